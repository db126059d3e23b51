"""What an older version left is opened, written to, and opened again; what a newer one left is not.

A refusal says that a newer version is wanted, and changes no byte of what it refuses.
"""

import json
import os
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import msgspec
import pytest

from ckptd.core.records import Moved, Phase
from ckptd.protocol import codec
from ckptd.protocol import messages as m
from ckptd.sdk.rate import Bucket
from ckptd.storage.journal import Journal
from ckptd.storage.store import Store
from tests.daemon_fixture import LiveDaemon, StartDaemon
from tests.raw_client import RawClient, RefusedError
from tests.waiting import until

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
WHOLE = GOLDEN / "whole_1.tar.xz"
NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="the tasks in it are root's")
ENDS = {
    1: "succeeded", 2: "succeeded", 3: "failed", 4: "succeeded", 5: "succeeded", 6: "succeeded",
}  # fmt: skip


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """The golden machine, unpacked."""
    with tarfile.open(WHOLE) as archive:
        archive.extractall(tmp_path, filter="tar")
    return tmp_path


def phases(daemon: LiveDaemon) -> dict[int, str]:
    with RawClient(daemon.endpoint) as client:
        return {row["id"]: row["phase"] for row in client.rows()}


# --- older ------------------------------------------------------------------------------------


@NEEDS_ROOT
def test_a_state_directory_of_format_1_is_opened_gone_on_with_and_opened_again(
    start_daemon: StartDaemon, whole: Path
) -> None:
    daemon = start_daemon(state_dir=whole / "state")
    until(lambda: phases(daemon) == ENDS, 30.0)
    resumed, unseen = daemon.row(2), daemon.row(5)
    assert (resumed["attempt"], resumed["failures"]) == (2, 0)
    assert (unseen["attempt"], unseen["cause"], unseen["code"]) == (1, "exit", 0)
    assert "from 41" in (whole / "state/output/2.log").read_text()
    daemon.ctl("checkpoint", "verify", "6")

    new = daemon.submit("true")
    assert new == 7
    daemon.ctl("wait", "7")
    daemon.restart()

    assert phases(daemon) == {**ENDS, 7: "succeeded"}
    daemon.ctl("checkpoint", "import", "4", str(whole / "export.tar"))
    daemon.ctl("checkpoint", "verify", "4")


@NEEDS_ROOT
def test_a_batch_of_format_1_keeps_its_results_and_goes_on(whole: Path) -> None:
    script = 'test "$1" != 3 && echo "half of $1"'
    words = ("batch", "run", "--name", "halves", "--", "sh", "-c", script, "_", "{}")
    _ctl(whole, *words, stdin="".join(f"{number}\n" for number in range(1, 9)), cwd="/")
    document = json.loads(_ctl(whole, "batch", "items", "halves", "-o", "json").stdout)
    found = {one["key"]: (one["status"], one["result"]) for one in document["items"]}
    assert found == {
        str(number): ("fail", found["3"][1]) if number == 3 else ("pass", f"half of {number}")
        for number in range(1, 9)
    }
    assert (whole / "batches/halves/journal/000003.j").exists()


def _ctl(
    whole: Path, *words: str, stdin: str = "", cwd: str = "."
) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "CKPTD_BATCH_DIR": str(whole / "batches"), "PYTHONPATH": os.getcwd()}
    command = (sys.executable, "-m", "ckptctl", *words)
    return subprocess.run(
        command, input=stdin, cwd=cwd, env=env, check=False, capture_output=True, text=True
    )


def test_a_shared_rate_of_format_1_is_still_kept(whole: Path) -> None:
    before = (whole / "scopes/api").read_bytes()
    bucket = Bucket("api", str(whole / "scopes"))
    assert bucket.take(0.5, burst=2.0) == 0
    assert not bucket.warning
    assert len(before) == len((whole / "scopes/api").read_bytes())


def said() -> Iterator[dict[str, Any]]:
    with tarfile.open(WHOLE) as archive:
        member = archive.extractfile("./said.jsonl")
        assert member is not None
        yield from map(json.loads, member.read().splitlines())


@pytest.mark.parametrize("one", list(said()), ids=lambda one: one["request"]["verb"])
def test_what_was_said_in_protocol_1_is_still_understood(one: dict[str, Any]) -> None:
    request = codec.decode_request(json.dumps(one["request"]).encode())
    codec.decode_args(request)
    gives = m.VERBS[request.verb][1]
    reply = codec.decode_reply(json.dumps(one["reply"]).encode())
    known = msgspec.to_builtins(codec.decode_result(reply, gives))
    assert one["reply"]["result"].keys() <= known.keys()


# --- newer ------------------------------------------------------------------------------------


def tree(root: Path) -> dict[str, bytes]:
    """Return all there is; LOCK may come and go."""
    files = (path for path in root.rglob("*") if path.is_file() and path.name != "LOCK")
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def raise_format_file(state: Path) -> None:
    text = (state / "FORMAT").read_bytes().replace(b":1,", b":2,")
    body = text.partition(b',"crc32"')[0]
    (state / "FORMAT").write_bytes(body + b',"crc32":"%08x"}\n' % crc32(body))


def raise_header(path: Path) -> None:
    """Write format and min_reader 2 into a header block, with the CRC that goes with it."""
    data = bytearray(path.read_bytes())
    struct.pack_into("<II", data, 8, 2, 2)
    struct.pack_into("<I", data, 4092, crc32(data[:4092]))
    path.write_bytes(data)


def raise_segments(state: Path) -> None:
    raise_header(max(state.glob("wal/*.wal")))


def raise_snapshot(state: Path) -> None:
    raise_header(max(state.glob("snap/*.snap")))


def copy_of_format_1(tmp_path: Path) -> Path:
    state = tmp_path / "state"
    for name, data in tree(GOLDEN / "format_1").items():
        (state / name).parent.mkdir(parents=True, exist_ok=True)
        (state / name).write_bytes(data)
    for name in ("quarantine", "snap", "wal"):
        (state / name).mkdir(exist_ok=True)
    return state


@pytest.mark.parametrize("raised", [raise_format_file, raise_segments, raise_snapshot])
@pytest.mark.parametrize("what", ["daemon", "verify", "repair", "salvage"])
def test_a_newer_state_directory_is_refused_and_no_byte_of_it_changes(
    tmp_path: Path, raised: Callable[[Path], None], what: str
) -> None:
    state = copy_of_format_1(tmp_path)
    raised(state)
    before = tree(state)
    config = tmp_path / "c.toml"
    config.write_text(f'[daemon]\nstate_dir = "{state}"\nrun_dir = "{tmp_path}/run"\n')
    command = {
        "daemon": ("ckptd", "--config", str(config)),
        "verify": ("ckptctl", "wal", "verify", "--state", str(state)),
        "repair": ("ckptctl", "wal", "repair", "--state", str(state), "--truncate-after", "40"),
        "salvage": ("ckptctl", "wal", "salvage", "--state", str(state)),
    }[what]
    done = subprocess.run(
        (sys.executable, "-m", *command), check=False, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "newer" in done.stdout + done.stderr, done.stdout + done.stderr
    assert tree(state) == before


def add_a_later_snapshot(store: Store) -> None:
    """Write a snapshot that checks, of chunks that only a later version knows."""
    wal = store.arm(store.recover(), epoch=9, boot_id="b", at_ns=1)
    snapshot = store.begin_snapshot(wal.durable_lsn)
    snapshot.add(msgspec.msgpack.encode(["Planets", 1]))
    snapshot.finish()
    assert until(snapshot.poll)


def add_a_record_of_nobody(store: Store) -> None:
    wal = store.arm(store.recover(), epoch=9, boot_id="b", at_ns=1)
    wal.append(msgspec.msgpack.encode([Moved(777, 1, Phase.HELD, "who?")]), 1)
    wal.sync()
    wal.mark_idle()


@pytest.mark.parametrize(
    ("add", "words"),
    [
        (add_a_later_snapshot, "the newest snapshot checks but cannot be read"),
        (add_a_record_of_nobody, "checks but makes no sense: Moved"),
    ],
)
def test_what_checks_and_says_nothing_that_we_know_is_refused_by_all_alike(
    tmp_path: Path, add: Callable[[Store], None], words: str
) -> None:
    state = tmp_path / "state"
    store = Store.open(str(state))
    add(store)
    store.close()
    before = tree(state)
    config = tmp_path / "c.toml"
    config.write_text(f'[daemon]\nstate_dir = "{state}"\nrun_dir = "{tmp_path}/run"\n')
    for command, code in {
        ("ckptd", "--config", str(config)): 65,
        ("ckptctl", "wal", "verify", "--state", str(state)): 65,
        ("ckptctl", "wal", "replay", "--state", str(state)): 65,
        ("ckptctl", "doctor", "--config", str(config)): 1,
    }.items():
        done = subprocess.run(
            (sys.executable, "-m", *command), check=False, capture_output=True, text=True
        )
        told = done.stdout + done.stderr
        assert done.returncode == code, told
        assert words in " ".join(told.split())
        assert "Traceback" not in told
    assert tree(state) == before


@NEEDS_ROOT
def test_a_newer_journal_and_a_newer_manifest_block_their_task_and_stay_as_they_are(
    start_daemon: StartDaemon, whole: Path
) -> None:
    state = whole / "state"
    manifest = state / "tasks/2/ckpt/1/MANIFEST.json"
    newer = json.dumps({**json.loads(manifest.read_text()), "format": 2})
    manifest.write_text(newer)
    daemon = start_daemon(state_dir=state)
    until(lambda: daemon.row(2)["phase"] == "blocked", 30.0)
    assert manifest.read_text() == newer
    assert "newer" in daemon.ctl("explain", "2").stdout
    task = daemon.submit("sh", "-c", "sleep 999")
    until(lambda: daemon.row(task)["phase"] == "running", 20.0)
    directory = str(state / "tasks" / str(task))
    journal = Journal(directory, task, 1, 0)
    journal.append([{"op": "open", "format": 2, "task": task, "attempt": 1}])
    journal.close()
    before = tree(Path(directory) / "journal")
    daemon.ctl("signal", "KILL", str(task))
    until(lambda: daemon.row(task)["phase"] == "blocked", 30.0)
    assert "newer" in daemon.ctl("explain", str(task)).stdout
    assert tree(Path(directory) / "journal") == before


def test_a_newer_batch_is_refused_and_no_byte_of_it_changes(whole: Path) -> None:
    file = whole / "batches/halves/batch.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 2}))
    before = tree(whole / "batches")
    assert "newer" in _ctl(whole, "batch", "status", "halves").stdout
    for words in (("retry", "halves", "--here"), ("export", "halves"), ("items", "halves")):
        done = _ctl(whole, "batch", *words)
        assert done.returncode == 65, done.stderr
        assert "newer" in done.stderr
    assert tree(whole / "batches") == before


def test_a_newer_protocol_is_refused_by_name(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    with RawClient(daemon.endpoint) as client:
        client.socket.send(json.dumps({"v": 2, "id": "x", "verb": "ping", "args": {}}).encode())
        reply = client.receive("x", 10.0)
        assert reply is not None
        assert reply["error"]["code"] == "protocol_mismatch"
        with pytest.raises(RefusedError, match="bad_request"):
            client.ask("ping", {"of_a_newer_client": True})
