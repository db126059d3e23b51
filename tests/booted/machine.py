"""Machines that really boot: what all of them can do. The kinds: nspawn.py (quick) and vm.py.

    with Nspawn("bookworm") as machine:              # systemd 252; "trixie" has 257
        machine.boot()                               # to "running"; about a second
        machine.run(["ckptctl", "status"])           # -> Result(argv, code, out, err); raises
                                                     # unless the code is 0
        machine.run([...], user="mallory", check=False).code
        machine.sh("systemctl enable --now ckptd")   # a script, as root; returns its stdout
        machine.put("/tmp/job", "#!/bin/sh\\n...", mode=0o755)
        machine.get("/tmp/result")                   # bytes
        machine.journal("-u", "ckptd")               # its text of this boot
        machine.reboot(); machine.poweroff(); machine.boot(); machine.kill()

A machine starts as installed and forgets everything when it is closed, but keeps its disk over
`reboot`, `poweroff` and `kill`. Users: alice (1000) and bob (1001) are in group ckptd, mallory
(1002) is not. Tests take machines from the fixtures in conftest.py.
"""

import atexit
import itertools
import os
import shutil
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
        # In a unit: logind 257 answers nobody whose cgroup is outside of the machine's, as ours is.
        self.run(["systemd-run", "--quiet", "--wait", "loginctl", "enable-linger", user])
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


@atexit.register
def close_all() -> None:
    """End the machines that nobody closed: nothing may stay behind."""
    for machine in list(_open):
        machine.close()
