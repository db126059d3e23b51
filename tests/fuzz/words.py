"""Targets of what people and tasks say: configuration, quantities, datagrams, the pipe's lines.

Oracle: understood, then bounded and the same after a round trip; or refused by our own error.
"""

import contextlib
import json
import math
import os
import tempfile
from pathlib import Path

from ckptctl import units
from ckptd.host import config
from ckptd.protocol.errors import BadConfig, BadRequest
from ckptd.runner.notify import Said
from ckptd.sdk.outcomes import NotJson
from ckptd.sdk.pipe import Pipe
from ckptd.sdk.surroundings import Surroundings
from ckptd.sdk.values import decode, encode
from ckptd.storage import blobs
from tests.fuzz.target import SLOW, Target

ROOT = Path(__file__).resolve().parents[2]
_SHM = "/dev/shm" if os.path.isdir("/dev/shm") else None


def run_config(data: bytes) -> None:
    """Load a configuration; what is taken says the same when it is written out."""
    with tempfile.NamedTemporaryFile(dir=_SHM, suffix=".toml") as file:
        file.write(data)
        file.flush()
        try:
            found = config.load(file.name)
        except BadConfig as refused:
            if file.name not in refused.message:
                raise
            return
        file.truncate(0)
        file.seek(0)
        file.write(config.as_toml(found).encode())
        file.flush()
        assert config.load(file.name) == found, "a configuration survives being written out"


def config_seeds() -> list[bytes]:
    """Return the configuration that is installed, whole and table by table."""
    text = (ROOT / "etc" / "ckptd.toml").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    whole = "\n".join(lines)
    return [whole.encode(), *(f"[{table}".encode() for table in whole.split("\n[")[1:])]


_PARSERS = (
    units.parse_duration, units.parse_time, units.parse_moment, units.parse_size,
    units.parse_number,
)  # fmt: skip


def run_quantities(data: bytes) -> None:
    """Read a text as every kind of quantity; a number that is none is refused."""
    text = data.decode("utf-8", "surrogateescape")
    for parse in _PARSERS:
        with contextlib.suppress(BadRequest):
            assert math.isfinite(parse(text)), f"{parse.__name__} gave no number"


def quantity_seeds() -> list[bytes]:
    """Return quantities of every kind."""
    return b"90s|1h30m|250ms|512M|1.5GiB|18:00|+3h|2026-11-20T18:00|2026-11-20T17:00Z|3|1.5".split(
        b"|"
    )


def run_notify(data: bytes) -> None:
    """Hear datagrams of a task, one after another: nothing is raised, all is bounded."""
    said = Said()
    for datagram in data.split(b"\0"):
        said.hear(datagram)
    seen = said.told(1, 1, 5)
    for number in (seen.done, seen.total, seen.extend_s):
        assert 0 <= number <= 1e15, "a number out of range"
    assert len(seen.text) <= 200, "a text without bound"
    assert seen.text.isprintable(), "a text that moves the cursor"


def notify_seeds() -> list[bytes]:
    """Return what tasks say."""
    return [b"PROGRESS=3/10\nSTATUS=half\0EXTEND_TIMEOUT_USEC=5000000\nWATCHDOG=1", b"PROGRESS=50%",
            b"CHECKPOINT=1"]  # fmt: skip


def run_values(data: bytes) -> None:
    """Store a value; what can be stored comes back."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(data)
        with contextlib.suppress(NotJson):
            assert decode(json.loads(json.dumps(encode(value, "it")))) == value


def value_seeds() -> list[bytes]:
    """Return values of every JSON type."""
    return [b'{"a":[1,2.5,null,true,"x"],"b":{"c":{}}}', b'{"$bytes":"AAA="}', b"[[[[]]]]"]


def run_pipe(data: bytes) -> None:
    """Hold a conversation by the line protocol: one answer for each line that asks something."""
    data = b"\n".join(line for line in data.split(b"\n") if not _names_files(line))
    with tempfile.TemporaryDirectory(dir=_SHM, prefix="ck-fuzz-") as folder:
        place = f"{folder}/12"
        blobs.prepare(place, 1, os.getuid(), os.getgid(), fresh=False)
        source = Path(folder, "in")
        source.write_bytes(data + b"\n")
        sink = Path(folder, "out")
        with source.open("rb") as lines, sink.open("wb") as said:
            pipe = Pipe(_around(place))
            pipe.run(lines.fileno(), said.fileno())
            pipe.journal.close()
        answers = [json.loads(line) for line in sink.read_bytes().splitlines()]
        asked = [line for line in data.split(b"\n") if line.strip()]
        assert len(answers) == len(asked), f"{len(answers)} answers to {len(asked)} lines"
        for answer in answers:
            assert answer["ok"] or (answer["error"]["code"] and answer["error"]["message"])
        again = Pipe(_around(place))  # what was told as recorded can be read
        again.journal.close()


def _names_files(line: bytes) -> bool:
    """Tell whether a line asks for files to be saved: a path may name all of this machine."""
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(request, dict) and "files" in request


def _around(place: str) -> Surroundings:
    return Surroundings({"CKPTD_DIR": place, "CKPTD_TASK_ID": "12", "CKPTD_ATTEMPT": "1"})


def pipe_seeds() -> list[bytes]:
    """Return conversations with every op."""
    lines = [
        b'{"op":"hello","id":1}', b'{"op":"step_start","name":"a"}',
        b'{"op":"step_done","name":"a","result":{"x":1}}', b'{"op":"step_query","name":"a"}',
        b'{"op":"set","key":"k","value":[1]}', b'{"op":"get","key":"k"}',
        b'{"op":"delete","key":"k"}', b'{"op":"item","key":"i","status":"pass","result":1}',
        b'{"op":"items_done","keys":["i"],"results":true}',
        b'{"op":"checkpoint","state":{"n":1},"progress":[1,2]}',
        b'{"op":"progress","done":1,"total":2,"durable":true}',
        b'{"op":"retry_after","seconds":5}', b'{"op":"should_stop"}', b'{"op":"dance"}',
    ]  # fmt: skip
    return [b"\n".join(lines), *lines]


TARGETS = (
    Target("config", run_config, config_seeds),
    Target("quantities", run_quantities, quantity_seeds, 64),
    Target("notify", run_notify, notify_seeds),
    Target("values", run_values, value_seeds),
    Target("pipe", run_pipe, pipe_seeds, weight=SLOW),
)
