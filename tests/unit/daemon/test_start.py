"""What a daemon needs before it can open its store."""

import errno
import os
import tempfile

import pytest

from ckptd.daemon.main import make_run
from ckptd.door.listen import clear_path
from ckptd.protocol.errors import BadConfig, CkptdError, DiskFull, Internal


@pytest.mark.parametrize("umask", [0o022, 0o077, 0])
@pytest.mark.parametrize(("uid", "mode"), [(0, 0o755), (1_000, 0o700)])
def test_the_runtime_directory_lets_the_tasks_of_all_users_pass_or_nobody_elses(
    monkeypatch: pytest.MonkeyPatch, uid: int, mode: int, umask: int
) -> None:
    before = os.umask(umask)
    try:
        with tempfile.TemporaryDirectory(prefix="ck-", dir="/tmp") as name:
            monkeypatch.setattr(os, "geteuid", lambda: uid)
            make_run(f"{name}/1")
            clear_path(f"{name}/2/ctl.sock")  # where it was removed under a running daemon
            made = [os.stat(f"{name}/{each}").st_mode & 0o777 for each in (1, 2)]
    finally:
        os.umask(before)
    assert made == [mode, mode]


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.EIO, Internal), (errno.ENOSPC, DiskFull), (errno.EACCES, BadConfig)],
)
def test_a_runtime_directory_that_a_later_start_may_make_keeps_no_daemon_down(
    monkeypatch: pytest.MonkeyPatch, number: int, kind: type[CkptdError]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "makedirs", refuse)
    with pytest.raises(kind):
        make_run("/run/ckptd")
