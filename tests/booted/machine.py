"""Machines that really boot: what all of them can do, and `Nspawn`, the quick kind.

    with Nspawn("bookworm") as machine:                # systemd 252; "trixie" has 257
        machine.boot()                                 # to "running"; 1-2 s
        machine.run(["ckptctl", "status"])             # -> Result(code, out, err); raises unless code is 0
        machine.run(["ckptctl", "status"], user="mallory", check=False).code
        machine.sh("systemctl enable --now ckptd")     # a script for /bin/sh as root; returns stdout
        machine.put("/tmp/job", "#!/bin/sh\\n...", mode=0o755)
        machine.get("/tmp/result")                     # bytes
        machine.journal("-u", "ckptd")                 # its text of this boot
        machine.reboot(); machine.poweroff(); machine.boot(); machine.kill()

Each machine is an overlay of its own over the tree that roots.py keeps; it starts as installed and
forgets everything when it is closed, but keeps its disk over `reboot`, `poweroff` and `kill`. Users:
alice (1000) and bob (1001) are in group ckptd, mallory (1002) is not.

An Nspawn shares the host's kernel: no cgroup controllers where the host has version 1, so that memory
limits are accepted and not enforced. For those, and for power cuts, take `Vm` (vm.py).

Nothing stays behind, however the test process dies: see `Nspawn.HOLD`.
"""

import atexit
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.booted import roots
from tests.waiting import until

COMMAND_S = 120.0
BOOT_S = 90.0
STOP_S = 120.0
ENV = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/root",
    "USER": "root",
    "TERM": "dumb",
}

_numbers = itertools.count(1)
_open: set["Machine"] = set()


@dataclass(frozen=True)
class Result:
    """What a command in a machine came to."""

    argv: Sequence[str]
    code: int
    out: str
    err: str


class CommandFailed(AssertionError):
    """A command in a machine ended with another code than 0."""


class Machine:
    """What every kind of machine can do; a kind has to add `boot`, `_exec`, `kill` and `is_up`."""

    def __init__(self, suite: str) -> None:
        _sweep()
        self.suite = suite
        self.name = f"ckb-{os.getpid()}-{next(_numbers)}"
        self.dir = Path(tempfile.mkdtemp(prefix=f"{self.name}-", dir="/tmp"))
        self.console = self.dir / "console"
        _open.add(self)

    # --- to be added by the kind ----------------------------------------------------------------

    def boot(self, *, until_running: bool = True) -> Self:
        """Start it on its disk; return once systemd says running or degraded, within 90 s."""
        raise NotImplementedError

    def kill(self) -> None:
        """End it at once, as a power cut would; its disk stays."""
        raise NotImplementedError

    def is_up(self) -> bool:
        """Tell whether it has power, in any state between the start and the power-off."""
        raise NotImplementedError

    def _exec(
        self, argv: Sequence[str], *, env: Mapping[str, str], stdin: bytes, timeout_s: float
    ) -> tuple[int, bytes, bytes]:
        raise NotImplementedError

    # --- commands and files ---------------------------------------------------------------------

    def run(
        self,
        argv: Sequence[str],
        *,
        user: str = "root",
        check: bool = True,
        stdin: bytes | str = b"",
        env: Mapping[str, str] | None = None,
        timeout_s: float = COMMAND_S,
    ) -> Result:
        """Run a command in /, outside of every session and unit, and return how it ended.

        `user` gets its groups, HOME and PATH, as after a login, but no session.

        Raises:
            CommandFailed: It ended with another code than 0, and `check` is true.
            TimeoutError: It did not end in time; it is killed.
        """
        command = list(argv)
        given = {**ENV, **(env or {})}
        if user != "root":
            passed = [f"{name}={value}" for name, value in (env or {}).items()]
            command = ["env", *passed, *command] if passed else command
            group = self._primary_group(user)
            drop = [f"--reuid={user}", f"--regid={group}", "--init-groups", "--reset-env"]
            command = ["setpriv", *drop, "--", *command]
        data = stdin.encode() if isinstance(stdin, str) else stdin
        code, out, err = self._exec(command, env=given, stdin=data, timeout_s=timeout_s)
        result = Result(
            tuple(argv), code, out.decode(errors="replace"), err.decode(errors="replace")
        )
        if check and code:
            raise CommandFailed(f"{list(argv)} as {user}: exit {code}\n{result.out}\n{result.err}")
        return result

    def sh(
        self, script: str, *, user: str = "root", check: bool = True, timeout_s: float = COMMAND_S
    ) -> str:
        """Run a script with /bin/sh and return what it prints on stdout."""
        return self.run(["sh", "-c", script], user=user, check=check, timeout_s=timeout_s).out

    def put(
        self, path: str, content: bytes | str, *, mode: int = 0o644, owner: str = "root"
    ) -> str:
        """Write a file, replacing it at once, and make its directories; return the path."""
        script = (
            'set -e; mkdir -p "$(dirname "$1")"; cat >"$1.new"; '
            'chmod "$2" "$1.new"; chown "$3:" "$1.new"; mv "$1.new" "$1"'
        )
        self.run(["sh", "-c", script, "-", path, f"{mode:o}", owner], stdin=content)
        return path

    def get(self, path: str) -> bytes:
        """Return the content of a file.

        Raises:
            CommandFailed: It cannot be read.
        """
        code, out, err = self._exec(["cat", path], env=ENV, stdin=b"", timeout_s=COMMAND_S)
        if code:
            raise CommandFailed(err.decode(errors="replace"))
        return out

    def exists(self, path: str) -> bool:
        """Tell whether there is something at the path."""
        return self.run(["test", "-e", path], check=False).code == 0

    # --- systemd --------------------------------------------------------------------------------

    def journal(self, *matches: str) -> str:
        """Return the text of this boot's journal, for example `journal("-u", "ckptd")`."""
        return self.run(["journalctl", "--no-pager", "-b", "-o", "short-monotonic", *matches]).out

    def show(self, unit: str, prop: str) -> str:
        """Return one property of a unit."""
        return self.run(["systemctl", "show", "--value", f"--property={prop}", unit]).out.strip()

    def state(self) -> str:
        """Return what `systemctl is-system-running` says; "" where nobody answers."""
        return self.run(["systemctl", "is-system-running"], check=False).out.strip()

    def failed_units(self) -> list[str]:
        """Return the names of units that failed."""
        lines = self.run(["systemctl", "list-units", "--failed", "--plain", "--no-legend"]).out
        return [line.split()[0] for line in lines.splitlines()]

    def user_env(self, user: str) -> dict[str, str]:
        """Return what `systemctl --user` needs in its environment; starts the user's manager."""
        uid = self.run(["id", "-u", user]).out.strip()
        self.run(["loginctl", "enable-linger", user])
        until(lambda: self.exists(f"/run/user/{uid}/systemd/private"), 30, every_s=0.1)
        run = f"/run/user/{uid}"
        return {"XDG_RUNTIME_DIR": run, "DBUS_SESSION_BUS_ADDRESS": f"unix:path={run}/bus"}

    def poweroff(self, timeout_s: float = STOP_S) -> None:
        """`systemctl poweroff`, and wait until the machine is off; its disk stays."""
        self._go_down("poweroff", timeout_s)

    def reboot(self, timeout_s: float = STOP_S) -> Self:
        """`systemctl reboot`, and wait until it runs again."""
        self._go_down("reboot", timeout_s)
        return self.boot()

    def _go_down(self, verb: str, timeout_s: float) -> None:
        self.run(["systemctl", verb, "--no-block"])
        until(lambda: not self.is_up(), timeout_s, every_s=0.05)
        self.kill()

    def close(self) -> None:
        """End it and remove all that it had."""
        self.kill()
        shutil.rmtree(self.dir, ignore_errors=True)
        _open.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _wait_running(self) -> None:
        def settled() -> bool:
            if not self.is_up():
                raise AssertionError(f"{self.name} went down while booting:\n{self.said()}")
            told = self.run(["systemctl", "is-system-running", "--wait"], check=False).out
            return told.strip() in ("running", "degraded")

        try:
            until(settled, BOOT_S, every_s=0.1)
        except TimeoutError as late:
            raise TimeoutError(f"{self.name} is not up: {self.state()}\n{self.said()}") from late

    def said(self) -> str:
        """Return the end of what was written to the console."""
        return self.console.read_text(errors="replace")[-4000:] if self.console.exists() else ""

    def _primary_group(self, user: str) -> str:
        known = {name: str(1000 + number) for number, name in enumerate(roots.USERS)}
        return known.get(user) or self.run(["id", "-g", user]).out.strip()


class Nspawn(Machine):
    """A container with its own systemd as PID 1, no network, and an overlay in memory as disk."""

    # The holder of the mounts and the one who cleans up: it waits for the end of its stdin, which comes
    # with the end of the test process, however that dies. The mounts vanish with it.
    # Bound: 100 looks, 10 s; what was killed leaves its cgroup within milliseconds.
    HOLD = """
    set -e
    disk=$1 lower=$2 groups=$3
    mount -t tmpfs -o mode=0755 tmpfs "$disk"
    mkdir "$disk/upper" "$disk/work" "$disk/root"
    mount -t overlay -o "lowerdir=$lower,upperdir=$disk/upper,workdir=$disk/work" overlay "$disk/root"
    mkdir -p $groups
    echo held
    read -r _ || true
    set +e
    for _ in $(seq 100); do
      left=$(find $groups -name cgroup.procs -exec cat {} + 2>/dev/null)
      [ -n "$left" ] || break
      kill -KILL $left 2>/dev/null
      sleep 0.1
    done
    find $groups -depth -type d -exec rmdir {} + 2>/dev/null
    umount "$disk/root" && umount "$disk" && rm -rf "${disk%/disk}"
    """
    # Invariant: each machine has a host cgroup of its own. systemd-nspawn --keep-unit makes its payload
    # below the one it is in, so that two machines started from one shell would share all units'
    # groups, and `systemctl stop ckptd.slice` in one would kill the tasks of the other.
    START = """
    groups=$1; shift
    for group in $groups; do echo $$ >"$group/cgroup.procs" || exit 1; done
    exec "$@"
    """

    def __init__(self, suite: str) -> None:
        below = roots.layers(suite)
        super().__init__(suite)
        self.disk = self.dir / "disk"
        self.disk.mkdir()
        lower = ":".join(map(str, below))
        command = [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "--",
            "sh",
            "-c",
            self.HOLD,
            "-",
        ]
        self._holder = subprocess.Popen(
            [*command, str(self.disk), lower, self._cgroups()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"held\n", "the overlay could not be mounted"
        self._nspawn: subprocess.Popen[bytes] | None = None
        self.leader = 0

    @property
    def root(self) -> Path:
        """The disk as the host sees it, also while the machine is off; links are the host's to follow."""
        return Path(f"/proc/{self._holder.pid}/root{self.disk}/root")

    def boot(self, *, until_running: bool = True) -> Self:
        assert self._nspawn is None, "it is up already"
        command = ["systemd-nspawn", "--quiet", f"--directory={self.disk}/root", "--boot"]
        command += ["--register=no", "--keep-unit", "--private-network", f"--machine={self.name}"]
        enter = ["nsenter", f"--target={self._holder.pid}", "--mount", "--"]
        start = ["sh", "-c", self.START, "-", self._cgroups(), *enter, *command]
        with self.console.open("ab") as console:
            self._nspawn = subprocess.Popen(
                start,
                env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        until(self._has_manager, BOOT_S, every_s=0.02)
        if until_running:
            self._wait_running()
        return self

    def _has_manager(self) -> bool:
        """Find the leader, and tell whether its systemd can be asked."""
        assert self._nspawn is not None
        if self._nspawn.poll() is not None:
            raise AssertionError(f"systemd-nspawn ended: {self._nspawn.returncode}\n{self.said()}")
        pid = self._nspawn.pid
        try:
            with open(f"/proc/{pid}/comm", encoding="ascii") as comm:
                is_nspawn = comm.read().startswith("systemd-nspawn")
            with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as children:
                child = children.read().split()
            if not is_nspawn or not child:
                return False
            self.leader = int(child[0])
            return os.path.exists(f"/proc/{self.leader}/root/run/systemd/private")
        except OSError:
            return False

    def is_up(self) -> bool:
        return self._nspawn is not None and self._nspawn.poll() is None

    def kill(self) -> None:
        if self._nspawn is None:
            return
        if self._nspawn.poll() is None and self.leader:
            _kill(self.leader)  # PID 1 of the namespace: everything in it goes with it
        try:
            self._nspawn.wait(10)
        except subprocess.TimeoutExpired:
            self._nspawn.kill()
            self._nspawn.wait()
        self._nspawn, self.leader = None, 0

    def close(self) -> None:
        self.kill()
        assert self._holder.stdin is not None
        self._holder.stdin.close()
        self._holder.wait()
        super().close()

    def _exec(
        self, argv: Sequence[str], *, env: Mapping[str, str], stdin: bytes, timeout_s: float
    ) -> tuple[int, bytes, bytes]:
        assert self.leader, "the machine is off"
        try:
            done = subprocess.run(
                ["nsenter", f"--target={self.leader}", "--all", "--", *argv],
                input=stdin,
                capture_output=True,
                env=dict(env),
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as late:
            raise TimeoutError(f"{list(argv)} in {self.name}: not done in {timeout_s} s") from late
        return done.returncode, done.stdout, done.stderr

    def spawn(self, argv: Sequence[str], **options: object) -> "subprocess.Popen[bytes]":
        """Start a command as root and do not wait for it; the caller ends it."""
        enter = ["nsenter", f"--target={self.leader}", "--all", "--"]
        return subprocess.Popen([*enter, *argv], env=ENV, **options)  # type: ignore[call-overload,no-any-return]

    def _cgroups(self) -> str:
        """Return the machine's cgroups on the host, one per tree where systemd-nspawn places things."""
        top = Path("/sys/fs/cgroup")
        tops = (
            [top] if (top / "cgroup.controllers").exists() else [top / "unified", top / "systemd"]
        )
        return " ".join(str(tree / self.name) for tree in tops if tree.is_dir())


def _sweep() -> None:
    """Remove the directories of machines whose test process was killed."""
    for path in Path("/tmp").glob("ckb-*-*"):
        pid = path.name.split("-")[1]
        if (
            pid.isdigit()
            and not os.path.exists(f"/proc/{pid}")
            and not os.path.ismount(path / "disk")
        ):
            shutil.rmtree(path, ignore_errors=True)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


@atexit.register
def close_all() -> None:
    """End the machines that nobody closed: nothing may stay behind."""
    for machine in list(_open):
        machine.close()
