"""Web servers for the examples: nginx where it is installed, and small ones of our own.

All listen on a loopback port that the system chose, and note each request that they answered.
"""

import contextlib
import http.server
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.waiting import let_pass, until

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
KB_PER_S = 4096  # slow enough to be killed in the middle


class Asked(NamedTuple):
    """A request for a file: where its range began, how it was answered, how much was sent."""

    start: int
    status: int
    sent: int


class Site:
    """A directory that is served; `asked` is what came in, once it was answered."""

    def __init__(self, root: Path, url: str, asked: Callable[[], list[Asked]]) -> None:
        self.root, self.url, self.asked = root, url, asked

    def publish(self, name: str, content: bytes) -> None:
        """Put a file there, whole or not at all, with a new ETag if it is another one."""
        aside = self.root / f".{name}"
        aside.write_bytes(content)
        aside.chmod(0o644)
        old = self.root / name
        if old.exists():  # an ETag is often made of size and whole seconds
            os.utime(aside, (0, old.stat().st_mtime + 10))
        aside.rename(old)


@contextlib.contextmanager
def nginx(folder: Path) -> Iterator[Site]:
    """Serve with nginx."""
    root = folder / "www"
    root.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = folder / "nginx.conf"
    config.write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1;\n"
        + ("user root;\n" if os.geteuid() == 0 else "")
        + "events { worker_connections 64; }\n"
        "http {\n"
        "  log_format asked '$status $body_bytes_sent \"$http_range\"';\n"
        f"  access_log {folder}/asked asked;\n"
        + "".join(
            f"  {kind}_temp_path {folder}/{kind};\n"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        + f"  server {{ listen 127.0.0.1:{port}; root {root}; limit_rate {KB_PER_S}k; }}\n"
        "}\n"
    )
    assert NGINX
    server = subprocess.Popen([NGINX, "-p", str(folder), "-c", str(config)], stderr=subprocess.PIPE)
    try:
        until(lambda: _answers(port) or server.poll() is not None)
        yield Site(root, f"http://127.0.0.1:{port}", lambda: _noted(folder / "asked"))
    finally:
        server.terminate()
        server.communicate(timeout=20)


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def _noted(path: Path) -> list[Asked]:
    found = re.findall(r'(\d+) (\d+) "(?:bytes=(\d+)-|-)"', path.read_text())
    return [Asked(int(start or 0), int(status), int(sent)) for status, sent, start in found]


@contextlib.contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve with a handler, in threads; give the URL."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def small_server(folder: Path, *, honours_if_range: bool = True) -> Iterator[Site]:
    """Serve with forty lines of Python: Range, If-Range and a strong ETag."""
    root = folder / "www"
    root.mkdir()
    asked: list[Asked] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = root / os.path.basename(self.path)
            if not path.exists():
                self.send_error(404)
                return
            content = path.read_bytes()
            etag = f'"{path.stat().st_mtime_ns:x}"'
            start = wanted = int(re.sub(r"\D", "", self.headers.get("Range", "0")))
            if honours_if_range and self.headers.get("If-Range", etag) != etag:
                start = 0
            status = 206 if start else 200
            self.send_response(status)
            self.send_header("ETag", etag)
            self.send_header("Content-Length", str(len(content) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-/{len(content)}")
            self.end_headers()
            sent = self.send_slowly(content[start:])
            asked.append(Asked(wanted, status, sent))

        def send_slowly(self, content: bytes) -> int:
            piece, sent = KB_PER_S * 10, 0  # a hundredth of a second's worth
            with contextlib.suppress(OSError):  # the client was killed
                for begin in range(0, len(content), piece):
                    sent += self.wfile.write(content[begin : begin + piece])
                    let_pass(0.01)
            return sent

        def log_message(self, *args: Any) -> None:
            pass

    with serving(Handler) as url:
        yield Site(root, url, lambda: list(asked))
