"""A small real API with pages that limits its callers: 429 with Retry-After in both forms."""

import contextlib
import email.utils
import http.server
import json
import math
import threading
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

from tests.examples.servers import serving

PAGE = 100


class LimitedApi:
    """Records to hand out, and what callers did: pages asked for, and calls that came too early."""

    def __init__(self, count: int, refuses_at: dict[int, str]) -> None:
        """`refuses_at`: the number of a call, and the form of Retry-After that it gets."""
        self.url = ""
        self.records = [record_of(number) for number in range(count)]
        self.pages: list[int] = []
        self.calls = self.refused = self.too_early = 0
        self._refuses_at = refuses_at
        self._closed_until_s = 0.0
        self._lock = threading.Lock()

    def answer(self, after: int) -> tuple[int, dict[str, str], dict[str, Any]]:
        """Return status, headers and body of the answer to a call."""
        with self._lock:
            self.calls += 1
            now_s = time.time()
            if now_s < self._closed_until_s:
                self.too_early += 1
                return 429, {"Retry-After": "1"}, {"error": "I told you"}
            if self.calls in self._refuses_at:
                self.refused += 1
                self._closed_until_s = math.ceil(now_s + 0.2)
                return 429, {"Retry-After": self._told(self.calls)}, {"error": "too many"}
            self.pages.append(after)
            page = self.records[after : after + PAGE]
            return 200, {}, {"records": page, "next": str(after + len(page))}

    def _told(self, call: int) -> str:
        if self._refuses_at[call] == "date":
            return email.utils.formatdate(self._closed_until_s, usegmt=True)
        return f"{self._closed_until_s - time.time() + 0.01:.3f}"

    @contextlib.contextmanager
    def open(self) -> Iterator["LimitedApi"]:
        """Serve it."""
        api = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
                status, headers, body = api.answer(int(query.get("after", ["0"])[0] or 0))
                content = json.dumps(body).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):  # the caller was killed
                    self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                pass

        with serving(Handler) as url:
            self.url = f"{url}/records"
            yield self


def record_of(number: int) -> dict[str, Any]:
    """Return a record; every tenth says the same as one before, under another number."""
    said = number - 7 if number % 10 == 9 else number
    return {"id": number, "body": {"text": f"record {said}", "even": said % 2 == 0}}
