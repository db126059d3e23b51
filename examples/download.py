"""A download that goes on after any kind of death, and never mixes two versions of a file.

    ckptctl submit --python examples/download.py:download \
        --input '{"url": "https://example.org/big.iso", "to": "big.iso"}'
    python examples/download.py https://example.org/big.iso big.iso [SHA256]     # without a daemon

The bytes go to big.iso.part. Every half second they are synced, and a checkpoint says how many they
are and which version of the file they belong to: its ETag. A resumed run cuts off what came after
the checkpoint and asks for the rest with Range and If-Range: a server whose file is another one by
now sends the whole of it, and the download starts over instead of mixing the two.
"""

import hashlib
import http.client
import os
import sys
import urllib.error
import urllib.request
from typing import Any

from ckptd.sdk import (
    PermanentError,
    RateLimited,
    SyncResumableContext,
    Time,
    TransientError,
    run_local,
    task,
)

CHUNK_BYTES = 1 << 17
SILENCE_S = 30.0


@task(strategy=Time(0.5))
def download(ctx: SyncResumableContext, url: str, to: str, sha256: str = "") -> dict[str, Any]:
    """Fetch `url` into the file `to`; return its digest and size."""
    part = f"{to}.part"
    size = ctx.step("fetch", fetch, ctx, url, part)
    digest = ctx.step("digest", digest_of, part)
    if sha256 and digest != sha256:
        raise PermanentError(f"{part} has the digest {digest}, not {sha256}: fetch it --fresh")
    ctx.step("move", move, part, to)
    return {"sha256": digest, "bytes": size}


def fetch(ctx: SyncResumableContext, url: str, part: str) -> int:
    """Fetch what is missing of the part; return the size of the whole."""
    state = ctx.state  # {"bytes": so many are synced, "etag": of this version}
    with open(part, "ab", buffering=0) as file:
        start = min(state.get("bytes", 0), file.tell()) if state.get("etag") else 0
        start = max(0, start - 1)  # so that there is always something left to send
        with asked(url, start, state.get("etag")) as answer:
            if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
                start = 0  # the whole: it is the first time, or the file is another one by now
            elif strong_etag(answer) != state["etag"]:
                state.clear()
                ctx.checkpoint("the file changed")
                raise TransientError(f"{url} changed, and its server ignores If-Range")
            file.truncate(start)
            state.update(bytes=start, etag=strong_etag(answer))

            def synced() -> None:  # what a checkpoint says of the part is true before it says it
                if not file.closed:
                    os.fsync(file.fileno())
                    state["bytes"] = os.path.getsize(part)

            ctx.on_checkpoint(synced)
            return copy(ctx, answer, file, start)


def copy(ctx: SyncResumableContext, answer: Any, file: Any, start: int) -> int:
    """Copy to the end, with a safe point after every chunk."""
    done, length = start, answer.headers["Content-Length"]
    total = start + int(length) if length else None
    try:
        while chunk := answer.read(CHUNK_BYTES):
            file.write(chunk)
            done += len(chunk)
            ctx.set_progress(done, total, "bytes")
            ctx.checkpoint_if_needed()
    except (ConnectionError, TimeoutError, http.client.HTTPException) as error:
        raise TransientError(f"{error!r} after {done} bytes") from error
    if total not in {None, done}:
        raise TransientError(f"the connection ended after {done} of {total} bytes")
    return done


def asked(url: str, start: int, etag: str | None) -> Any:
    """Return the server's answer, or say what its refusal means."""
    headers = {"Range": f"bytes={start}-", "If-Range": str(etag)} if start else {}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - the user's own URL
    try:
        return urllib.request.urlopen(request, timeout=SILENCE_S)  # noqa: S310
    except urllib.error.HTTPError as error:
        if error.code in {429, 503}:
            after = error.headers.get("Retry-After", "60")
            raise RateLimited(f"{url}: {error}", retry_after=after) from error
        kind = TransientError if error.code >= 500 else PermanentError
        raise kind(f"{url}: {error}") from error
    except OSError as error:  # no network, no such host, refused
        raise TransientError(f"{url}: {error}") from error


def strong_etag(answer: Any) -> str | None:
    """Return the ETag; None for a weak one, with which a server does not promise equal bytes."""
    etag = answer.headers["ETag"]
    return etag if etag and not etag.startswith("W/") else None


def digest_of(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def move(part: str, to: str) -> None:
    if os.path.exists(part):  # else it was moved, and the crash came before that was recorded
        os.replace(part, to)


if __name__ == "__main__":
    url, to, *sha256 = sys.argv[1:]
    print(run_local(download, f"{to}.task", url=url, to=to, sha256="".join(sha256)))
