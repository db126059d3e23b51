"""What the runner waits for: one epoll with timers, and a few threads for work that takes long.

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
from functools import partial
from typing import Any, TypeVar

from ckptd.runner import linux

EVENTS_PER_TURN_MAX = 256
SHORTAGE_S = 1.0  # until a step is tried again
THREADS_MAX = 3  # so that the terabyte of one task does not keep the others waiting

Handler = Callable[[], None]
T = TypeVar("T")
Job = tuple[Callable[[], Any], Callable[[Any], None]]


class Watch:
    """Descriptors and times, each with its handler. `fileno` is readable when one is due."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._writers: dict[int, Handler] = {}  # only while there is something to write
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

    def when_writable(self, fd: int, handler: Handler | None) -> None:
        """Call `handler` too while `fd`, which is watched, takes bytes; with None no longer."""
        if handler is not None:
            self._writers[fd] = handler
            self._epoll.modify(fd, select.EPOLLIN | select.EPOLLOUT)
        elif self._writers.pop(fd, None) is not None:
            self._epoll.modify(fd, select.EPOLLIN)

    def remove(self, fd: int) -> None:
        """Stop watching; call it before the descriptor is closed."""
        self._writers.pop(fd, None)
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

    def patiently(self, step: Handler) -> None:
        """Take a step that reads records or processes; again later, where they cannot be read now.

        What cannot be read says nothing: neither that a process is dead, nor that it lives.
        """
        try:
            step()
        except OSError:
            self.after(SHORTAGE_S, partial(self.patiently, step))

    def wake(self) -> None:
        """Make `fileno` readable; any thread may call it."""
        os.eventfd_write(self._wake, 1)

    def dispatch(self) -> None:
        """Call what is due now, a bounded number of them, without waiting."""
        for fd, events in self._epoll.poll(0, EVENTS_PER_TURN_MAX):
            handler = self._handlers.get(fd)
            if events != select.EPOLLOUT and handler is not None:  # None: removed in this turn
                handler()
            writer = self._writers.get(fd)
            if events & select.EPOLLOUT and writer is not None:
                writer()

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
    """Threads that read and hash files off the loop: jobs of one task in the order given.

    They are started by the first jobs: tasks that never save anything, the common case, cost none.
    Invariant: no two jobs of one task run at the same time.
    """

    def __init__(self, wake: Handler) -> None:
        self._wake = wake
        self._waiting: dict[int, deque[Job]] = {}  # of every task that has a job waiting or running
        self._turns: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # whose job is next
        self._done: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()  # of `_waiting`, and between a last wake-up and its target
        self._is_closed = False

    def submit(self, task: int, job: Callable[[], T], then: Callable[[T], None]) -> None:
        """Run `job` in a thread, later `then` with its result in the loop's thread."""
        if len(self._threads) < THREADS_MAX:
            thread = threading.Thread(target=self._work, name="runner-files", daemon=True)
            self._threads.append(thread)
            thread.start()
        with self._lock:
            jobs = self._waiting.setdefault(task, deque())
            jobs.append((job, then))
            if len(jobs) == 1:
                self._turns.put(task)

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
        """Let the threads end after the jobs they are in; nobody waits for them."""
        with self._lock:
            self._is_closed = True
        for _ in self._threads:
            self._turns.put(None)

    def _work(self) -> None:
        while (task := self._turns.get()) is not None and not self._is_closed:
            job, then = self._waiting[task][0]  # it stays there while it runs
            try:
                self._done.append((then, job()))
            except Exception as error:  # noqa: BLE001  (raised again by `settle`)
                self._done.append((then, error))
            with self._lock:
                jobs = self._waiting[task]
                jobs.popleft()
                if jobs:
                    self._turns.put(task)  # behind the other tasks
                else:
                    del self._waiting[task]
                if not self._is_closed:
                    self._wake()
