"""What somebody wrote in an editor is kept wherever it could not be used."""

from pathlib import Path

import pytest

from ckptd.protocol import messages as m
from ckptd.protocol.errors import BadRequest, Conflict, Unreachable
from tests.fakes.scripted_daemon import Said
from tests.task_world import TASK
from tests.unit.ctl.conftest import Scripted, ctl_on_terminal
from tests.unit.ctl.rows import detail, row
from tests.unit.ctl.test_checkpoint import Desk

SHOWN = m.TaskDetails((detail(row(7, phase="queued")),))


class Author:
    """A person at a terminal whose editor runs a sed script, one per time that it is opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "editor"

    def writes(self, *scripts: str) -> None:
        lines = "".join(
            f"{number}) sed -i '{text}' \"$1\";;\n" for number, text in enumerate(scripts)
        )
        count = (
            f"n=$(cat {self.folder}/n 2>/dev/null || echo 0); echo $((n + 1)) > {self.folder}/n\n"
        )
        (self.folder / "n").unlink(missing_ok=True)
        self.path.write_text(f"#!/bin/sh\n{count}case $n in\n{lines}esac\n")
        self.path.chmod(0o755)

    def runs(self, endpoint: str, *words: str, typed: str = "") -> tuple[int, str]:
        at = {"EDITOR": str(self.path), "VISUAL": "", "TMPDIR": str(self.folder)}
        return ctl_on_terminal(endpoint, *words, typed=typed, **at)

    def kept(self) -> list[Path]:
        return list(self.folder.glob("ckptctl-*"))


@pytest.fixture
def author(short_dir: Path) -> Author:
    return Author(short_dir)


@pytest.mark.parametrize(
    ("script", "why"),
    [('s/^timeout = .*/timeout = "soon"/', "--timeout: not a duration: 'soon'"),
     ("s/^timeout = .*/timeuot = 5/", "cannot edit 'timeuot'"),
     ("s/task.7/task.8/", "[task.8] was not among the tasks to edit"),
     ("s/task.7/tsk.7/", "[tsk] is not a task to edit"),
     ('s/^group = .*/group = ""/', "--group: the value is empty"),
     ("s/^timeout = .*/timeout = [/", "not TOML: ")],
)  # fmt: skip
def test_a_text_that_cannot_be_used_can_be_mended_and_is_kept_by_who_gives_up(
    scripted: Scripted, author: Author, script: str, why: str
) -> None:
    daemon = scripted({"show": lambda _: SHOWN})
    author.writes(script)
    code, shown = author.runs(daemon.endpoint, "edit", "7", typed="n\n")
    assert code == 64
    assert f"ckptctl: {why}" in shown
    assert "open it again? [Y/n]" in shown
    (kept,) = author.kept()
    assert f"what you wrote is kept in {kept}" in shown
    assert daemon.asked("edit") == []


def test_a_bad_value_is_mended_in_the_text_as_it_was_left(
    scripted: Scripted, author: Author
) -> None:
    changed = m.Changed((m.TaskChange(7, "queued"),))
    daemon = scripted({"show": lambda _: SHOWN, "edit": lambda _: changed})
    author.writes('s/^timeout = .*/timeout = "2hh"/', "s/2hh/2h/")
    code, shown = author.runs(daemon.endpoint, "edit", "7", typed="\n")
    assert code == 0, shown
    assert daemon.requests[-1][2] == m.Edit(m.Selector(ids=(7,)), timeout_s=7200.0)
    assert author.kept() == []


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (BadRequest("deadline is in the past", "name a later one"), 64),
        (Unreachable("no daemon"), 2),
        (m.Changed((m.TaskChange(7, "running", Conflict("task 7 runs", "wait").reply()),)), 5),
    ],
)
def test_a_text_that_the_daemon_did_not_take_is_kept(
    scripted: Scripted, author: Author, said: Said, code: int
) -> None:
    daemon = scripted({"show": lambda _: SHOWN, "edit": lambda _: said})
    author.writes('s/^timeout = .*/timeout = "2h"/')
    ended, shown = author.runs(daemon.endpoint, "edit", "7")
    (kept,) = author.kept()
    assert ended == code
    assert f"what you wrote is kept in {kept}" in shown
    assert 'timeout = "2h"' in kept.read_text()


def test_an_editor_that_is_no_command_is_told(scripted: Scripted) -> None:
    daemon = scripted({"show": lambda _: SHOWN})
    code, shown = ctl_on_terminal(daemon.endpoint, "edit", "7", EDITOR="'", VISUAL="")
    assert code == 64
    assert 'EDITOR: not a command: "\'": no closing quotation' in shown


def test_a_checkpoint_that_could_not_be_made_keeps_what_was_written_for_it(
    scripted: Scripted, author: Author
) -> None:
    desk = Desk(author.folder, scripted)
    desk.saves({"part": 6})
    desk.world.begin()  # an attempt that was started meanwhile
    author.writes('s/"part": 6/"part": 8/')
    code, shown = author.runs(desk.endpoint, "checkpoint", "edit", str(TASK))
    (kept,) = author.kept()
    assert code == 5
    assert f"what you wrote is kept in {kept}" in shown
    assert '"part": 8' in kept.read_text()


def test_a_checkpoint_whose_braces_are_gone_can_be_mended(
    scripted: Scripted, author: Author
) -> None:
    desk = Desk(author.folder, scripted)
    desk.saves({"part": 6})
    author.writes("1,$c []")
    code, shown = author.runs(desk.endpoint, "checkpoint", "edit", str(TASK), typed="n\n")
    assert code == 64
    assert "not an object any more" in shown
    assert len(author.kept()) == 1
