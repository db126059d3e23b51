"""What in a store tells that an attempt of another one, which it is a copy of, still runs."""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ckptd.core.port import EndSeen, Identity, StartSeen
from ckptd.runner import attempt, identity, original
from ckptd.runner.attempt import End, Holder, Record
from ckptd.runner.fork import ForkRunner
from ckptd.runner.original import Living
from tests.unit.runner.test_fork import Bench
from tests.waiting import until

BOOT = identity.boot_id()
ME = os.getpid(), identity.ticks_of(os.getpid())
NOBODY = ME[0], ME[1] - 1  # our pid, of a process that is gone


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


class Stores:
    """A store with one record, and a copy of it."""

    def __init__(self, root: Path) -> None:
        self.first, self.second = f"{root}/first", f"{root}/second"
        self.attempts = f"{self.first}/attempts"
        os.makedirs(self.attempts)
        attempt.begin_reign(self.attempts, "token")

    def record(
        self,
        shim: tuple[int, int] = ME,
        main: tuple[int, int] | None = ME,
        boot: str = BOOT,
        *,
        is_over: bool = False,
    ) -> None:
        holder = Holder(boot, *shim, attempt.home_of(self.attempts))
        place = attempt.place_of(self.attempts, 7, 2)
        with closing(Record(self.attempts, place, "token.1", holder.claim)) as record:
            assert record.take()
            if main is not None:
                record.write_start(holder.start(*main, 5, 0))
            if is_over:
                directory = os.open(self.attempts, os.O_RDONLY)
                record.write_exit(End("exit").line(7, 2), directory)
                os.close(directory)
        shutil.copytree(self.first, self.second, symlinks=True)

    def living(self) -> tuple[Living | None, Living | None]:
        return original.living(self.first, BOOT, {}), original.living(self.second, BOOT, {})


@pytest.fixture
def stores(tmp_path: Path) -> Stores:
    return Stores(tmp_path)


def test_an_attempt_that_runs_is_its_own_stores_and_not_the_copys(stores: Stores) -> None:
    stores.record()
    assert stores.living() == (None, Living(7, 2, ME[0]))


def test_what_is_claimed_and_not_yet_started_lives_as_its_supervisor_does(stores: Stores) -> None:
    stores.record(main=None)
    assert stores.living() == (None, Living(7, 2, ME[0]))


@pytest.mark.parametrize(
    "record",
    [
        {"main": NOBODY},  # its supervisor lives, at another attempt
        {"shim": NOBODY, "main": None},
        {"is_over": True},
        {"boot": "another boot"},
        {"shim": (ME[0], 0), "main": None},  # a daemon's, so that nobody runs it
    ],
)
def test_what_cannot_run_any_more_keeps_no_copy_from_starting(
    stores: Stores, record: dict[str, object]
) -> None:
    stores.record(**record)  # type: ignore[arg-type]
    assert stores.living() == (None, None)


def test_a_claim_by_a_version_that_did_not_say_where_it_was_made_is_ours(stores: Stores) -> None:
    start = Holder(BOOT, *ME).start(*ME, 5, 0).replace(b',"home":""', b"").partition(b"\n")[0]
    place = Path(attempt.place_of(stores.attempts, 7, 2))
    claim = attempt.sealed(b'{"boot_id":"%s","shim_pid":%d,"shim_ticks":%d}' % (BOOT.encode(), *ME))
    block = claim.ljust(1_024, b"\0") + attempt.sealed(start).ljust(1_024, b"\0")
    place.write_bytes(block.ljust(attempt.RECORD_BYTES, b"\0"))
    shutil.copytree(stores.first, stores.second, symlinks=True)
    assert stores.living() == (None, None)


def test_a_store_that_is_moved_is_no_copy(stores: Stores) -> None:
    stores.record()
    shutil.rmtree(stores.second)
    os.rename(stores.first, stores.second)
    assert original.living(stores.second, BOOT, {}) is None


def test_the_log_tells_of_an_attempt_whose_record_was_not_copied(
    stores: Stores, bench: Bench
) -> None:
    bench.start("sleep", "1000", task=3)
    start = bench.start_of(3)

    def living(shim: Identity) -> Living | None:
        return original.living(stores.first, BOOT, {(3, 1): (shim, start.pid)})

    assert living(start.shim) == Living(3, 1, start.pid)
    assert living(Identity("another boot", start.shim.pid, start.shim.ticks)) is None
    assert living(Identity(BOOT, start.shim.pid, start.shim.ticks - 1)) is None
    assert living(Identity(BOOT, *ME)) is None  # not its child: the pid was used again
    assert living(Identity(BOOT, 1, 0)) is None  # a unit's


def test_a_runner_on_a_copy_neither_follows_nor_ends_what_the_original_runs(bench: Bench) -> None:
    bench.start("sh", "-c", "until [ -e go ]; do sleep 0.02; done", cwd=str(bench.root))
    start = bench.start_of()
    copy = bench.root / "copy"
    shutil.copytree(bench.state, copy, symlinks=True)
    runner = ForkRunner(str(copy), str(bench.root / "run2"))
    runner.adopt(1, 1)
    seen = runner.poll()
    os.kill(start.shim.pid, signal.SIGKILL)  # an orphan's tree is killed, by its own store's runner
    assert bench.end_of().cause == "lost"

    until(lambda: seen.extend(runner.poll()) or [one for one in seen if isinstance(one, EndSeen)])

    runner.close()
    assert not [one for one in seen if isinstance(one, StartSeen)]
    assert [(one.cause, one.text) for one in seen if isinstance(one, EndSeen)] == [
        ("lost", "it ran in the store that this is a copy of")
    ]
