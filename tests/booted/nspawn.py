"""Nspawn: a container with its own systemd as PID 1, up within a second.

It shares the host's kernel: where that has cgroup version 1 there are no controllers inside, so
that memory limits are accepted and not enforced. For those, and for power cuts, take `Vm` (vm.py).

Each machine is an overlay in memory over the tree that roots.py keeps. Nothing stays behind,
however the test process dies: see `Nspawn.HOLD`.
"""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from tests.booted import roots
from tests.booted.machine import BOOT_S, ENV, Machine
from tests.waiting import until


class Nspawn(Machine):
    """A container with its own systemd as PID 1, no network, and an overlay in memory as disk."""

    # Holds the mounts and cleans up: it waits for the end of its stdin, which comes with the end of
    # the test process, however that dies. The mounts vanish with it.
    # Bound: 100 looks, 10 s; what was killed leaves its cgroup within milliseconds.
    HOLD = """
    set -e
    disk=$1 lower=$2 groups=$3
    mount -t tmpfs -o mode=0755 tmpfs "$disk"
    mkdir "$disk/upper" "$disk/work" "$disk/root"
    cd "$disk"
    mount -t overlay -o "lowerdir=$lower,upperdir=upper,workdir=work" overlay root
    cd /
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
    # Invariant: each machine has a host cgroup of its own. systemd-nspawn --keep-unit makes its
    # payload below the one it is in, so that two machines started from one shell would share all
    # groups of units, and `systemctl stop ckptd.slice` in one would kill the tasks of the other.
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
        with self._holder.stdout as said:
            assert said.readline() == b"held\n", "the overlay could not be mounted"
        self._nspawn: subprocess.Popen[bytes] | None = None
        self.leader = 0

    @property
    def root(self) -> Path:
        """The disk as the host sees it, also while the machine is off. Its links are not safe."""
        return Path(f"/proc/{self._holder.pid}/root{self.disk}/root")

    def boot(self, *, until_running: bool = True) -> Self:
        assert self._nspawn is None, "it is up already"
        command = ["systemd-nspawn", "--quiet", f"--directory={self.disk}/root", "--boot"]
        command += ["--register=no", "--keep-unit", "--private-network", f"--machine={self.name}"]
        enter = ["nsenter", f"--target={self._holder.pid}", "--mount", "--root", "--"]
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
            inside = f"/proc/{self.leader}/root"
            return os.path.exists(f"{inside}/run/systemd/private")
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
        assert self._holder.stdout is not None
        self._holder.stdin.close()
        self._holder.wait()
        self._holder.stdout.close()
        super().close()

    def _exec(
        self, argv: Sequence[str], *, env: Mapping[str, str], stdin: bytes, timeout_s: float
    ) -> tuple[int, bytes, bytes]:
        assert self.leader, "the machine is off"
        try:
            done = subprocess.run(
                ["nsenter", f"--target={self.leader}", "--all", "--root", "--wd", "--", *argv],
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
        enter = ["nsenter", f"--target={self.leader}", "--all", "--root", "--wd", "--"]
        command = [*enter, *argv]
        return subprocess.Popen(command, env=ENV, **options)  # type: ignore[call-overload,no-any-return]

    def _cgroups(self) -> str:
        """Return the machine's cgroups on the host, in each tree that systemd-nspawn uses."""
        top = Path("/sys/fs/cgroup")
        tops = (
            [top] if (top / "cgroup.controllers").exists() else [top / "unified", top / "systemd"]
        )
        return " ".join(str(tree / self.name) for tree in tops if tree.is_dir())


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
