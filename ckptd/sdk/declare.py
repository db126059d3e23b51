"""What an author says of a function once: name, version, strategy, retries, state, migrations.

    @task(name="ingest", version=2, strategy=Time(10), retry=RetryPolicy(max_failures=5))
    def ingest(ctx, path, limit=0): ...

    @ingest.migrate(from_=1)
    def _(state): return {**state, "limit": 0}

A function without the decorator is a task, too: all defaults. Stdlib only; msgspec is loaded for a
`state_schema` alone. Read next: `work.py` (one attempt of a task), `run.py` (who calls it).
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple, Self

from ckptd.protocol.limits import NAME_CHARS_MAX, RETRIES_UNLIMITED
from ckptd.sdk.outcomes import StateVersionError
from ckptd.sdk.strategy import Automatic, Strategy

_CO_COROUTINE: Final = 0x80  # Source: inspect.CO_COROUTINE; importing inspect costs 10 ms
_VERSION_MAX: Final = 1 << 31


class RetryPolicy(NamedTuple):
    """How often a failure is forgiven, and the pauses between, doubling from `backoff` seconds.

    `max_failures` None: as long as there is progress. Waits for others (`TransientError`, a rate
    limit, a shutdown) are no failures and not counted.
    """

    max_failures: int | None = None
    backoff: float = 1.0
    backoff_max: float = 900.0

    def checked(self) -> Self:
        """Return the policy. Raises ValueError for a value out of range."""
        if self.max_failures is not None and self.max_failures < 1:
            raise ValueError(f"max_failures is {self.max_failures}, expected at least 1 or None")
        if not 0 <= self.backoff <= self.backoff_max:
            raise ValueError(f"backoff {self.backoff} s is not between 0 and {self.backoff_max} s")
        return self

    @property
    def retries(self) -> int:
        """Return the failures that are forgiven, as a submit counts them."""
        return RETRIES_UNLIMITED if self.max_failures is None else self.max_failures - 1

    def delay_s(self, failures: int) -> float:
        """Return the pause after so many failures, without jitter."""
        return float(min(self.backoff * 2.0 ** min(failures - 1, 60), self.backoff_max))


class Task:
    """A declared function. Calling it calls the function, so it stays testable as it is."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str = "",
        version: int = 1,
        strategy: Strategy | None = None,
        retry: RetryPolicy | None = None,
        state_schema: type | None = None,
    ) -> None:
        """Check what was said.

        Raises:
            ValueError: a name or version out of range.
        """
        self.function = function
        self.name = name or getattr(function, "__name__", "task")
        if not 0 < len(self.name) <= NAME_CHARS_MAX or not self.name.isprintable():
            raise ValueError(f"a task's name is 1 to {NAME_CHARS_MAX} printable characters")
        if not isinstance(version, int) or not 1 <= version < _VERSION_MAX:
            raise ValueError(f"version {version!r} of {self.name}: expected a whole number from 1")
        self.version = version
        self.strategy = strategy or Automatic()
        self.retry = (retry or RetryPolicy()).checked()
        self.state_schema = state_schema
        self.migrations: dict[int, Callable[[Any], Any]] = {}
        self.__name__ = getattr(function, "__name__", self.name)
        self.__doc__ = function.__doc__
        self.__module__ = getattr(function, "__module__", self.__module__)
        self.__wrapped__ = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function as it is."""
        return self.function(*args, **kwargs)

    @property
    def is_async(self) -> bool:
        """Return whether the function is a coroutine function."""
        code = getattr(self.function, "__code__", None)
        return bool(code and code.co_flags & _CO_COROUTINE)

    def migrate(self, *, from_: int) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
        """Register how state of version `from_` becomes state of the next one.

        Raises:
            ValueError: registered twice, or not below this task's version.
        """
        if from_ in self.migrations or not 0 < from_ < self.version:
            raise ValueError(
                f"{self.name} has version {self.version}: cannot register a migration from "
                f"{from_} (known: {sorted(self.migrations) or 'none'})"
            )

        def register(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
            self.migrations[from_] = function
            return function

        return register

    def migrated(self, state: Any, saved_version: int) -> Any:
        """Return state of an earlier version as this version has it.

        Raises:
            StateVersionError: it is of a later version, or a migration is missing or failed.
        """
        if saved_version > self.version:
            raise StateVersionError(
                f"the state of {self.name} was saved by version {saved_version}, this code has "
                f"version {self.version}: run the newer code, or start over with --fresh"
            )
        for version in range(saved_version, self.version):
            migration = self.migrations.get(version)
            if migration is None:
                raise StateVersionError(
                    f"the state of {self.name} has version {saved_version}, this code has "
                    f"{self.version} and no migration from {version}: add "
                    f"@{self.__name__}.migrate(from_={version}), or start over with --fresh"
                )
            state = _migrated(migration, state, f"{self.name} from {version}")
        return state


def _migrated(migration: Callable[[Any], Any], state: Any, what: str) -> Any:
    try:
        return migration(state)
    except Exception as error:
        raise StateVersionError(
            f"the migration of {what} failed: {type(error).__name__}: {error}; what was saved is "
            "untouched: mend it and release the task"
        ) from error


def task(
    function: Callable[..., Any] | None = None,
    *,
    name: str = "",
    version: int = 1,
    strategy: Strategy | None = None,
    retry: RetryPolicy | None = None,
    state_schema: type | None = None,
) -> Any:
    """Declare a function a task: `@task`, or `@task(name=..., version=2, ...)`.

    The function takes the context first, then its input by name. `version` is that of its state.
    """

    def declared(one: Callable[..., Any]) -> Task:
        return Task(
            one,
            name=name,
            version=version,
            strategy=strategy,
            retry=retry,
            state_schema=state_schema,
        )

    return declared if function is None else declared(function)


def as_task(function: Any) -> Task:
    """Return a task of whatever can be called.

    Raises:
        TypeError: it cannot.
    """
    if isinstance(function, Task):
        return function
    if not callable(function):
        raise TypeError(f"{function!r} is no function")
    return Task(function)
