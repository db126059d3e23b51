"""Control groups of this machine; skipped, with the reason, where there are none for us."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.runner import cgroup
from ckptd.runner.cgroup import Group, Roots
from tests.waiting import until

HEARD = 3


@pytest.fixture
def group() -> Iterator[Group]:
    roots = cgroup.discover(f"test-{os.getpid()}")
    if not roots.unified:
        pytest.skip(f"needs a writable v2 hierarchy, there is: {roots}")
    made = Group(Roots(roots.unified), f"{os.getpid()}.1")
    made.make()
    yield made
    made.kill()
    made.close()
    until(lambda: not made.pids())
    for path in (made.unified, roots.unified, roots.memory, roots.freezer):
        if path:
            os.rmdir(path)


def fork_sleeper(group: Group) -> int:
    """Return a child that ends with HEARD on SIGTERM, if it is let run."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    pid = group.fork()
    if pid == 0:
        signal.sigwait({signal.SIGTERM})
        os._exit(HEARD)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    return pid


def end_of(pid: int) -> int:
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def test_a_child_is_born_inside_and_killed_with_the_group(group: Group) -> None:
    pid = fork_sleeper(group)
    assert group.pids() == [pid]

    assert group.kill()

    assert end_of(pid) == -signal.SIGKILL
    assert group.pids() == []


def test_a_group_that_was_killed_takes_births_again_once_it_is_renewed(group: Group) -> None:
    first = fork_sleeper(group)
    group.kill()
    assert end_of(first) == -signal.SIGKILL

    group.renew()
    pid = fork_sleeper(group)
    os.kill(pid, signal.SIGTERM)

    assert end_of(pid) == HEARD


def test_a_frozen_group_stands_still_and_goes_on(group: Group) -> None:
    pid = fork_sleeper(group)
    assert group.freeze(frozen=True)
    until(lambda: "frozen 1" in Path(f"{group.unified}/cgroup.events").read_text())
    os.kill(pid, signal.SIGTERM)

    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    group.freeze(frozen=False)

    assert end_of(pid) == HEARD


def test_groups_of_dead_supervisors_are_swept_and_those_of_living_ones_stay(group: Group) -> None:
    root = os.path.dirname(group.unified)
    dead = f"{root}/999999999.7"
    os.mkdir(dead)

    cgroup.sweep(Roots(root), lambda pid, _: pid != os.getpid())

    assert not os.path.exists(dead)
    assert os.path.isdir(group.unified)


def test_a_start_survives_that_another_store_swept_its_unused_parent_away() -> None:
    roots = cgroup.discover(f"test-swept-{os.getpid()}")
    paths = [path for path in (roots.unified, roots.memory, roots.freezer) if path]
    if not (roots.unified or roots.freezer):
        pytest.skip(f"needs a writable hierarchy, there is: {roots}")
    for path in paths:
        os.utime(path, (1, 1))
    assert str(cgroup.discover(f"test-swept-{os.getpid()}")) == str(roots)
    assert min(os.stat(path).st_mtime for path in paths) > 1, "it is still old enough to be swept"
    for path in paths:
        os.rmdir(path)

    cgroup.sweep(roots, lambda *_: True)
    ours = Roots(roots.unified, "", roots.freezer)  # v1 memory: whoever makes it enters it
    made = Group(ours, f"{os.getpid()}.1")
    made.make()
    assert os.path.isdir(made.unified or made.freezer)
    made.close()
    made.remove()
    os.rmdir(roots.unified or roots.freezer)


def test_without_any_hierarchy_nothing_fails_and_nothing_is_claimed() -> None:
    none = Group(Roots(), "1.2")
    none.make()

    assert not none
    assert not none.kill()
    assert not none.freeze(frozen=True)
    assert not none.limit(1 << 20)
    assert none.ooms() == (0, 0)
    assert none.pids() == []
    assert str(Roots()) == "none"
