"""What the runner waits for: one epoll with timers, and one thread for work that takes long.

It knows descriptors, times and jobs, and what to call for them; nothing of attempts.
"""

import contextlib
import heapq
import os
import queue
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from ckptd.runner import linux

EVENTS_PER_TURN_MAX = 256

Handler = Callable[[], None]
T = TypeVar("T")


class Watch:
    """Descriptors and times, each with its handler. `fileno` is readable when one is due."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._due: list[tuple[float, int, Handler]] = []
        self._serial = 0
        self._timer = linux.timer()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.add(self._timer, self._ring)
        self.add(self._wake, self._awake)

    def fileno(self) -> int:
        """Return the epoll's own descriptor."""
        return self._epoll.fileno()

    def add(self, fd: int, handler: Handler) -> None:
        """Call `handler` while `fd` is readable or hung up."""
        self._handlers[fd] = handler
        self._epoll.register(fd, select.EPOLLIN)

    def remove(self, fd: int) -> None:
        """Stop watching; call it before the descriptor is closed."""
        if self._handlers.pop(fd, None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def after(self, seconds: float, handler: Handler) -> None:
        """Call `handler` once, so much later."""
        self._serial += 1
        entry = (time.monotonic() + seconds, self._serial, handler)
        heapq.heappush(self._due, entry)
        if self._due[0] is entry:
            self._set_timer()

    def wake(self) -> None:
        """Make `fileno` readable; any thread may call it."""
        os.eventfd_write(self._wake, 1)

    def dispatch(self) -> None:
        """Call what is due now, a bounded number of them, without waiting."""
        for fd, _ in self._epoll.poll(0, EVENTS_PER_TURN_MAX):
            handler = self._handlers.get(fd)
            if handler is not None:  # None: an earlier one of this turn removed it
                handler()

    def close(self) -> None:
        """Close what is ours; watched descriptors are their owners'."""
        os.close(self._timer)
        os.close(self._wake)
        self._epoll.close()

    def _awake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._timer, 8)
        now_s = time.monotonic()
        while self._due and self._due[0][0] <= now_s:  # Bound: `after` adds later ones only
            heapq.heappop(self._due)[2]()
        self._set_timer()

    def _set_timer(self) -> None:
        if self._due:
            linux.set_timer(self._timer, self._due[0][0] - time.monotonic())


class Worker:
    """One thread that reads and hashes files off the loop, jobs in the order given.

    It is started by the first job: tasks that never save anything, the common case, cost none.
    """

    def __init__(self, wake: Handler) -> None:
        self._wake = wake
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Callable[[Any], None]] | None]
        self._jobs = queue.SimpleQueue()
        self._done: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()  # between a last wake-up and the end of what it wakes
        self._is_closed = False

    def submit(self, job: Callable[[], T], then: Callable[[T], None]) -> None:
        """Run `job` in the thread, later `then` with its result in the loop's thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="runner-files", daemon=True)
            self._thread.start()
        self._jobs.put((job, then))

    def settle(self) -> None:
        """Call `then` for all that is done; only in the loop's thread.

        Raises:
            Exception: what a job raised; jobs answer for hostile files themselves, so it is ours.
        """
        while self._done:  # Bound: one per job
            then, result = self._done.popleft()
            if isinstance(result, Exception):
                raise result
            then(result)

    def close(self) -> None:
        """Let the thread end after the job it is in; nobody waits for it."""
        with self._lock:
            self._is_closed = True
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None and not self._is_closed:
            run, then = job
            try:
                self._done.append((then, run()))
            except Exception as error:  # noqa: BLE001  (raised again by `settle`)
                self._done.append((then, error))
            with self._lock:
                if not self._is_closed:
                    self._wake()
