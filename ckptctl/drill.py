"""`drill`: hit a running task, or its daemon, for real, and see it come back.

The daemon does what is done to a task, and counts it as an interruption. Its own death is done
from here, by whoever may kill it. Read next: `drill_watch.py` (what is seen).
"""

import argparse
import subprocess
import time
from typing import Any, Final

from ckptctl import (
    drill_checks,
    drill_counts,
    drill_daemon,
    drill_watch,
    selectors,
    units,
    words,
)
from ckptctl.call import Call
from ckptctl.drill_checks import Check
from ckptctl.drill_watch import Before, Story
from ckptctl.render import facts_lines, json_text
from ckptctl.saving import short_text
from ckptd.client import as_error
from ckptd.protocol.errors import BadRequest, Conflict, NotFound, TimedOut
from ckptd.protocol.limits import STARVED_BYTES
from ckptd.protocol.messages import (
    Changed,
    CheckpointList,
    CheckpointRow,
    Checkpoints,
    DaemonStatus,
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
_HOLDS: Final = {True: "ok ", False: "BAD", None: "-- "}
_KINDS: Final = {
    "kill9": "SIGKILL to all of its processes",
    "sigterm": "stop it as a shutdown does: save, stop signal, grace, SIGKILL",
    "oom": "take its memory away, until the kernel kills it",
    "daemon": "SIGKILL to the daemon; the task must not even notice",
}


def drill_options(parser: argparse.ArgumentParser) -> None:
    """Add the task and the kinds of damage."""
    selectors.add_options(parser, many=False)
    kinds = parser.add_argument_group("what is done").add_mutually_exclusive_group(required=True)
    for name, text in _KINDS.items():
        kinds.add_argument(f"--{name}", dest="how", action="store_const", const=name, help=text)
    parser.add_argument(
        "--within",
        metavar="TIME",
        type=units.parse_duration,
        default=WITHIN,
        help=f"it must be back, and get on, in this time ({WITHIN})",
    )
    parser.add_argument(
        "--restart", metavar="COMMAND", default="",
        help="with --daemon: what starts it again, where no service manager does",
    )  # fmt: skip


def drill(call: Call) -> int:
    """Do the damage and wait: 0 if all that must hold held, 1 if not, 124 if it was not seen."""
    call.takes("json")
    how, within_s = str(call.args.how), _within(call)
    before = _before(call, call.one_id(call.select()))
    target = drill_daemon.find(call, call.args.restart) if how == "daemon" else None
    if how == "oom":
        _check_memory(before.row)
    if _consent(call, how, before.row, target):
        before = _before(call, before.row.id)  # it went on while a person thought
    run = _Run(call, before, how, time.monotonic() + within_s)
    try:
        run.strike(target)
        run.watch(0 if target is None else target.epoch)
    except KeyboardInterrupt:
        what = "daemon status" if target is not None else f"explain {before.row.id}"
        call.note(f"the drill was left; what came of it: ckptctl {what}")
        raise
    return run.tell()


def _within(call: Call) -> float:
    """Return the seconds it has to be back in; what can only fail is refused before any harm."""
    if call.args.restart and call.args.how != "daemon":
        raise BadRequest("--restart says what starts the daemon again", "it goes with --daemon")
    if call.args.within <= 0:
        raise BadRequest("no task is back within no time", f"--within {WITHIN}")
    return float(call.args.within)


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


def _consent(call: Call, how: str, row: TaskRow, target: drill_daemon.Target | None) -> bool:
    """Have a person say yes, at a terminal or by --yes; return whether somebody was asked."""
    if call.args.yes:
        return False
    what = f"{_what(row)}: {_KINDS[how]}"
    if not call.asks:
        raise BadRequest(f"nothing was done: a drill does real damage. {what}", "add --yes")
    lines = (what, *_costs(how, row, target), "Do it?")
    if not call.confirm("\n  ".join(lines)):
        raise BadRequest("nothing was done: drill was not confirmed")
    return True


def _what(row: TaskRow) -> str:
    return f"task {row.id} ({words.clean(row.name)}), attempt {row.attempt}, pid {row.pid}"


def _costs(how: str, row: TaskRow, target: drill_daemon.Target | None) -> tuple[str, ...]:
    """Return what the damage will cost, for who is asked."""
    if target is not None:
        by = words.clean(target.command) or f"its service manager, {target.service}"
        return ("all tasks run on; requests wait", f"it is started again by: {by}")
    again = "it starts again at once; an interruption is counted, no failure"
    if not row.checkpoint:
        return ("no checkpoint was saved: it begins anew, but for what its journal holds", again)
    age = short_text(max(0.0, (time.time_ns() - row.checkpoint_ns) / drill_watch.SECOND_NS))
    newer = ", or a newer one: it is asked to save" if how == "sigterm" else ""
    return (
        f"it goes on from checkpoint {row.checkpoint}, {age} old{newer}",
        "what it did since is done again, unless its journal holds it",
        again,
    )


class _Run:
    """One drill from the blow to the verdict."""

    def __init__(self, call: Call, before: Before, how: str, until: float) -> None:
        self._call, self._before, self._how, self._until = call, before, how, until
        self._task = before.row.id
        self._story = Story(before, time.time_ns(), is_hit=how != "daemon")
        self._row = before.row
        self._since = before.lsn
        self._epochs = (0, 0)
        self._answer_ns = 0
        self._restart: subprocess.Popen[bytes] | None = None

    def strike(self, target: drill_daemon.Target | None) -> None:
        """Do the damage: to the daemon, or by it to the task. Raises what refuses it."""
        listed = self._call.ask("checkpoints", Checkpoints(self._task), CheckpointList)
        self._story.note(listed.checkpoints)
        if target is not None:
            self._restart = drill_daemon.kill(self._call, target)
            self._story.struck_ns = time.time_ns()
            return
        how: Any = self._how
        asked = Drill(Selector(ids=(self._task,)), how)
        (change,) = self._call.ask("drill", asked, Changed).tasks
        if change.error is not None:
            raise as_error(change.error)
        self._call.aside(f"task {self._task} is hit; waiting until it is back")

    def watch(self, epoch: int) -> None:
        """Follow log and task until it is back. Raises TimedOut where nobody goes on by then."""
        if epoch:
            pong = self._ping()
            self._epochs, self._answer_ns = (epoch, pong.epoch), time.time_ns()
            while self._is_adopting():  # Bound: `_until`, past which nothing is answered
                self._look()
        is_seen = False
        while time.monotonic() < self._until:
            try:
                self._look()
            except TimedOut:
                break  # judged by what was seen until then
            start = self._story.start
            is_new = start is not None and not is_seen
            if start is not None and is_new:
                is_seen = True
            goes_on = epoch or start is not None or self._is_finished()
            if goes_on and self._story.is_over and drill_counts.is_settled(self._story):
                return
            if start is not None and is_new:
                self._call.aside(f"attempt {start.attempt} runs; waiting until it gets on")
        if not epoch and self._story.start is None:
            raise self._not_back()

    def _not_back(self) -> TimedOut:
        has_looked = self._row is not self._before.row
        state = words.state_text(self._row, time.time_ns())
        was = f"it is {state}" if has_looked else "its end was not told"
        return TimedOut(
            f"task {self._task} was hit and not seen to run again in time; {was}",
            f"see: ckptctl explain {self._task}",
        )

    def _ping(self) -> Pong:
        """Return who answers next. Raises TimedOut once nobody will."""
        while True:  # Bound: `_until`, or the end of what was to start it
            code = None if self._restart is None else self._restart.poll()
            until = min(self._until, time.monotonic() + LOOK_S)
            try:
                return self._call.wait_for("ping", Empty(), Pong, until)
            except TimedOut as late:
                if code or time.monotonic() >= self._until:
                    text = f"; what was to start it ended with {_exit_text(code)}" if code else ""
                    raise TimedOut(
                        f"the daemon was killed and does not answer again{text}",
                        "start it; its tasks live on",
                    ) from late

    def _is_adopting(self) -> bool:
        """Tell whether the new daemon still looks for what its log says: the task may be gone."""
        status = self._call.wait_for("daemon", Empty(), DaemonStatus, self._until)
        return status.health == "adopting"

    def _look(self) -> None:
        end = self._events(Events(since=-1)).next
        while True:  # Bound: `end`, or `_until`; one page may not reach it
            page = self._events(Events(since=self._since, task=self._task, hold_s=LOOK_S))
            self._since = page.next
            was_to_note = self._story.is_to_note
            self._story.hear(page.events)
            if was_to_note or self._story.is_to_note:
                self._note()
            if self._since >= end:
                break
        status = Status(Selector(ids=(self._task,)), 1)
        rows = self._call.wait_for("status", status, TaskPage, self._until).tasks
        if not rows:
            raise NotFound(f"task {self._task} was removed during the drill")
        self._row = rows[0]
        self._story.look(self._row, time.time_ns())

    def _note(self) -> None:
        """Note what the checkpoints say, at once: the next ones may take their place."""
        self._story.note(self._saved(self._until, verify=False))

    def _events(self, asked: Events) -> EventPage:
        try:
            return self._call.wait_for("events", asked, EventPage, self._until)
        except NotFound as cut:
            raise Conflict(
                "the log was cut behind what was read of it: nothing is proven",
                f"see: ckptctl explain {self._task}",
            ) from cut

    def _is_finished(self) -> bool:
        death = self._story.death
        return death is not None and death.fields["verdict"]["phase"] not in ("queued", "waiting")

    def _saved_at_last(self) -> tuple[CheckpointRow, ...]:
        until = max(self._until, time.monotonic() + self._call.client.timeout_s)
        return self._saved(until, verify=True)

    def _saved(self, until: float, *, verify: bool) -> tuple[CheckpointRow, ...]:
        asked = Checkpoints(self._task, verify)
        return self._call.wait_for("checkpoints", asked, CheckpointList, until).checkpoints

    # --- the verdict ----------------------------------------------------------------------------

    def tell(self) -> int:
        """Print what was lost, how long it took, and what held; 0 if all did.

        Raises:
            Conflict: the attempt ended of something else than the blow.
        """
        checks = self._checks()
        is_passed = all(check.holds for check in checks)
        is_failed = any(check.holds is False for check in checks)
        if self._call.style.form == "json":
            self._call.out([json_text({"drill": self._document(checks, is_passed=is_passed)})])
        else:
            facts = [*self._facts(), *((check.name, _check_text(check)) for check in checks)]
            self._call.out(facts_lines(facts, self._call.style))
            unproven = _not_proven(checks, self._story)
            self._call.out(["passed" if is_passed else "FAILED" if is_failed else unproven])
        return 0 if is_passed else 1 if is_failed else TimedOut.exit_code

    def _checks(self) -> list[Check]:
        if self._how == "daemon":
            drill_checks.check_left_alone(self._story)
            saved = self._saved_at_last()
            return drill_checks.checks_of_daemon(self._story, self._row, self._epochs, saved)
        drill_checks.check_hit(self._how, self._story)
        return drill_checks.checks_of_task(self._how, self._story, self._saved_at_last())

    def _document(self, checks: list[Check], *, is_passed: bool) -> dict[str, Any]:
        start = self._story.start
        return {
            "task": self._task,
            "how": self._how,
            "passed": is_passed,
            "attempts": [self._before.row.attempt, start.attempt if start else None],
            **self._figures(),
            "lost_items": drill_counts.items_lost(self._story),
            "checks": [{"name": c.name, "holds": c.holds, "text": c.text} for c in checks],
        }

    def _figures(self) -> dict[str, float | None]:
        found = drill_watch.figures(self._story)
        if self._answer_ns:
            found["daemon_back_s"] = (self._answer_ns - self._story.hit_ns) / drill_watch.SECOND_NS
        return found

    def _facts(self) -> list[tuple[str, str]]:
        found, start = self._figures(), self._story.start
        began = f", as attempt {start.attempt}, pid {start.fields['pid']}" if start else ""
        since = "its end" if start is not None else "the blow"
        signs = [("gets on", found["progress_s"])]
        signs += [("where it was", found["back_s"])] if start is not None else []
        signs.sort(key=lambda sign: sign[1] or 0.0)
        return [
            ("drill", f"{self._how} of {_what(self._before.row)}"),
            ("work lost", drill_counts.lost_text(self._story)),
            ("ended", _after(found["ended_s"], "the blow")),
            ("daemon back", _after(found.get("daemon_back_s"), "the blow")),
            ("runs again", _after(found["restart_s"], since, began)),
            *((name, _after(seconds, since)) for name, seconds in signs),
        ]


def _after(seconds: float | None, since: str, more: str = "") -> str:
    return "" if seconds is None else f"{short_text(seconds)} after {since}{more}"


def _exit_text(code: int) -> str:
    return f"exit {code}" if code > 0 else units.signal_name(-code)


def _not_proven(checks: list[Check], story: Story) -> str:
    unseen = [check.name for check in checks if check.holds is None]
    is_mute = story.handed is not None and story.base is None
    how = "let it save how far it is: ckpt save --progress 50/400, or ctx.set_progress"
    hints = (
        how if "checkpoint" in unseen and is_mute else "",
        "a slow task takes a longer --within" if "progress" in unseen else "",
    )
    return "; ".join(
        ("not proven, for what was not seen: " + ", ".join(unseen), *filter(None, hints))
    )


def _check_text(check: Check) -> str:
    return f"{_HOLDS[check.holds]}  {check.text}"
