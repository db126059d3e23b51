"""What is seen of a batch: a bar at a terminal, few lines elsewhere, a log that is turned over."""

import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ckptd.batch import meter as shown
from ckptd.batch.job import Ended, How, Job
from ckptd.batch.meter import Meter, Printed, span
from ckptd.batch.place import Item
from tests.batch_world import BATCH, ROOT, BatchWorld


def test_a_terminal_gets_a_bar_that_leaves_no_trace_in_the_output(tmp_path: Path) -> None:
    world = BatchWorld(tmp_path)
    script = "sleep 0.15; echo out $1"
    world.prepare(argv=["sh", "-c", script, "sh"], items=[str(n) for n in range(8)], jobs=1)
    ours, theirs = pty.openpty()
    runner = subprocess.Popen(
        [*BATCH, "run", str(world.dir)], stdout=theirs, stderr=theirs, env=world.env
    )
    os.close(theirs)
    said = b""
    try:
        while chunk := os.read(ours, 4096):
            said += chunk
    except OSError:  # EIO: the other end is closed
        pass
    assert runner.wait(20) == 0
    os.close(ours)
    text = said.decode()
    lines = [line.rpartition("\x1b[K")[2].strip() for line in text.split("\n")]

    assert "8/8" in text or "7/8" in text
    assert "ETA 0:0" in text
    assert [line for line in lines if line.startswith("out ")] == [f"out {n}" for n in range(8)]
    assert lines[-2].startswith("batch b: finished: 8 items, 8 pass")


def test_elsewhere_there_is_a_line_now_and_then() -> None:
    out = io.StringIO()
    meter = Meter("b", 100, out)
    began_s = time.monotonic()
    for tenth in range(100):
        meter.ended(tenth, began_s + tenth / 10)
        meter.draw(tenth, 1, {"pass": tenth}, began_s + tenth / 10)
    lines = out.getvalue().splitlines()

    assert len(lines) == 1
    assert re.fullmatch(r"batch b: (\d\d) of 100 done, 10/s, 0:05 to go; \1 pass", lines[0])


def test_a_reader_that_is_gone_stops_the_batch_in_order(tmp_path: Path) -> None:
    world = BatchWorld(tmp_path)
    world.prepare(argv=["echo"], items=[str(n) for n in range(500)], jobs=1)
    reader, writer = os.pipe()
    runner = subprocess.Popen(
        [*BATCH, "run", str(world.dir)], stdout=writer, stderr=subprocess.PIPE, env=world.env
    )
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    _, told = runner.communicate(timeout=30)

    assert runner.returncode == 130
    assert b"batch b: nobody reads what it prints any more\n" in told
    assert 0 < len(world.results()) < 500
    assert world.events() == ["begin", "end"]


def test_a_full_disk_behind_stdout_costs_no_result_and_is_74(tmp_path: Path) -> None:
    world = BatchWorld(tmp_path)
    world.prepare(argv=["echo", "printed", "{}"], items=["a", "b"], jobs=1)
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*BATCH, "run", str(world.dir)], stdout=full, stderr=subprocess.PIPE, env=world.env,
            text=True, check=False,
        )  # fmt: skip

    assert done.returncode == 74
    assert "not all that items printed is on stdout: No space left on device" in done.stderr
    assert world.statuses() == {"a": "pass", "b": "pass"}
    assert "printed b" in (world.dir / "logs" / "lane-00.log").read_text()


def test_a_reader_that_is_late_gets_all_though_its_pipe_does_not_block(tmp_path: Path) -> None:
    """Some who share the pipe with us make it non-blocking."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    printed = Printed(str(tmp_path), 1)
    saved = os.dup(1)
    os.dup2(writer, 1)
    try:
        end = Ended(Job(Item("a", "x", 1), 1), How.RESULT, "pass", out=b"x" * 299_999)
        got: list[bytes] = []
        slow = threading.Thread(target=_read_all, args=(reader, got))
        slow.start()
        printed.tell(end, "pass", 0.1)
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(writer)
    slow.join()
    os.close(reader)

    assert sum(map(len, got)) == 300_000
    assert printed.lost == ""


def _read_all(fd: int, got: list[bytes]) -> None:
    while data := os.read(fd, 1 << 16):
        got.append(data)


def test_functions_run_though_nobody_can_write_to_their_stdout(tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text("print('loading', flush=True)\ndef f(item): return item\n")
    world = BatchWorld(tmp_path)
    with open(os.devnull) as unwritable:
        done = subprocess.run(
            [sys.executable, str(ROOT / "ckptd/batch/host.py"), "0", "2", "threads", "1", "loud:f"],
            stdin=subprocess.DEVNULL, stdout=unwritable, stderr=subprocess.PIPE, text=True,
            cwd=tmp_path, env=world.env, check=False,
        )  # fmt: skip
    assert json.loads(done.stderr.splitlines()[0])["ready"], done.stderr


def test_a_log_is_turned_over_and_one_old_one_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shown, "LOG_BYTES_MAX", 1_000)
    printed = Printed(str(tmp_path), 1)
    job = Job(Item("a\nb", "x", 1), 7, lane=3)
    for _ in range(30):
        printed.tell(Ended(job, How.RESULT, "pass", out=b"x" * 100), "pass", 0.1)
    printed.close()
    logs = sorted(path.name for path in (tmp_path / "logs").iterdir())

    assert logs == ["lane-03.log", "lane-03.log.1"]
    assert all((tmp_path / "logs" / name).stat().st_size < 1_400 for name in logs)
    assert "--- a?b: pass, try 0 of run 1, 0.10 s\n" in (tmp_path / "logs" / logs[0]).read_text()
    assert capfd.readouterr().out.count("x" * 100) == 30


def test_a_speed_of_thousands_is_a_number_that_people_read() -> None:
    out = io.StringIO()
    meter = Meter("b", 20_000, out)
    began_s = time.monotonic()
    meter.ended(0, began_s)
    meter.ended(12_000, began_s + 6)
    meter.draw(12_000, 1, {"pass": 12_000}, began_s + 6)

    assert "12,000 of 20,000 done, 2,000/s, 0:04 to go" in out.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75.4, "1:15"), (7_500, "2:05:00")])
def test_spans_read_like_clocks(seconds: float, text: str) -> None:
    assert span(seconds) == text
