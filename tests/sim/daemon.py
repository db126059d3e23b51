"""One reign of the real daemon on simulated edges, built as `daemon/main.py` builds it."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from ckptd.daemon.ending import Ending
from ckptd.daemon.inhibitor import Inhibitor
from ckptd.daemon.main import Base, Edges, adopt, build, close, recover
from ckptd.daemon.readiness import Progress
from ckptd.host import config as cfg
from ckptd.host.journal import Field, Journal, Kind
from ckptd.host.notify import Notify
from ckptd.host.paths import Paths
from ckptd.protocol import codec
from ckptd.protocol import messages as m
from ckptd.storage.store import Store
from tests.fakes.memory_disk import MemoryDisk
from tests.sim.agenda import SimClock
from tests.sim.asked import Violation
from tests.sim.faults import Climate
from tests.sim.jobs import JobMachine, JobRunner
from tests.sim.network import Network, SimServer

ROOT = "/state"
NOWHERE = "/nonexistent/ckptd-sim"
PARALLEL = 2
Edge = Callable[[str, str], None]


def config_of(climate: Climate) -> cfg.Config:
    """Return a small daemon's configuration; sizes are below what a file may ask for."""
    return cfg.Config(
        wal=cfg.Wal(
            segment_bytes=climate.segment_bytes, snapshot_every_bytes=climate.snapshot_every_bytes
        ),
        retention=cfg.Retention(
            finished_max=climate.finished_max, checkpoints_age_s=climate.checkpoints_age_s
        ),
        groups={"default": cfg.Group(parallel=PARALLEL)},
    )


class SimWake:
    """Signals, as the loop sees them."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.stop_asked = self.reload_asked = self.is_up = False

    def fileno(self) -> int:
        return self._fd

    def up(self) -> None:
        self.is_up = True

    def clear(self) -> None:
        self.is_up = False


class Told:
    """The journal's sink: lines of the trace; a bug that the daemon caught is none that passes."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell
        self.is_mute = False

    def send(self, kind: Kind, message: str, priority: int, fields: Mapping[str, Field]) -> bool:
        if self.is_mute:
            return True
        self.tell(f"  journal: {message}")
        if kind in {Kind.INTERNAL_ERROR, Kind.CLIENT_MALFORMED}:
            raise Violation(f"the daemon met a bug of its own: {message}")
        return True

    def flush(self) -> bool:
        return True


class Descriptors:
    """What the loop's epoll is given: it is never waited on, so one set serves every reign."""

    def __init__(self) -> None:
        self.server, self.wake = os.eventfd(0), os.eventfd(0)

    def close(self) -> None:
        os.close(self.server)
        os.close(self.wake)


class Daemon:
    """One process, from its start to its end or its death."""

    def __init__(
        self,
        climate: Climate,
        disk: MemoryDisk,
        clock: SimClock,
        boot_id: str,
        told: Told,
        number: int,
    ) -> None:
        notify = Notify({}, clock)
        paths = Paths(ROOT, NOWHERE, f"{NOWHERE}/ctl.sock")
        self.disk, self.told = disk, told
        self.base = Base(
            config_of(climate), None, paths, Journal(told), notify, clock, boot_id,
            Progress(notify, clock), 1_000 + number,
        )  # fmt: skip
        self.runner: JobRunner | None = None
        self.server: SimServer | None = None
        self.wake: SimWake | None = None
        self.is_built = False

    def start(self, machine: JobMachine, network: Network, fds: Descriptors, edge: Edge) -> None:
        """Come up: recover, adopt, and put everything together."""
        base = self.base
        store = Store.open(
            ROOT, self.disk, segment_bytes=base.config.wal.segment_bytes, has_threads=False
        )
        self.recovered = recover(base, store)
        self.engine = self.recovered.engine
        ending = Ending(self.engine, base.notify, base.journal, base.paths.run)
        self.runner = JobRunner(machine, edge)
        self.wake = SimWake(fds.wake)
        adopted = adopt(base, self.engine, self.runner)
        self.server = SimServer(network, fds.server, edge)
        self.edges = Edges(
            store,
            self.runner,
            self.server,
            self.wake,
            ending,
            Inhibitor(ending),  # type: ignore[arg-type]
        )
        built = build(base, self.edges, self.recovered, adopted, base.clock.mono_ns())
        self.loop, self.requests = built
        self.is_built = True

    @property
    def has_news(self) -> bool:
        """Tell whether the loop's epoll would wake up."""
        assert self.runner is not None, "no runner before the start"
        assert self.server is not None, "no server before the start"
        assert self.wake is not None, "no signals before the start"
        return self.runner.has_news or self.server.pending() or self.wake.is_up

    def ask(self, verb: str, args: m.Message) -> Any:
        """Return what a client that asks now would be answered; nothing changes by it."""
        assert self.server is not None
        frame = codec.encode_request("look", verb, args)
        incoming = self.server.read(b"look", frame)
        assert incoming is not None
        clock = self.base.clock
        self.requests.take(incoming, clock.now(), clock.mono_ns())
        request, answer = self.requests.outbox.pop()
        assert request is incoming, "an answer to somebody else"
        reply = codec.decode_reply(answer)
        if not reply.ok:
            raise Violation(f"{verb} is answered with {reply.error}")
        return msgspec.json.decode(reply.result)

    def end(self) -> None:
        """End in order, as it was asked to."""
        self.is_built = False
        self.loop.close()
        close(self.base, self.engine, self.edges, self.requests)

    def bury(self) -> None:
        """Let go of what a dead process holds; nothing of it is told or written."""
        self.told.is_mute = True
        if self.runner is not None:
            self.runner.close()
        if self.is_built:
            self.loop.close()
            self.requests.close()
        self.disk.locked.clear()
