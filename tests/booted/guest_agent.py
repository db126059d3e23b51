"""Runs inside a virtual machine as root: executes what the tests ask for (see vm.py).

One JSON object per line over a virtio port. Asked: {"id", "argv", "env", "stdin" (base64),
"timeout_s"}. Told: {"id", "code", "out", "err", "late"}, out and err in base64; late means killed
for taking too long. Requests run side by side, each in a cgroup of its own beside the agent's, so
that what they use up is not the agent's. Standard library only.
"""

import base64
import contextlib
import json
import os
import select
import signal
import subprocess
import threading
from typing import Any

PORT = "ckptd.test"
PORTS = "/sys/class/virtio-ports"
GROUPS = "/sys/fs/cgroup"


def port_path() -> str:
    """Return the device of the port; there is no udev to name it."""
    for entry in os.listdir(PORTS):
        with open(f"{PORTS}/{entry}/name", encoding="ascii") as name:
            if name.read().strip() == PORT:
                return f"/dev/{entry}"
    raise SystemExit(f"no virtio port is called {PORT}")


def execute(asked: dict[str, Any]) -> dict[str, Any]:
    """Run one command to its end."""
    group = f"{GROUPS}/ckptd-test-{asked['id']}"
    os.makedirs(group, exist_ok=True)

    def first_steps() -> None:
        os.setsid()
        for path, text in ((f"{group}/cgroup.procs", "0"), ("/proc/self/oom_score_adj", "0")):
            with open(path, "w", encoding="ascii") as file:
                file.write(text)

    try:
        process = subprocess.Popen(
            asked["argv"],
            env=asked["env"],
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=first_steps,  # noqa: PLW1509  (it takes no lock that a thread could hold)
        )
    except OSError as error:
        return {"code": 127, "out": "", "err": coded(str(error).encode())}
    late = False
    try:
        out, err = process.communicate(base64.b64decode(asked["stdin"]), asked["timeout_s"])
    except subprocess.TimeoutExpired:
        late = True
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
    with contextlib.suppress(OSError):  # what left processes behind keeps its group
        os.rmdir(group)
    code = 124 if late else process.returncode
    return {"code": code, "out": coded(out), "err": coded(err), "late": late}


def coded(data: bytes) -> str:
    """Return bytes as text for JSON."""
    return base64.b64encode(data).decode("ascii")


def main() -> None:
    """Serve for ever."""
    port = os.open(port_path(), os.O_RDWR)
    lock = threading.Lock()

    def answer(asked: dict[str, Any]) -> None:
        told = json.dumps({"id": asked["id"], **execute(asked)}).encode() + b"\n"
        with lock:
            while told:
                told = told[os.write(port, told) :]

    rest = b""
    while True:
        data = os.read(port, 65536)
        if not data:  # nobody is connected on the other side: look again in a moment
            rest = b""
            select.select([], [], [], 0.05)
            continue
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.strip():
                threading.Thread(target=answer, args=(json.loads(line),), daemon=True).start()


if __name__ == "__main__":
    main()
