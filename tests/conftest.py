"""Fixtures that several test files share."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
for entry in (str(ROOT), str(ROOT / "tests")):
    if entry not in sys.path:
        sys.path.insert(0, entry)

from tests.daemon_fixture import LiveDaemon, StartDaemon  # noqa: E402  (needs the path set above)

hypothesis.settings.register_profile("ckptd", deadline=None, print_blob=True)
hypothesis.settings.load_profile("ckptd")


@pytest.fixture
def start_daemon() -> Iterator[StartDaemon]:
    """Start any number of daemons; all of their processes are gone when the test ends."""
    started: list[LiveDaemon] = []

    def start(**options: object) -> LiveDaemon:
        daemon = LiveDaemon(**options)  # type: ignore[arg-type]
        started.append(daemon)
        daemon.start()
        return daemon

    yield start
    for daemon in started:
        daemon.close()


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> LiveDaemon:
    """One running daemon with a state directory of its own."""
    return start_daemon()


@pytest.fixture
def rounds() -> int:
    """How many rounds a crash test makes: few in `make test`, CKPTD_ROUNDS in `make crash`."""
    return int(os.environ.get("CKPTD_ROUNDS", "40"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need root where we are not, and say so."""
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs root (mounts or other uids)"))
