"""The loop, one screen: gather, decide, plan, one commit, replies, effects.

One thread. Everything that comes in waits until the turn begins; everything that goes out waits
until the turn's records are durable. Long work is elsewhere or in slices. ZeroMQ's own thread
keeps receiving while the commit syncs, so a group commit is simply what one turn is.
"""

import select

from ckptd.core.plan import Adopt
from ckptd.core.policy import Now
from ckptd.core.port import Runner
from ckptd.daemon.engine import Engine
from ckptd.daemon.housekeeping import Housekeeping
from ckptd.daemon.requests import Requests
from ckptd.daemon.story import Story
from ckptd.door.server import Server
from ckptd.host.clock import Clock
from ckptd.host.wake import Wake

REQUESTS_PER_BATCH = 8
BATCHES_PER_TURN_MAX = 64


class Loop:
    """Turns until it is told to stop."""

    def __init__(  # noqa: PLR0913, PLR0917 - the one place where all parts meet
        self,
        engine: Engine,
        server: Server,
        requests: Requests,
        runner: Runner,
        house: Housekeeping,
        story: Story,
        clock: Clock,
        wake: Wake,
    ) -> None:
        self._engine, self._server, self._requests = engine, server, requests
        self._runner, self._house, self._story = runner, house, story
        self._clock, self._wake = clock, wake
        self._poll = select.epoll()
        for fd in (server.fileno(), runner.fileno(), wake.fileno(), story.echo.fileno()):
            self._poll.register(fd, select.EPOLLIN)

    def run(self) -> None:
        """Turn until housekeeping says that it is over."""
        while not self.is_over:  # Bound: SIGTERM and `shutdown` end it
            self._poll.poll(self.rest_s())
            self.turn()
        self.close()

    @property
    def is_over(self) -> bool:
        """Tell whether the loop's work is done."""
        return self._house.is_over

    def rest_s(self) -> float:
        """Tell the story if there is time; return how long there is no turn to do, -1 for ever.

        A descriptor that becomes readable ends the rest.
        """
        timeout_s = self._timeout_s()
        if timeout_s or self._story.is_long:
            self._story.tell_all(self._engine.state)
        return self._story.timeout_s(timeout_s)

    def close(self) -> None:
        """Tell the rest of the story."""
        self._story.close(self._engine.state)

    def turn(self) -> None:
        """Do one turn. Invariant: nothing is told or done before the commit that covers it."""
        engine, requests = self._engine, self._requests
        now, mono_ns = self._clock.now(), self._clock.mono_ns()
        self._wake.clear()
        self._house.watch_clock(now, mono_ns)
        news = self._runner.poll()
        for seen in news:
            engine.see(seen, now)
        self._house.hear(news)
        for _ in range(BATCHES_PER_TURN_MAX):
            batch = self._server.receive(REQUESTS_PER_BATCH)
            for request in batch:
                requests.take(request, now, mono_ns)
            if len(batch) < REQUESTS_PER_BATCH or engine.is_turn_full:
                break
        self._house.heed(now)
        engine.plan(now)
        grown = engine.commit()
        self._tell(now, mono_ns, grown=grown)
        for effect in engine.orders():
            if isinstance(effect, Adopt):
                self._runner.adopt(effect.task, effect.attempt)
            else:
                self._runner.carry_out(effect)
        self._house.keep(mono_ns, grown=grown)

    def _tell(self, now: Now, mono_ns: int, *, grown: bool) -> None:
        """Send what the turn has to say; parked requests may now have their answer."""
        engine, requests = self._engine, self._requests
        requests.revisit(engine.turn_touched, now, mono_ns, grown=grown)
        for request, frame in requests.outbox:
            self._server.send(request, frame)
        requests.outbox.clear()
        self._story.hear(engine.turn_records)

    def _timeout_s(self) -> float:
        """Return how long nothing can happen unless somebody calls; -1 for ever."""
        if self._server.pending():
            return 0.0
        return self._house.timeout_s(self._clock.now(), self._clock.mono_ns())
