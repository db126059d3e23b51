"""The machine's side: jobs that count items, save, fail and die, and the runner that sees them.

What really happens here is the truth that the model compares with what clients are told. A job's
command says how it behaves: `job UNIQUE ITEMS ITEM_S SAVES MOOD`.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

from ckptd.core.port import (
    Control,
    Delete,
    Deliver,
    DropCheckpoints,
    Effect,
    EndSeen,
    Forget,
    Sighting,
    Start,
)
from tests.fakes.sim_runner import Plan, SimAttempt, SimMachine, SimRunner, Step
from tests.sim.agenda import Agenda, SimClock
from tests.sim.model import Model

SIGTERM, SIGKILL = 15, 9
MOODS = ("calm", "flaky", "crashing", "hungry", "parking", "stubborn", "usage")
POLITE_CODE = 85  # saved, asks to be started again


class Job(NamedTuple):
    """How one task behaves, as its command says it."""

    unique: str
    items: int
    item_s: float
    saves: bool
    mood: str

    def argv(self) -> tuple[str, ...]:
        saves = "saves" if self.saves else "-"
        return "job", self.unique, str(self.items), f"{self.item_s:.3f}", saves, self.mood


def job_of(argv: tuple[str, ...]) -> Job:
    _, unique, items, item_s, saves, mood = argv
    return Job(unique, int(items), float(item_s), saves == "saves", mood)


class Accident(NamedTuple):
    """What happens to one attempt before it is done, and after how many of its items."""

    after: int
    cause: str
    code: int = 0
    signal: int = 0
    blame: str = ""


_ACCIDENTS = {
    "flaky": (("exit", 1), ("exit", 1), ("exit", 75)),
    "crashing": (("signal", 11), ("signal", 9), ("exit", 1)),
    "hungry": (("oom", 9),),
    "parking": (("exit", 75), ("exit", 85)),
    "usage": (("exit", 64), ("spawn_error", 2), ("spawn_error", 11)),
}
_BLAMES = {"oom": ("limit", "host"), "exit": ("", "", "", "disk")}


class JobMachine(SimMachine):
    """The machine of `sim_runner`, in simulated time and with work to do."""

    def __init__(self, agenda: Agenda, clock: SimClock, dice: random.Random, model: Model) -> None:
        super().__init__(self._ordered)
        self.agenda, self.clock, self.dice, self.model = agenda, clock, dice, model
        self.random = dice
        self.delay_s = 0.01  # the longest from cause to effect
        self.accidents = 0.5  # chance for an attempt of a job that has a mood
        self.on_begin: Callable[[SimAttempt], None] = lambda _: None
        self.items: dict[tuple[int, int], int] = {}  # done by an attempt's task so far
        self.saved: dict[int, int] = {}  # items in the newest checkpoint of a task
        self.dying: set[tuple[int, int]] = set()  # dead, without an exit record yet
        self._orders = 0
        self._taken_up: dict[tuple[int, int], int] = {}
        self.happened = {"shim_death": 0, "task_death": 0, "oom": 0, "late_order": 0}

    def later(self, act: Callable[[], None]) -> None:
        self.agenda.after(self.dice.random() * self.delay_s, act)

    def tick_clock(self) -> None:
        self.now_ns = self.clock.wall_ns()

    # --- orders -----------------------------------------------------------------------------------

    def _ordered(self, start: Start) -> Plan:
        key = (start.task, start.attempt)
        if start.fresh:
            self.saved.pop(start.task, None)
            self.model.dropped(start.task, "fresh")
        self._order(key, self.dice.random() * self.delay_s)
        job = job_of(start.argv)
        return Plan(ignores=(SIGTERM,) if job.mood == "stubborn" else ())

    def _order(self, key: tuple[int, int], delay_s: float) -> None:
        """Let a supervisor take an order up then, and at no other time that was said before."""
        self._orders += 1
        number = self._taken_up[key] = self._orders
        self.agenda.after(delay_s, lambda: self._carried_out(key, number))

    def _carried_out(self, key: tuple[int, int], number: int) -> None:
        """A supervisor takes an order up: also one of a daemon that is gone, unless fenced."""
        one = self.attempts.get(key)
        if self._taken_up.get(key) != number:
            return
        if one is None or one.step is not Step.ORDERED or key in self.refused:
            return
        self.tick_clock()
        if one.reign != self._reigns or self.viewer is None:
            self.happened["late_order"] += 1
        one.reign = self._reigns
        self.on_begin(one)
        done = self.saved.get(one.start.task, 0)
        self.items[key] = done
        self.begin(one)
        self.model.begun(*key, done)
        if one.step is Step.RUNNING:
            self._work_on(one, self._accident(one, job_of(one.start.argv), done))

    def forget_orders(self) -> None:
        """The daemon died: an order that no supervisor has read is lost, or late."""
        for one in list(self.attempts.values()):
            if one.step is not Step.ORDERED:
                continue
            if self.dice.random() < 0.3:
                del self.attempts[one.key]
            elif self.dice.random() < 0.5:
                self._order(one.key, self.dice.choice([0.01, 1.0, 10.0]))

    # --- work -------------------------------------------------------------------------------------

    def _accident(self, one: SimAttempt, job: Job, done: int) -> Accident | None:
        kinds = _ACCIDENTS.get(job.mood, ())
        if not kinds or self.dice.random() >= self.accidents:
            return None
        cause, number = self.dice.choice(kinds)
        after = 0 if cause == "spawn_error" else self.dice.randrange(job.items - done + 1)
        is_signal = cause in {"signal", "oom"}
        return Accident(
            after,
            cause,
            code=0 if is_signal else number,
            signal=number if is_signal else 0,
            blame=self.dice.choice(_BLAMES.get(cause, ("",))),
        )

    def _work_on(self, one: SimAttempt, accident: Accident | None) -> None:
        job = job_of(one.start.argv)
        if accident is not None and accident.after == 0:
            self.agenda.after(0.001, lambda: self._end(one, accident))
        elif self.items[one.key] >= job.items:  # all was saved, only the end is missing
            self.agenda.after(0.001, lambda: self._end(one, Accident(0, "exit")))
        else:
            self.agenda.after(job.item_s, lambda: self._tick(one, job, accident))

    def _is_at_work(self, one: SimAttempt) -> bool:
        return (
            self.attempts.get(one.key) is one
            and one.step is Step.RUNNING
            and one.key not in self.dying
        )

    def _tick(self, one: SimAttempt, job: Job, accident: Accident | None) -> None:
        """Finish one item; save it, where the job saves, in a step of its own."""
        if not self._is_at_work(one):
            return
        self.tick_clock()
        if one.is_frozen:
            self._work_on(one, accident)
            return
        if self.items[one.key] < job.items:
            self.items[one.key] += 1
            self.model.did(*one.key, self.items[one.key])
        if accident is not None:
            accident = accident._replace(after=accident.after - 1)
        self.later(lambda: self._after_item(one, job, accident))

    def _after_item(self, one: SimAttempt, job: Job, accident: Accident | None) -> None:
        if not self._is_at_work(one):
            return
        self.tick_clock()
        if job.saves:
            self.saved[one.start.task] = self.items[one.key]
            number = self.publish(*one.key)
            self.model.saved(*one.key, number, self.items[one.key])
        control = self.controls.get(one.start.task)
        asked = control is not None and control.attempt == one.start.attempt and control.stop
        if asked and job.saves:
            self._end(one, Accident(0, "exit", POLITE_CODE))
        elif accident is not None and accident.after <= 0:
            self._end(one, accident)
        elif self.items[one.key] >= job.items:
            self._end(one, Accident(0, "exit"))
        else:
            self._work_on(one, accident)

    def _end(self, one: SimAttempt, how: Accident) -> None:
        if self._is_at_work(one):
            self.tick_clock()
            self.finish(*one.key, how.cause, how.code, how.signal, blame=how.blame)

    # --- ends -------------------------------------------------------------------------------------

    def finish(  # noqa: PLR0917 - the end as the machine of the fakes has it
        self,
        task: int,
        attempt: int,
        cause: str = "exit",
        code: int = 0,
        signal: int = 0,
        text: str = "",
        blame: str = "",
        **_: object,
    ) -> None:
        """The main process is gone; its exit record follows, or is lost with its shim."""
        one = self.attempts[task, attempt]
        if one.key in self.dying:
            return
        self.happened["oom"] += cause == "oom"
        self.happened["task_death"] += cause != "exit"
        self.dying.add(one.key)
        end = EndSeen(
            task, attempt, cause, code, signal, started_ns=one.started_ns,
            ended_ns=self.now_ns, text=text, blame=blame,
        )  # fmt: skip
        self.later(lambda: self._record(one, end))

    def _record(self, one: SimAttempt, end: EndSeen) -> None:
        """The exit record is durable; from here on the end is known for ever."""
        if self.attempts.get(one.key) is not one or one.step is not Step.RUNNING:
            return
        self.dying.discard(one.key)
        one.step = Step.ENDED
        one.end = end
        self.model.ended(*one.key, end.cause, end.code, end.signal, end.blame)
        self._tell_end(one)

    def kill_supervisor(self, task: int, attempt: int) -> None:
        """SIGKILL the supervisor: nobody can ever know how its task would have ended."""
        one = self.attempts[task, attempt]
        self.tick_clock()
        self.happened["shim_death"] += 1
        end = EndSeen(task, attempt, "lost", started_ns=one.started_ns, ended_ns=self.now_ns)
        self._record(one, end)

    def signal(self, one: SimAttempt, number: int) -> None:
        self.tick_clock()
        if one.key not in self.dying:
            super().signal(one, number)

    def reboot(self) -> None:
        """Cut the power: what ran is gone, and sometimes even its claim."""
        for one in list(self.attempts.values()):
            if one.step is Step.ORDERED:
                del self.attempts[one.key]
            elif one.step is Step.RUNNING:
                self.model.vanished(*one.key)
        super().reboot()
        self.dying.clear()
        for one in list(self.attempts.values()):
            if one.end is not None and one.end.cause == "reboot" and self.dice.random() < 0.2:
                del self.attempts[one.key]


class JobRunner(SimRunner):
    """One daemon's view; sightings are late, orders may be the last thing that a daemon does."""

    def __init__(self, machine: JobMachine, edge: Callable[[str, str], None]) -> None:
        self._edge = edge
        self._told_ns = 0
        self._is_closed = False
        self.on_news: Callable[[], None] = lambda: None
        super().__init__(machine)
        self.jobs = machine

    @property
    def has_news(self) -> bool:
        return bool(self._seen)

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            super().close()

    def see(self, sighting: Sighting) -> None:
        """Let the daemon see it a moment later, in order."""
        agenda = self.jobs.agenda
        delay_ns = int(self.jobs.dice.random() * self.jobs.delay_s * 1e9)
        self._told_ns = max(self._told_ns, agenda.elapsed_ns + delay_ns)
        agenda.at(self._told_ns, lambda: self._arrive(sighting))

    def _arrive(self, sighting: Sighting) -> None:
        if not self._is_closed:
            super().see(sighting)
            self.on_news()

    def adopt(self, task: int, attempt: int) -> None:
        self._edge("adopt", f"{task}.{attempt}")
        self.jobs.tick_clock()
        super().adopt(task, attempt)

    def carry_out(self, effect: Effect) -> None:
        self._edge("order", type(effect).__name__)
        jobs, model = self.jobs, self.jobs.model
        jobs.tick_clock()
        match effect:
            case Forget(task=task, attempt=attempt):
                model.forgotten(task, attempt)
            case Delete(task=task):
                jobs.saved.pop(task, None)
                model.deleted(task)
            case DropCheckpoints(task=task):
                jobs.saved.pop(task, None)
                model.dropped(task, "success")
            case Deliver(task=task, attempt=attempt, signal=number):
                model.signalled(task, attempt, number)
            case Control(task=task, attempt=attempt, stop=why) if why:
                model.told_to_stop(task, attempt)
            case _:
                pass
        super().carry_out(effect)
