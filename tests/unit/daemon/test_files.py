import fcntl
import json
import math
import os
import signal
from pathlib import Path

import pytest

from ckptd.daemon.files import Files, numbers_of
from ckptd.protocol import codec
from ckptd.protocol import messages as m
from ckptd.protocol.errors import Busy, CkptdError
from ckptd.sdk.save import save
from ckptd.storage import facts
from tests.task_world import TASK, TaskWorld


def output_of(state: Path, task: int) -> Path:
    (state / "output").mkdir(exist_ok=True)
    return state / "output" / f"{task}.log"


def read(state: Path, **asked: int) -> m.OutputChunk:
    return Files(str(state)).output(m.Output(7, **asked), over=True)


def test_output_is_read_in_pieces_from_either_end(tmp_path: Path) -> None:
    output_of(tmp_path, 7).write_bytes(b"0123456789")
    assert read(tmp_path, limit=4).data == b"0123"
    assert read(tmp_path, offset=-3).data == b"789"
    assert read(tmp_path, offset=99).data == b""
    assert not read(tmp_path, limit=4).done
    assert read(tmp_path).done


def test_output_that_is_not_there_yet_is_empty(tmp_path: Path) -> None:
    output_of(tmp_path, 1)
    assert read(tmp_path).data == b""


@pytest.mark.parametrize("kind", ["fifo", "link", "directory"])
def test_whatever_a_task_puts_in_place_of_its_output_is_refused_at_once(
    tmp_path: Path, kind: str
) -> None:
    path = output_of(tmp_path, 7)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/etc/passwd")
    else:
        path.mkdir()
    with pytest.raises(CkptdError):
        read(tmp_path)


def test_a_lease_on_the_output_does_not_hold_the_daemon_up(tmp_path: Path) -> None:
    path = output_of(tmp_path, 7)
    path.write_bytes(b"x")
    ready, go = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:  # the task: holds a write lease and ignores the kernel's request to give it up
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        fd = os.open(path, os.O_RDWR)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        os.write(ready[1], b"r")
        os.read(go[0], 1)
        os._exit(0)
    assert os.read(ready[0], 1) == b"r"
    try:
        with pytest.raises(Busy):
            read(tmp_path)
    finally:
        os.write(go[1], b"g")
        assert os.waitpid(pid, 0)[1] == 0
        for fd in (*ready, *go):
            os.close(fd)


# --- checkpoints ---------------------------------------------------------------------------------


def listed(world: TaskWorld, *, result: bool = False) -> m.CheckpointList:
    files = Files(str(Path(world.dir).parent.parent))
    answer = files.checkpoints(TASK, world.uid, verify=False, result=result)
    reply = codec.decode_reply(codec.encode_reply("a", codec.encode_answer(answer)))
    return codec.decode_result(reply, m.CheckpointList)


def test_how_saving_went_comes_with_each_checkpoint(tmp_path: Path) -> None:
    world = TaskWorld(tmp_path)
    save(world.dir, [], {"attempt": 1, "state": 1})
    save(world.dir, [], {"attempt": 1, "numbers": {"strategy": "automatic", "saves": 12}})

    assert [row.numbers for row in listed(world).checkpoints] == [
        {"strategy": "automatic", "saves": 12.0},
        {},
    ]


HOSTILE = [
    ("no object", [1, 2], {}),
    ("no numbers", {"a": None, "b": [1], "c": {"d": 1}, "e": 1.5}, {"e": 1.5}),
    ("not finite", {"a": float("nan"), "b": float("inf"), "c": 10**400, "d": 0}, {"d": 0.0}),
    ("half a pair", {"\ud800": "\udfff"}, {"?": "?"}),
    ("long", {"n" * 999: "x" * 999}, {"n" * 64: "x" * 64}),
]


@pytest.mark.parametrize(("said", "kept"), [row[1:] for row in HOSTILE], ids=lambda _: "")
def test_numbers_of_a_hostile_manifest_are_bounded(
    tmp_path: Path, said: object, kept: dict[str, float | str]
) -> None:
    world = TaskWorld(tmp_path)
    save(world.dir, [], {"attempt": 1, "numbers": said})

    (row,) = listed(world).checkpoints
    assert row.valid
    assert row.numbers == kept


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"done": 3, "total": 10}, (3.0, 10.0)),
        ({"done": 3, "total": None}, (3.0, 0.0)),
        (None, None),
        ([3, 10], None),
        ({"done": "much"}, None),
        ({"done": 10**400, "total": 10}, None),
        ({"done": math.inf, "total": 10}, None),
        ({"done": 3, "total": math.nan}, None),
    ],
)
def test_how_far_a_checkpoint_says_it_is_comes_with_it_and_what_is_no_number_does_not(
    tmp_path: Path, said: object, told: tuple[float, float] | None
) -> None:
    world = TaskWorld(tmp_path)
    save(world.dir, [], {"attempt": 1, "progress": said})

    (row,) = listed(world).checkpoints
    assert row.valid
    assert (row.progress and (row.progress.done, row.progress.total)) == told
    assert row.progress is None or row.progress.at_ns == row.at_ns


def test_at_most_a_few_numbers_are_passed_on() -> None:
    assert len(numbers_of({"numbers": {f"n{count}": count for count in range(10_000)}})) == 32


@pytest.mark.parametrize("value", [None, 0, {"rows": [1, "é"]}, "\ud800"])
def test_what_the_whole_task_came_to_is_read_from_its_journals_when_asked_for(
    tmp_path: Path, value: object
) -> None:
    world = TaskWorld(tmp_path)
    assert listed(world, result=True).result == ""
    world.record(facts.result_made("an earlier one"))
    world.begin()
    world.record(facts.result_made(value), facts.step_done("after"))

    assert listed(world).result == ""
    assert json.loads(listed(world, result=True).result) == value


def test_a_result_of_the_largest_size_fits_into_one_answer(tmp_path: Path) -> None:
    world = TaskWorld(tmp_path)
    world.record(facts.result_made('"\\é' * 100_000))

    assert len(listed(world, result=True).result) > 400_000


def test_a_damaged_journal_has_no_result(tmp_path: Path) -> None:
    world = TaskWorld(tmp_path)
    world.record(facts.result_made(7))
    world.record(facts.result_made(8))
    data = bytearray(world.journal_path().read_bytes())
    data[40] ^= 1
    world.journal_path().write_bytes(data)

    assert listed(world, result=True).result == ""
