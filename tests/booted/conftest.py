"""Fixtures of the booted tests: a machine with ckptd running, a fresh one, and a virtual machine.

    machine        Nspawn, one per systemd version (252 and 257), shared by a module's tests
    sh             its `sh`: runs a script as root, returns stdout, raises unless it exits with 0
    fresh_machine  a function that boots one more of that version; closed after the test
    vm             Vm, restored for each test from a snapshot taken after boot, ckptd running
    fresh_vm       a function that boots one, for those who need other memory or another suite

Every test in this directory is marked by the fixtures it takes: `nspawn` or `vm`, or both. What is
missing on this machine is a skip that names it.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from tests.booted import roots
from tests.booted.cache import Missing
from tests.booted.machine import close_all
from tests.booted.nspawn import Nspawn

if TYPE_CHECKING:
    from tests.booted.vm import Vm

NSPAWN = {"machine", "fresh_machine", "systemd_version"}
VM = {"vm", "fresh_vm", "vm_snapshot"}
FIRST_BUILD_S = 1200  # the first test may have to build trees
START = "systemctl enable --now ckptd && ckptctl group set default --parallel 20"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by the kind of machine it takes; give it the time that machines need."""
    for item in items:
        if "/booted/" not in item.path.as_posix():
            continue
        taken = set(getattr(item, "fixturenames", ()))
        if taken & NSPAWN:
            item.add_marker(pytest.mark.nspawn)
            params = getattr(getattr(item, "callspec", None), "params", {})
            version = params.get("systemd_version")
            item.add_marker(pytest.mark.xdist_group(f"systemd-{version}"))
        if taken & VM:
            item.add_marker(pytest.mark.vm)
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(300, func_only=True))


def _or_skip(make: Callable[[], Nspawn]) -> Nspawn:
    try:
        return make()
    except Missing as missing:
        pytest.skip(f"no booted system here: {missing}")


@pytest.fixture(scope="module", params=list(roots.SUITES), ids="systemd-{}".format)
def systemd_version(request: pytest.FixtureRequest) -> str:
    """The version of systemd that the test's machines have: "252" or "257"."""
    return str(request.param)


def _booted(version: str) -> Nspawn:
    machine = _or_skip(lambda: Nspawn(roots.SUITES[version]))
    machine.boot()
    machine.sh(START)
    return machine


@pytest.fixture(scope="module")
def machine(systemd_version: str) -> Iterator[Nspawn]:
    """A booted machine with ckptd enabled and running; the tests of one module share it."""
    machine = _booted(systemd_version)
    yield machine
    machine.close()


@pytest.fixture
def fresh_machine(systemd_version: str) -> Iterator[Callable[[], Nspawn]]:
    """Boot a machine of this test's own, as `machine`."""
    booted: list[Nspawn] = []

    def boot() -> Nspawn:
        booted.append(_booted(systemd_version))
        return booted[-1]

    yield boot
    for machine in booted:
        machine.close()


@pytest.fixture
def sh(machine: Nspawn) -> Callable[[str], str]:
    """Run a script as root in the machine; return what it prints. Raises where it fails."""
    return machine.sh


@pytest.fixture(scope="session")
def vm_snapshot() -> "Iterator[Callable[[], Vm]]":
    """Give a function that makes a running machine out of a snapshot taken once."""
    from tests.booted.vm import snapshot_of  # noqa: PLC0415  (qemu is not everywhere)

    try:
        original, copy = snapshot_of(START)
    except Missing as missing:
        pytest.skip(f"no virtual machine here: {missing}")
    yield copy
    original.close()


@pytest.fixture
def vm(vm_snapshot: "Callable[[], Vm]") -> "Iterator[Vm]":
    """A virtual machine of this test's own, with ckptd running, on a real kernel with cgroup v2."""
    vm = vm_snapshot()
    yield vm
    vm.close()


@pytest.fixture
def fresh_vm() -> "Iterator[Callable[..., Vm]]":
    """Boot a virtual machine with the given options of `Vm`; closed after the test."""
    from tests.booted.vm import Vm  # noqa: PLC0415

    made: list[Vm] = []

    def boot(**options: object) -> Vm:
        try:
            made.append(Vm(**options))  # type: ignore[arg-type]
        except Missing as missing:
            pytest.skip(f"no virtual machine here: {missing}")
        made[-1].boot()
        made[-1].sh(START)
        return made[-1]

    yield boot
    for vm in made:
        vm.close()


def pytest_sessionfinish() -> None:
    """End what a failed set-up left open."""
    close_all()
