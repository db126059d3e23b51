"""`drill`: hit a running task, or its daemon, for real, and see it come back.

The daemon does what is done to a task, and counts it as an interruption. Its own death is done
from here, by whoever may kill it. Read next: `drill_watch.py` (what is seen, and must hold).
"""

import argparse
import time
from typing import Any, Final

from ckptctl import drill_daemon, drill_watch, offline, selectors, units, words
from ckptctl.call import Call
from ckptctl.drill_watch import Before, Check, Story
from ckptctl.render import facts_lines, json_text
from ckptctl.saving import short_text
from ckptd.client import as_error
from ckptd.protocol.errors import BadRequest, CkptdError, Conflict, NotFound, TimedOut
from ckptd.protocol.limits import STARVED_BYTES
from ckptd.protocol.messages import (
    Changed,
    CheckpointList,
    CheckpointRow,
    Checkpoints,
    Drill,
    Empty,
    EventPage,
    Events,
    Pong,
    Selector,
    Status,
    TaskPage,
    TaskRow,
)

WITHIN: Final = "2m"
LOOK_S: Final = 0.2  # between two looks at what the task says
_KINDS: Final = {
    "kill9": "SIGKILL all of its processes",
    "sigterm": "stop it as a shutdown does: save, stop signal, grace, SIGKILL",
    "oom": "take its memory away, until the kernel kills it",
    "daemon": "SIGKILL the daemon; the task is to live on",
}


def drill_options(parser: argparse.ArgumentParser) -> None:
    """Add the task and the kinds of damage."""
    selectors.add_options(parser, many=False)
    kinds = parser.add_argument_group("what is done").add_mutually_exclusive_group(required=True)
    for name, text in _KINDS.items():
        kinds.add_argument(f"--{name}", dest="how", action="store_const", const=name, help=text)
    parser.add_argument(
        "--within", metavar="TIME", default=WITHIN, help=f"to be back in ({WITHIN})"
    )
    parser.add_argument(
        "--restart", metavar="COMMAND", default="",
        help="what starts the daemon again, where no service manager does",
    )  # fmt: skip


def drill(call: Call) -> int:
    """Do the damage and wait: 0 if all that must hold held, 1 if not, 124 if not in time."""
    call.takes("json")
    how, within_s = str(call.args.how), units.parse_duration(call.args.within)
    before = _before(call, call.one_id(call.select()))
    target = drill_daemon.find(call, call.args.restart) if how == "daemon" else None
    if how == "oom":
        _check_memory(before.row)
    _consent(call, how, before.row)
    run = _Run(call, before, how, time.monotonic() + within_s)
    if target is not None:
        drill_daemon.kill(call, target)
    else:
        _hit(call, before.row.id, how)
    run.watch(0 if target is None else target.epoch)
    return run.tell()


def _before(call: Call, task: int) -> Before:
    lsn = call.ask("events", Events(since=-1), EventPage).next
    (row,) = call.rows(Selector(ids=(task,)))
    if row.phase != "running":
        state = words.state_text(row, time.time_ns())
        raise Conflict(f"cannot drill task {task}: it is {state}", "only a running task can be")
    return Before(row, lsn, drill_watch.look_at(row.pid))


def _check_memory(row: TaskRow) -> None:
    """Raise Conflict where the kernel would find no reason to kill the task, and it alone."""
    held = drill_watch.memory_of(row.pid)
    if held < 0:
        raise Conflict(
            f"cannot take memory from task {row.id}: no memory group is its own",
            "that takes units of systemd on cgroup v2; here: --kill9",
        )
    if held <= STARVED_BYTES:
        raise Conflict(
            f"cannot take memory from task {row.id}: it has {units.size_text(held)}, and"
            f" {units.size_text(STARVED_BYTES)} are left for its end to be recorded",
            "here: --kill9",
        )


def _consent(call: Call, how: str, row: TaskRow) -> None:
    """Have a person say yes, at a terminal or by --yes: the damage is real."""
    what = f"task {row.id} ({words.clean(row.name)}), attempt {row.attempt}"
    costs = f"it goes on from checkpoint {row.checkpoint}"
    if not row.checkpoint:
        costs = "it has saved no checkpoint: what its journal does not hold will be done again"
    if how == "daemon":
        costs = "its tasks live on; requests wait until it is back"
    text = f"{what}: {_KINDS[how]}; {costs}"
    if not call.args.yes and not call.asks:
        raise BadRequest(f"nothing was done: a drill does real damage. {text}", "add --yes")
    if not call.confirm(f"{text}. Do it?"):
        raise BadRequest("nothing was done: drill was not confirmed")


def _hit(call: Call, task: int, how: Any) -> None:
    (change,) = call.ask("drill", Drill(Selector(ids=(task,)), how), Changed).tasks
    if change.error is not None:
        raise as_error(change.error)


class _Run:
    """One drill from the blow to the verdict."""

    def __init__(self, call: Call, before: Before, how: str, until: float) -> None:
        self._call, self._before, self._how, self._until = call, before, how, until
        self._task = before.row.id
        self._hit_ns = time.time_ns()
        self._story = Story(before, is_hit=how != "daemon")
        self._row = before.row
        self._since = before.lsn
        self._lost: float | None = None  # of what the task counts
        self._epochs = (0, 0)
        self._answer_ns = 0

    def watch(self, epoch: int) -> None:
        """Follow log and task until it is back. Raises TimedOut where nobody goes on by then."""
        if epoch:
            pong = self._ping()
            self._epochs, self._answer_ns = (epoch, pong.epoch), time.time_ns()
        has_read = False
        while time.monotonic() < self._until:
            try:
                self._look()
            except TimedOut:
                break  # judged by what was seen until then
            if self._story.start is not None and not has_read:
                has_read = True
                self._lost = self._items_lost(int(self._story.start.fields["resumed_from"]))
            goes_on = epoch or self._story.start is not None or self._is_finished()
            if goes_on and self._story.is_over:
                return
        if not epoch and self._story.start is None:
            state = words.state_text(self._row, time.time_ns())
            raise TimedOut(
                f"task {self._task} was hit and is not running again in time: it is {state}",
                f"see: ckptctl explain {self._task}",
            )

    def _ping(self) -> Pong:
        try:
            return self._call.wait_for("ping", Empty(), Pong, self._until)
        except TimedOut as late:
            text = "the daemon was killed and does not answer again in time"
            raise TimedOut(text, "start it; its tasks live on") from late

    def _look(self) -> None:
        asked = Events(since=self._since, task=self._task, hold_s=LOOK_S)
        page = self._call.wait_for("events", asked, EventPage, self._until)
        self._since = page.next
        self._story.hear(page.events)
        status = Status(Selector(ids=(self._task,)), 1)
        rows = self._call.wait_for("status", status, TaskPage, self._until).tasks
        if not rows:
            raise NotFound(f"task {self._task} was removed during the drill")
        self._row = rows[0]
        self._story.look(self._row, time.time_ns())

    def _is_finished(self) -> bool:
        death = self._story.death
        return death is not None and death.fields["verdict"]["phase"] not in ("queued", "waiting")

    def _items_lost(self, seq: int) -> float | None:
        """Return what was done beyond the checkpoint, in the task's own units; None: not known."""
        said = self._before.row.progress
        row = next((row for row in self._saved(verify=False) if row.seq == seq), None)
        if said is None or row is None:
            return None
        try:
            manifest = offline.ask("show", offline.task_dir(row.path), str(seq))
            return max(0.0, said.done - float(manifest["progress"]["done"]))
        except (CkptdError, KeyError, TypeError, ValueError):
            return None  # not ours to read, pruned by now, or it saves without saying how far

    def _saved(self, *, verify: bool) -> tuple[CheckpointRow, ...]:
        asked = Checkpoints(self._task, verify)
        until = max(self._until, time.monotonic() + self._call.client.timeout_s)
        return self._call.wait_for("checkpoints", asked, CheckpointList, until).checkpoints

    # --- the verdict ----------------------------------------------------------------------------

    def tell(self) -> int:
        """Print what was lost, how long it took, and what held; 0 if all did."""
        saved = self._saved(verify=True)
        if self._how == "daemon":
            checks = drill_watch.checks_of_daemon(self._story, self._row, self._epochs, saved)
        else:
            checks = drill_watch.checks_of_task(self._how, self._story, saved)
        is_passed = all(check.holds for check in checks)
        if self._call.style.form == "json":
            self._call.out([json_text({"drill": self._document(checks, is_passed=is_passed)})])
        else:
            facts = [*self._facts(), *((check.name, _check_text(check)) for check in checks)]
            self._call.out(facts_lines(facts, self._call.style))
            self._call.out(["passed" if is_passed else "FAILED"])
        return 0 if is_passed else 1

    def _document(self, checks: list[Check], *, is_passed: bool) -> dict[str, Any]:
        start = self._story.start
        return {
            "task": self._task,
            "how": self._how,
            "passed": is_passed,
            "attempts": [self._before.row.attempt, start.attempt if start else None],
            **self._figures(),
            "lost_items": self._lost,
            "checks": [{"name": c.name, "holds": c.holds, "text": c.text} for c in checks],
        }

    def _figures(self) -> dict[str, float | None]:
        found = drill_watch.figures(self._story, self._hit_ns)
        if self._answer_ns:
            found["daemon_back_s"] = (self._answer_ns - self._hit_ns) / drill_watch.SECOND_NS
        return found

    def _facts(self) -> list[tuple[str, str]]:
        row, found, start = self._before.row, self._figures(), self._story.start
        what = f"task {row.id} ({words.clean(row.name)}), attempt {row.attempt}, pid {row.pid}"
        items = f", {units.number_text(self._lost)} of what it counts" if self._lost else ""
        began = f", as attempt {start.attempt}, pid {start.fields['pid']}" if start else ""
        return [
            ("drill", f"{self._how} of {what}"),
            ("work lost", f"{short_text(found['lost_s'] or 0.0)}{items}"),
            ("daemon back", _after(found.get("daemon_back_s"))),
            ("runs again", _after(found["restart_s"]) and _after(found["restart_s"]) + began),
            ("gets on", _after(found["progress_s"])),
            ("where it was", _after(found["back_s"])),
        ]


def _after(seconds: float | None) -> str:
    return "" if seconds is None else f"after {short_text(seconds)}"


def _check_text(check: Check) -> str:
    return f"{'ok ' if check.holds else 'BAD'}  {check.text}"
