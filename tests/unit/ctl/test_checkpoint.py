"""`ckptctl checkpoint VERB` as a process, over a task's real files; the daemon is scripted."""

import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ckptd.daemon.files import Files
from ckptd.protocol import messages as m
from ckptd.sdk.save import save
from ckptd.storage import blobs, facts
from ckptd.storage.facts import Facts
from tests.fakes.scripted_daemon import Handler
from tests.task_world import TASK, TaskWorld
from tests.unit.ctl.conftest import ROOT, Scripted, ctl, ctl_on_terminal, ctl_process
from tests.unit.ctl.rows import detail, row

Run = Callable[..., tuple[int, str, str]]
SAVED = {
    "task": TASK, "attempt": 1, "epoch": 4, "task_name": "ingest", "task_version": 2,
    "sdk_version": "0.1.0", "code_digest": "c0de", "config_digest": "c0f1", "state_version": 2,
    "numbers": {"strategy": "automatic", "saves": 12, "cost_s": 0.05, "interval_s": 93.1,
                "overhead": 0.004, "budget": 0.01, "wall_s": 150.2, "block_s": 0.6, "odd": 3},
}  # fmt: skip


class Desk:
    """One task that is over, its files, and the command line."""

    def __init__(self, folder: Path, scripted: Scripted) -> None:
        self.folder = folder
        self.world = TaskWorld(folder)
        self.phase, self.attempt = "failed", 1
        script: dict[str, Handler] = {"checkpoints": self.listed, "show": self.shown}
        self.endpoint = scripted(script).endpoint

    def listed(self, asked: m.Message) -> m.CheckpointList:
        assert isinstance(asked, m.Checkpoints)
        uid, files = self.world.uid, Files(str(self.folder))
        return files.checkpoints(asked.task, uid, verify=asked.verify, result=asked.result)

    def shown(self, _: m.Message) -> m.TaskDetails:
        one = detail(row(TASK, phase=self.phase, attempt=self.attempt))
        return m.TaskDetails((msgspec.structs.replace(one, directory=self.world.dir),))

    def saves(self, state: object, files: dict[str, bytes] | None = None, **more: object) -> int:
        for name, data in (files or {}).items():
            path = self.world.path("stage", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return save(self.world.dir, [], {**SAVED, "state": state, **more}).seq

    def run(self, verb: str, *words: str, **more: str) -> tuple[int, str, str]:
        return ctl(self.endpoint, "checkpoint", verb, str(TASK), *words, **more)

    def manifest(self, seq: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            self.world.path(f"ckpt/{seq:08d}/MANIFEST.json").read_text()
        )
        return found

    def tree(self) -> dict[str, bytes]:
        """All published files by name, to see that nothing of them changed."""
        top = self.world.path("ckpt")
        return {str(p.relative_to(top)): p.read_bytes() for p in top.rglob("*") if p.is_file()}

    def resumed(self) -> tuple[dict[str, Any], Facts]:
        """What the next attempt finds."""
        self.world.begin()
        newest = self.world.newest()
        assert (newest.warning, newest.problem) == ("", "")
        return self.manifest(newest.seq), self.world.facts()


@pytest.fixture
def desk(short_dir: Path, scripted: Scripted) -> Desk:
    return Desk(short_dir, scripted)


# --- show ----------------------------------------------------------------------------------------


def test_verify_of_nothing_is_told_also_to_a_script(desk: Desk) -> None:
    assert desk.run("verify") == (0, "", f"ckptctl: task {TASK} has no checkpoint yet\n")
    assert desk.run("verify", "-q") == (0, "", "")
    assert desk.run("ls") == (0, "", "")


def test_show_tells_all_that_a_checkpoint_says(desk: Desk) -> None:
    desk.saves({"part": 7}, {"model.bin": b"x" * 2048}, current_step="fold", steps=["fetch"],
               progress={"done": 7, "total": 10}, results={"rows": 3}, resume_count=2)  # fmt: skip
    code, out, err = desk.run("show")
    assert (code, err) == (0, "")
    for part in (
        "of task        12 (ingest, version 2)", "progress       7/10", "steps          fetch",
        "now at         fold", "resumed        2 times", "made by        ckptd 0.1.0",
        "code           c0de", "  strategy  automatic", "  cost      50ms a save, 600ms in all",
        "  overhead  0.40% of 2m30s so far, at most 1% is wanted", "  odd       3",
        '  {"part": 7}', '  {"rows": 3}', "model.bin  2.0 KiB",
    ):  # fmt: skip
        assert part in out, out
    document = json.loads(desk.run("show", "1", "-o", "json")[1])["checkpoint"]
    assert document["manifest"] == desk.manifest(1)
    assert document["numbers"]["saves"] == 12


def test_show_of_a_state_that_is_long_is_cut_and_json_has_it_whole(desk: Desk) -> None:
    desk.saves({"rows": list(range(5_000))})
    _, out, _ = desk.run("show")
    assert '"rows": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ... 4,988 more: -o json]' in out
    assert len(out.splitlines()) < 40
    document = json.loads(desk.run("show", "-o", "json")[1])
    assert len(document["checkpoint"]["manifest"]["state"]["rows"]) == 5_000


def test_show_keeps_the_terminal_safe_from_what_a_task_saved(desk: Desk) -> None:
    desk.saves({"\x1b[2J": "\x1b]0;pwned\x07"}, current_step="\x1b[31m", numbers={"\x1b": "\x1b"})
    _, out, _ = desk.run("show")
    assert "\x1b" not in out
    assert "\x07" not in out


def test_show_of_a_damaged_checkpoint_tells_what_the_daemon_knows(desk: Desk) -> None:
    desk.saves(1)
    desk.world.path("ckpt/00000001/MANIFEST.json").write_text("{}")
    code, out, err = desk.run("show", "1")
    assert code == 0
    assert "the manifest cannot be read: it does not check" in err
    assert "bad" in out


@pytest.mark.parametrize("verb", ["show", "diff", "export", "edit"])
def test_a_checkpoint_that_is_not_there_is_4(desk: Desk, verb: str) -> None:
    desk.saves(1)
    words = {"export": ["9", str(desk.folder / "out")], "diff": ["9"], "show": ["9"]}
    code, _, err = desk.run(verb, *words.get(verb, ["9", "--set", "state=1"]))
    assert code == 4
    assert "has no checkpoint 9 (there are: 1)" in err


# --- diff ----------------------------------------------------------------------------------------


def test_diff_tells_members_steps_and_files_and_exits_1(desk: Desk) -> None:
    desk.saves({"part": 6, "old": 1}, {"a.bin": b"1", "gone": b""}, steps=["fetch"])
    desk.saves({"part": 7, "new": [1]}, {"a.bin": b"2", "d/b.bin": b""}, steps=["fetch", "fold"])
    code, out, _ = desk.run("diff")
    assert code == 1
    lines = out.splitlines()
    assert lines[0].startswith("files.a.bin: 6b86b273ff34..., 1 bytes -> d4735e3a265e..., 1 bytes")
    assert lines[3:] == [
        "state.new: added [1]", "state.old: removed, was 1", "state.part: 6 -> 7",
        'steps.fold: added "done"',
    ]  # fmt: skip
    document = json.loads(desk.run("diff", "1", "2", "-o", "json")[1])["diff"]
    assert (document["a"], document["b"], document["same"]) == (1, 2, False)
    part = {"path": "state.part", "kind": "changed", "before": 6, "after": 7}
    assert part in document["changes"]


def test_diff_of_the_same_saved_twice_is_0(desk: Desk) -> None:
    desk.saves({"part": 6})
    desk.saves({"part": 6}, epoch=5, numbers={})
    assert desk.run("diff")[:2] == (0, "")
    assert desk.run("diff", "2")[0] == 0


def test_diff_needs_two(desk: Desk) -> None:
    desk.saves(1)
    code, _, err = desk.run("diff")
    assert code == 4
    assert "has 1 valid checkpoints: nothing to compare" in err


# --- export and import ---------------------------------------------------------------------------

FILES = {"model.bin": bytes(range(256)) * 40, "deep/er/x": b"y", "empty": b""}


@pytest.mark.parametrize("name", ["out", "out.tar"])
def test_what_was_exported_is_imported_as_a_new_checkpoint(desk: Desk, name: str) -> None:
    desk.saves({"part": 1}, FILES, results={"rows": 3}, progress={"done": 1, "total": 2})
    target = str(desk.folder / name)
    assert desk.run("export", target)[0] == 0
    desk.saves({"part": 2})
    before = desk.tree()

    code, out, err = desk.run("import", target, "-o", "json")
    assert code == 0, err
    assert json.loads(out)["checkpoint"]["seq"] == 3
    assert {name: data for name, data in desk.tree().items() if "00000002" in name} == {
        name: data for name, data in before.items() if "00000002" in name
    }
    manifest, known = desk.resumed()
    assert (manifest["seq"], manifest["state"], manifest["task_name"]) == (3, {"part": 1}, "ingest")
    assert manifest["provenance"]["imported_from"]["seq"] == 1
    assert known.values == {"rows": 3}
    assert known.progress["done"] == 1
    for path, data in FILES.items():
        assert desk.world.path("ckpt/00000003", path).read_bytes() == data


def test_a_checkpoint_of_another_function_is_taken_and_told(desk: Desk) -> None:
    desk.saves({"part": 1}, task_name="census")
    assert desk.run("export", str(desk.folder / "own"))[0] == 0
    assert "saved it" not in desk.run("import", str(desk.folder / "own"))[2]
    desk.saves({"part": 2})
    assert desk.run("export", str(desk.folder / "other"))[0] == 0
    code, _, err = desk.run("import", str(desk.folder / "other"))
    assert code == 0
    assert f"ingest (task {TASK}) saved it, and task {TASK} is census" in err


def test_a_checkpoint_goes_through_a_pipe(desk: Desk) -> None:
    desk.saves({"part": 1}, FILES)
    with ctl_process(desk.endpoint, "checkpoint", "export", str(TASK), "-") as process:
        assert process.stdout is not None
        data = process.stdout.buffer.read()
    assert process.returncode == 0
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert archive.getnames() == ["MANIFEST.json", *sorted(FILES)]
    with ctl_process(desk.endpoint, "checkpoint", "import", str(TASK), "-") as process:
        assert process.stdin is not None
        process.stdin.buffer.write(data)
        process.stdin.close()
        assert process.wait(30) == 0
    assert desk.manifest(2)["state"] == {"part": 1}


def test_export_is_all_or_nothing_and_refuses_what_is_there(desk: Desk) -> None:
    desk.saves(1, {"a": b"1"})
    desk.world.path("ckpt/00000001/a").write_bytes(b"2")
    before = sorted(os.listdir(desk.folder))
    for name in ("out", "out.tar"):
        code, _, err = desk.run("export", "1", str(desk.folder / name))
        assert code == 65, err
        assert "checkpoint verify" in err
    assert sorted(os.listdir(desk.folder)) == before
    (desk.folder / "there").mkdir()
    assert desk.run("export", "1", str(desk.folder / "there"))[0] == 5
    code, _, err = desk.run("export", "1", str(desk.folder / "no" / "where"))
    assert (code, "there is no directory" in err) == (64, True)


def tampered(desk: Desk, how: str) -> str:
    """Return the path of an export that somebody changed."""
    target = desk.folder / "out"
    assert desk.run("export", str(target))[0] == 0
    manifest = json.loads((target / "MANIFEST.json").read_text())
    match how:
        case "a file changed":
            (target / "empty").write_bytes(b"!")
        case "the same size, other bytes":
            (target / "deep/er/x").write_bytes(b"z")
        case "a file too many":
            (target / "more").write_bytes(b"")
        case "a file missing":
            (target / "empty").unlink()
        case "a link":
            (target / "empty").unlink()
            (target / "empty").symlink_to("/dev/null")
        case "the manifest changed":
            manifest["state"] = {"part": 99}
        case "a name that leads out":
            manifest["files"][0]["name"] = "../../x"
        case "a later format":
            manifest["format"] = 99
        case "no manifest":
            (target / "MANIFEST.json").unlink()
            return str(target)
        case _:
            raise AssertionError(how)
    (target / "MANIFEST.json").write_text(json.dumps(manifest))
    return str(target)


DAMAGES = [
    "a file changed", "the same size, other bytes", "a file too many", "a file missing", "a link",
    "the manifest changed", "a name that leads out", "a later format", "no manifest",
]  # fmt: skip


@pytest.mark.parametrize("how", DAMAGES)
def test_an_export_that_was_changed_is_not_imported(desk: Desk, how: str) -> None:
    desk.saves({"part": 1}, FILES)
    before = desk.tree()
    source = tampered(desk, how)
    code, _, err = desk.run("import", source)
    assert code == 65, err
    hints = {"no manifest": "name what", "a later format": "a later ckptd wrote it"}
    assert hints.get(how, "export it again") in err
    assert desk.tree() == before
    assert os.listdir(desk.world.path("stage")) == []


def tar_of(members: list[tuple[str, bytes, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, kind, data in members:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(data), "/etc/passwd"
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize(
    "members",
    [
        [],
        [("a", tarfile.REGTYPE, b"1")],
        [("M", tarfile.REGTYPE, b""), ("../x", tarfile.REGTYPE, b"1")],
        [("M", tarfile.REGTYPE, b""), ("a", tarfile.SYMTYPE, b"")],
        [("M", tarfile.REGTYPE, b""), ("a", tarfile.REGTYPE, b"12")],
        [("M", tarfile.REGTYPE, b""), ("a", tarfile.REGTYPE, b"1"), ("a", tarfile.REGTYPE, b"1")],
        [("M", tarfile.REGTYPE, b"")],
        [("M", tarfile.LNKTYPE, b"")],
    ],
    ids=["empty", "no manifest", "out", "link", "size", "twice", "missing", "linked manifest"],
)
def test_a_hostile_tar_is_refused_and_leaves_nothing(
    desk: Desk, members: list[tuple[str, bytes, bytes]]
) -> None:
    desk.saves({"part": 1}, {"a": b"1"})
    manifest = desk.world.path("ckpt/00000001/MANIFEST.json").read_bytes()
    before, listed = desk.tree(), sorted(os.listdir(desk.world.dir))
    path = desk.folder / "in.tar"
    path.write_bytes(
        tar_of([
            ("MANIFEST.json" if name == "M" else name, kind,
             manifest if name == "M" and kind == tarfile.REGTYPE else data)
            for name, kind, data in members
        ])
    )  # fmt: skip
    code, _, err = desk.run("import", str(path))
    assert (code, "Traceback" in err) == (65, False), err
    assert desk.tree() == before
    assert sorted(os.listdir(desk.world.dir)) == listed
    assert not (desk.folder / "x").exists()


def test_what_is_no_tar_is_said_to_be_none(desk: Desk) -> None:
    desk.saves(1)
    (desk.folder / "in.tar").write_bytes(os.urandom(4096))
    code, _, err = desk.run("import", str(desk.folder / "in.tar"))
    assert (code, "no tar of an exported checkpoint" in err) == (65, True)
    code, _, err = desk.run("import", str(desk.folder / "nowhere"))
    assert (code, "there is no " in err) == (64, True)


def test_a_task_that_was_never_started_takes_an_import(desk: Desk, scripted: Scripted) -> None:
    desk.saves({"part": 1}, FILES)
    target = str(desk.folder / "out")
    assert desk.run("export", target)[0] == 0
    (desk.folder / "fresh").mkdir()
    other = Desk(desk.folder / "fresh", scripted)
    shutil.rmtree(other.world.dir)
    other.attempt, other.phase = 0, "held"
    code, _, err = other.run("import", target)
    assert code == 0, err
    assert blobs.has_anything(other.world.dir)
    other.world.attempt = 0
    manifest, _ = other.resumed()
    assert (manifest["state"], manifest["attempt"]) == ({"part": 1}, 0)


# --- edit ----------------------------------------------------------------------------------------


def test_an_edit_is_a_new_checkpoint_and_the_old_one_stays_as_it_was(desk: Desk) -> None:
    desk.saves({"part": 6, "tmp": 1, "rows": [1, 2]}, FILES, results={"a": 1, "b": 2},
               progress={"done": 6, "total": 10}, steps=["fetch"])  # fmt: skip
    before = desk.tree()
    code, out, err = desk.run(
        "edit", "--set", "state.part=7", "--set", 'state.name="x"', "--set", "state.rows.1=5",
        "--unset", "state.tmp", "--set", "progress.done=7", "--set", "results.a=[1]",
        "--unset", "results.b",
    )  # fmt: skip
    assert code == 0, err
    assert "state.part: 6 -> 7" in out.splitlines()
    assert "checkpoint 2 of task 12 is made of 1" in err

    manifest, known = desk.resumed()
    assert manifest["state"] == {"part": 7, "rows": [1, 5], "name": "x"}
    assert manifest["progress"] == {"done": 7, "total": 10}
    assert (manifest["steps"], manifest["parent"], manifest["numbers"]["odd"]) == (["fetch"], 1, 3)
    origin = manifest["provenance"]
    assert (origin["edited"], origin["uid"]) == (1, os.getuid())
    assert {"path": "state.part", "kind": "changed", "before": 6, "after": 7} in origin["changes"]
    assert known.values == {"a": [1]}
    assert known.progress["done"] == 7
    after = desk.tree()
    assert {name: after[name] for name in before} == before
    for name, data in FILES.items():
        assert after[f"00000002/{name}"] == data
    assert "edited from 1: " in desk.run("show")[1]


def test_an_edit_of_an_older_one_names_it_as_its_parent(desk: Desk) -> None:
    desk.saves({"part": 1})
    desk.saves({"part": 2})
    assert desk.run("edit", "1", "--set", "state.part=5")[0] == 0
    assert desk.manifest(3)["parent"] == 1
    assert desk.run("edit", "--set", "state.part=5")[2] == "ckptctl: nothing was changed\n"
    assert not desk.world.path("ckpt/00000004").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "state.prat=7"], "did you mean state.part? to add it: --force"),
        (["--set", "stat.part=7"], "cannot edit 'stat'"),
        (["--set", "steps.x=1"], "steps are facts of the journal"),
        (["--set", "state.part=seven"], "a text needs quotes: --set 'state.part=\"seven\"'"),
        (["--set", "state.part=NaN"], "NaN is not JSON"),
        (["--set", "state.part"], "is no PATH=JSON"),
        (["--set", "state.part.deep=1"], "state.part is a number"),
        (["--set", "state..x=1"], "not a path"),
        (["--unset", "state.nothing"], "there are: state.part, state.rows"),
        (["--set", "state.rows.7=1"], "it has 2 elements"),
        (["--set", "progress.done=-1"], "progress cannot be"),
        (["--set", 'progress.done="x"'], "progress cannot be"),
        (["--set", "results=3"], "results must stay an object"),
        (["--set", "state=" + "[" * 60_000], "nested too deeply"),
    ],
)
def test_an_edit_that_cannot_be_is_refused_with_a_hint(
    desk: Desk, words: list[str], said: str
) -> None:
    desk.saves({"part": 6, "rows": [1, 2]})
    before = desk.tree()
    code, _, err = desk.run("edit", *words)
    assert code == 64, err
    assert said in err
    assert desk.tree() == before


def test_a_name_with_dots_is_found_and_force_adds_a_name_that_looks_mistyped(desk: Desk) -> None:
    desk.saves({"a.b": {"c": 1}, "part": 1})
    assert desk.run("edit", "--set", "state.a.b.c=2", "--set", "state.prat=1", "--force")[0] == 0
    assert desk.manifest(2)["state"] == {"a.b": {"c": 2}, "part": 1, "prat": 1}


@pytest.mark.parametrize("phase", ["starting", "running", "paused", "stopping"])
def test_what_belongs_to_a_living_attempt_is_left_alone(desk: Desk, phase: str) -> None:
    desk.saves({"part": 6})
    desk.phase = phase
    for words in (["edit", "--set", "state.part=7"], ["import", str(desk.folder)]):
        code, _, err = desk.run(*words)
        assert code == 5
        assert f"task 12 is {phase}" in err
        assert "pausing does not help: ckptctl cancel 12" in err


def test_an_attempt_that_was_started_meanwhile_keeps_its_files(desk: Desk) -> None:
    desk.saves({"part": 6})
    desk.world.begin()
    desk.world.path("stage/half").write_text("of the new attempt")
    before = desk.tree()
    code, _, err = desk.run("edit", "--set", "state.part=7")
    assert code == 5
    assert "attempt 2 exists" in err
    assert desk.tree() == before
    assert desk.world.path("stage/half").read_text() == "of the new attempt"


def test_what_a_dead_attempt_left_in_its_stage_gets_into_no_edit(desk: Desk) -> None:
    desk.saves({"part": 6})
    desk.world.path("stage/half").write_text("x")
    assert desk.run("edit", "--set", "state.part=7")[0] == 0
    assert desk.manifest(2)["files"] == []


def test_an_edit_in_an_editor_keeps_what_was_not_touched(desk: Desk) -> None:
    editor = desk.folder / "editor"
    editor.write_text('#!/bin/sh\nsed -i \'s/"part": 6/"part": 8/\' "$1"\n')
    editor.chmod(0o755)
    desk.saves({"part": 6}, FILES, cursors={"rows": 3})
    words = ("checkpoint", "edit", str(TASK))
    code, out = ctl_on_terminal(desk.endpoint, *words, EDITOR=str(editor), VISUAL="")
    assert code == 0, out
    assert (desk.manifest(2)["state"], desk.manifest(2)["cursors"]) == ({"part": 8}, {"rows": 3})
    code, _, err = desk.run("edit")
    assert (code, "an editor needs a terminal" in err) == (64, True)


def test_a_damaged_checkpoint_is_edited_by_nobody(desk: Desk) -> None:
    desk.saves({"part": 6}, {"a": b"1"})
    desk.world.path("ckpt/00000001/a").write_bytes(b"2")
    code, _, err = desk.run("edit", "1", "--set", "state.part=7")
    assert code == 65, err
    assert sorted(os.listdir(desk.world.path("ckpt"))) == ["00000001"]


def test_a_journal_that_knows_better_is_told_of_the_edit(desk: Desk) -> None:
    desk.world.record(facts.set_value("rows", 5), facts.progress_made(5, 10))
    desk.saves({}, results={"rows": 5})
    assert desk.run("edit", "--set", "results.rows=6")[0] == 0
    assert desk.resumed()[1].values == {"rows": 6}


# --- whose files they are ------------------------------------------------------------------------

OTHER = ["setpriv", "--reuid", "nobody", "--clear-groups", "/usr/bin/python3"]


def can_be_other() -> bool:
    code = f"import sys; open({__file__!r}); sys.exit(sys.version_info < (3, 11))"
    words = [*OTHER, "-c", code]
    return os.geteuid() == 0 and subprocess.run(words, check=False).returncode == 0


@pytest.mark.skipif(not can_be_other(), reason="needs root, and a Python for all")
@pytest.mark.parametrize("verb", ["show", "export", "import", "edit"])
def test_files_of_another_user_are_denied_and_left_alone(desk: Desk, verb: str) -> None:
    desk.saves({"part": 1}, {"a": b"1"})
    desk.folder.chmod(0o755)
    before = desk.tree()
    words = {
        "show": ["1"], "export": ["1", "/tmp/ck-never"], "import": [str(TASK), "1", "/tmp"],
        "edit": [str(TASK), "1", "1"],
    }[verb]  # fmt: skip
    done = subprocess.run(
        [*OTHER, "-P", "-m", "ckptd.offline.checkpoint", verb, desk.world.dir, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd="/",
        input=b'{"set": {"state.part": 2}}',
        capture_output=True,
        check=False,
    )
    assert done.returncode == 77, done.stderr
    assert desk.tree() == before
    assert not os.path.lexists("/tmp/ck-never")


# --- beside a task that saves ---------------------------------------------------------------------


def test_an_export_to_a_pipe_that_is_overtaken_is_cut_short_and_says_so(desk: Desk) -> None:
    desk.saves(1, {"a": bytes(1 << 20), "b": b"1"})
    with ctl_process(desk.endpoint, "checkpoint", "export", str(TASK), "-") as process:
        assert process.stdout
        assert process.stderr
        begin = process.stdout.buffer.read(4096)
        desk.saves(2, {"a": b"2"})
        desk.saves(3, {"a": b"3"})
        data = begin + process.stdout.buffer.read()
        said = process.stderr.read()
    assert process.returncode == 5
    assert data.count(b"MANIFEST.json\0") == 1
    assert "checkpoint 1 was cleared away while it was sent: the tar is cut short" in said


@pytest.mark.parametrize("verb", ["show", "diff"])
def test_what_is_overtaken_while_it_is_looked_up_is_looked_up_again(
    short_dir: Path, scripted: Scripted, verb: str
) -> None:
    desk = Desk(short_dir, scripted)
    for state in (1, 2):
        desk.saves(state)
    left = [3, 4]

    def overtaken(asked: m.Message) -> m.CheckpointList:
        found = desk.listed(asked)
        while left:
            desk.saves(left.pop(0))
        return found

    desk.endpoint = scripted({"checkpoints": overtaken, "show": desk.shown}).endpoint
    code, out, err = desk.run(verb, "-o", "json")
    assert (code, err) == (1 if verb == "diff" else 0, "")
    told = json.loads(out)
    assert (told["diff"]["b"] if verb == "diff" else told["checkpoint"]["seq"]) == 4


def test_verify_tells_what_waits_for_its_seal_from_what_is_bad(desk: Desk) -> None:
    desk.world.publish(1, state="by hand")
    code, out, err = desk.run("verify")
    assert (code, out.splitlines()[1].split()[:2]) == (1, ["1", "unsealed"])
    assert "not verified before the task sends CHECKPOINT=1, or its attempt ends" in err

    desk.saves(2)  # so the daemon never comes to seal the older one
    code, out, err = desk.run("verify")
    states = [line.split()[:2] for line in out.splitlines()[1:]]
    assert (code, states, err) == (1, [["2", "valid"], ["1", "bad"]], "")
