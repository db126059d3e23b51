"""A client written from PROTOCOL.md alone: one DEALER socket and JSON, nothing of ours imported."""

import json
import secrets
import time
from typing import Any, Self

import zmq


class RefusedError(Exception):
    """The daemon said no; `error` is the wire form."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(f"{error['code']}: {error['message']}")
        self.error = error


class RawClient:
    """Sends requests and collects replies by request id; requests may be pipelined."""

    def __init__(self, endpoint: str) -> None:
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RECONNECT_IVL, 5)
        self.socket.setsockopt(zmq.RECONNECT_IVL_MAX, 50)
        self.socket.connect(endpoint)
        self.replies: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, verb: str, args: dict[str, Any], request: str = "") -> str:
        """Send one request; return its id. The same id again is a resend."""
        request = request or secrets.token_hex(8)
        self.socket.send(json.dumps({"v": 1, "id": request, "verb": verb, "args": args}).encode())
        return request

    def receive(self, request: str, timeout_s: float) -> dict[str, Any] | None:
        """Return the reply to a request, or None where there is none in time."""
        deadline = time.monotonic() + timeout_s
        while request not in self.replies:  # Bound: the deadline
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not self.socket.poll(int(left_s * 1000) + 1):
                return None
            reply = json.loads(self.socket.recv())
            self.replies[reply["id"]] = reply
        return self.replies.pop(request)

    def ask(self, verb: str, args: dict[str, Any] | None = None, timeout_s: float = 30.0) -> Any:
        """Return the result; raise RefusedError for an error, TimeoutError for silence."""
        reply = self.receive(self.send(verb, args or {}), timeout_s)
        if reply is None:
            raise TimeoutError(f"no answer to {verb} in {timeout_s} s")
        if not reply["ok"]:
            raise RefusedError(reply["error"])
        return reply["result"]

    def rows(self, select: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Return the status rows of all tasks, page by page."""
        found: list[dict[str, Any]] = []
        cursor = 0
        while True:  # Bound: every page moves the cursor on
            page = self.ask(
                "status", {"select": select or {"all": True}, "limit": 1000, "cursor": cursor}
            )
            found += page["tasks"]
            if not page["next"]:
                return found
            cursor = page["next"]

    def events(self, since: int = 0) -> list[dict[str, Any]]:
        """Return all events after an LSN that are durable by now."""
        found: list[dict[str, Any]] = []
        while True:  # Bound: every page moves `since` on
            page = self.ask("events", {"since": since, "limit": 1000})
            if not page["events"]:
                return found
            found += page["events"]
            since = page["next"]
