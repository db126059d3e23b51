import os
import pty
import subprocess
import sys

import pytest

from ckptctl.picture import Picture
from ckptctl.render import Style, text_width
from ckptctl.watch import frame
from ckptd.protocol.messages import Progress
from tests.unit.ctl.conftest import ROOT, Scripted
from tests.unit.ctl.rows import page, row

TASKS = [row(number, progress=Progress(number, 40, "", 1, 2.0)) for number in range(1, 31)]


@pytest.mark.parametrize(("width", "height"), [(20, 3), (40, 8), (80, 24), (120, 40), (200, 60)])
def test_a_frame_never_leaves_the_screen(width: int, height: int) -> None:
    shown = Picture(TASKS, {"running": 30})
    lines = frame(shown, Style(), width, height, "")
    assert len(lines) <= height
    assert height < 40 or lines[-1].lstrip().startswith("30")
    assert width < 40 or all(text_width(line) <= width for line in lines)


def test_every_running_task_has_a_bar_and_the_time_left() -> None:
    lines = frame(Picture(TASKS, {"running": 30}), Style(), 120, 40, "")
    assert "━━━━━━━━━━━━━━━─────  75% 5s left" in lines[-1]


def test_a_daemon_that_is_gone_is_told_above_the_last_picture() -> None:
    lines = frame(Picture(TASKS, {}), Style(has_color=True), 100, 40, "no daemon answers")
    assert "no daemon answers" in lines[0]
    assert len(lines) == 33


def test_an_empty_list_says_what_to_do() -> None:
    assert "no tasks yet; try: ckptctl run" in frame(Picture([], {}), Style(), 80, 24, "")[-1]


def test_a_terminal_that_is_gone_ends_it_without_a_word(scripted: Scripted) -> None:
    daemon = scripted({"status": lambda _: page(row(7))})
    mine, theirs = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CKPTD_ENDPOINT": daemon.endpoint}
    command = [sys.executable, "-m", "ckptctl", "status", "--watch"]
    with subprocess.Popen(
        command, env=env, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE
    ) as process:
        os.close(theirs)
        assert os.read(mine, 64)
        os.close(mine)
        _, err = process.communicate(timeout=30)

    assert (process.returncode, err) == (141, b"")
