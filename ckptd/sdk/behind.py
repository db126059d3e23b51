"""A checkpoint that is written beside the work, by a thread that ends with it.

One is on its way at a time: whoever saves next, and the end of the task, settles it first.
Invariant: once it was begun it ends, whatever exception strikes whoever waits for it: it holds the
lock on `ckpt/`, and what it publishes is what the next save carries on from.
Stdlib only. Read next: `work.py` (who begins it), `save.py` (what it does).
"""

import threading
from _thread import allocate_lock
from collections.abc import Callable
from typing import NamedTuple


class CheckpointRef(NamedTuple):
    """A checkpoint that is durable: number, digest, bytes of its files, seconds it took."""

    seq: int
    digest: str
    bytes: int
    seconds: float


class Pending:
    """A checkpoint on its way to the disk, in a thread of its own once it is started."""

    def __init__(self, finish: Callable[[], CheckpointRef]) -> None:
        self._finish = finish
        self._ref: CheckpointRef | None = None
        self._error: BaseException | None = None
        self._is_told = False
        self._claim = allocate_lock()  # whoever has it runs
        self._gate = allocate_lock()  # closed until it is over; a join that was struck forgets
        self._gate.acquire()

    def start(self) -> None:
        """Let it run beside its caller; where nothing runs beside, in its place."""
        try:
            threading.Thread(target=self._run, name="checkpoint").start()
        except RuntimeError:  # no more threads are allowed here
            self._run()
        except BaseException:
            # A signal's exception: left undone, it would hold the lock on `ckpt/` for ever.
            self._run()
            raise

    def _run(self) -> None:
        if not self._claim.acquire(blocking=False):
            return
        try:
            self._ref = self._finish()
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it raised
            self._error = error
        finally:
            self._gate.release()

    def wait(self) -> CheckpointRef:
        """Return it once it is durable; raises what `checkpoint` raises.

        Durable: the checkpoint it returns.
        """
        with self._gate:
            pass
        self._is_told = True
        if self._error is not None:
            raise self._error
        assert self._ref is not None
        return self._ref

    def settle(self) -> None:
        """Wait until it is over; raises what became of it, unless `wait` did.

        Durable: the checkpoint.
        """
        with self._gate:
            pass
        if not self._is_told:
            self.wait()
