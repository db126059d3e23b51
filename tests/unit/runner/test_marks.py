"""What a look at a task's files may say of them, and what it may not."""

import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ckptd.core.port import MarkSeen
from ckptd.runner.files import TaskFiles
from ckptd.runner.instance import Instance
from ckptd.runner.marks import Marks
from ckptd.runner.watch import Watch, Worker
from ckptd.storage import facts
from tests.task_world import TASK, TaskWorld


class Looks:
    """The looks at one attempt, each waited for."""

    def __init__(self, folder: Path, world: TaskWorld) -> None:
        self.seen: list[MarkSeen] = []
        self.one = Instance(TASK, world.attempt, world.uid)
        self._watch, self._is_done = Watch(), threading.Event()
        self._worker = Worker(self._is_done.set)
        files = TaskFiles(str(folder), world.boot_id)
        self._marks = Marks(files, self._watch, self._worker, self.seen.append, lambda _: None)

    def look(self) -> None:
        self.one.rests_until_s = 0.0
        self._marks.hinted(self.one)
        assert self._is_done.wait(50)
        self._is_done.clear()
        self._worker.settle()
        assert not self.one.is_marking

    def close(self) -> None:
        self._worker.close()
        self._watch.close()


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_look_that_met_trouble_misses_no_journal_that_never_was(tmp_path: Path) -> None:
    """Else a task that only saves is told at its next save that what it did is lost."""
    world = TaskWorld(tmp_path)
    os.rename(world.publish(1, state="saved"), world.path("kept"))
    looks = Looks(tmp_path, world)
    looks.look()  # its thread runs
    os.rename(world.path("kept"), world.path("ckpt", "1"))
    with no_descriptor_left():
        looks.look()
    assert (looks.seen, looks.one.has_journal) == ([], False)

    looks.look()

    looks.close()
    assert [(one.checkpoint, one.problem) for one in looks.seen] == [(1, "")]


def test_what_is_saved_beside_a_journal_that_was_taken_away_is_told_as_without_one(
    tmp_path: Path,
) -> None:
    world = TaskWorld(tmp_path)
    looks = Looks(tmp_path, world)
    world.record(facts.step_done("pay"))
    looks.look()
    os.rename(world.path("journal"), world.path("away"))
    world.publish(1, state="saved")
    looks.look()
    os.rename(world.path("away"), world.path("journal"))
    looks.look()
    looks.close()
    assert [(one.checkpoint, one.problem, one.has_journal) for one in looks.seen] == [
        (0, "", True),
        (1, "", False),
        (1, "", True),
    ]
