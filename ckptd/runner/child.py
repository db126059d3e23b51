"""From fork to exec: what the child of a supervisor does to become the task's main process.

It must not be able to run the task before the gate opens: the supervisor's death closes the gate,
and then nothing has happened. Afterwards the kernel kills it with the supervisor (PDEATHSIG).
Loaded by the supervisors: stdlib only. Read next: `shim.py`.
"""

import os

from ckptd.runner import linux
from ckptd.runner.attempt import Order

OPEN = b"go"
_DEFAULT_PATH = "/usr/local/bin:/usr/bin:/bin"
_MESSAGE_BYTES_MAX = 1_024


def become_task(order: Order, gate: int, output: int, supervisor: int, *, calm: bool) -> None:
    """Turn this process into the task. Returns never: ends in exec, or tells why not and exits."""
    step = "prepare the process"
    try:
        os.setsid()
        if not calm:
            _reset_oom_score()
        if order.uid >= 0:
            step = f"become uid {order.uid}"
            os.setgroups(order.groups)
            os.setresgid(order.gid, order.gid, order.gid)
            os.setresuid(order.uid, order.uid, order.uid)
        linux.die_with_parent()  # after the change of uid, which would undo it
        os.umask(order.umask)
        step = f"enter the working directory {order.cwd}"
        os.chdir(order.cwd)
        step = f"open the input {order.stdin}"
        _set_streams(order.stdin, output)
        if os.read(gate, len(OPEN)) != OPEN or os.getppid() != supervisor:
            os._exit(1)
        step = f"execute {order.argv[0]}"
        linux.set_mask(linux.NO_SIGNALS)
        _execute(order)
    except OSError as error:
        _tell(gate, error.errno or 0, f"cannot {step}: {os.strerror(error.errno or 0)}")
    except BaseException as error:  # noqa: BLE001  (nothing may return into the supervisor's code)
        _tell(gate, 22, f"cannot {step}: {error!r}")
    os._exit(127)


def _reset_oom_score() -> None:
    """A daemon protected from the OOM killer must not pass that on. Needs to be our own still."""
    fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
    os.write(fd, b"0")
    os.close(fd)


def _set_streams(stdin: str, output: int) -> None:
    """All other descriptors are close-on-exec, as Python makes them."""
    os.dup2(os.open(stdin or "/dev/null", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)


def _execute(order: Order) -> None:
    name = order.argv[0]
    if "/" in name:
        os.execve(name, order.argv, order.env)  # noqa: S606
    denied: OSError | None = None
    for directory in order.env.get("PATH", _DEFAULT_PATH).split(":"):
        try:
            os.execve(f"{directory or '.'}/{name}", order.argv, order.env)  # noqa: S606
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError as error:
            denied = error
    raise denied or FileNotFoundError(2, "not found in PATH")


def _tell(gate: int, errno: int, text: str) -> None:
    try:
        os.write(gate, f"{errno} {text}".encode(errors="replace")[:_MESSAGE_BYTES_MAX])
    except OSError:
        return
