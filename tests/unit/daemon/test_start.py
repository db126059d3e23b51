"""What a daemon needs before it can open its store."""

import errno
import os

import pytest

from ckptd.daemon.main import make_run
from ckptd.protocol.errors import BadConfig, CkptdError, DiskFull, Internal


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
