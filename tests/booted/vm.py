"""Virtual machines: a real kernel with cgroup version 2 and enforced limits, and power cuts.

    vm = Vm()                       # Debian 12, 1 GiB, 2 CPUs; Vm(suite="trixie", memory_mib=512)
    vm.boot()                       # some 6 s; all that machine.py describes works here, too
    vm.run([...]); vm.sh("..."); vm.put(...); vm.poweroff(); vm.reboot()
    vm.power_cut()                  # SIGKILL of qemu: what the guest had not flushed is lost
    vm.boot()                       # the same disk after it
    vm.save("here")                 # a snapshot of disk and memory, inside the disk's file
    again = vm.copy("here")         # another machine that goes on from there, in a second

The fixture `vm` gives a copy of a snapshot that was taken once after boot, with ckptd running. Its
clock is set to the host's, as after a suspend. Commands run in cgroups of their own directly under
the root. There is no network and no swap; `psi=1` is set. Everything is some 20 times slower than
outside: wait with `until` and long limits.

Always `-accel tcg`: a nested /dev/kvm may open and then not work.
"""

import json
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tests.booted import disk_image
from tests.booted.cache import require
from tests.booted.guest_channel import GuestChannel, MachineGone
from tests.booted.machine import ENV, Machine
from tests.waiting import until

FIRST_ANSWER_S = 90.0
SNAPSHOT = "ready"
KERNEL_WORDS = "root=/dev/vda rw console=ttyS0 quiet panic=-1 psi=1 systemd.show_status=0"


class Vm(Machine):
    """A virtual machine on a qcow2 disk of its own over the image that disk_image.py keeps."""

    def __init__(
        self,
        suite: str = "bookworm",
        *,
        memory_mib: int = 1024,
        cpus: int = 2,
        disk: Path | None = None,
    ) -> None:
        require("qemu-system-x86_64", package="qemu-system-x86")
        require("qemu-img", package="qemu-utils")
        self._kernel = disk_image.kernel()
        base = disk_image.image(suite)
        super().__init__(suite)
        self.memory_mib, self.cpus = memory_mib, cpus
        self.disk = self.dir / "disk.qcow2"
        self._qemu: subprocess.Popen[bytes] | None = None
        self._channel: GuestChannel | None = None
        if disk is not None:
            subprocess.run(["cp", "--reflink=auto", "--sparse=always", disk, self.disk], check=True)
        else:
            create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(base)]
            subprocess.run([*create, str(self.disk)], check=True)

    # --- power ----------------------------------------------------------------------------------

    def boot(self, *, until_running: bool = True) -> Self:
        self._start([])
        try:
            self._exec(["true"], env=ENV, stdin=b"", timeout_s=FIRST_ANSWER_S)
        except (MachineGone, TimeoutError) as error:
            raise AssertionError(f"{self.name} does not boot\n{self.said()}") from error
        if until_running:
            self._wait_running()
        return self

    def kill(self) -> None:
        if self._qemu is None:
            return
        self._qemu.kill()
        self._qemu.wait()
        self._qemu = None
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def power_cut(self) -> None:
        """Cut the power: SIGKILL of qemu. `boot` starts from what the disk holds then."""
        assert self.is_up(), "the machine is off"
        self.kill()

    def is_up(self) -> bool:
        return self._qemu is not None and self._qemu.poll() is None

    # --- snapshots ------------------------------------------------------------------------------

    def save(self, name: str) -> None:
        """Keep disk and memory as they are now under a name, in the disk's file."""
        said = self.monitor(f"savevm {name}")
        assert not said, said

    def copy(self, name: str) -> "Vm":
        """Return another machine, running, that goes on from a saved state; this one may be off."""
        twin = Vm(self.suite, memory_mib=self.memory_mib, cpus=self.cpus, disk=self.disk)
        try:
            twin._start(["-loadvm", name])
            twin.run(["date", "--set", f"@{time.time():.3f}"])
        except BaseException:
            twin.close()
            raise
        return twin

    def monitor(self, line: str) -> str:
        """Give qemu's monitor a line (for example `info block`); return what it says."""
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.connect(str(self.dir / "qmp"))
            with monitor.makefile("rw") as talk:
                talk.readline()  # the greeting
                _ask(talk, {"execute": "qmp_capabilities"})
                arguments = {"command-line": line}
                return str(_ask(talk, {"execute": "human-monitor-command", "arguments": arguments}))

    # --- inside ---------------------------------------------------------------------------------

    def _exec(
        self, argv: Sequence[str], *, env: Mapping[str, str], stdin: bytes, timeout_s: float
    ) -> tuple[int, bytes, bytes]:
        if self._channel is None:
            raise MachineGone(f"{self.name} is off")
        return self._channel.execute(argv, env=env, stdin=stdin, timeout_s=timeout_s)

    def _start(self, extra: list[str]) -> None:
        assert self._qemu is None, "it is up already"
        agent, qmp = self.dir / "agent", self.dir / "qmp"
        for path in (agent, qmp):
            path.unlink(missing_ok=True)
        # cache=writeback: a flush of the guest becomes an fdatasync of the disk's file, after the
        # tables of qcow2 are in it; none is skipped (that would be `unsafe`). Between flushes, what
        # went to newly mapped clusters is known to qemu's memory alone and dies with it, what went
        # over old ones is in the host's cache and lives: as with a drive that had written a part
        # of its cache when the power went. The host itself does not lose power here.
        drive = f"file={self.disk},if=virtio,format=qcow2,cache=writeback,discard=unmap"
        command = [
            "setpriv", "--pdeathsig", "KILL",
            "qemu-system-x86_64", "-accel", "tcg",
            "-smp", str(self.cpus), "-m", str(self.memory_mib), "-nodefaults",
            "-no-reboot", "-display", "none",
            "-kernel", str(self._kernel.image), "-initrd", str(self._kernel.initramfs),
            "-append", KERNEL_WORDS, "-drive", drive, "-serial", f"file:{self.console}",
            "-qmp", f"unix:{qmp},server=on,wait=off",
            "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=agent,path={agent},server=on,wait=off",
            "-device", "virtserialport,chardev=agent,name=ckptd.test",
        ]  # fmt: skip
        with (self.dir / "qemu.log").open("ab") as log:
            self._qemu = subprocess.Popen(
                [*command, *extra],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until(lambda: agent.exists() or not self.is_up(), 20)
        if not self.is_up():
            raise AssertionError(f"qemu ended: {(self.dir / 'qemu.log').read_text()}")
        self._channel = GuestChannel(agent)


def _ask(talk: Any, request: dict[str, object]) -> object:
    """Send one request to qemu and return its answer; what happens meanwhile is passed over."""
    talk.write(json.dumps(request) + "\n")
    talk.flush()
    for line in talk:  # Bound: qemu answers every request or hangs up
        told = json.loads(line)
        if "return" in told:
            return told["return"]
        if "error" in told:
            raise AssertionError(told["error"])
    raise ConnectionError("qemu hung up")


def snapshot_of(script: str) -> tuple[Vm, Callable[[], Vm]]:
    """Boot a machine, run a script in it and save it; return it and what makes copies of it."""
    original = Vm()
    try:
        original.boot()
        original.sh(script)
        original.sh("sync")
        original.save(SNAPSHOT)
    except BaseException:
        original.close()
        raise
    original.kill()
    return original, lambda: original.copy(SNAPSHOT)
