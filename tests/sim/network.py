"""The network between clients and the daemon of the moment: bytes, late, twice, or never.

`SimServer` stands where `ckptd/door/server.py` stands and reads frames with the same codec.
"""

import os
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ckptd.door.server import Incoming
from ckptd.door.zap import Access, Peer
from ckptd.protocol import codec
from ckptd.protocol.errors import CkptdError
from tests.sim.agenda import Agenda

UID = os.geteuid()
BACKLOG_MAX = 64  # what waits in the socket while no daemon reads it


@dataclass
class Weather:
    """How the network is: chances for each message, and the longest delay."""

    loss: float = 0.0
    double: float = 0.0
    delay_s: float = 0.002
    late: float = 0.0  # chance of a message that is much later than others


class Network:
    """Carries frames. Clients are known by their identity."""

    def __init__(self, agenda: Agenda, dice: random.Random) -> None:
        self._agenda, self._dice = agenda, dice
        self.weather = Weather()
        self.clients: dict[bytes, Callable[[bytes], None]] = {}
        self.on_arrival: Callable[[], None] = lambda: None
        self.on_reply: Callable[[bytes], None] = lambda _: None
        self.inbox: deque[tuple[bytes, bytes]] = deque()
        self.is_open = False
        self.counts = {"sent": 0, "lost": 0, "doubled": 0, "late": 0}

    def ask(self, identity: bytes, frame: bytes) -> None:
        """Carry a request to whatever daemon reads the socket when it arrives."""
        self._carry(lambda: self._arrive(identity, frame))

    def tell(self, identity: bytes, frame: bytes) -> None:
        """Carry a reply to its client."""
        self._carry(lambda: self.clients[identity](frame))

    def _carry(self, deliver: Callable[[], None]) -> None:
        dice, weather = self._dice, self.weather
        self.counts["sent"] += 1
        if dice.random() < weather.loss:
            self.counts["lost"] += 1
            return
        times = 1 + (dice.random() < weather.double)
        self.counts["doubled"] += times - 1
        for _ in range(times):
            delay_s = dice.random() * weather.delay_s
            if dice.random() < weather.late:
                self.counts["late"] += 1
                delay_s += dice.random() * 20
            self._agenda.after(delay_s, deliver)

    def _arrive(self, identity: bytes, frame: bytes) -> None:
        if len(self.inbox) < BACKLOG_MAX or self.is_open:
            self.inbox.append((identity, frame))
            self.on_arrival()

    def daemon_gone(self) -> None:
        """Lose what libzmq had read; what still lies in the socket waits for the next daemon."""
        self.is_open = False
        kept = [message for message in self.inbox if self._dice.random() < 0.5]
        self.inbox.clear()
        self.inbox.extend(kept)


class SimServer:
    """The daemon's end. `edge` is told of every reply: a daemon may die at any of them."""

    def __init__(self, network: Network, fd: int, edge: Callable[[str, str], None]) -> None:
        self._network, self._fd, self._edge = network, fd, edge
        self.access = Access(UID, "")
        self.replies = 0
        network.is_open = True

    def fileno(self) -> int:
        return self._fd

    def pending(self) -> bool:
        return bool(self._network.inbox)

    def receive(self, limit: int) -> list[Incoming]:
        found = []
        for _ in range(min(limit, len(self._network.inbox))):
            identity, frame = self._network.inbox.popleft()
            incoming = self.read(identity, frame)
            if incoming is not None:
                found.append(incoming)
        return found

    def read(self, identity: bytes, frame: bytes) -> Incoming | None:
        try:
            request = codec.decode_request(frame)
            args = codec.decode_args(request)
        except CkptdError as refused:
            self._network.tell(identity, codec.encode_error("", refused))
            return None
        peer = Peer(UID, UID, 1)
        return Incoming(peer, identity, False, request.id, request.verb, args, len(frame))

    def send(self, incoming: Incoming, frame: bytes) -> None:
        self._edge("reply", incoming.verb)
        self.replies += 1
        self._network.on_reply(frame)
        self._network.tell(incoming.identity, frame)

    def look_at_path(self) -> None:
        pass

    def stats(self) -> dict[str, int]:
        return {"replies": self.replies}

    def close(self) -> None:
        self._network.is_open = False
