import fcntl
import os
import signal
from pathlib import Path

import pytest

from ckptd.daemon.files import Files
from ckptd.protocol import messages as m
from ckptd.protocol.errors import Busy, CkptdError


def output_of(state: Path, task: int) -> Path:
    (state / "output").mkdir(exist_ok=True)
    return state / "output" / f"{task}.log"


def read(state: Path, **asked: int) -> m.OutputChunk:
    return Files(str(state)).output(m.Output(7, **asked), over=True)


def test_output_is_read_in_pieces_from_either_end(tmp_path: Path) -> None:
    output_of(tmp_path, 7).write_bytes(b"0123456789")
    assert read(tmp_path, limit=4).data == b"0123"
    assert read(tmp_path, offset=-3).data == b"789"
    assert read(tmp_path, offset=99).data == b""
    assert not read(tmp_path, limit=4).done
    assert read(tmp_path).done


def test_output_that_is_not_there_yet_is_empty(tmp_path: Path) -> None:
    output_of(tmp_path, 1)
    assert read(tmp_path).data == b""


@pytest.mark.parametrize("kind", ["fifo", "link", "directory"])
def test_whatever_a_task_puts_in_place_of_its_output_is_refused_at_once(
    tmp_path: Path, kind: str
) -> None:
    path = output_of(tmp_path, 7)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/etc/passwd")
    else:
        path.mkdir()
    with pytest.raises(CkptdError):
        read(tmp_path)


def test_a_lease_on_the_output_does_not_hold_the_daemon_up(tmp_path: Path) -> None:
    path = output_of(tmp_path, 7)
    path.write_bytes(b"x")
    ready, go = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:  # the task: holds a write lease and ignores the kernel's request to give it up
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        fd = os.open(path, os.O_RDWR)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        os.write(ready[1], b"r")
        os.read(go[0], 1)
        os._exit(0)
    assert os.read(ready[0], 1) == b"r"
    try:
        with pytest.raises(Busy):
            read(tmp_path)
    finally:
        os.write(go[1], b"g")
        assert os.waitpid(pid, 0)[1] == 0
        for fd in (*ready, *go):
            os.close(fd)
