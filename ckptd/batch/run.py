"""`run DIR`: what comes before the first turn and after the last.

Before: the lock, the end of whatever an earlier run left alive, the ledger, who is suspect, the
choice. After: the end in the ledger, a summary, the exit code.

An item in flight when a runner was killed in this boot is watched: after the second such death
it runs with nobody beside it, once the others are done; at the third death alone it is
quarantined. A stop in order, a reboot, or the death of a runner with others in flight quarantine
nobody. Read next: `runner.py`.
"""

import contextlib
import os
import select
import sys
import time
from typing import Any, Final

from msgspec.structs import replace

from ckptd.batch import itemdir, ledger, place, spec
from ckptd.batch.choose import BAD, choose, errors_allowed
from ckptd.batch.command import Commands, check_program, fields_of
from ckptd.batch.contact import Contact
from ckptd.batch.functions import Functions
from ckptd.batch.job import Job, Line, Setting, Workers
from ckptd.batch.ledger import Ledger
from ckptd.batch.meter import Meter, Printed, Tally
from ckptd.batch.pace import Pace
from ckptd.batch.place import Batch, Item, Next
from ckptd.batch.refusal import (
    BAD_DATA,
    FAILED,
    INTERRUPTED,
    LOST,
    PARKED,
    TRANSIENT,
    Refused,
    count,
)
from ckptd.batch.runner import DEATHS_MAX, Parts, Runner
from ckptd.storage import facts
from ckptd.storage.journal import Fact, StaleAttempt, TooLarge
from ckptd.storage.taskdir import this_boot_id
from ckptd.storage.untrusted import Damaged, NotTrusted, is_empty

# Every park ends a run, and a ledger holds 10,000: a slow rate must not use them up.
_RUNS_SPARED: Final = 5_000
_PARK_LATE_S: Final = 3_600.0
SHARED_DEATHS_MAX: Final = 2  # runners killed with an item in flight, before it runs alone


def run(path: str, knobs: dict[str, Any], *, waits: bool) -> int:
    """Work on a batch; return the exit code.

    Raises:
        Refused: it cannot be begun, or not gone on with; what was recorded is kept.

    Durable: every result that was told.
    """
    name = place.load(path).name
    contact = Contact()
    contact.listen()
    try:
        with place.locked(path, name, contact.task or None):
            batch = _with(place.load(path), path, knobs)  # as it stands now that nobody changes it
            return _Run(path, batch, contact).work(waits=waits)
    except place.Held as held:
        refused = held.refusal()
        refused.code = TRANSIENT if contact.is_under_daemon else refused.code
        raise refused from None
    except StaleAttempt as stale:
        raise Refused(f"{stale}; the new one goes on", code=PARKED) from stale
    except (Damaged, NotTrusted, TooLarge) as bad:
        hint = "results before that are kept; `--fresh` archives the ledger and starts anew"
        raise Refused(f"the ledger takes nothing more: {bad}", hint, code=BAD_DATA) from bad
    finally:
        contact.close()


def dry_run(path: str, knobs: dict[str, Any]) -> int:
    """Print the keys that a run would work on, one a line; changes nothing."""
    batch = _with(place.load(path), path, knobs)
    chosen = choose(batch, place.load_items(path), ledger.read(path, batch))
    sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # a text stream
    for item in chosen.todo:
        print(item.key)
    print(f"batch {batch.name}: {count(len(chosen.todo), 'item')} would run", file=sys.stderr)
    return 0


def _with(batch: Batch, path: str, knobs: dict[str, Any]) -> Batch:
    if not knobs:
        return batch
    wanted = spec.parse(knobs, batch.config, batch.knobs)
    now = replace(batch, knobs=wanted.knobs)
    if "limit" in knobs:  # said for this run: what ran before does not count
        now.next = replace(batch.next, base_run=place.newest_run(path))
    return now


class _Run:
    """One run, with the batch locked."""

    def __init__(self, path: str, batch: Batch, contact: Contact) -> None:
        self.path, self.batch, self.contact = path, batch, contact
        self.known = ledger.read(path, batch, is_acted_on=True)
        self.items = list(place.load_items(path))
        self.chosen = choose(batch, self.items, self.known)
        self.meter = Meter(batch.name, len(self.items))
        base = itemdir.base_environment(path, batch.name, os.environ)
        self.setting = Setting(path, batch.name, batch.id, batch.config.cwd, base)
        results = self.known.items
        self.tally = Tally(
            ledger.counts(
                {item.key: results[item.key] for item in self.items if item.key in results}
            ),
            len(self.items),
            self.chosen.bad,
            errors_allowed(batch.knobs, self.chosen.selected),
        )
        self.lost = ""  # why stdout did not take all that items printed

    def work(self, *, waits: bool) -> int:
        """Do it; return the exit code."""
        self._end_leftovers("an earlier run left alive")
        if not self.chosen.todo:
            self._spend(self.batch.next.base_run)
            return self._summed_up("finished", 0.0)
        if not os.path.isdir(self.setting.cwd):
            raise Refused(f"the working directory {self.setting.cwd} is gone", code=FAILED)
        if self.batch.config.argv:
            try:
                check_program(self.batch.config, self.setting.env)
            except Refused as refused:
                refused.code = FAILED  # under the daemon 1 says: a person must look
                raise
        jobs = [self._job(item) for item in self.chosen.todo]
        poison = [job for job in jobs if job.alone_deaths >= DEATHS_MAX]
        self.contact.learnt(sum(job.run_deaths + job.alone_deaths for job in jobs))
        began_s = time.monotonic()
        run_number = ledger.begin(self.path)
        opened = Ledger(self.path, self.batch, run_number)
        try:
            opened.append(self._opening() + [_quarantined(job) for job in poison])
            self._count(poison)
            jobs = [job for job in jobs if job.alone_deaths < DEATHS_MAX]
            self._sweep(jobs)
            runner, why = self._run(jobs, opened, run_number, waits=waits)
            opened.append([self._end_event(why)])
        finally:
            opened.close()
        self._end_leftovers("left their items' groups")
        if why == "finished" and not self.chosen.left:
            self._spend(run_number)
        if why == "parked":
            self.contact.park(runner.wait_left_s, self.batch.knobs.scope)
        return self._summed_up(why, time.monotonic() - began_s)

    def _run(
        self, jobs: list[Job], opened: Ledger, run_number: int, *, waits: bool
    ) -> tuple[Runner, str]:
        epoll, config, knobs = select.epoll(), self.batch.config, self.batch.knobs
        if self.contact.is_under_daemon and run_number > _RUNS_SPARED:
            knobs = replace(knobs, park_after_s=max(knobs.park_after_s, _PARK_LATE_S))
        workers: Workers = (
            Commands(self.setting, config, fields_of(self.items), epoll)
            if config.argv
            else Functions(self.setting, config, knobs, epoll)
        )
        printed = Printed(self.path, run_number)
        pace = Pace(self.batch, time.monotonic())
        if pace.warning:
            self.meter.say(pace.warning)
        parts = Parts(
            self.setting,
            knobs,
            config.timeout_s,
            opened,
            self.contact,
            workers,
            epoll,
            pace,
            Line(jobs, knobs.workers),
            self.tally,
            printed,
            self.meter,
            {job.item.key: self._status_of(job.item.key) for job in jobs},
            waits,
        )
        runner = Runner(parts)
        try:
            return runner, runner.run()
        except Exception as error:
            # In order, too: what was in flight did not end this run, a full disk or so did.
            workers.close()
            itemdir.empty_outputs(self.path)
            why = "refused" if isinstance(error, Refused) else "trouble"
            with contextlib.suppress(OSError, Damaged, NotTrusted, TooLarge, StaleAttempt):
                opened.append([self._end_event(why)])
            raise
        finally:
            workers.close()
            itemdir.remove_spares(self.setting)
            self.lost = printed.lost
            printed.close()
            epoll.close()
            self.meter.clear()

    def _status_of(self, key: str) -> str:
        return str(self.known.items[key]["status"]) if key in self.known.items else ""

    def _job(self, item: Item) -> Job:
        """Return an item in play, with what earlier runs tell of it."""
        job = Job(item, place.item_number(self.batch.id, item.key))
        before = self.known.flying.get(item.key)
        result = self.known.items.get(item.key)
        told = before or result or {}
        job.has_dir = before is not None
        job.lane, job.tries = int(told.get("lane", -1)), int(told.get("tries", 0))
        if before is not None:
            job.run_deaths = int(before.get("run_deaths", 0))
            job.alone_deaths = int(before.get("alone_deaths", 0))
            job.is_suspect = bool(before.get("suspect"))
            if self._was_killed(int(before["attempt"])):
                job.run_deaths += not before.get("alone")
                job.alone_deaths += bool(before.get("alone"))
            job.is_alone = job.run_deaths >= SHARED_DEATHS_MAX
        return job

    def _was_killed(self, run_number: int) -> bool:
        """Return whether a run without an end died in this boot: not with the machine."""
        boots = [one.get("boot") for one in self.known.runs if one["attempt"] == run_number]
        return this_boot_id() in boots

    def _opening(self) -> list[Fact]:
        batch = self.batch
        began = ledger.begin_event(batch, len(self.items), batch.knobs.workers, self.contact.task)
        group = [began, *ledger.accepted_events(batch, self.known)]
        pause = ledger.open_pause(self.known)
        if pause is not None:
            waited_s = max(0.0, (time.time_ns() - int(pause["at_ns"])) / 1e9)
            group.append(facts.run_event("resume", waited_s=round(waited_s, 3)))
        return group

    def _count(self, poison: list[Job]) -> None:
        self.tally.bad += len(poison)
        for job in poison:
            self.tally.took(self._status_of(job.item.key), "quarantined")
            self.meter.say(f"quarantined {job.item.key[:80]!r}: its runners died with it alone")

    def _sweep(self, jobs: list[Job]) -> None:
        """Keep the directories of what has no result yet, whether it runs now or not."""
        if is_empty(f"{self.path}/items"):
            return
        open_ones = (item for item in self.items if item.key not in self.known.items)
        kept = {place.item_number(self.batch.id, item.key) for item in open_ones}
        itemdir.sweep(self.path, kept | {job.number for job in jobs})

    def _end_leftovers(self, what: str) -> None:
        killed = itemdir.end_leftovers(self.path)
        if killed:
            self.meter.say(f"ended {count(killed, 'process', 'processes')} that {what}")

    def _end_event(self, why: str) -> Fact:
        return facts.run_event("end", why=why, ran=self.tally.ran, done=self.tally.done)

    def _spend(self, run_number: int) -> None:
        """Forget what was wished for this run alone: it is done."""
        if self.batch.next.only or self.batch.next.statuses:
            stored = place.load(self.path)
            stored.next = Next(base_run=run_number)
            place.store(self.path, stored)

    # --- the end ---------------------------------------------------------------------------------

    def _summed_up(self, why: str, seconds: float) -> int:
        """Print how it came out; return the exit code."""
        tally, left = self.tally, len(self.items) - self.tally.done
        said = ", ".join(f"{number:,} {status}" for status, number in tally.seen().items())
        is_cut = why == "finished" and bool(self.chosen.left)
        how = "stopped at --limit" if is_cut else _WORDS.get(why, f"stopped ({why})")
        text = f"{how}: {count(tally.total, 'item')}"
        text += f", {said}" if said else ""
        text += f", {left:,} to do" if left else ""
        if tally.ran:
            text += f"; ran {tally.ran:,} in {seconds:.1f} s"
        elif why == "finished":
            text += "; nothing to run"
        self.meter.say(text)
        self.contact.tell_now(tally.done, tally.total, text, time.monotonic())
        if self.lost:
            where = f"all of it is in: ckptctl batch logs {self.batch.name}"
            self.meter.say(f"not all that items printed is on stdout: {self.lost}; {where}")
        # With `--only` others may be bad as before; it asked for these alone.
        is_part = bool(self.batch.next.only)
        bad = tally.bad if is_part else sum(tally.counts.get(status, 0) for status in BAD)
        # The same line goes on, but where it names what is done: it would begin with that again.
        goes_on = is_cut and not is_part and not (self.batch.next.statuses and bad)
        if goes_on and not self.contact.is_under_daemon:  # which runs no task again for a limit
            return TRANSIENT
        if why == "finished":
            is_lost = self.lost and not self.contact.is_under_daemon  # which asks for results alone
            return FAILED if bad else LOST if is_lost else 0
        return _CODES.get(why, PARKED)


_WORDS: Final = {
    "finished": "finished",
    "max_errors": "stopped at --max-errors",
    "parked": "parked",
    "no_wait": "not finished, would have to wait",
    "interrupt": "interrupted",
}
_CODES: Final = {"max_errors": FAILED, "interrupt": INTERRUPTED, "no_wait": TRANSIENT}


def _quarantined(job: Job) -> Fact:
    text = f"its runner was killed {job.alone_deaths} times while nothing else ran"
    return facts.item_done(
        job.item.key, "quarantined", text=text, lane=max(0, job.lane), tries=job.tries, seconds=0.0
    )
