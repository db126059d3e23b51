"""The runner's own small loop: descriptors, times, and work of another thread."""

import os
import select
import socket
import threading
from collections.abc import Iterator

import pytest

from ckptd.runner.watch import Watch, Worker
from tests.waiting import until


@pytest.fixture
def watch() -> Iterator[Watch]:
    made = Watch()
    yield made
    made.close()


def test_times_come_in_their_order_and_make_the_descriptor_readable(watch: Watch) -> None:
    rung: list[int] = []
    watch.after(0.02, lambda: rung.append(2))
    watch.after(0.01, lambda: rung.append(1))
    poll = select.poll()
    poll.register(watch.fileno(), select.POLLIN)

    while len(rung) < 2:
        assert poll.poll(5_000)
        watch.dispatch()

    assert rung == [1, 2]


def test_a_handler_may_remove_another_one_of_the_same_turn(watch: Watch) -> None:
    called: list[int] = []
    readers, writers = zip(*(os.pipe() for _ in range(2)), strict=True)

    def handle(mine: int, other: int) -> None:
        called.append(mine)
        watch.remove(readers[other])

    watch.add(readers[0], lambda: handle(0, 1))
    watch.add(readers[1], lambda: handle(1, 0))
    for fd in writers:
        os.write(fd, b"x")

    watch.dispatch()

    assert len(called) == 1
    for fd in (*readers, *writers):
        os.close(fd)


def test_a_writer_is_called_while_its_descriptor_takes_bytes_and_not_after(watch: Watch) -> None:
    ours, theirs = socket.socketpair()
    called: list[str] = []

    def write() -> None:
        called.append("write")
        watch.when_writable(ours.fileno(), None)

    watch.add(ours.fileno(), lambda: watch.remove(ours.fileno()))
    watch.when_writable(ours.fileno(), write)
    watch.dispatch()
    watch.dispatch()
    assert called == ["write"]

    theirs.send(b"x")
    watch.when_writable(ours.fileno(), lambda: called.append("never"))
    watch.dispatch()
    watch.dispatch()
    assert called == ["write"], "the reader removed both"
    ours.close()
    theirs.close()


def test_results_of_one_task_come_back_in_order_on_the_threads_own_side(watch: Watch) -> None:
    worker = Worker(watch.wake)
    done: list[tuple[int, bool]] = []
    here = threading.get_ident()
    for number in range(10):
        worker.submit(
            7,
            threading.get_ident,
            lambda there, n=number: done.append(  # type: ignore[misc]
                (n, there != here and threading.get_ident() == here)
            ),
        )

    def all_done() -> bool:
        watch.dispatch()
        worker.settle()
        return len(done) == 10

    until(all_done)
    worker.close()

    assert done == [(number, True) for number in range(10)]
