"""Starts as transient units beside bare systemd, in a booted machine with ckptd running.

`python -m bench units` where systemd is PID 1 and the daemon's runner is "unit"; elsewhere it says
what is missing. `make bench-systemd` boots machines for it. Reference and daemon take turns.
"""

import os
import statistics
import subprocess
import time
from collections.abc import Callable
from itertools import count

from jeepney import DBusAddress, MatchRule, message_bus, new_method_call
from jeepney.io.blocking import DBusConnection, open_dbus_connection

from bench.measures import TRUE, Figure
from bench.rig import Clients, quantile

ENDPOINT = "ipc:///run/ckptd/ctl.sock"
BOOTED = "/run/systemd/system"
ROUNDS, STARTS, AT_ONCE = 5, 80, 8
SYSTEMD = DBusAddress(
    "/org/freedesktop/systemd1", "org.freedesktop.systemd1", "org.freedesktop.systemd1.Manager"
)
_numbers = count(1)


def units(base: str) -> list[Figure]:
    """Measure how many tasks get through, and how soon one starts."""
    del base  # the daemon that runs has its own
    if not os.path.isdir(BOOTED) or not os.path.exists(ENDPOINT.removeprefix("ipc://")):
        print("  units: skipped, needs a booted systemd with ckptd running: make bench-systemd")
        return []
    clients = Clients(ENDPOINT, 1)
    clients.ask("group_set", {"name": "default", "parallel": AT_ONCE})
    with open_dbus_connection("SYSTEM") as bus:
        _subscribe(bus)
        rates: dict[str, list[float]] = {"ours": [], "bare": [], "waited": []}
        calls, jobs, ours = [], [], []
        for _ in range(ROUNDS):
            rates["ours"].append(_per_second(lambda: _through_daemon(clients)))
            rates["bare"].append(_per_second(lambda: _systemd_run([])))
            rates["waited"].append(_per_second(lambda: _systemd_run(["--wait"])))
            for _ in range(STARTS // ROUNDS):
                call_s, job_s = _bare_call_s(bus)
                calls.append(call_s)
                jobs.append(job_s)
                ours.append(_start_s(clients))
    clients.close()
    rate, bare, waited = (statistics.median(rates[name]) for name in ("ours", "bare", "waited"))
    call_ms, job_ms, start_ms = (quantile(sorted(some), 0.5) * 1e3 for some in (calls, jobs, ours))
    return [
        Figure("units, 8 at once", rate / bare, "x", ">=", 2,
               f"{rate:,.0f}/s; systemd-run {bare:,.0f}/s; --wait {waited:,.0f}/s, so"
               f" {rate / waited:.1f} x of that"),
        Figure("submit to start, p50", start_ms, "ms", "<=", round(call_ms + 5, 1),
               f"bare StartTransientUnit {call_ms:.1f} ms + 5; its job {job_ms:.1f} ms"),
    ]  # fmt: skip


def _per_second(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return STARTS / (time.perf_counter() - began)


def _through_daemon(clients: Clients) -> None:
    ids = clients.ask("submit", {"tasks": [TRUE] * STARTS})["ids"]
    while not clients.ask("wait", {"select": {"ids": ids}})["met"]:  # Bound: ask times out
        continue


def _systemd_run(options: list[str]) -> None:
    running: list[subprocess.Popen[bytes]] = []
    for _ in range(STARTS):
        if len(running) == AT_ONCE:
            running.pop(0).wait()
        command = ["systemd-run", "--quiet", "--collect", *options, "/bin/true"]
        running.append(subprocess.Popen(command))
    for one in running:
        one.wait()


def _start_s(clients: Clients) -> float:
    began_ns = time.time_ns()
    ids = clients.ask("submit", {"tasks": [TRUE]})["ids"]
    row = clients.ask("wait", {"select": {"ids": ids}})["tasks"][0]
    return float(row["started_ns"] - began_ns) / 1e9


def _subscribe(bus: DBusConnection) -> None:
    rule = MatchRule(type="signal", interface=SYSTEMD.interface, member="JobRemoved")
    bus.send_and_get_reply(new_method_call(SYSTEMD, "Subscribe"))
    bus.send_and_get_reply(message_bus.AddMatch(rule))


def _bare_call_s(bus: DBusConnection) -> tuple[float, float]:
    """Return the seconds until the reply to StartTransientUnit, and until its job is done."""
    name = f"bench-{next(_numbers)}.service"
    command = ("a(sasb)", [("/bin/true", ["true"], False)])
    body = (name, "fail", [("Type", ("s", "exec")), ("ExecStart", command)], [])
    began = time.perf_counter()
    call = new_method_call(SYSTEMD, "StartTransientUnit", "ssa(sv)a(sa(sv))", body)
    (job,) = bus.send_and_get_reply(call).body
    called_s = time.perf_counter() - began
    while True:  # Bound: every job is removed
        signal = bus.receive(timeout=30)
        if len(signal.body) == 4 and signal.body[1] == job:
            return called_s, time.perf_counter() - began
