"""For tests of tasks: crash a function at every durable point in turn, see that it resumes.

    from ckptd.testing import check_resumable, lines_of

    def test_ingest_survives_every_crash(tmp_path):
        report = check_resumable(
            ingest,
            tmp_path,
            given=lambda place: {"source": "rows.csv", "out": f"{place}/out"},
            side_effects=lambda place: lines_of(f"{place}/out"),
        )
        assert report.repeated_max <= 1

A *durable point* is an append to the journal or a checkpoint. For each one the function runs in a
forked child that is killed there (SIGKILL), before the point or after it; then it runs again, in
another child, and must come to the result of a run that nobody disturbed. `place` is a directory
of that round alone, for what the function writes outside of its task. Between two durable points
nothing is known of the work, so a crash anywhere else is a crash before the next point.

It does not cut the power: that facts and checkpoints outlive that is what ckptd's own tests show.
Bound: points times two, each child `timeout` seconds. Read next: `ckptd/sdk/local.py`.
"""

import itertools
import json
import os
import random
import select
import shutil
import signal
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Self

from ckptd.sdk.declare import Task, as_task
from ckptd.sdk.group import Appends
from ckptd.sdk.local import run_local
from ckptd.sdk.save import Saved
from ckptd.sdk.surroundings import Surroundings
from ckptd.sdk.values import decode, encode
from ckptd.sdk.work import Ports
from ckptd.storage.journal import Fact

WHENS: Final = ("before", "after")
TIMEOUT_S: Final = 60.0
POINTS_MAX: Final = 10_000
_PAIRS: Final = 6  # of two crashes, the second one during the resume
_SHOWN_CHARS: Final = 400

Given = Mapping[str, Any] | Callable[[str], Mapping[str, Any]]
Effects = Callable[[str], Iterable[str]]


class Point(NamedTuple):
    """A moment at which something becomes durable: its number, from 1, and what."""

    number: int
    what: str


class Run(NamedTuple):
    """One round: where it was crashed, what it came to, and the effects that happened again."""

    crashes: tuple[str, ...]
    result: Any
    repeated: list[str]
    raised: str = ""  # an exception of `may_raise`, by name


class Report(NamedTuple):
    """What `check_resumable` saw."""

    result: Any
    points: list[Point]
    runs: list[Run]

    @property
    def repeated_max(self) -> int:
        """How many side effects a single round repeated at most."""
        return max((len(run.repeated) for run in self.runs), default=0)


class Crash:
    """Kills this process at its durable point number `at`: `before` it, or `after` it.

    run_local(function, directory, ports=Crash(at=3, when="after").ports)    does not return
    """

    def __init__(self, at: int, when: str = "before") -> None:
        if at < 1 or when not in WHENS:
            raise ValueError(f"crash {when!r} point {at!r}: expected before or after, from 1 on")
        self.at = at
        self.when = when
        self.ports = Watch(self._reached).ports

    def __str__(self) -> str:
        return f"{self.when} point {self.at}"

    def _reached(self, point: Point, when: str) -> None:
        if (point.number, when) == (self.at, self.when):
            os.kill(os.getpid(), signal.SIGKILL)


class Watch:
    """Real ports that tell when a durable point is reached and when it is passed."""

    def __init__(self, reached: Callable[[Point, str], None]) -> None:
        self._reached = reached
        self._numbers = itertools.count(1)  # appends and saves may be of several threads
        self._real = Ports()
        self.ports = Ports(journal=self._journal, save=self._save)

    def _journal(self, around: Surroundings) -> Appends:
        return _Watched(self._real.journal(around), self)

    def _save(self, *args: Any, **kwargs: Any) -> Saved:
        header = next((one for one in args if isinstance(one, dict)), {})
        what = f"checkpoint ({header.get('reason', 'migration')})"
        saved: Saved = self.passing(what, lambda: self._real.save(*args, **kwargs))
        return saved

    def passing(self, what: str, act: Callable[[], Any]) -> Any:
        """Do what makes something durable, and tell."""
        point = Point(next(self._numbers), what)
        self._reached(point, "before")
        done = act()
        self._reached(point, "after")
        return done


class _Watched:
    """A journal whose appends are durable points."""

    def __init__(self, real: Appends, watch: Watch) -> None:
        self._real = real
        self._watch = watch

    def append(self, facts: list[Fact]) -> int:
        """Durable: the facts."""
        told = (f"{fact['op']} {fact.get('name', fact.get('key', ''))}".strip() for fact in facts)
        done = self._watch.passing(", ".join(told), lambda: self._real.append(facts))
        assert isinstance(done, int)
        return done

    def close(self) -> None:
        """Close the files."""
        self._real.close()


def lines_of(path: str | os.PathLike[str]) -> list[str]:
    """Return the lines of a file, none where it is not there yet."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().splitlines()
    except FileNotFoundError:
        return []


def crash_points(
    function: Any,
    directory: str | os.PathLike[str],
    *,
    given: Given | None = None,
    timeout: float = TIMEOUT_S,
) -> list[Point]:
    """Return the durable points of a run that nobody disturbs, in a child.

    Raises:
        AssertionError: the function failed, with its traceback.
    """
    with _Rounds(function, directory, given, timeout) as rounds:
        return rounds.whole().points


def check_resumable(  # noqa: PLR0913 - what an author may say of a check
    function: Any,
    directory: str | os.PathLike[str],
    *,
    given: Given | None = None,
    side_effects: Effects | None = None,
    twice: bool = False,
    may_raise: tuple[type[BaseException], ...] = (),
    at_most: int = 200,
    timeout: float = TIMEOUT_S,
) -> Report:
    """Crash a function, plain or async, at every durable point in turn; return what was seen.

    `given`: its input, or a function that makes it of the round's `place`. `side_effects(place)`
    returns what was done there, one text each. `twice`: in some rounds the resume is crashed, too.
    `may_raise`: what a resumed run may end with instead of a result, such as StepInterrupted.
    `at_most`: so many points, evenly chosen, where there are more.

    Raises:
        AssertionError: a resumed run came to another result, failed, hung, or left out an effect;
        the text names the point, and the directory that shows how it was left.
    """
    with _Rounds(function, directory, given, timeout, side_effects, may_raise) as rounds:
        whole = rounds.whole()
        chosen = _spread(whole.points, at_most)
        plans: list[Sequence[Crash]] = [
            [Crash(point.number, when)] for point in chosen for when in WHENS
        ]
        if twice:
            plans += _pairs(len(whole.points))
        runs = [rounds.crashed(plan, whole) for plan in plans]
        return Report(decode(whole.result), whole.points, runs)


def _spread(points: list[Point], at_most: int) -> list[Point]:
    if at_most < 1:
        raise ValueError(f"at_most is {at_most}, expected at least 1")
    count = min(at_most, len(points))
    return [points[number * len(points) // count] for number in range(count)]


def _pairs(count: int) -> list[Sequence[Crash]]:
    """Return two crashes each; the same ones every time, so that a failure comes again."""
    choice = random.Random(count)  # noqa: S311 - which ones does not matter
    numbers = [(choice.randint(1, count), choice.randint(1, count)) for _ in range(_PAIRS)]
    whens = itertools.cycle(itertools.product(WHENS, WHENS))
    return [
        [Crash(first, one), Crash(second, other)]
        for (first, second), (one, other) in zip(numbers, whens, strict=False)
    ]


class _Whole(NamedTuple):
    """A run that nobody disturbed; `result` is encoded."""

    result: Any
    points: list[Point]
    effects: Counter[str]


class _Ended(NamedTuple):
    """How a child ended; `is_killed` where it was by the crash."""

    is_killed: bool
    told: dict[str, Any]  # result, or raised, or error with a traceback


class _Rounds:
    """Runs of one function, each in a directory of its own; what went well is removed."""

    def __init__(
        self,
        function: Any,
        directory: str | os.PathLike[str],
        given: Given | None,
        timeout_s: float,
        side_effects: Effects | None = None,
        may_raise: tuple[type[BaseException], ...] = (),
    ) -> None:
        self.task: Task = as_task(function)
        self._given = given or {}
        self._timeout_s = timeout_s
        self._effects = side_effects
        self._may_raise = may_raise
        os.makedirs(directory, exist_ok=True)
        self._root = tempfile.mkdtemp(prefix="crashes-", dir=directory)
        _load(self.task)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            shutil.rmtree(self._root, ignore_errors=True)

    def whole(self) -> _Whole:
        """Run it once without a crash."""
        points: list[Point] = []

        def reached(point: Point, when: str) -> None:
            if when == "before" and len(points) < POINTS_MAX:
                points.append(point)

        place = self._place("whole")
        ended = self._child(place, Watch(reached).ports, points)
        result = self._result_of(ended, "without any crash", place)
        found = [Point(int(number), str(what)) for number, what in ended.told["points"]]
        if not found:
            raise AssertionError(f"{self.task.name} has no durable point, not even a result")
        return _Whole(result, found, self._effects_in(place))

    def crashed(self, plan: Sequence[Crash], whole: _Whole) -> Run:
        """Run it once for each crash, then to its end; compare."""
        names = tuple(_named(crash, whole.points) for crash in plan)
        where = f"after a crash {', then '.join(names)}"
        place = self._place("-".join(f"{crash.at}-{crash.when}" for crash in plan))
        for crash in plan:
            ended = self._child(place, crash.ports)
            if not ended.is_killed:  # the point was not reached: several threads, a resume
                break
        else:
            ended = self._child(place, None)
        if "raised" in ended.told:
            shutil.rmtree(place)
            return Run(names, None, [], ended.told["raised"])
        result = self._result_of(ended, where, place)
        if result != whole.result:
            raise AssertionError(
                f"{self.task.name} came to another result {where}\n"
                f"  undisturbed: {_shown(whole.result)}\n"
                f"  resumed:     {_shown(result)}\n"
                f"  left in:     {place}"
            )
        repeated = self._repeated(place, where, whole.effects)
        shutil.rmtree(place)
        return Run(names, decode(result), repeated)

    def _place(self, name: str) -> str:
        place = os.path.join(self._root, name)
        os.makedirs(os.path.join(place, "task"), mode=0o700, exist_ok=True)
        return place

    def _repeated(self, place: str, where: str, wanted: Counter[str]) -> list[str]:
        found = self._effects_in(place)
        missing = wanted - found
        if missing:
            raise AssertionError(
                f"{self.task.name} left out {_shown(sorted(missing))} {where}: it was recorded "
                f"as done before it was done\n  left in: {place}"
            )
        return sorted((found - wanted).elements())

    def _effects_in(self, place: str) -> Counter[str]:
        return Counter(self._effects(place) if self._effects else ())

    def _result_of(self, ended: _Ended, where: str, place: str) -> Any:
        """Return the encoded result; raise for what is none."""
        if "result" in ended.told:
            return ended.told["result"]
        error = ended.told.get("error", "it was killed by somebody else")
        raise AssertionError(f"{self.task.name} failed {where}\n  left in: {place}\n{error}")

    def _child(self, place: str, ports: Ports | None, points: Sequence[Point] = ()) -> _Ended:
        """Run one attempt in a child; it ends by itself, by its crash, or by our timeout."""
        given = self._given(place) if callable(self._given) else self._given

        def attempt() -> dict[str, Any]:
            try:
                result = run_local(self.task, f"{place}/task", ports=ports, **given)
                return {"result": encode(result, "the result"), "points": points}
            except self._may_raise as error:
                return {"raised": type(error).__name__}

        told_fd = os.memfd_create("ckptd-outcome")
        try:
            pid = _forked(attempt, told_fd)
            status = _waited(pid, self._timeout_s)
            text = os.pread(told_fd, os.fstat(told_fd).st_size, 0)
        finally:
            os.close(told_fd)
        if status is None:
            late = f"it did not end within {self._timeout_s:g} s; its child {pid} was killed"
            return _Ended(is_killed=False, told={"error": late})
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return _Ended(is_killed=True, told={})
        ended = f"its child ended with wait status {status:#x}"
        return _Ended(is_killed=False, told=json.loads(text) if text else {"error": ended})


def _load(task: Task) -> None:
    """Import what children would import each for itself."""
    import hashlib  # noqa: F401, PLC0415  (only tests pay)

    if task.is_async:
        import ckptd.sdk.aio  # noqa: F401, PLC0415


def _forked(attempt: Callable[[], dict[str, Any]], told_fd: int) -> int:
    """Fork a child that tells what `attempt` came to, and ends without touching what is ours."""
    with warnings.catch_warnings():  # from 3.12 on, about threads: the child uses none of theirs
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    try:
        try:
            told = attempt()
        except BaseException:  # noqa: BLE001 - it is told to the parent, who raises
            told = {"error": traceback.format_exc()}
        os.pwrite(told_fd, json.dumps(told).encode(), 0)
    finally:
        os._exit(0)


def _waited(pid: int, timeout_s: float) -> int | None:
    """Return the wait status, or None if the child had to be killed for its time."""
    is_ended = False
    fd = os.pidfd_open(pid)
    try:
        is_ended = bool(select.select([fd], [], [], timeout_s)[0])
    finally:
        os.close(fd)
        # The child is ours and not waited for yet, so its pid is still its own.
        if not is_ended:
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
    return status if is_ended else None


def _named(crash: Crash, points: list[Point]) -> str:
    what = next((point.what for point in points if point.number == crash.at), "")
    return f"{crash} ({what[:80]})" if what else str(crash)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}... ({len(text)} chars)"
