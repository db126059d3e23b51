"""A real message bus of the test's own, and services on it that answer from a thread."""

import os
import select
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jeepney import (
    DBus,
    DBusAddress,
    HeaderFields,
    Message,
    MessageFlag,
    MessageType,
    new_error,
    new_method_return,
    new_signal,
)
from jeepney.io.blocking import open_dbus_connection

from ckptd.runner.watch import Watch
from tests.waiting import until

CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><listen>unix:path={socket}</listen><auth>EXTERNAL</auth>
<policy context="default"><allow send_destination="*" eavesdrop="true"/>
<allow eavesdrop="true"/><allow own="*"/></policy>
<limit name="max_replies_per_connection">128</limit>
<limit name="max_incoming_unix_fds">64</limit><limit name="max_outgoing_unix_fds">64</limit>
</busconfig>
"""  # the limits are those of the system bus

Answer = tuple[str, tuple[Any, ...]]  # signature and body; ("!", (name, text)): an error


class PrivateBus:
    """A dbus-daemon that can be killed and started again at the same address."""

    def __init__(self, directory: Path) -> None:
        program = shutil.which("dbus-daemon")
        if program is None:
            pytest.skip("no dbus-daemon here (Debian: dbus-daemon)")
        self.socket = directory / "bus socket"
        self.address = f"unix:path={directory}/bus%20socket"
        self._config = directory / "bus.conf"
        self._config.write_text(CONFIG.format(socket=str(self.socket).replace(" ", "%20")))
        self._argv = [program, f"--config-file={self._config}", "--nofork", "--nopidfile"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        ready, theirs = os.pipe()
        self._process = subprocess.Popen(
            [*self._argv, f"--print-address={theirs}"],
            pass_fds=[theirs],
            stdin=subprocess.DEVNULL,
        )
        os.close(theirs)
        assert os.read(ready, 1_000), "dbus-daemon did not start"
        os.close(ready)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def service(self, name: str, answer: Callable[[Message], Answer | None]) -> "Service":
        return Service(self.address, name, answer)


class Service:
    """A second connection, with a name, that answers calls; None leaves one without reply."""

    def __init__(self, address: str, name: str, answer: Callable[[Message], Answer | None]) -> None:
        self._connection = open_dbus_connection(address, enable_fds=True)
        self._connection.send_and_get_reply(DBus().RequestName(name))
        self._answer = answer
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def emit(  # a signal, to everybody or straight to one connection
        self, emitter: DBusAddress, name: str, answer: Answer, to: str = ""
    ) -> None:
        message = new_signal(emitter, name, *answer)
        if to:
            message.header.fields[HeaderFields.destination] = to
        self._connection.send(message)

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()
        self._connection.close()

    def _serve(self) -> None:
        while not self._is_over.is_set():
            try:
                message = self._connection.receive(timeout=0.02)
            except TimeoutError:
                continue
            except (ConnectionError, OSError):
                return
            if message.header.message_type is not MessageType.method_call:
                continue
            answer = self._answer(message)
            if answer is None or message.header.flags & MessageFlag.no_reply_expected:
                continue
            signature, body = answer
            if signature == "!":
                reply = new_error(message, body[0], "s", (body[1],))
            else:
                reply = new_method_return(message, signature, body)
            self._connection.send(reply)


def turn_until(watch: Watch, condition: Callable[[], object]) -> None:
    """Turn the loop until the condition holds."""
    poll = select.poll()
    poll.register(watch.fileno(), select.POLLIN)

    def is_so() -> bool:
        poll.poll(100)
        watch.dispatch()
        return bool(condition())

    until(is_so, every_s=0.0)
