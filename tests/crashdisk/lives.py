"""What is lived on the lying disk: work that promises things, and the check of what is left.

A life calls `mark` with what it has promised and what it has tried, after each operation that
could promise. `check` gets the promise that stood at the cut and the one after it: what is found
must lie between the two. It recovers by the real code, works on, and recovers again.
"""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import pytest

from ckptd.batch import ledger, place
from ckptd.batch.spec import Config, Knobs
from ckptd.runner.attempt import End, Record, read
from ckptd.sdk.save import save_from
from ckptd.sdk.surroundings import Surroundings
from ckptd.storage import blobs, examine, journal, taskdir
from ckptd.storage.disk import File, RealDisk
from ckptd.storage.facts import item_done, item_start, set_value
from tests.fakes.engine_model import Reign, judge, picture
from tests.fakes.log_model import Writer, open_store, replay

UID, GID = os.getuid(), os.getgid()
TASK = 12
AT_NS = 10**18
SNAPSHOT_SHARE = 0.1


class Promise(NamedTuple):
    """Counts that only grow: what was promised, what was tried."""

    kept: int = 0
    tried: int = 0
    acts: tuple[tuple[int, int], ...] = ()
    ends: tuple[tuple[int, int, int], ...] = ()  # task, attempt, when in ns


Mark = Callable[[Promise], None]


class Life(Protocol):
    """One kind of work."""

    name: str
    adds: int  # to what was tried, by a check: its own cut may find that

    def live(self, top: Path, dice: random.Random, mark: Mark) -> None:
        """Work below `top`; promise what is durable."""
        ...

    def check(self, top: Path, least: Promise, most: Promise, *, works_on: bool) -> None:
        """Recover, twice; go on working where asked to, and recover that.

        Raises AssertionError, or what recovery raises: both are violations.
        """
        ...


class Below(RealDisk):
    """The kernel's file system, seen from a directory: its paths begin with `/`."""

    def __init__(self, top: Path) -> None:
        self._top = str(top)

    def make_dir(self, path: str, mode: int) -> None:
        super().make_dir(self._top + path, mode)

    def create(self, path: str) -> File:
        return super().create(self._top + path)

    def open(self, path: str, *, write: bool = False) -> File:
        return super().open(self._top + path, write=write)

    def names(self, path: str) -> list[str]:
        return super().names(self._top + path)

    def rename(self, old: str, new: str) -> None:
        super().rename(self._top + old, self._top + new)

    def link(self, old: str, new: str) -> None:
        super().link(self._top + old, self._top + new)

    def unlink(self, path: str) -> None:
        super().unlink(self._top + path)

    def sync_dir(self, path: str) -> None:
        super().sync_dir(self._top + path)

    def lock(self, path: str) -> File:
        return super().lock(self._top + path)

    def free_bytes(self, path: str) -> int:
        return super().free_bytes(self._top + path)


class Deaf(Below):
    """One that pretends to sync: `data`, `names` of directories, or what a `snapshot` needs."""

    def __init__(self, top: Path, kind: str) -> None:
        super().__init__(top)
        self._kind = kind

    def create(self, path: str) -> File:
        return self._as_deaf(super().create(path), path)

    def open(self, path: str, *, write: bool = False) -> File:
        return self._as_deaf(super().open(path, write=write), path)

    def sync_dir(self, path: str) -> None:
        if self._kind != "names":
            super().sync_dir(path)

    def free_bytes(self, path: str) -> int:
        """Room for no spare ahead: the sync of that one would make renames durable by chance."""
        return 0 if self._kind == "names" else super().free_bytes(path)

    def _as_deaf(self, file: File, path: str) -> File:
        is_deaf = self._kind == "data" or (self._kind == "snapshot" and "/snap/" in path)
        return DeafFile(file) if is_deaf else file


class DeafFile:
    """A file whose syncs do nothing."""

    def __init__(self, file: File) -> None:
        self._file = file
        self.read, self.write, self.size = file.read, file.write, file.size
        self.close = file.close

    def drop_cache(self) -> None:
        """Pretend: posix_fadvise(2) writes dirty pages out first, as a sync by chance would."""

    def sync_data(self) -> None:
        """Pretend."""

    def sync(self) -> None:
        """Pretend."""


class LogLife:
    """The log with every step of its protocol: append, group commit, rotate, snapshot, retire."""

    name = "log"
    adds = 3

    def __init__(self, deaf: str = "") -> None:
        """`deaf`: the syncs that this log goes without, to show that they are missed."""
        self._deaf = deaf

    def live(self, top: Path, dice: random.Random, mark: Mark) -> None:
        acked = submitted = 0
        for _ in range(2):
            disk = Deaf(top, self._deaf) if self._deaf else Below(top)
            writer = Writer(disk, acked, submitted)
            for _ in range(25):
                writer.work(dice, 1)
                mark(Promise(writer.acked, writer.submitted))
                if dice.random() < SNAPSHOT_SHARE:
                    writer.snapshot()
            acked, submitted = writer.acked, writer.submitted
            if dice.random() < 0.5:
                writer.close()
            else:
                writer.store.close()
            mark(Promise(writer.acked, writer.submitted))

    def check(self, top: Path, least: Promise, most: Promise, *, works_on: bool) -> None:
        store = open_store(Below(top))
        recovery = store.recover()
        recovered = replay(recovery)
        report = recovery.report  # a torn tail is one warning; any other would be of damage
        assert len(report.warnings) == bool(report.torn_file), f"damage: {report.warnings}"
        assert least.kept <= recovered <= most.tried, f"{least}, {recovered}, {most}"
        assert replay(store.recover()) == recovered, "a second look finds another log"
        store.close()
        if works_on:
            writer = Writer(Below(top), recovered, recovered)
            writer.append(self.adds)
            writer.close()
            store = open_store(Below(top))
            found = [*examine.examine(store.place)]
            assert not found, f"verified: {found}"
            assert replay(store.recover()) == recovered + self.adds
            store.close()


class EngineLife:
    """State over the log: submits and ends are acknowledged, an attempt follows its intent."""

    name = "engine"
    adds = 0

    def live(self, top: Path, dice: random.Random, mark: Mark) -> None:
        at_ns, acked, acts, tried = AT_NS, set[int](), set[tuple[int, int]](), 0
        ends: dict[tuple[int, int], int] = {}
        for _ in range(2):
            reign = Reign(Below(top), at_ns)
            for _ in range(dice.randint(5, 12)):
                reign.turn(dice)
                acked |= reign.acked
                acts |= set(reign.ordered)
                tried = max(acked)
                ends |= reign.ended
                told = tuple((*key, ended_ns) for key, ended_ns in ends.items())
                mark(Promise(len(acked), tried, tuple(sorted(acts)), told))
                if dice.random() < 0.1:
                    reign.snapshot()
            at_ns = reign.at_ns
            reign.store.close()

    def check(self, top: Path, least: Promise, most: Promise, *, works_on: bool) -> None:
        reign = Reign(Below(top), AT_NS * 2)
        tasks = {task.id: task for task in reign.engine.state.tasks.ascending(0)}
        assert set(range(1, least.kept + 1)) <= tasks.keys(), f"{least.kept} kept, {len(tasks)}"
        assert len(tasks) <= most.tried, f"{len(tasks)} tasks, {most.tried} were tried"
        for task, attempt in least.acts:
            run = tasks[task].run
            assert run is not None, f"attempt {attempt} of task {task} has no intent"
            assert run.attempt >= attempt, f"attempt {attempt} of {task}, intent {run.attempt}"
        judge(reign.engine.state, least.ends)
        reign.store.close()
        if not works_on:
            return
        again = Reign(Below(top), AT_NS * 3)
        found, first = picture(again.engine.state), picture(reign.engine.state)
        assert found == first, f"a second look finds {found}, the first found {first}"
        again.store.close()


class JournalLife:
    """A task's journal over attempts; some facts ride unsynced with later ones."""

    name = "journal"
    adds = 1

    def live(self, top: Path, dice: random.Random, mark: Mark) -> None:
        kept = tried = 0
        for attempt in range(1, 4):
            taskdir.prepare(f"{top}/{TASK}", attempt, UID, GID, fresh=False)
            ours = journal.Journal(f"{top}/{TASK}", TASK, attempt, epoch=1)
            for _ in range(dice.randint(1, 12)):
                count, is_synced = dice.randint(1, 4), dice.random() < 0.7
                facts = [set_value("n", tried + one) for one in range(count)]
                ours.append(facts, is_synced=is_synced)
                tried += count
                kept = tried if is_synced else kept
                mark(Promise(kept, tried))
            ours.close()

    def check(self, top: Path, least: Promise, most: Promise, *, works_on: bool) -> None:
        found = self._numbers(top)  # what was never promised may lack between two attempts
        assert found == sorted(set(found)), f"facts in another order: {found}"
        assert found[: least.kept] == list(range(least.kept)), f"{least.kept} promised: {found}"
        assert max(found, default=0) < max(1, most.tried), f"{most.tried} tried: {found}"
        if not found or not works_on:
            return
        attempt = taskdir.newest_attempt(f"{top}/{TASK}", UID)
        ours = journal.Journal(f"{top}/{TASK}", TASK, max(1, attempt), epoch=2)
        ours.append([set_value("n", found[-1] + 1)])
        ours.close()
        again = self._numbers(top)
        assert again == [*found, found[-1] + 1], f"{found}, after one more: {again}"

    @staticmethod
    def _numbers(top: Path) -> list[int]:
        facts = journal.read(f"{top}/{TASK}", TASK, UID, 99)
        return [int(fact["value"]) for _, fact in facts if fact["op"] == "set"]


class CheckpointLife:
    """Checkpoints by the contract: published, sealed, pruned."""

    name = "checkpoint"
    adds = 0

    def live(self, top: Path, dice: random.Random, mark: Mark) -> None:
        path = f"{top}/{TASK}"
        taskdir.prepare(path, 1, UID, GID, fresh=False)
        source = top / "work"
        source.mkdir()
        around = Surroundings({"CKPTD_DIR": path, "CKPTD_TASK_ID": str(TASK), "CKPTD_ATTEMPT": "1"})
        for number in range(1, 9):
            (source / "data").write_bytes(self._content(number))
            mark(Promise(number - 1, number))
            saved = save_from(around, [str(source / "data")], {"n": number}, None)
            assert saved.seq == number
            mark(Promise(number, number))
            if dice.random() < 0.5:
                blobs.prune(path, UID)

    def check(self, top: Path, least: Promise, most: Promise, *, works_on: bool) -> None:
        found = blobs.newest_valid(f"{top}/{TASK}", UID, "another boot")
        assert not found.problem, found.problem
        assert least.kept <= found.seq <= most.tried, f"{least.kept} <= {found.seq}, {most.tried}"
        if found.seq:
            held = Path(found.path, "data").read_bytes()
            assert held == self._content(found.seq), f"checkpoint {found.seq} holds other data"
        if not works_on:
            return
        again = blobs.newest_valid(f"{top}/{TASK}", UID, "another boot")
        assert again.seq == found.seq, "a second look finds another"

    @staticmethod
    def _content(number: int) -> bytes:
        return json.dumps([number] * (900 * number)).encode()


class LedgerLife:
    """A batch's ledger over runs."""

    name = "ledger"
    adds = 1

    def live(self, top: Path, dice: random.Random, mark: Mark) -> None:
        path = f"{top}/batches/b"
        place.make(path)
        batch = place.new_batch("b", Config(argv=["true"]), Knobs())
        place.store(path, batch)
        mark(Promise(0, 0))
        done = 0
        for _ in range(3):
            ours = ledger.Ledger(path, batch, ledger.begin(path))
            for _ in range(dice.randint(1, 10)):
                ours.append([item_start(str(done))], is_synced=False)
                mark(Promise(done, done + 1))
                ours.append([item_done(str(done), "pass", done)])
                done += 1
                mark(Promise(done, done))
            ours.close()

    def check(self, top: Path, least: Promise, most: Promise, *, works_on: bool) -> None:
        path = f"{top}/batches/b"
        if not least.kept and not Path(path, "batch.json").exists():
            return
        batch = place.load(path)
        items = ledger.read(path, batch).items
        assert sorted(map(int, items)) == list(range(len(items))), f"results: {sorted(items)}"
        assert least.kept <= len(items) <= most.tried, f"{least.kept} <= {len(items)}, {most}"
        if not works_on:
            return
        ours = ledger.Ledger(path, batch, ledger.begin(path))
        ours.append([item_done(str(len(items)), "pass")])
        ours.close()
        again = ledger.read(path, batch).items
        assert len(again) == len(items) + 1, "a result after the recovery"


class ExitLife:
    """Exit records of attempts, as the supervisor writes them."""

    name = "exit"
    adds = 0

    def live(self, top: Path, dice: random.Random, mark: Mark) -> None:
        folder = str(top)
        os.mkdir(f"{folder}/spare")
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        for number in range(1, 13):
            record = self._record(folder, number)
            assert record.take()
            if dice.random() < 0.8:
                record.write_start(b'{"start":1}\n')
            mark(Promise(number - 1, number))
            record.write_exit(self._end(number), fd)
            mark(Promise(number, number))
            record.close()
        os.close(fd)

    def check(self, top: Path, least: Promise, most: Promise, *, works_on: bool) -> None:
        del works_on  # an end is final
        for number in range(1, 13):
            found = read(f"{top}/{number}.1")
            told = found.exit if found is not None else None
            assert told is None or told + b"\n" == self._end(number).partition(b"\n")[0] + b"\n"
            assert told is not None or number > least.kept, f"the end of {number} is lost"
            assert told is None or number <= most.tried, f"an end of {number}, which never was"

    @staticmethod
    def _record(folder: str, number: int) -> Record:
        return Record(folder, f"{folder}/{number}.1", f"s{number}", b'{"claim":1}\n')

    @staticmethod
    def _end(number: int) -> bytes:
        return End("exit", code=number).line(number, 1)


class Unsynced:
    """A life under which no sync does anything, to show that each kind of work needs them."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self.name, self.adds, self.check = life.name, life.adds, life.check

    def live(self, top: Path, dice: random.Random, mark: Mark) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("fsync", "fdatasync", "posix_fadvise"):  # the last: see `drop_cache`
                patch.setattr(os, name, lambda *_: None)
            self._life.live(top, dice, mark)


LIVES: tuple[Life, ...] = (
    LogLife(), EngineLife(), JournalLife(), CheckpointLife(), LedgerLife(), ExitLife(),
)  # fmt: skip
