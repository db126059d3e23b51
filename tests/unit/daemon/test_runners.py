"""Which runner is chosen where."""

import os
from pathlib import Path

import pytest

from ckptd.daemon.runners import BOOTED, choose, missing_manager
from ckptd.host.paths import resolve
from ckptd.protocol.errors import BadConfig

not_booted = pytest.mark.skipif(os.path.isdir(BOOTED), reason="this machine was booted by systemd")


def chosen(wanted: str, directory: Path) -> str:
    paths = resolve(os.geteuid(), {}, state_dir=f"{directory}/state", run_dir=f"{directory}/run")
    os.makedirs(paths.state)
    os.makedirs(paths.run)
    runner, units = choose(wanted, paths, "b", lambda _: None)
    runner.close()
    assert units is None
    return runner.name


def test_fork_is_taken_where_it_is_asked_for(tmp_path: Path) -> None:
    assert chosen("fork", tmp_path) == "fork"


@not_booted
def test_without_a_service_manager_auto_is_fork(tmp_path: Path) -> None:
    assert chosen("auto", tmp_path) == "fork"


@not_booted
def test_units_without_a_service_manager_are_a_mistake_in_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="not booted by systemd") as refused:
        chosen("unit", tmp_path)
    assert '"fork" or "auto"' in refused.value.hint
    assert missing_manager(is_system=True) == missing_manager(is_system=False)
