"""Damage that a review found in what tasks save, one test each; the name says what was lost."""

import contextlib
import errno
import itertools
import json
import os
import resource
import subprocess
from collections.abc import Callable, ItemsView, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from ckptd.core.retry import SPAWN_TRANSIENT
from ckptd.runner.files import TaskFiles
from ckptd.sdk.save import save
from ckptd.storage import blobs, facts, journal
from ckptd.storage.copy import copy_out
from ckptd.storage.frame import NOTE
from ckptd.storage.journal import JournalDamaged, StaleAttempt, TooLarge
from ckptd.storage.manifest import EMPTY, digest_of
from ckptd.storage.spent import delete_spent
from ckptd.storage.taskdir import fence
from ckptd.storage.untrusted import JSON_DEPTH_MAX, NotTrusted
from tests.task_world import TASK, TaskWorld

NAME_BYTES_MAX = 255


@pytest.fixture
def world(tmp_path: Path) -> TaskWorld:
    return TaskWorld(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    order = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    if subprocess.run(order, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a tmpfs")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@contextlib.contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """Let only so many more files be opened, whatever gaps there are among the open ones."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_open = os.path.lexists
    free = (number for number in itertools.count() if not is_open(f"/proc/self/fd/{number}"))
    limit = next(itertools.islice(free, count, None))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def make_hole(path: Path, size: int) -> None:
    """Make a file that is one long hole."""
    with path.open("wb") as file:
        file.truncate(size)


# --- what cannot be sealed, and who is to blame --------------------------------------------------


def test_a_checkpoint_that_cannot_be_sealed_is_no_silent_fresh_start(world: TaskWorld) -> None:
    world.path("stage", "latest").symlink_to("state")
    world.publish(1, state="hours of work")
    world.begin()

    for _ in range(2):
        found = world.newest()
        assert found.seq == 0
        assert "checkpoint 1 cannot be sealed: latest" in found.problem
    assert sorted(os.listdir(world.path("ckpt", "1"))) == ["latest", "state"]

    world.begin(fresh=True)
    assert world.newest() == blobs.Found()


def test_the_number_after_the_one_resumed_from_is_free_so_that_mv_does_not_nest(
    world: TaskWorld,
) -> None:
    world.publish(1, state="good")
    world.seal()
    world.path("stage", "latest").symlink_to("state")
    world.publish(2, state="cannot be sealed")
    world.publish(3, state="damaged")
    world.seal()
    world.path("ckpt", "3", "state").write_text("changed")
    world.begin()

    found = world.newest()

    assert found.seq == 1
    assert "kept as 2.unsealed" in found.warning
    assert "kept as 3.damaged" in found.warning
    numbers = [int(name) for name in os.listdir(world.path("ckpt")) if name.isdigit()]
    assert max(numbers) == found.seq
    published = world.publish(found.seq + 1, state="new")
    assert os.listdir(published) == ["state"]
    world.begin()
    assert world.newest().seq == 2


def test_a_full_disk_at_the_seal_is_waited_out_and_costs_no_checkpoint(small_disk: Path) -> None:
    world = TaskWorld(small_disk)
    world.publish(1, state="hours of work")
    files = TaskFiles(str(small_disk), world.boot_id)
    with contextlib.suppress(OSError), (small_disk / "fat").open("wb", buffering=0) as fat:
        while fat.write(bytes(4096)):  # Bound: the disk is small
            pass

    assert files.mark(TASK, 1, world.uid) == blobs.Mark()
    found = files.checkpoint_to_resume(TASK, world.uid)
    assert found.passing is not None
    assert found.passing.errno == errno.ENOSPC
    assert not found.problem

    (small_disk / "fat").unlink()
    assert files.checkpoint_to_resume(TASK, world.uid).seq == 1


@pytest.mark.parametrize("name", ["EIO", "ENOMEM", "ENFILE", "EMFILE", "ENOSPC", "EDQUOT"])
def test_no_trouble_of_the_machine_at_the_seal_is_a_verdict_on_the_checkpoint(
    world: TaskWorld, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    number = getattr(errno, name)

    def refused(_: int) -> None:
        raise OSError(number, os.strerror(number))

    world.publish(1, state="hours of work")
    with monkeypatch.context() as sick:
        sick.setattr(os, "fsync", refused)
        with pytest.raises(OSError, match=os.strerror(number)):
            world.newest()
    assert (world.newest().seq, world.newest().warning) == (1, "")


def test_a_disk_that_does_not_give_the_names_is_told_where_checkpoints_are_listed(
    world: TaskWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    world.publish(1, a="x")
    monkeypatch.setattr(os, "scandir", refused)
    (found,) = blobs.generations(world.dir, world.uid, verify=False)
    assert (found.seq, found.valid) == (0, False)
    assert os.strerror(errno.EIO) in found.fault


@pytest.mark.parametrize("is_sealed", [True, False])
def test_a_daemon_without_descriptors_neither_blocks_a_task_nor_forgets_what_it_saved(
    world: TaskWorld, *, is_sealed: bool
) -> None:
    deep = world.path("stage", "a", "b")
    deep.mkdir(parents=True)
    (deep / "c").write_text("x")
    world.publish(1)
    world.record(facts.step_done("s"))
    if is_sealed:
        world.seal()
    files = TaskFiles(str(Path(world.dir).parent.parent), world.boot_id)

    def is_enough() -> bool:
        mark, found = files.mark(TASK, 1, world.uid), files.checkpoint_to_resume(TASK, world.uid)
        assert (mark.problem, found.problem, found.warning) == ("", "", "")
        assert found.seq == 1 or (found.passing and found.passing.errno == errno.EMFILE)
        return found.seq == 1

    def outcome(count: int) -> bool:
        with descriptors_left(count):
            return is_enough()

    assert not outcome(0)
    assert any(outcome(count) for count in range(1, 12))
    assert files.mark(TASK, 1, world.uid).checkpoint == 1
    assert os.listdir(world.path("ckpt")) == ["1"], "nothing was set aside"


# --- sizes made to keep us busy ------------------------------------------------------------------


def test_a_file_that_is_one_hole_of_terabytes_is_not_read_to_its_end(world: TaskWorld) -> None:
    make_hole(world.path("stage", "x"), 15 << 40)
    world.publish(1)
    assert "mostly a hole" in world.seal()[0]

    entry = {"name": "x", "bytes": 15 << 40, "sha256": ""}
    forged = {**EMPTY, "format": 1, "seq": 1, "files": [entry]}
    text = json.dumps({**forged, "digest": digest_of(forged)})
    world.path("ckpt", "1", "MANIFEST.json").write_text(text)
    assert "mostly a hole" in world.newest().problem


def test_a_file_with_small_holes_is_sealed(world: TaskWorld) -> None:
    make_hole(world.path("stage", "x"), 16 << 20)
    world.publish(1)

    assert world.seal() == [""]


def test_a_tail_full_of_heads_that_promise_costs_no_minutes(world: TaskWorld) -> None:
    world.record(facts.step_done("a"))
    end_bytes = world.journal_path().stat().st_size
    head = bytearray(b"\x01" * 40)  # 16 MiB long, so that a bound of the size alone refuses it
    head[4:8] = (1 << 20).to_bytes(4, "little")
    head[30], head[31], head[36:40] = NOTE, 0, bytes(4)
    with world.journal_path().open("ab") as file:
        file.write(bytes(head) * (2 << 20 // len(head)))
        file.write(bytes(head) * 100_000)

    with pytest.raises(JournalDamaged, match=f"byte {end_bytes} is no torn append"):
        world.facts()


# --- promised durable, then refused by our own reader --------------------------------------------


def test_the_journals_of_all_attempts_never_grow_beyond_what_is_read(world: TaskWorld) -> None:
    room_bytes = 100_000
    world.path("journal").mkdir()
    for attempt in (1, 2):
        size = journal.ALL_BYTES_MAX // 2 - (room_bytes if attempt == 2 else 0)
        make_hole(world.journal_path(attempt), size)
    world.begin()
    world.begin()
    kept: list[str] = []

    def record_twenty() -> None:
        for n in range(20):
            world.record(facts.set_value(str(n), "x" * 10_000))
            kept.append(str(n))

    with pytest.raises(TooLarge, match="all attempts"):
        record_twenty()

    assert len(kept) > 5
    assert list(world.facts().values) == kept
    assert not world.mark().problem


def test_a_value_nested_deeper_than_is_read_is_refused_before_it_is_kept(world: TaskWorld) -> None:
    world.record(facts.step_done("a"))

    def nested(depth: int) -> str:
        return "[" * depth + "]" * depth

    for depth in range(JSON_DEPTH_MAX - 8, JSON_DEPTH_MAX + 2):
        request = f'{{"op":"set","key":"{depth}","value":{nested(depth)}}}'
        with contextlib.suppress(IndexError):
            (answer,) = world.pipe(request)
            assert (str(depth) in world.facts().values) is answer["ok"]
        (last,) = world.pipe('{"op":"checkpoint","files":[],"state":1}')
        assert last["ok"]
    assert str(JSON_DEPTH_MAX - 8) in world.facts().values
    assert str(JSON_DEPTH_MAX) not in world.facts().values
    with pytest.raises(TooLarge, match="nested"):
        world.record(facts.set_value("k", json.loads(nested(JSON_DEPTH_MAX))))
    with pytest.raises(NotTrusted, match="nested"):
        save(world.dir, [], {"attempt": 1, "state": json.loads(nested(JSON_DEPTH_MAX))})
    assert world.newest().seq == 10


@pytest.mark.parametrize("depth", range(JSON_DEPTH_MAX - 4, JSON_DEPTH_MAX))
def test_a_value_nested_to_the_brim_was_told_as_kept_and_cost_all_facts(
    world: TaskWorld, depth: int
) -> None:
    world.record(facts.set_value("before", 1))
    value = json.loads("[" * depth + "]" * depth)

    with contextlib.suppress(TooLarge):
        world.record(facts.set_value("deep", value))
        assert world.facts().values["deep"] == value

    assert world.facts().values["before"] == 1


@pytest.mark.parametrize("length", [200, 250, NAME_BYTES_MAX])
def test_a_file_of_the_longest_name_comes_back_out(
    world: TaskWorld, tmp_path: Path, length: int
) -> None:
    name = "n" * length
    (tmp_path / name).write_text("x")
    save(world.dir, [str(tmp_path / name)], {"attempt": 1})
    out = tmp_path / "out"
    out.mkdir()
    (out / f".ckpt-{os.getpid()}-0").write_text("left by a crash under the same process id")

    assert copy_out(world.dir, world.uid, 1, str(out)) == [name]

    assert (out / name).read_text() == "x"


# --- zombies -------------------------------------------------------------------------------------


class Meanwhile(dict[str, int]):
    """A state that takes long to be written: something else happens in between."""

    def __init__(self, happens: Callable[[], None]) -> None:
        super().__init__(offset=700)
        self.happens = [happens]

    def items(self) -> ItemsView[str, int]:
        while self.happens:
            self.happens.pop()()
        return super().items()


def test_a_zombie_that_was_copying_publishes_nothing_into_its_successors_row(
    world: TaskWorld, tmp_path: Path
) -> None:
    (tmp_path / "work").write_text("old work of attempt 1")

    with pytest.raises(StaleAttempt):
        save(world.dir, [str(tmp_path / "work")], {"attempt": 1, "state": Meanwhile(world.begin)})

    assert os.listdir(world.path("ckpt")) == []
    assert save(world.dir, [str(tmp_path / "work")], {"attempt": 2}).seq == 1


def test_a_zombie_puts_nothing_back_into_its_successors_stage(world: TaskWorld) -> None:
    world.path("stage", "old").write_text("work of attempt 1")

    with pytest.raises(StaleAttempt):
        save(world.dir, [], {"attempt": 1, "state": Meanwhile(world.begin)})

    assert os.listdir(world.path("stage")) == []
    assert os.listdir(world.path("ckpt")) == []


class Slowly(journal.Fact):
    """A fact that takes long to be written: something else happens in between."""

    def __init__(self, fact: journal.Fact, happens: Callable[[], None]) -> None:
        super().__init__(fact)
        self._happens = happens

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> Any:
        self._happens()
        return super().keys()


def test_a_zombie_is_not_told_done_what_its_successor_may_not_have_seen(world: TaskWorld) -> None:
    zombie = world.journal()

    with pytest.raises(StaleAttempt):
        zombie.append([Slowly(facts.step_done("a"), world.begin)])

    world.record(facts.step_done("b"))
    assert list(world.facts().steps) == ["a", "b"], "there or not: nothing is damaged"


def test_a_start_does_not_wait_for_a_task_that_holds_the_fence(world: TaskWorld) -> None:
    fd = os.open(world.dir, os.O_RDONLY)
    fence(fd, waits=True)

    with pytest.raises(BlockingIOError) as held:
        world.begin()
    assert held.value.errno in SPAWN_TRANSIENT
    assert f"held by pid {os.getpid()} (" in str(held.value)

    os.close(fd)
    world.begin()


class Watched(int):
    """A user's number; something else happens each time that an owner is compared with it."""

    def __new__(cls, uid: int, happens: Callable[[], object]) -> Self:
        made = super().__new__(cls, uid)
        made.happens = happens
        return made

    happens: Callable[[], object]

    def __eq__(self, other: object) -> bool:
        self.happens()
        return super().__eq__(other)

    __hash__ = int.__hash__


def test_the_fence_of_a_start_was_kept_by_who_had_its_open_file_too(tmp_path: Path) -> None:
    task_dir, gid = str(tmp_path / "7"), os.getgid()
    blobs.prepare(task_dir, 1, os.getuid(), gid, fresh=False)
    copies: list[int] = []

    def copy_all() -> None:
        for name in os.listdir("/proc/self/fd"):
            link = f"/proc/self/fd/{name}"
            with contextlib.suppress(OSError):
                if os.readlink(link) == task_dir:
                    copies.append(os.dup(int(name)))

    blobs.prepare(task_dir, 2, Watched(os.getuid(), copy_all), gid, fresh=False)
    assert copies

    blobs.prepare(task_dir, 3, os.getuid(), gid, fresh=False)

    for fd in copies:
        os.close(fd)


def test_what_was_asked_of_one_attempt_is_not_asked_of_the_next(tmp_path: Path) -> None:
    task_dir, uid, gid = str(tmp_path / "7"), os.getuid(), os.getgid()
    blobs.prepare(task_dir, 1, uid, gid, fresh=False)
    control = Path(task_dir, "control.json")
    control.write_text('{"stop":"cancel","deadline":1.0,"checkpoint":1}')
    blobs.prepare(task_dir, 2, uid, gid, fresh=False)
    assert not control.exists()


# --- signals -------------------------------------------------------------------------------------


class Struck(Exception):
    """What a time limit raises out of its signal handler."""


class Interrupted(OSError):
    """An error of the disk during which a signal came: its exception strikes at the next call."""

    def __str__(self) -> str:
        raise Struck


def test_a_signal_during_a_sync_that_fails_does_not_hide_the_failure(
    world: TaskWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = world.journal()
    one.append([facts.step_done("a")])

    def fail(_fd: int) -> None:
        raise Interrupted(errno.EIO, "the disk is failing")

    with monkeypatch.context() as patched:
        patched.setattr(journal, "sync_data_fd", fail)
        with pytest.raises(Interrupted):
            one.append([facts.step_done("b")])

    assert list(world.facts().steps) == ["a"], "what failed was taken back"
    with pytest.raises(Struck):  # of our Interrupted, when it is put into words
        one.append([facts.step_done("c")])
    assert list(world.facts().steps) == ["a"], "nothing follows"


def test_a_task_that_says_its_attempt_is_infinite_is_cleaned_up_as_any_other(
    world: TaskWorld,
) -> None:
    world.publish(1, a="spent")
    world.path("attempt.json").write_text('{"attempt":1e999,"boot_id":""}')
    assert delete_spent(world.dir, world.attempt, world.uid)
    world.begin()
    assert not world.newest().problem
