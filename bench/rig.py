"""A daemon to measure, and clients that cost little themselves."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import zmq

from ckptd.protocol.limits import PROTOCOL_VERSION

READY_S = 30.0
ANSWER_MS = 30_000


class Rig:
    """One daemon in a directory of its own; on a tmpfs its syncs cost nothing."""

    def __init__(self, base: str) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="ck-", dir=base))
        self.config = self.root / "ckptd.toml"
        self.config.write_text(
            f'[daemon]\nstate_dir = "{self.root}/state"\nrun_dir = "{self.root}/run"\n'
        )
        self.endpoint = f"ipc://{self.root}/run/ctl.sock"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Start the daemon; return the seconds until READY=1."""
        ready = self.root / "ready.sock"
        ready.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
            heard.bind(str(ready))
            heard.settimeout(READY_S)
            began = time.perf_counter()
            with (self.root / "daemon.log").open("ab") as log:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "ckptd", "--config", str(self.config)],
                    env={**os.environ, "NOTIFY_SOCKET": str(ready)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            while b"READY=1" not in heard.recv(4096):  # Bound: READY_S of silence
                continue
            return time.perf_counter() - began

    def kill(self) -> None:
        """SIGKILL the daemon."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def resident_bytes(self) -> int:
        """Return the daemon's resident memory."""
        assert self.process is not None
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def cpu_and_wakeups(self) -> tuple[float, int]:
        """Return CPU seconds and voluntary context switches of all threads so far."""
        assert self.process is not None
        proc = Path(f"/proc/{self.process.pid}")
        fields = (proc / "stat").read_text().rpartition(")")[2].split()
        cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        wakeups = 0
        for status in proc.glob("task/*/status"):
            for line in status.read_text().splitlines():
                if line.startswith("voluntary_ctxt_switches"):
                    wakeups += int(line.split()[1])
        return cpu_s, wakeups


@contextlib.contextmanager
def rig(base: str) -> Iterator[Rig]:
    """Give a running daemon below `base`; its directory stays until `sweep`."""
    made = Rig(base)
    _left.append(made.root)
    try:
        made.start()
        yield made
    finally:
        if made.process is not None:
            made.kill()


_left: list[Path] = []


def sweep() -> None:
    """Remove the directories of all rigs.

    Not before the end: for half a minute after a deletion ext4 makes new files ten times slower,
    because it looks for inodes that were not in use lately.
    """
    for root in _left:
        shutil.rmtree(root, ignore_errors=True)
    _left.clear()


def tmpfs() -> str:
    """Return a directory whose syncs cost nothing, or "" where the machine has none."""
    path = "/dev/shm"  # noqa: S108  (its content is removed again)
    with open("/proc/mounts") as mounts:
        is_there = any(line.split()[1:3] == [path, "tmpfs"] for line in mounts)
    return path if is_there and os.access(path, os.W_OK) else ""


class Clients:
    """So many clients in one thread, each with one request under way at any time."""

    def __init__(self, endpoint: str, count: int) -> None:
        self.context = zmq.Context()
        self.sockets = []
        self.number = 0
        for _ in range(count):
            client = self.context.socket(zmq.DEALER)
            client.setsockopt(zmq.LINGER, 0)
            client.connect(endpoint)
            self.sockets.append(client)

    def close(self) -> None:
        """Hang up."""
        self.context.destroy(linger=0)

    def frame(self, verb: str, args: Any) -> bytes:
        """Return a request under an id of its own."""
        self.number += 1
        made = {"v": PROTOCOL_VERSION, "id": f"{id(self)}-{self.number}", "verb": verb}
        return msgspec.json.encode({**made, "args": args})

    def ask(self, verb: str, args: Any) -> Any:
        """Ask by the first client; return the result."""
        self.sockets[0].send(self.frame(verb, args))
        reply = msgspec.json.decode(self._receive(self.sockets[0]))
        if not reply["ok"]:
            raise RuntimeError(reply["error"])
        return reply["result"]

    def _receive(self, client: zmq.Socket[bytes]) -> bytes:
        if not client.poll(ANSWER_MS):
            raise TimeoutError("no answer")
        return client.recv()

    def latencies_s(self, verb: str, args: Any, rounds: int) -> list[float]:
        """Return how long each of so many requests of one client took, sorted."""
        took = []
        for frame in [self.frame(verb, args) for _ in range(rounds)]:
            began = time.perf_counter()
            self.sockets[0].send(frame)
            self._receive(self.sockets[0])
            took.append(time.perf_counter() - began)
        return sorted(took)

    def per_second(self, verb: str, args: Any, rounds: int) -> float:
        """Return answers per second while every client always has one request under way."""
        frames = iter([self.frame(verb, args) for _ in range(rounds)])
        poller = zmq.Poller()
        for client in self.sockets:
            poller.register(client, zmq.POLLIN)
        began = time.perf_counter()
        under_way = 0
        for client in self.sockets:
            client.send(next(frames))
            under_way += 1
        while under_way:  # Bound: the frames
            for client, _ in poller.poll(ANSWER_MS):
                client.recv()
                under_way -= 1
                frame = next(frames, None)
                if frame is not None:
                    client.send(frame)
                    under_way += 1
        return rounds / (time.perf_counter() - began)


def quantile(ordered: list[float], share: float) -> float:
    """Return the value below which this share of a sorted list lies."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]
