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

from ckptd import sdk


@sdk.task(strategy=sdk.Time(0.5))
def download(ctx: sdk.SyncResumableContext, url: str, to: str, sha256: str = "") -> dict[str, Any]:
    """Fetch `url` into the file `to`; return its digest and size."""
    part = f"{to}.part"
    size = ctx.step("fetch", fetch, ctx, url, part)
    digest = ctx.step("digest", digest_of, part)
    if sha256 and digest != sha256:
        raise sdk.PermanentError(f"{part} has the digest {digest}, not {sha256}: fetch it --fresh")
    if os.path.exists(part):  # else it was moved, and the crash came before the result was stored
        os.replace(part, to)
    return {"sha256": digest, "bytes": size}


def fetch(ctx: sdk.SyncResumableContext, url: str, part: str) -> int:
    """Fetch what is missing of the part; return the size of the whole."""
    state = ctx.state  # {"bytes": so many are synced, "etag": of this version}
    with open(part, "ab", buffering=0) as file:
        start = min(state.get("bytes", 0), file.tell()) if state.get("etag") else 0
        start = max(0, start - 1)  # so that there is always something left to send
        with asked(url, start, state.get("etag")) as answer:
            etag = answer.headers["ETag"] or "W/"  # weak: the server does not promise equal bytes
            if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
                start = 0  # the whole: it is the first time, or the file is another one by now
            elif etag != state["etag"]:
                state.clear()
                ctx.checkpoint("the file changed")
                raise sdk.TransientError(f"{url} changed, and its server ignores If-Range")
            file.truncate(start)
            state.update(bytes=start, etag=None if etag.startswith("W/") else etag)

            @ctx.on_checkpoint
            def _() -> None:  # what a checkpoint says of the part is true before it says it
                if not file.closed:
                    os.fsync(file.fileno())
                    state["bytes"] = os.path.getsize(part)

            return copy(ctx, answer, file, start)


def copy(ctx: sdk.SyncResumableContext, answer: Any, file: Any, start: int) -> int:
    """Copy to the end, with a safe point after every chunk."""
    done, length = start, answer.headers["Content-Length"]
    total = start + int(length) if length else None
    try:
        while chunk := answer.read(1 << 17):
            file.write(chunk)
            done += len(chunk)
            ctx.set_progress(done, total, "bytes")
            ctx.checkpoint_if_needed()
    except (ConnectionError, TimeoutError, http.client.HTTPException) as error:
        raise sdk.TransientError(f"{error!r} after {done} bytes") from error
    if total not in {None, done}:
        raise sdk.TransientError(f"the connection ended after {done} of {total} bytes")
    return done


def asked(url: str, start: int, etag: str | None) -> Any:
    """Return the server's answer, or say what its refusal means."""
    headers = {"Range": f"bytes={start}-", "If-Range": str(etag)} if start else {}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - the user's own URL
    try:
        return urllib.request.urlopen(request, timeout=30)  # noqa: S310
    except urllib.error.HTTPError as error:
        if error.code in {429, 503}:
            after = error.headers.get("Retry-After", "60")
            raise sdk.RateLimited(f"{url}: {error}", retry_after=after) from error
        kind = sdk.TransientError if error.code >= 500 else sdk.PermanentError
        raise kind(f"{url}: {error}") from error
    except OSError as error:  # no network, no such host, refused
        raise sdk.TransientError(f"{url}: {error}") from error


def digest_of(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: download.py URL FILE [SHA256]")
    url, to, *sha256 = sys.argv[1:]
    print(sdk.run_local(download, f"{to}.task", url=url, to=to, sha256="".join(sha256)))
