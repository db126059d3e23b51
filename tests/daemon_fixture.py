"""LiveDaemon: a real daemon process in a directory of its own, for tests that kill it.

Everything lives under /tmp/ck-XXXX, because the path of a unix socket ends at 107 bytes. `close`
finds every process that belongs to the directory (daemon, supervisors, tasks) and ends it by pid.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.raw_client import RawClient
from tests.waiting import until

ROOT = Path(__file__).resolve().parent.parent
READY_S = 20.0
CTL_S = 60.0


class LiveDaemon:
    """One `python -m ckptd` with its own state and runtime directories."""

    def __init__(
        self,
        *,
        config: str = "",
        state_dir: Path | None = None,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="ck-", dir="/tmp"))
        self.root.chmod(0o755)  # tasks of other users pass through
        self.state = state_dir or self.root / "state"
        self.run = self.root / "run"
        self.work = self.root / "work"
        self.work.mkdir(mode=0o777)
        self.work.chmod(0o777)
        self.config = self.root / "ckptd.toml"
        self.config.write_text(
            f'[daemon]\nstate_dir = "{self.state}"\nrun_dir = "{self.run}"\n{config}'
        )
        self.log = self.root / "daemon.log"
        self.endpoint = f"ipc://{self.run}/ctl.sock"
        self.prefix = list(prefix)
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("CKPT", "NOTIFY_"))},
            "PYTHONPATH": str(ROOT),
            "CKPTD_ENDPOINT": self.endpoint,
            "CKPTD_TEST_ROOT": str(self.root),
            "CKPTD_BATCH_DIR": str(self.root / "batches"),
            "CKPTD_SCOPES_DIR": str(self.root / "scopes"),
            **(env or {}),
        }
        self.process: subprocess.Popen[bytes] | None = None
        self._clients: list[subprocess.Popen[str]] = []

    # --- the daemon's life ----------------------------------------------------------------------

    def start(self, *, wait_ready: bool = True) -> None:
        """Start the daemon; return once it said READY=1 (with replay and adoption behind it)."""
        assert self.process is None, "already started"
        ready = self.root / "ready.sock"
        ready.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
            heard.bind(str(ready))
            heard.settimeout(0.05)
            self.process = self._spawn({"NOTIFY_SOCKET": str(ready)})
            if wait_ready:
                until(lambda: self._is_ready(heard), READY_S, every_s=0)

    def _spawn(self, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        command = [*self.prefix, sys.executable, "-m", "ckptd", "--config", str(self.config)]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command,
                env={**self.env, **env},
                cwd=self.work,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _is_ready(self, heard: socket.socket) -> bool:
        try:
            return b"READY=1" in heard.recv(4096)
        except TimeoutError:
            assert self.process is not None
            code = self.process.poll()
            assert code is None, f"daemon ended with {code}: {self.log.read_text()[-4000:]}"
            return False

    @property
    def pid(self) -> int:
        """The daemon's pid."""
        assert self.process is not None, "not running"
        return self.process.pid

    def kill9(self) -> None:
        """SIGKILL the daemon, and only it; return when it is gone."""
        assert self.process is not None, "not running"
        self.process.kill()
        self.process.wait()
        self.process = None

    def stop(self, timeout_s: float = 20.0) -> int:
        """Ask the daemon to end (SIGTERM); return its exit code."""
        assert self.process is not None, "not running"
        self.process.terminate()
        code = self.process.wait(timeout_s)
        self.process = None
        return code

    def restart(self) -> None:
        """SIGKILL the daemon and start it again on the same state."""
        self.kill9()
        self.start()

    def close(self) -> None:
        """End every process that belongs to this daemon and remove its directory."""
        if self.process is not None:
            self.kill9()
        for client in self._clients:
            client.kill()
            client.communicate()

        def none_left() -> bool:
            left = list(processes_of(self.root))
            for pid in left:
                kill_quietly(pid)
            return not left

        until(none_left, 10.0, every_s=0.02)
        shutil.rmtree(self.root, ignore_errors=True)

    # --- its clients ----------------------------------------------------------------------------

    def spawn_ctl(self, *args: str, **options: Any) -> subprocess.Popen[str]:
        """Start `ckptctl ARGS` and do not wait for it."""
        client: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, "-m", "ckptctl", *args],
            env=self.env,
            cwd=self.work,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **options,
        )
        self._clients.append(client)
        return client

    def ctl(
        self, *args: str, check: bool = True, timeout_s: float = CTL_S
    ) -> subprocess.CompletedProcess[str]:
        """Run `ckptctl ARGS` to its end."""
        process = self.spawn_ctl(*args)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
        done = subprocess.CompletedProcess(args, process.returncode, out, err)
        said = f"ckptctl {' '.join(args)} gave {done.returncode}\n{out}{err}"
        assert not check or done.returncode == 0, f"{said}\n{self.log.read_text()[-4000:]}"
        return done

    def json(self, *args: str) -> Any:
        """Return what `ckptctl ARGS -o json` prints."""
        return json.loads(self.ctl(*args, "-o", "json").stdout)

    def connections(self) -> int:
        """Return how many clients are connected right now."""
        mark = f"{self.run}/ctl.sock\n"
        with open("/proc/net/unix") as table:  # column 5: 03 is connected
            return sum(line.endswith(mark) and line.split()[5] == "03" for line in table)

    def submit(self, *command: str, options: Sequence[str] = ()) -> int:
        """Submit one command; return its id."""
        return int(self.ctl("submit", "-q", *options, "--", *command).stdout)

    def submit_python(self, code: str, *args: str, options: Sequence[str] = ()) -> int:
        """Submit a piece of Python; return its id."""
        return self.submit(sys.executable, "-c", code, *args, options=options)

    def row(self, task: int) -> dict[str, Any]:
        """Return the task's line of `status`, as it is on the wire."""
        with RawClient(self.endpoint) as client:
            (row,) = client.ask("status", {"select": {"ids": [task]}})["tasks"]
        assert isinstance(row, dict)
        return row

    def detail(self, task: int) -> dict[str, Any]:
        """Return all about the task, as it is on the wire."""
        with RawClient(self.endpoint) as client:
            (detail,) = client.ask("show", {"select": {"ids": [task]}})["tasks"]
        assert isinstance(detail, dict)
        return detail

    def wait_phase(self, task: int, *phases: str, timeout_s: float = 20.0) -> dict[str, Any]:
        """Return the task's row once it is in one of the phases."""
        row: dict[str, Any] = {}

        def there() -> bool:
            row.update(self.row(task))
            return row["phase"] in phases

        try:
            until(there, timeout_s, every_s=0.03)
        except TimeoutError as late:
            log = self.log.read_text()[-4000:]
            raise TimeoutError(f"task {task} is not {phases}: {row}\n{log}") from late
        return row

    def wait_file(self, name: str, timeout_s: float = 20.0) -> str:
        """Return the content of a file in the work directory once it is there, not empty."""
        path = self.work / name
        return until(lambda: path.exists() and path.read_text(), timeout_s) or ""


StartDaemon = Callable[..., LiveDaemon]


def processes_of(root: Path) -> Iterator[int]:
    """Yield the pid of every process that mentions the directory in any way."""
    mark = os.fsencode(root)
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid() and _mentions(f"/proc/{entry}", mark):
            yield int(entry)


def _mentions(proc: str, mark: bytes) -> bool:
    """Tell by environment, command line, working directory and open files."""
    try:
        for name in ("environ", "cmdline"):
            with open(f"{proc}/{name}", "rb") as file:
                if mark in file.read():
                    return True
        links = [f"{proc}/cwd", *(f"{proc}/fd/{fd}" for fd in os.listdir(f"{proc}/fd"))]
    except OSError:  # it ended while we looked, or is not ours
        return False
    return any(_link_target(link).startswith(mark) for link in links)


def _link_target(link: str) -> bytes:
    try:
        return os.readlink(os.fsencode(link))
    except OSError:
        return b""


def kill_quietly(pid: int) -> None:
    """SIGKILL a process that may be gone already."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def parent_of(pid: int) -> int:
    """Return the parent's pid: of a task's main process that is its supervisor."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[1])


def is_alive(pid: int) -> bool:
    """Tell whether the process runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False
