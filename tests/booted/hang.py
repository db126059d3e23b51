"""Run inside a booted machine: stop the main thread of PID where it is, until the process is gone.

    hang.py PID

A thread that never returns from a call looks like this: the others, and signals, go on.
Source: ptrace(2).
"""

import ctypes
import os
import sys

_SEIZE, _INTERRUPT, _WALL = 0x4206, 0x4207, 0x40000000


def main(pid: int) -> None:
    """Hold the thread; a held process that dies ends this."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    for request in (_SEIZE, _INTERRUPT):
        if libc.ptrace(request, pid, None, None) < 0:
            raise OSError(ctypes.get_errno(), "ptrace")
    while True:  # Bound: the watchdog ends the process
        _, status = os.waitpid(pid, _WALL)
        if not os.WIFSTOPPED(status):
            return


if __name__ == "__main__":
    main(int(sys.argv[1]))
