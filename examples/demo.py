"""make demo: kill a task, its daemon and everything at once; watch the work carry on.

Starts a private daemon in a directory of its own, submits the census of Python's standard library
(`census.py`, a plain command) and kills: the task; the daemon; then daemon, supervisor and task.
At the end the result is compared with that of an uninterrupted run. Exit code 0 means: identical,
nothing counted twice, at most the current module repeated per kill.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
IS_TERMINAL = sys.stdout.isatty()
BAR_CHARS = 32
WORK_S = 10.0  # the census is paced so that it takes about so long
GIVE_UP_S = 25.0
ENDS = ("succeeded", "failed", "cancelled", "quarantined", "blocked")


class BrokenPromiseError(Exception):
    """Something did not happen as promised."""


class Screen:
    """A progress bar that redraws itself on a terminal, and plain lines in between."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._is_bar_open = False

    def line(self, text: str = "") -> None:
        """Print one line, below the bar if there is one."""
        if self._is_bar_open and IS_TERMINAL:
            print()
        self._is_bar_open = False
        print(text, flush=True)

    def bar(self, done: int, total: int, note: str, *, keep: bool = False) -> None:
        """Draw how far the task is; off a terminal only where it is to be kept."""
        full = BAR_CHARS * done // total if total else 0
        drawn = "█" * full + "·" * (BAR_CHARS - full)
        spent_s = time.monotonic() - self._began
        text = f"  {spent_s:5.1f} s  {drawn} {done:4}/{total}  {note[:32]:32}"
        if IS_TERMINAL:
            print(f"\r{text}", end="", flush=True)
            self._is_bar_open = True
        elif keep:
            print(text.rstrip(), flush=True)

    def said(self, text: str) -> None:
        """Print what was done to them, standing out."""
        self.line(f"\n  \033[1;31m✗ {text}\033[0m" if IS_TERMINAL else f"\n  ✗ {text}")


class Stage:
    """The private daemon, the files of the run, and the client."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.out, self.touched = root / "census.json", root / "touched.log"
        self.config = root / "ckptd.toml"
        self.config.write_text(f'[daemon]\nstate_dir = "{root}/state"\nrun_dir = "{root}/run"\n')
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("CKPT", "NOTIFY_"))}
        self.env["CKPTD_ENDPOINT"] = f"ipc://{root}/run/ctl.sock"
        self.env["CKPTD_DEMO"] = str(root)
        self.daemon: subprocess.Popen[bytes] | None = None

    def start_daemon(self) -> None:
        """Start the daemon on this directory's state; return once it answers."""
        with (self.root / "daemon.log").open("ab") as log:
            self.daemon = subprocess.Popen(
                [sys.executable, "-m", "ckptd", "--config", str(self.config)],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + GIVE_UP_S
        while self.ctl("daemon", "ping").returncode:  # Bound: the deadline
            if self.daemon.poll() is not None:
                raise BrokenPromiseError(f"the daemon ended with {self.daemon.returncode}")
            if time.monotonic() > deadline:
                raise BrokenPromiseError(f"the daemon gave no answer in {GIVE_UP_S:.0f} s")
            time.sleep(0.02)

    def kill_daemon(self) -> None:
        """SIGKILL the daemon, and only it."""
        if self.daemon is not None:
            self.daemon.kill()
            self.daemon.wait()
            self.daemon = None

    @property
    def daemon_pid(self) -> int:
        """The daemon's pid."""
        assert self.daemon is not None
        return self.daemon.pid

    def spawn_ctl(self, *args: str) -> subprocess.Popen[str]:
        """Start `ckptctl ARGS`."""
        command = [sys.executable, "-m", "ckptctl", *args]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.env, text=True, stdout=pipe, stderr=pipe)

    def ctl(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Run `ckptctl ARGS` to its end."""
        process = self.spawn_ctl(*args)
        out, err = process.communicate(timeout=GIVE_UP_S)
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    def show(self, task: str) -> dict[str, Any]:
        """Return all that the daemon knows about the task."""
        done = self.ctl("show", task, "-o", "json")
        if done.returncode:
            raise BrokenPromiseError(f"ckptctl show: {done.stderr}")
        detail: dict[str, Any] = json.loads(done.stdout)["tasks"][0]
        return detail

    def last_start(self, task: str) -> dict[str, Any]:
        """Return the event of the newest start: attempt, supervisor, checkpoint."""
        done = self.ctl("events", "--task", task, "--type", "started", "-o", "jsonl")
        if done.returncode:
            raise BrokenPromiseError(f"ckptctl events: {done.stderr}")
        event: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return event

    def begun_count(self) -> int:
        """Return how many modules were begun so far, by the task's own log."""
        return self.touched.read_bytes().count(b"\n") if self.touched.exists() else 0

    def close(self) -> None:
        """End everything that was started here, by pid."""
        mark = os.fsencode(self.root)
        self.kill_daemon()
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                is_ours = mark in Path("/proc", entry, "environ").read_bytes()
                if is_ours and int(entry) != os.getpid():
                    os.kill(int(entry), signal.SIGKILL)
            except OSError:  # it is gone, or somebody else's
                continue


class Demo:
    """The play: one task, three murders, one verdict."""

    def __init__(self, stage: Stage, screen: Screen, chance: random.Random, total: int) -> None:
        self.stage, self.screen, self.chance, self.total = stage, screen, chance, total
        self.task, self.done = "", 0
        self.task_kills = 0

    def submit(self, command: list[str]) -> None:
        """Submit the census as the plain command that it is."""
        done = self.stage.ctl("submit", "-q", "--retries", "9", "--backoff", "0.1", "--", *command)
        if done.returncode:
            raise BrokenPromiseError(f"ckptctl submit: {done.stderr}")
        self.task = done.stdout.strip()
        shown = " ".join(["python", f"examples/{Path(command[1]).name}", *command[2:6], "..."])
        self.screen.line(f"  task {self.task} submitted: {shown}\n")

    def draw(self, row: dict[str, Any], *, keep: bool = False) -> None:
        """Draw how far the task is; a new daemon hears of it at the next module."""
        if row["progress"]:
            self.done = int(row["progress"]["done"])
        note = row["progress"]["text"] if row["progress"] else row["phase"]
        self.screen.bar(self.done, self.total, note, keep=keep)

    def watch(self, *, share: float = 0.0, attempt: int = 0) -> dict[str, Any]:
        """Show progress until this attempt runs and so much is done; return the task's row."""
        deadline = time.monotonic() + GIVE_UP_S
        while True:  # Bound: the deadline
            detail = self.stage.show(self.task)
            row: dict[str, Any] = detail["row"]
            self.draw(row)
            is_there = row["phase"] == "running" and row["pid"] and row["attempt"] >= attempt
            if is_there and self.done >= share * self.total:
                self.draw(row, keep=True)
                return row
            if time.monotonic() > deadline or row["phase"] in ENDS:
                raise BrokenPromiseError(f"task is {row['phase']}: {detail['explanation']}")
            time.sleep(0.1)

    def watch_until_chance(self, low: float, high: float) -> dict[str, Any]:
        """Watch until a random moment between these shares of the work; return the task's row."""
        row = self.watch(share=self.chance.uniform(low, high))
        time.sleep(self.chance.uniform(0, 0.05))  # in the middle of a module
        return row

    def tell_resume(self, attempt: int) -> None:
        """Show where the newest attempt started: by the daemon's word and by the task's own."""
        self.watch(attempt=attempt)
        start = self.stage.last_start(self.task)
        self.screen.line(
            f"    attempt {start['attempt']} resumed from checkpoint"
            f" {start['fields']['resumed_from']}; the task says:"
        )
        for _ in range(int(GIVE_UP_S / 0.1)):
            said = self.stage.ctl("logs", self.task).stdout.splitlines()
            own = [line for line in said if "modules are done" in line]
            if len(own) >= attempt:
                self.screen.line(f"    {own[-1]}")
                return
            time.sleep(0.1)
        raise BrokenPromiseError(f"the output of attempt {attempt} is missing")

    def kill_task(self) -> None:
        """SIGKILL the task; the daemon starts it again."""
        row = self.watch_until_chance(0.10, 0.25)
        self.screen.said(f"SIGKILL to the task (pid {row['pid']})")
        os.kill(row["pid"], signal.SIGKILL)
        self.task_kills += 1
        self.tell_resume(row["attempt"] + 1)

    def kill_daemon(self) -> None:
        """SIGKILL the daemon; the task does not notice, the next daemon adopts it."""
        row = self.watch_until_chance(0.35, 0.50)
        self.screen.said(f"SIGKILL to the daemon (pid {self.stage.daemon_pid})")
        before = self.stage.begun_count()
        self.stage.kill_daemon()
        time.sleep(self.chance.uniform(0.3, 0.8))
        during = self.stage.begun_count() - before
        self.screen.line(f"    no daemon, and the task went on: {during} modules meanwhile")
        began = time.monotonic()
        self.stage.start_daemon()
        took_s = time.monotonic() - began
        after = self.watch()
        if (after["pid"], after["attempt"]) != (row["pid"], row["attempt"]):
            raise BrokenPromiseError(f"the task was not adopted: {row} became {after}")
        self.screen.line(
            f"    a new daemon answers after {took_s:.1f} s and adopted the running task:"
            f" still attempt {after['attempt']}, pid {after['pid']}"
        )

    def kill_everything(self) -> None:
        """SIGKILL daemon, supervisor and task; the next daemon starts the task again."""
        row = self.watch_until_chance(0.65, 0.80)
        supervisor = self.stage.last_start(self.task)["fields"]["shim"]["pid"]
        self.screen.said(
            f"SIGKILL to all: daemon {self.stage.daemon_pid}, supervisor {supervisor},"
            f" task {row['pid']}"
        )
        victims = [self.stage.daemon_pid, supervisor, row["pid"]]
        self.chance.shuffle(victims)
        for pid in victims:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # a task dies with its supervisor
                continue
        self.stage.kill_daemon()  # only to reap it
        self.task_kills += 1
        self.stage.start_daemon()
        self.tell_resume(row["attempt"] + 1)

    def finish(self, waiting: subprocess.Popen[str]) -> None:
        """Let the task come to its end; the `wait` of before the kills tells its exit code."""
        while waiting.poll() is None:  # Bound: the task ends, and `wait` with it
            self.draw(self.stage.show(self.task)["row"])
            time.sleep(0.1)
        self.screen.bar(self.total, self.total, "done", keep=True)
        _, err = waiting.communicate()
        if waiting.returncode:
            raise BrokenPromiseError(f"ckptctl wait gave {waiting.returncode}: {err}")
        self.screen.line(
            f"\n  `ckptctl wait {self.task}`, started before the kills, returned 0"
            f" after {self.stage.show(self.task)['row']['attempt']} attempts"
        )


def verdicts(stage: Stage, reference: Path, task_kills: int) -> list[tuple[bool, str]]:
    """Compare with the uninterrupted run; return (holds, text) for each promise."""
    expected, got = json.loads(reference.read_text()), json.loads(stage.out.read_text())
    names = [row["module"] for row in got["modules"]]
    begun = Counter(line.split(" ", 1)[1] for line in stage.touched.read_text().splitlines())
    repeated = [name for name, times in begun.items() if times > 1]
    extra = sum(begun.values()) - len(begun)
    return [
        (got == expected, f"identical with an uninterrupted run: {got['total']['lines']:,} lines"),
        (
            len(names) == len(set(names)) == len(begun),
            f"{len(names)} modules, each counted once, none left out",
        ),
        (
            extra <= task_kills,
            (
                f"{extra} begun a second time ({', '.join(repeated) or 'none'}):"
                f" at most the current one for each of {task_kills} kills"
            ),
        ),
    ]


def play(stage: Stage, seed: int, items: int) -> bool:
    """Play the demo; return whether every promise was kept."""
    screen = Screen()
    stage.start_daemon()
    reference = stage.root / "reference.json"
    census = [sys.executable, str(HERE / "census.py"), "--items", str(items)]
    listed = subprocess.run(
        [*census, "--out", str(reference)], check=True, stdout=subprocess.PIPE, text=True
    )
    screen.line(f"  an uninterrupted run: {listed.stdout.splitlines()[-1]}")
    total = len(json.loads(reference.read_text())["modules"])
    demo = Demo(stage, screen, random.Random(seed), total)  # noqa: S311  (chance, not secrecy)
    demo.submit(
        [
            *(*census, "--pace", f"{WORK_S * 1000 / total:.1f}"),
            *("--out", str(stage.out), "--touched", str(stage.touched)),
        ]
    )
    waiting = stage.spawn_ctl("wait", demo.task)
    demo.kill_task()
    demo.kill_daemon()
    demo.kill_everything()
    demo.finish(waiting)
    found = verdicts(stage, reference, demo.task_kills)
    for holds, text in found:
        screen.line(f"    {'ok    ' if holds else 'BROKEN'}  {text}")
    return all(holds for holds, _ in found)


def main() -> int:
    """Run the demo in a directory of its own and leave nothing behind."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--items", type=int, default=0, help="so many modules only; 0: all")
    options = parser.parse_args()
    began = time.monotonic()
    print(f"A job that survives every kind of death. (seed {options.seed}: --seed repeats it)\n")
    root = Path(tempfile.mkdtemp(prefix="ckptd-demo-", dir="/tmp"))  # short: socket paths
    stage = Stage(root)
    try:
        is_kept = play(stage, options.seed, options.items)
    except (BrokenPromiseError, OSError) as failed:
        log = (root / "daemon.log").read_text()[-3000:]
        print(f"\n  BROKEN: {failed}\n  the daemon's log ends:\n{log}")
        is_kept = False
    finally:
        stage.close()
        shutil.rmtree(root, ignore_errors=True)
    print(f"\n{'All promises kept' if is_kept else 'FAILED'}, {time.monotonic() - began:.0f} s.")
    return 0 if is_kept else 1


if __name__ == "__main__":
    sys.exit(main())
