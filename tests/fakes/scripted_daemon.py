"""A small real server: a ROUTER that answers from a script, so that clients can be tested alone.

It can lose answers, stay silent, close, end in order and come back on the same endpoint.
"""

import threading
from collections.abc import Callable
from pathlib import Path

import zmq

from ckptd.protocol import codec
from ckptd.protocol.errors import CkptdError
from ckptd.protocol.messages import Answer, Message

Said = Answer | CkptdError | bytes | None
"""What a handler gives: an answer, an error, raw bytes of a frame, or nothing at all."""
Handler = Callable[[Message], Said]


class ScriptedDaemon:
    """Serves `script` (verb -> handler) on an ipc socket, in a thread of its own."""

    def __init__(self, directory: Path, script: dict[str, Handler]) -> None:
        self.path = directory / "ctl.sock"
        self.endpoint = f"ipc://{self.path}"
        self.script = script
        self.requests: list[tuple[str, str, Message]] = []  # (id, verb, arguments)
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def start(self) -> "ScriptedDaemon":
        bound = threading.Event()
        self._stop.clear()
        self._thread = threading.Thread(target=self._serve, args=(bound,))
        self._thread.start()
        assert bound.wait(10)
        return self

    def stop(self) -> None:
        """Close the socket and leave a stale file behind, as a killed daemon does.

        With its context: before that ends, libzmq may still take up a connection.
        """
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None

    def end(self, last: Answer) -> Answer:
        """Give the last answer: it is sent, and the connection closed behind it."""
        self._stop.set()
        return last

    def close(self) -> None:
        self.stop()

    def asked(self, verb: str) -> list[str]:
        """Return the ids of the requests for a verb, in the order of their arrival."""
        return [number for number, asked, _ in list(self.requests) if asked == verb]

    def _serve(self, bound: threading.Event) -> None:
        context = zmq.Context()
        socket = context.socket(zmq.ROUTER)
        socket.linger = 1_000
        made = self.path.with_suffix(".new")
        socket.bind(f"ipc://{made}")
        made.rename(self.path)  # at no moment is nobody there, as where systemd keeps the socket
        bound.set()
        while not self._stop.is_set():
            if socket.poll(10):
                peer, frame = socket.recv_multipart()
                reply = self._reply(frame)
                if reply is not None:
                    socket.send_multipart([peer, reply])
        socket.close()
        context.term()

    def _reply(self, frame: bytes) -> bytes | None:
        request = codec.decode_request(frame)
        args = codec.decode_args(request)
        self.requests.append((request.id, request.verb, args))
        said = self.script[request.verb](args)
        if said is None or isinstance(said, bytes):
            return said
        if isinstance(said, CkptdError):
            return codec.encode_error(request.id, said)
        return codec.encode_reply(request.id, codec.encode_answer(said))
