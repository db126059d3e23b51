"""Take steps of a task back, that they run again: the named one and all that came after it.

    python -P -m ckptd.offline.checkpoint rewind TASK_DIR TASK ATTEMPT STEP

    journal before   fetch done, clean done, load done, result
    rewind to clean  clean reset, load reset      -> the next attempt runs clean and load

The order is that in which steps were completed, over all attempts; one that began and must not run
twice stands where it began. A step's external job is forgotten with it. Items, values and the
state stay as they are.
Invariant: no attempt begins between looking and writing: the fence is held over both.
Read next: `ckptd/storage/facts.py`, `ckptctl/rewind.py` (which then asks for the retry).
"""

import difflib
import os
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from ckptd.offline.refusal import Refused, refuse_others
from ckptd.sdk.steps import job_key
from ckptd.storage import facts
from ckptd.storage.journal import FACTS_PER_FRAME_MAX, Fact, Journal, StaleAttempt, read
from ckptd.storage.taskdir import attempt_of, fence
from ckptd.storage.untrusted import open_directory, plain

_KNOWN_TOLD_MAX: Final = 10


class Story(NamedTuple):
    """What journals say of steps: by name, in order, whether it stands; and which jobs there are.

    A step that was taken back keeps its place: who rewinds twice means the same place.
    """

    steps: dict[str, bool]
    values: set[str]

    @classmethod
    def of(cls, recorded: Iterable[Fact]) -> "Story":
        """Read it out of facts."""
        story = cls({}, set())
        for fact in recorded:
            story._take(fact)
        return story

    def _take(self, fact: Fact) -> None:
        name, key = str(fact.get("name")), str(fact.get("key"))
        match fact.get("op"):
            case "step_done":
                self.steps.pop(name, None)
                self.steps[name] = True
            case "step_start" if not self.steps.get(name):
                self.steps.pop(name, None)
                self.steps[name] = True
            case "step_reset" if name in self.steps:
                self.steps[name] = False
            case "set":
                self.values.add(key)
            case "delete":
                self.values.discard(key)
            case _:
                pass  # says nothing about steps

    def taken_back(self, first: str) -> list[str]:
        """Return the step and those after it that stand, in order.

        Raises:
            Refused: there is no such step.
        """
        names = list(self.steps)
        if first not in self.steps:
            raise Refused(4, f"no step {plain(first)!r} was done by the task", _hint(first, names))
        after = names[names.index(first) :]
        return [name for name in after if self.steps[name] or name == first]


def _hint(wanted: str, names: list[str]) -> str:
    if not names:
        return "it has recorded no steps; from the beginning: ckptctl retry --fresh"
    near = difflib.get_close_matches(wanted, names, len(names), 0.6)[:3]
    rest = [name for name in names if name not in near]
    told = [plain(name) for name in (*near, *rest)[:_KNOWN_TOLD_MAX]]
    return f"its steps are: {', '.join(told)}" + (" ..." if len(names) > len(told) else "")


def rewind(task_dir: str, task: str, attempt: str, first: str) -> dict[str, Any]:
    """Record that a step and all after it are not completed; return their names, in order.

    Crash: some of them are taken back, the last one first, so what stands is a beginning of the
    row; do it again. Durable: that they are taken back, and with them the task's result.
    """
    if not os.path.lexists(task_dir):
        raise Refused(4, "the task was never started: it has recorded no steps")
    refuse_others(task_dir)
    uid, number, newest = os.getuid(), int(task), int(attempt)
    task_fd = open_directory(task_dir, uid)
    try:
        fence(task_fd, waits=True)  # until the descriptor is closed
        found = attempt_of(task_fd, uid)[0]
        if found > newest:
            raise StaleAttempt(f"attempt {newest} is over: attempt {found} exists")
        recorded = (fact for _, fact in read(task_dir, number, uid, newest))
        story = Story.of(recorded)
        names = story.taken_back(first)
        _append(task_dir, number, newest, _facts(story, names))
    finally:
        os.close(task_fd)
    return {"steps": names}


def _facts(story: Story, names: list[str]) -> list[Fact]:
    """Return what is recorded: the last step first."""
    found: list[Fact] = []
    for name in reversed(names):
        if (key := job_key(name)) in story.values:
            found.append(facts.delete_value(key))
        found.append(facts.step_reset(name))
    return found


def _append(task_dir: str, task: int, attempt: int, group: list[Fact]) -> None:
    """Durable: all of them."""
    journal = Journal(task_dir, task, attempt, 0)
    try:
        for first in range(0, len(group), FACTS_PER_FRAME_MAX):
            journal.append(group[first : first + FACTS_PER_FRAME_MAX])
    finally:
        journal.close()
