"""How `whole_1.tar.xz` was made: `python -m tests.golden.make_whole_1 FILE`, once, at the release.

What a whole machine has on disk, left as a power cut leaves it, and what was said over the socket:

    state/              of a daemon: log, attempts with and without exit record, tasks, output
    batches/ scopes/    of a user: a batch with two runs, a shared rate
    export.tar          an exported checkpoint
    said.jsonl          request and reply of every verb that only looks, and of some that change

A later format gets a script and an archive of its own; this one stays, and is opened for ever.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

from ckptd.sdk.rate import Bucket
from tests.daemon_fixture import LiveDaemon
from tests.raw_client import RawClient
from tests.waiting import until

ENV = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
SAVES = 'echo 41 >"$CKPTD_DIR/stage/n"; mv "$CKPTD_DIR/stage" "$CKPTD_DIR/ckpt/1"'
RESUMES = (
    f'[ -n "$CKPTD_LAST" ] && echo "from $(cat "$CKPTD_LAST/n")" && exit 0; {SAVES}; sleep 999'
)
WAITS = 'while [ ! -e "$CKPTD_DIR/go" ]; do sleep 0.05; done; echo it went'
ONE: dict[str, Any] = {"select": {"ids": [1]}}
CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("signal", {**ONE, "signal": 10}), ("pause", ONE), ("resume", ONE), ("hold", ONE),
    ("edit", {**ONE, "priority": 3}), ("cancel", {"select": {"ids": [4]}, "grace_s": 1.0}),
    ("retry", {"select": {"ids": [4]}}), ("hold", {"select": {"ids": [4]}}),
    ("clean", {**ONE, "dry_run": True}), ("group_set", {"name": "gpu", "parallel": 2}),
]  # fmt: skip
LOOKS: list[tuple[str, dict[str, Any]]] = [
    ("groups", {}), ("status", {"limit": 3, "newest": True}), ("show", {**ONE, "env": True}),
    ("wait", {**ONE, "goal": "done"}), ("events", {"since": 0, "limit": 1000}),
    ("output", {"task": 1}), ("checkpoints", {"task": 6, "verify": True, "result": True}),
    ("stats", {}), ("ping", {}), ("daemon", {}), ("config", {}), ("reload", {}),
]  # fmt: skip


def talk(client: RawClient, verb: str, args: dict[str, Any]) -> dict[str, Any]:
    """Return request and reply of one verb."""
    request = client.send(verb, args)
    reply = client.receive(request, 30.0)
    assert reply is not None, verb
    return {"request": {"v": 1, "id": request, "verb": verb, "args": args}, "reply": reply}


def shell(script: str, **fields: Any) -> dict[str, Any]:
    """Return a task of one line."""
    return {"argv": ["sh", "-c", script], "cwd": "/", **fields}


def leave_state(daemon: LiveDaemon) -> list[dict[str, Any]]:
    """Have tasks of every kind, then cut the power while two of them run."""
    tasks = [
        shell("echo hello", name="done", key="k", labels={"a": "b"}),
        shell(RESUMES, name="resumed"), shell("exit 3", name="failed"),
        shell("true", name="held", hold=True), shell(WAITS, name="ends unseen"),
        shell(SAVES, name="saved"),
    ]  # fmt: skip
    with RawClient(daemon.endpoint) as client:
        client.ask("group_set", {"name": "default", "parallel": 6})
        said = [talk(client, "submit", {"tasks": tasks, "env": ENV})]
        over = {"select": {"ids": [1, 3, 6]}, "hold_s": 20.0}
        assert client.ask("wait", over)["met"]
        assert client.ask("wait", {"select": {"ids": [2]}, "goal": "checkpoint"})["met"]
        said += [talk(client, verb, args) for verb, args in CHANGES + LOOKS]
    daemon.ctl("checkpoint", "export", "6", str(daemon.root / "export.tar"))
    daemon.kill9()
    (daemon.state / "tasks" / "5" / "go").touch()
    record = daemon.state / "attempts" / "5.1"
    until(lambda: b'"cause":"exit"' in record.read_bytes(), 10.0)
    return said


def leave_batch(root: Path) -> None:
    """Run a batch twice: the second time with more items, and one that failed again."""
    for count in (4, 6):
        items = "".join(f"{number}\n" for number in range(1, count + 1))
        words = ("batch", "run", "--name", "halves", "-j", "2", "--", "sh", "-c",
                 'test "$1" != 3 && echo "half of $1"', "_", "{}")  # fmt: skip
        subprocess.run(
            (sys.executable, "-m", "ckptctl", *words), cwd="/", input=items.encode(), check=False,
            env={**ENV, "PYTHONPATH": os.getcwd(), "HOME": "/",
                 "CKPTD_BATCH_DIR": str(root / "batches")},
        )  # fmt: skip
    Bucket("api", str(root / "scopes")).take(0.5, burst=2.0)


def main(target: str) -> None:
    """Make the archive."""
    daemon = LiveDaemon()
    daemon.start()
    said = leave_state(daemon)
    leave_batch(daemon.root)
    (daemon.root / "said.jsonl").write_text("".join(json.dumps(one) + "\n" for one in said))
    kept = daemon.root / "kept"
    kept.mkdir()
    names = ("state", "batches", "scopes", "export.tar", "said.jsonl")
    subprocess.run(
        ("cp", "-a", *(str(daemon.root / name) for name in names), str(kept)), check=True
    )
    with tarfile.open(target, "w:xz") as archive:
        archive.add(kept, arcname=".")
    shutil.rmtree(kept)
    daemon.close()


if __name__ == "__main__":
    main(sys.argv[1])
