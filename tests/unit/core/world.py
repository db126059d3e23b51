"""A State driven by hand: commands, sightings and time in, records and effects out. No I/O."""

from msgspec.structs import replace

from ckptd.core import outcome
from ckptd.core.apply import apply
from ckptd.core.decide import Case, decide
from ckptd.core.plan import Adopt, Observed, effects, intents
from ckptd.core.policy import Caller, Now, Policy
from ckptd.core.port import Effect, EndSeen, Identity, MarkSeen, StartSeen
from ckptd.core.records import AnyRecord, Phase
from ckptd.core.state import State, Task
from ckptd.protocol import messages as m

SECOND = 1_000_000_000
ME = Caller(1000, 1000, admin=False)
ROOT = Caller(0, 0, admin=True)


class World:
    """One machine's worth of tasks under a clock that the test turns."""

    def __init__(self, *, slots: int = 2, **policy: float) -> None:
        self.state = State()
        self.observed = Observed()
        self.policy = replace(Policy(slots=slots), **policy)
        self.log: list[AnyRecord] = []
        self.orders: list[Effect | Adopt] = []
        self.at_ns = 1_000 * SECOND
        self.starts = 64
        self.told = 0  # records of which the effects were taken

    @property
    def now(self) -> Now:
        return Now(self.at_ns, seed=7)

    def put(self, records: list[AnyRecord]) -> None:
        for record in records:
            apply(self.state, self.state.lsn + 1, record)
            self.log.append(record)

    def ask(self, command: m.Message, caller: Caller = ME) -> m.Answer:
        case = Case(self.state, caller, self.now, self.policy)
        records, answer = decide(case, command)
        self.put(records)
        self.turn()
        return answer

    def submit(self, *argv: str, caller: Caller = ME, **spec: object) -> int:
        task = m.TaskSpec(argv=argv or ("true",), **spec)  # type: ignore[arg-type]
        answer = self.ask(m.Submit((task,)), caller)
        assert isinstance(answer, m.Submitted)
        return answer.ids[0]

    def turn(self) -> None:
        """Plan until at rest, then take the effects."""
        touched_all: set[int] = set()
        for _ in range(100):
            touched = self.state.touched | self.state.removed
            self.state.touched, self.state.removed = set(), set()
            touched_all |= touched
            records = intents(
                self.state,
                self.observed,
                touched,
                self.now,
                self.policy,
                starts=self.starts,
            )
            if not records:
                break
            self.put(records)
        news, self.told = self.log[self.told :], len(self.log)
        self.orders += effects(self.state, self.observed, touched_all, news)

    def pass_time(self, seconds: float) -> None:
        self.at_ns += int(seconds * SECOND)
        self.turn()

    def task(self, number: int) -> Task:
        task = self.state.tasks.get(number)
        assert task is not None
        return task

    def phase(self, number: int) -> Phase:
        return self.task(number).phase

    def begins(self, number: int, invocation: str = "", resumed_from: int = 0) -> None:
        seen = StartSeen(
            number, self.attempt(number), self.shim(number), 20_000 + number, self.at_ns,
            resumed_from, invocation=invocation,
        )  # fmt: skip
        self.put(outcome.started(self.state, seen))
        self.turn()

    def shim(self, number: int) -> Identity:
        return Identity("boot", 10_000 + number, self.attempt(number))

    def saves(
        self, number: int, checkpoint: int, *, problem: str = "", why: str = "", retry_s: float = 0
    ) -> None:
        seen = MarkSeen(
            number,
            self.attempt(number),
            checkpoint,
            self.at_ns,
            f"c{checkpoint}",
            retry_s,
            problem,
            why,
        )
        self.mark = seen
        self.put(outcome.marked(self.state, seen, self.now))
        self.turn()

    def ends(
        self, number: int, cause: str = "exit", *, code: int = 0, signal: int = 0, blame: str = ""
    ) -> None:
        run = self.task(number).run
        assert run is not None
        mark = getattr(self, "mark", None)
        if mark is not None and (mark.task, mark.attempt) != (number, run.attempt):
            mark = None
        seen = EndSeen(
            number, run.attempt, cause, code, signal, started_ns=run.started_ns,
            ended_ns=self.at_ns, blame=blame,
        )  # fmt: skip
        self.put(outcome.ended(self.state, seen, mark, self.now, self.policy))
        self.turn()

    def attempt(self, number: int) -> int:
        run = self.task(number).run
        assert run is not None, f"task {number} was never started"
        return run.attempt

    def ordered(self, kind: type) -> list[Effect | Adopt]:
        found = [order for order in self.orders if isinstance(order, kind)]
        self.orders = [order for order in self.orders if not isinstance(order, kind)]
        return found
