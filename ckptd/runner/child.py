"""From fork to exec: what the child of a supervisor does to become the task's main process.

It must not be able to run the task before the gate opens: the supervisor's death closes the gate,
and then nothing has happened. Afterwards the kernel kills it with the supervisor (PDEATHSIG).
Loaded by the supervisors: stdlib only. Read next: `shim.py`.
"""

import os

from ckptd.runner import linux
from ckptd.runner.attempt import Order

OPEN = b"go"
_ENOENT, _EACCES, _ENOTDIR, _EINVAL = 2, 13, 20, 22
_MESSAGE_BYTES_MAX = 1_024


class Child:
    """All that `become_task` needs, made before the fork: what is made after it costs copies."""

    __slots__ = ("argv", "env", "is_calm", "order", "output", "supervisor")

    def __init__(self, order: Order, output: int, supervisor: int, *, is_calm: bool) -> None:
        self.order = order
        self.argv = linux.strings(order.argv)
        self.env = linux.strings(order.env)
        self.output = output
        self.supervisor = supervisor
        self.is_calm = is_calm  # the OOM score is the normal one

    def become_task(self, gate: int) -> None:
        """Turn this process into the task. Never returns: ends in exec, or says why not."""
        order = self.order
        step = "prepare the process"
        try:
            os.setsid()
            if not self.is_calm:
                _reset_oom_score()
            if order.nice:
                step = f"set its niceness to {order.nice}"
                os.setpriority(os.PRIO_PROCESS, 0, order.nice)  # below 0: as root only
            if order.uid >= 0:
                step = f"become uid {order.uid}"
                os.setgroups(order.groups)
                os.setresgid(order.gid, order.gid, order.gid)
                os.setresuid(order.uid, order.uid, order.uid)
            linux.die_with_parent()  # after the change of uid, which would undo it
            os.umask(order.umask)
            step = "enter the working directory"
            os.chdir(order.cwd)
            step = "open the input"
            _set_streams(order.stdin, self.output)
            if os.read(gate, len(OPEN)) != OPEN or os.getppid() != self.supervisor:
                os._exit(1)
            step = "execute"
            linux.set_mask(linux.NO_SIGNALS)
            self._execute()
        except OSError as error:
            errno = error.errno or _EINVAL
            named = {"enter the working directory": order.cwd, "open the input": order.stdin}
            what = named.get(step) or os.fsdecode(order.argv.partition(b"\0")[0])
            what = f" {what}" if step in {*named, "execute"} else ""
            _tell(gate, errno, f"cannot {step}{what}: {os.strerror(errno)}")
        except BaseException as error:  # noqa: BLE001  (nothing may return into the supervisor)
            _tell(gate, _EINVAL, f"cannot {step}: {error!r}")
        os._exit(127)

    def _execute(self) -> None:
        """Try every program; a search goes on past what is not there or not allowed."""
        found = _ENOENT
        for program in self.order.programs:
            errno = linux.execute(program, self.argv, self.env)
            if errno not in {_ENOENT, _ENOTDIR, _EACCES}:
                raise OSError(errno, "execve")
            found = _EACCES if _EACCES in {errno, found} else found
        raise OSError(found, "execve")


def _reset_oom_score() -> None:
    """A daemon protected from the OOM killer must not pass that on. Needs to be our own still."""
    fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
    os.write(fd, b"0")
    os.close(fd)


def _set_streams(stdin: str, output: int) -> None:
    """All other descriptors are close-on-exec, as Python makes them."""
    if stdin:  # else: /dev/null, as the warm parent got it
        os.dup2(os.open(stdin, os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)


def _tell(gate: int, errno: int, text: str) -> None:
    try:
        os.write(gate, f"{errno} {text}".encode(errors="replace")[:_MESSAGE_BYTES_MAX])
    except OSError:
        return
