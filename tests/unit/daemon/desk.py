"""A desk behind a real `Server`: a thread that answers `ping` and `output` and hides nothing."""

import io
import select
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ckptd.door.listen import Listening, listen
from ckptd.door.server import Incoming, Server
from ckptd.host.config import Ipc
from ckptd.host.journal import Journal, StreamSink
from ckptd.protocol import codec
from ckptd.protocol.messages import Output, OutputChunk, Pong


class Desk:
    """Serves until closed; remembers every request that reached it."""

    def __init__(self, ipc: Ipc, path: str, listening: Listening | None = None) -> None:
        self.path = path
        self.endpoint = f"ipc://{path}"
        self.told = io.StringIO()
        journal = Journal(StreamSink(self.told, prefixed=True))
        self.server = Server(listening or listen(path, ipc, [], journal), ipc, journal)
        self.seen: list[Incoming] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        poll = select.epoll()
        poll.register(self.server.fileno(), select.EPOLLIN)
        while not self._stop.is_set():
            if not self.server.pending():
                poll.poll(0.02)
            for request in self.server.receive(512):
                self.seen.append(request)
                self.server.send(
                    request, codec.encode_reply(request.request_id, self._answer(request))
                )
        poll.close()
        self.server.close()

    @staticmethod
    def _answer(request: Incoming) -> bytes:
        if isinstance(request.args, Output):
            data = bytes(request.args.limit)
            return codec.encode_answer(OutputChunk(data, 0, len(data), done=False))
        peer = request.peer
        return codec.encode_answer(Pong("test", 1, peer.pid, peer.uid, 1))

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


@contextmanager
def open_desk(ipc: Ipc | None = None) -> Iterator[Desk]:
    """A desk in a directory of its own; socket paths must be short."""
    with tempfile.TemporaryDirectory(prefix="ck-", dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        desk = Desk(ipc or Ipc(group="", mode="0600"), f"{directory}/ctl.sock")
        try:
            yield desk
        finally:
            desk.close()


@pytest.fixture
def desk() -> Iterator[Desk]:
    with open_desk() as opened:
        yield opened
