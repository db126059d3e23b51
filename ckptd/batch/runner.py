"""The turn: gather ends, judge, append one group, sync once, hand out the next items.

    gather -> judge -> ledger (one fdatasync) -> tell -> start -> gather -> ...

One thread, one epoll over pidfds, the pipes of hosts and the wake pipe of signals. While the disk
syncs, other items end; they are the next group. It holds no code of users: what an item does to
its process is seen from outside.
Invariant: a result is told, printed and its directory removed only once it is durable.
Invariant: an item is started only after its `item_start` is written, so a killed runner leaves
every item in flight named. Those ride unsynced: a power cut forgets them, and blames nobody.
Read next: `run.py` (before and after), `job.py`, `pace.py`.
"""

import json
import select
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ckptd.batch import itemdir, ledger
from ckptd.batch.choose import BAD
from ckptd.batch.contact import Contact
from ckptd.batch.job import Ended, How, Job, Line, Setting, Workers
from ckptd.batch.ledger import Ledger
from ckptd.batch.meter import Meter, Printed, Tally, span
from ckptd.batch.pace import Pace
from ckptd.batch.preflight import Preflight
from ckptd.batch.refusal import FAILED, Refused
from ckptd.batch.spec import Knobs
from ckptd.storage import facts
from ckptd.storage.journal import Fact

DEATHS_MAX: Final = 3  # deaths alone, then an item is quarantined
TRANSIENTS_MAX: Final = 100  # "not now" that often in a row is an error
_RETRY_S: Final = 0.5
_RETRY_S_MAX: Final = 8.0  # below the default of park_after_s: retries are counted in memory
_PAUSE_S: Final = 1.0  # a shorter wait is no pause
_KILL_S: Final = 2.0  # between SIGTERM and SIGKILL when we are stopped
_IDLE_S: Final = 0.5
_TEXT_CHARS_MAX: Final = 2_000
_OWN_STOPS: Final = ("", "max_errors", "interrupt")  # these reach this process alone


@dataclass(slots=True)
class Parts:
    """What a run is made of; `run.py` makes it."""

    setting: Setting
    knobs: Knobs
    timeout_s: float
    ledger: Ledger
    contact: Contact
    workers: Workers
    epoll: select.epoll
    pace: Pace
    line: Line
    tally: Tally
    printed: Printed
    meter: Meter
    old_status: dict[str, str]  # of items that have a result and run again
    waits: bool  # in place, where no daemon starts us again


class Runner:
    """One run, from the first turn to the last."""

    def __init__(self, parts: Parts) -> None:
        self._setting, self._knobs, self._timeout_s = parts.setting, parts.knobs, parts.timeout_s
        self._ledger, self._contact = parts.ledger, parts.contact
        self._workers, self._epoll = parts.workers, parts.epoll
        self._pace, self._line, self._tally = parts.pace, parts.line, parts.tally
        self._printed, self._meter = parts.printed, parts.meter
        self._old_status, self._waits = parts.old_status, parts.waits
        self._preflight: Preflight | None = None
        self._asks_preflight = bool(parts.knobs.preflight)
        self._has_turned = False
        self._late: list[Ended] = []  # of jobs that could not even be started
        self._paused_s = 0.0  # monotonic; 0: not paused
        self._facts: list[Fact] = []  # of the group under way, beside results
        self._stop_why = ""
        self._kill_s = 0.0  # when to go one rung up; 0: there is none
        self._rung = 0
        self.wait_left_s = 0.0  # when parked
        parts.epoll.register(parts.contact.wake_fd, select.EPOLLIN)

    def run(self) -> str:
        """Work until there is nothing left to do; return why: finished, or what kept it.

        Durable: every result that was told.
        """
        while True:  # Bound: every turn waits for an end, a time or a signal
            why = self._over(time.monotonic())
            if why:
                return why
            self._turn()

    def _turn(self) -> None:
        ends = self._gathered()
        now_s = time.monotonic()
        self._heed(now_s, looks_now=any(end.is_bad for end in ends))
        self._expire(now_s)
        results = [self._judged(end, now_s) for end in ends]
        told = [(end, fact) for end, fact in zip(ends, results, strict=True) if fact is not None]
        self._count_bad(fact for _, fact in told)
        trouble = next((end.trouble for end in ends if end.trouble is not None), None)
        starts = self._starts(now_s) if trouble is None else []
        group = [fact for _, fact in told] + self._facts + [self._start_of(job) for job in starts]
        self._facts = []
        self._ledger.append(group, is_synced=bool(told))
        self._tell(told, now_s)
        if trouble is not None:
            raise trouble
        for job in starts:
            end = self._workers.start(job)
            if end is not None:
                self._late.append(end)
        self._workers.send()
        self._show(time.monotonic())

    # --- gather ----------------------------------------------------------------------------------

    def _gathered(self) -> list[Ended]:
        ends, self._late = self._late, []
        is_due = bool(ends) or not self._has_turned
        self._has_turned = True
        for fd, events in self._epoll.poll(0 if is_due else self._timeout()):
            found = self._workers.take(fd, events)
            if found is not None:
                ends += found
            elif fd == self._contact.wake_fd:
                self._contact.drain()
            elif self._preflight is not None and fd == self._preflight.fd:
                self._answered(self._preflight)
        return ends

    def _timeout(self) -> float:
        now_s = time.monotonic()
        times = [job.ends_s for job in self._line.flying.values() if job.ends_s]
        times += [self._kill_s] if self._kill_s else []
        if not self._stop_why and self._line:
            times += [now_s + wait_s for wait_s in [self._wait_s(now_s)] if wait_s]
        return max(0.0, min([now_s + _IDLE_S, *times]) - now_s)

    def _wait_s(self, now_s: float) -> float:
        """Return for how long nothing can start, 0 where that is not a matter of time."""
        return max(self._pace.wait_s(now_s), self._line.due_s() - now_s, 0.0)

    # --- judge -----------------------------------------------------------------------------------

    def _judged(self, end: Ended, now_s: float) -> Fact | None:
        """Return the fact for the ledger; None where the item runs again."""
        job = end.job
        self._line.landed(job)
        # SIGTERM may have gone to the whole tree: what it did to an item is not the item's doing.
        is_stopped = end.is_bad and self._stop_why not in _OWN_STOPS
        match How.INNOCENT if is_stopped and not job.is_timed_out else end.how:
            case How.RESULT:
                return self._result(end, now_s)
            case How.TRANSIENT:
                job.transients += 1
                if job.transients > TRANSIENTS_MAX:
                    text = f"still not, after {TRANSIENTS_MAX} times: {end.text or 'exit 75'}"
                    return self._fact(end._replace(status="error", text=text), now_s)
                self._pace.hit(end.retry_after_s, end.scope, now_s)
                # It may be its own trouble and no limit: the others get their turn first.
                self._line.again(job, is_last=job.transients > 1)
            case How.LATER:
                self._line.again(job, now_s + max(end.retry_after_s, 0.001))
            case How.DIED:
                job.alone_deaths += 1
                job.is_suspect = True
                if job.alone_deaths >= DEATHS_MAX:
                    return self._fact(end._replace(status="quarantined", text=_dead(end)), now_s)
                self._line.again(job)
            case How.SUSPECT:
                job.is_suspect = True
                self._line.again(job)
            case How.AGAIN | How.INNOCENT | How.TROUBLE:
                self._line.again(job)
        return None

    def _result(self, end: Ended, now_s: float) -> Fact | None:
        job = end.job
        if end.status == "error" and not end.is_final and job.failures < self._knobs.retries:
            delay_s = min(_RETRY_S * 2.0**job.failures, _RETRY_S_MAX)
            job.failures += 1
            self._line.again(job, now_s + delay_s)
            return None
        self._pace.succeeded()
        return self._fact(end, now_s)

    @staticmethod
    def _fact(end: Ended, now_s: float) -> Fact:
        job = end.job
        return facts.item_done(
            job.item.key,
            end.status,
            end.result,
            end.text[:_TEXT_CHARS_MAX],
            lane=job.lane,
            tries=job.tries,
            seconds=round(now_s - job.began_s, 6),
        )

    def _count_bad(self, found: Iterable[Fact]) -> None:
        """Hand out nothing more once there are more bad results than were allowed."""
        tally = self._tally
        tally.bad += sum(fact["status"] in BAD for fact in found)
        if tally.bad > tally.allowed and not self._stop_why:
            self._stop_why = "max_errors"
            self._meter.say(f"stops: {tally.bad} bad results are more than --max-errors")

    # --- start -----------------------------------------------------------------------------------

    def _starts(self, now_s: float) -> list[Job]:
        """Return the items to hand out once they are in the ledger."""
        starts: list[Job] = []
        if self._stop_why or self._preflight is not None or self._pace.wait_s(now_s):
            return starts
        while len(self._line.flying) < self._pace.limit:  # Bound: the limit
            job = self._line.next(now_s, self._workers.can_start)
            if job is None:
                break
            if self._asks_preflight:
                self._line.again(job)
                self._ask_preflight(now_s)
                break
            if self._pace.take(now_s):
                self._line.again(job)
                break
            self._line.flies(job)
            job.tries += 1
            job.began_s = now_s
            job.ends_s = now_s + self._timeout_s if self._timeout_s else 0.0
            job.is_timed_out = job.is_signalled = False
            starts.append(job)
        if starts and self._paused_s:
            self._resumed(now_s)
        return starts

    @staticmethod
    def _start_of(job: Job) -> Fact:
        more = {
            name: value
            for name, value in (
                ("run_deaths", job.run_deaths),
                ("alone_deaths", job.alone_deaths),
                ("suspect", job.is_suspect),
                ("alone", job.is_alone),
            )
            if value
        }
        return facts.item_start(job.item.key, lane=job.lane, tries=job.tries, **more)

    def _resumed(self, now_s: float) -> None:
        waited_s = now_s - self._paused_s
        self._facts.append(facts.run_event("resume", waited_s=round(waited_s, 3)))
        self._meter.say(f"goes on after {span(waited_s)}")
        self._paused_s = 0.0

    # --- tell ------------------------------------------------------------------------------------

    def _tell(self, told: list[tuple[Ended, Fact]], now_s: float) -> None:
        """Invariant: called once the facts are durable."""
        for end, fact in told:
            key, status = end.job.item.key, str(fact["status"])
            self._tally.took(self._old_status.pop(key, ""), status)
            if end.out or end.err:
                self._meter.clear()
            self._printed.tell(end, status, float(fact["seconds"]))
            if end.job.has_dir:
                itemdir.retire(self._setting, end.job.number)
        if told:
            self._meter.ended(self._tally.done, now_s)
        if self._printed.is_unread and not self._stop_why:
            self._meter.say("nobody reads what it prints any more")
            self._contact.interrupts += 1

    def _show(self, now_s: float) -> None:
        done, total = self._tally.done, self._tally.total
        self._meter.draw(done, len(self._line.flying), self._tally.seen(), now_s)
        text = f"{done} of {total} items"
        self._contact.tell(done, total, text, now_s)

    # --- wait and stop ---------------------------------------------------------------------------

    def _over(self, now_s: float) -> str:
        """Return why the run ends here, "" while it goes on."""
        if self._line.flying or self._late or self._preflight is not None:
            return ""
        if self._stop_why:
            return self._stop_why
        if not self._line:
            return "finished"
        wait_s = self._wait_s(now_s)
        is_long = wait_s > self._knobs.park_after_s
        is_pause = is_long or (wait_s >= _PAUSE_S and self._pace.is_limited(now_s))
        if is_pause and not self._paused_s:
            self._pause(wait_s, now_s)
        if is_long:
            if self._contact.is_under_daemon:
                self.wait_left_s = wait_s
                return "parked"
            if not self._waits:
                return "no_wait"
        return ""

    def _pause(self, wait_s: float, now_s: float) -> None:
        self._paused_s = now_s
        self._asks_preflight = bool(self._knobs.preflight)
        pause = ledger.pause_event(self._pace.why, self._pace.scope, wait_s)
        self._ledger.append([pause], is_synced=False)
        until = time.strftime("%H:%M:%S", time.localtime(time.time() + wait_s))
        why = self._pace.why.replace("_", " ")
        self._meter.say(f"waits {span(wait_s)} until {until} ({why})")
        self._contact.status(f"waiting until {until}: {why}")

    def _ask_preflight(self, now_s: float) -> None:
        try:
            self._preflight = Preflight(self._setting, self._knobs, now_s)
        except OSError as error:
            text = f"the preflight cannot be started: {error}"
            raise Refused(text, "nothing more was run", code=FAILED) from error
        self._preflight.watch(self._epoll)

    def _answered(self, preflight: Preflight) -> None:
        self._preflight = None
        answer = preflight.answer(self._epoll)
        if answer.wait_s:
            self._pace.hold(answer.wait_s, "preflight", time.monotonic())
        elif answer.refusal and not self._stop_why:
            raise Refused(answer.refusal, "nothing more was run", code=FAILED)
        else:
            self._asks_preflight = False

    def _expire(self, now_s: float) -> None:
        for job in list(self._line.flying.values()):
            if job.ends_s and now_s >= job.ends_s:
                self._workers.expire(job)
                job.ends_s = now_s + 1.0  # looked at again: SIGKILL comes later
        if self._preflight is not None and now_s >= self._preflight.ends_s:
            self._preflight.expire()

    def _heed(self, now_s: float, *, looks_now: bool) -> None:
        """Stop where somebody asks for it: leave, then SIGTERM, then SIGKILL."""
        reason = self._contact.stop_reason(now_s, looks_now=looks_now)
        if reason and self._stop_why in ("", "max_errors"):
            self._begin_to_stop(reason, now_s)
        elif self._kill_s and (now_s >= self._kill_s or self._contact.interrupts > self._rung + 1):
            self._rung += 1
            self._kill_s = now_s + _KILL_S
            is_first = self._rung == 1 and self._contact.interrupts < 2
            self._workers.stop(signal.SIGTERM if is_first else signal.SIGKILL)

    def _begin_to_stop(self, reason: str, now_s: float) -> None:
        self._stop_why = reason
        grace_s = self._contact.grace_s(self._knobs.grace_s)
        self._kill_s = now_s + grace_s
        flying = self._line.flying
        deadline = {"stop": reason, "deadline": time.time() + grace_s, "checkpoint": 0}
        itemdir.ask_to_stop(self._setting.path, list(flying), json.dumps(deadline).encode())
        if self._preflight is not None:
            self._preflight.stop()
        if flying:
            more = "; Ctrl-C again ends them" if reason == "interrupt" else ""
            self._meter.say(
                f"stopping ({reason}): {len(flying)} in flight may end within {grace_s:.3g} s{more}"
            )


def _dead(end: Ended) -> str:
    return f"ended its worker {end.job.alone_deaths} times, alone in it: {end.text}"
