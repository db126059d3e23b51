"""What a hostile task may put into its directory, and that nothing comes of it."""

import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptd.runner.files import TaskFiles
from ckptd.sdk.save import save
from ckptd.storage import blobs, facts
from ckptd.storage.copy import copy_out
from ckptd.storage.facts import read_facts
from ckptd.storage.journal import Journal
from ckptd.storage.manifest import EMPTY, digest_of
from ckptd.storage.untrusted import DEPTH_MAX, Damaged, NotTrusted, parse_json, remove_tree
from tests.task_world import TaskWorld


@pytest.fixture
def world(tmp_path: Path) -> TaskWorld:
    return TaskWorld(tmp_path)


@pytest.mark.parametrize("kind", ["link", "fifo", "directory link", "too deep"])
def test_what_is_no_plain_file_cannot_be_sealed(world: TaskWorld, kind: str) -> None:
    stage = world.path("stage")
    match kind:
        case "link":
            (stage / "x").symlink_to("/etc/shadow")
        case "fifo":
            os.mkfifo(stage / "x")
        case "directory link":
            (stage / "x").symlink_to("/etc")
        case "too deep":
            (stage / "/".join("d" * (DEPTH_MAX + 1))).mkdir(parents=True)
    world.publish(1)

    assert "cannot be sealed" in world.seal()[0]
    assert world.newest().seq == 0


@pytest.mark.parametrize("name", ["ckpt", "stage"])
def test_a_link_where_a_directory_must_be_is_not_followed(
    world: TaskWorld, tmp_path: Path, name: str
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "1").mkdir()
    world.path(name).rmdir()
    world.path(name).symlink_to(victim)

    with pytest.raises(NotTrusted):
        world.begin()
    world.newest()
    blobs_seen = world.mark()

    assert blobs_seen.checkpoint == 0
    assert not any(one.valid for one in blobs.generations(world.dir, world.uid, verify=True))
    assert os.listdir(victim) == ["1"]


def test_a_manifest_that_names_files_outside_restores_nothing(
    world: TaskWorld, tmp_path: Path
) -> None:
    for name in ("../../secret", "/etc/passwd", "a/../b", ""):
        generation = world.path("ckpt", "1")
        generation.mkdir(exist_ok=True)
        entry = {"name": name, "bytes": 0, "sha256": ""}
        manifest = {**EMPTY, "format": 1, "seq": 1, "files": [entry]}
        manifest["digest"] = digest_of(manifest)
        (generation / "MANIFEST.json").write_text(json.dumps(manifest))

        with pytest.raises(Damaged):
            copy_out(world.dir, world.uid, 1, str(tmp_path / "out"))
        assert world.newest().problem


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format":1}', "[" * 100_000, '{"format":1,"seq":1,"files":[1]}']
)
def test_a_manifest_of_rubbish_is_damage(world: TaskWorld, text: str) -> None:
    generation = world.publish(1, a="x")
    (generation / "MANIFEST.json").write_text(text)

    assert "no valid checkpoint is left" in world.newest().problem


@pytest.mark.parametrize(
    "forged",
    [
        {"at_ns": "x"}, {"at_ns": 1 << 70}, {"attempt": -1}, {"steps": {}}, {"boot_id": 1},
        {"files": 7}, {"files": {"hostname": 1}}, {"files": ["hostname"]}, {"files": [{"name": 1}]},
        {"files": [{"bytes": 1}]},
    ],
)  # fmt: skip
def test_a_forged_manifest_that_checks_gives_readers_no_surprise(
    world: TaskWorld, forged: dict[str, object]
) -> None:
    save(world.dir, ["/etc/hostname"], {"attempt": 1})
    path = world.path("ckpt", "00000001", "MANIFEST.json")
    manifest = {**json.loads(path.read_text()), **forged}
    path.write_text(json.dumps({**manifest, "digest": digest_of(manifest)}))

    (found,) = blobs.generations(world.dir, world.uid, verify=True)

    assert not found.valid
    assert next(iter(forged)) in found.fault


def test_names_made_to_confuse_a_terminal_or_an_encoder_stay_out_of_texts(
    world: TaskWorld,
) -> None:
    os.mkdir(os.fsencode(world.path("ckpt")) + b"/9.\xff\x1b[31m")
    (world.path("stage") / "red\x1b[31m").symlink_to("x")
    world.publish(1)
    name = os.fsencode(world.path("stage")) + b"/\xff"
    with open(name, "wb"):
        pass
    world.publish(2)

    texts = [*world.seal(), world.newest().warning, world.newest().problem]

    assert "no UTF-8" in texts[0]
    assert "cannot be opened" in texts[1]
    assert all(text.isprintable() and text.encode() for text in texts if text)


@pytest.mark.root
def test_files_of_another_owner_are_refused(world: TaskWorld) -> None:
    generation = world.publish(1, a="x")
    os.chown(generation / "a", 4711, -1)

    assert "belongs to uid 4711" in world.seal()[0]


@pytest.mark.root
def test_prepare_as_root_gives_every_directory_to_the_task(tmp_path: Path) -> None:
    task_dir = tmp_path / "12"

    for attempt in (1, 2):
        blobs.prepare(str(task_dir), attempt, 4711, 4712, fresh=attempt == 2)

    for path in (task_dir, *task_dir.rglob("*")):
        assert path.stat().st_uid == 4711, path
        assert path.stat().st_mode & 0o077 == 0, path


@pytest.mark.root
def test_daemon_as_root_and_task_as_a_user_work_on_the_same_files(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents):
        if "pytest" in str(folder):  # with several workers there is one folder more
            folder.chmod(0o711)
    task_dir, boot_id, uid = str(tmp_path / "12"), blobs.this_boot_id(), 4711
    blobs.prepare(task_dir, 1, uid, uid, fresh=False)

    def publish_and_record() -> None:
        Path(task_dir, "stage", "a").write_text("x")
        os.rename(f"{task_dir}/stage", f"{task_dir}/ckpt/1")
        Journal(task_dir, 12, 1, 1).append([facts.step_done("s")])

    def save_on_top() -> None:
        assert blobs.newest_sealed(task_dir, uid)[0] == 1
        assert read_facts(task_dir, 12, uid, 2).steps
        assert save(task_dir, [], {"attempt": 2}).seq == 2
        Journal(task_dir, 12, 2, 1).append([facts.step_done("t")])

    as_user(uid, publish_and_record)
    first = blobs.mark(task_dir, 1, uid, boot_id)
    blobs.prepare(task_dir, 2, uid, uid, fresh=False)
    assert blobs.newest_valid(task_dir, uid, boot_id).seq == 1
    as_user(uid, save_on_top)
    second = blobs.mark(task_dir, 2, uid, boot_id)

    assert (first.checkpoint, first.problem) == (1, "")
    assert (second.checkpoint, second.problem) == (2, "")
    assert first.cursor != second.cursor


def as_user(uid: int, work: Callable[[], None]) -> None:
    """Do the work in a child process that has become another user."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            work()
            code = 0
        except BaseException:  # noqa: BLE001  (a child must not run on as pytest)
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.root
def test_checkpoints_that_lie_there_and_cannot_be_looked_at_are_bad_not_gone(
    tmp_path: Path,
) -> None:
    for folder in (tmp_path, *tmp_path.parents):
        if "pytest" in str(folder):
            folder.chmod(0o711)
    task_dir, uid = str(tmp_path / "12"), 4711
    blobs.prepare(task_dir, 1, uid, uid, fresh=False)

    def save_and_lock_out() -> None:
        save(task_dir, [], {"attempt": 1})
        assert [one.valid for one in blobs.generations(task_dir, uid, verify=True)] == [True]
        os.chmod(f"{task_dir}/ckpt", 0o600)
        assert [one.valid for one in blobs.generations(task_dir, uid, verify=True)] == [False]

    as_user(uid, save_and_lock_out)


@pytest.mark.root
def test_prepare_as_root_gives_away_no_file_that_it_did_not_make(tmp_path: Path) -> None:
    task_dir = tmp_path / "12"
    blobs.prepare(str(task_dir), 1, 4711, 4711, fresh=False)
    victim = tmp_path / "victim"
    victim.touch()
    (task_dir / "attempt.json").unlink()
    os.link(victim, task_dir / "attempt.json")

    with pytest.raises(NotTrusted):
        blobs.prepare(str(task_dir), 2, 4711, 4711, fresh=False)

    assert victim.stat().st_uid == 0
    assert victim.read_bytes() == b""


def test_a_tree_of_any_depth_is_removed_and_no_link_followed(tmp_path: Path) -> None:
    keep = tmp_path / "keep"
    keep.write_text("x")
    top = tmp_path / "top"
    top.mkdir()
    folder = os.open(top, os.O_RDONLY)
    for _ in range(2_000):
        os.mkdir("d", dir_fd=folder)
        os.symlink(keep, "link", dir_fd=folder)
        below = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(folder)
    parent = os.open(tmp_path, os.O_RDONLY)

    remove_tree("top", parent)

    os.close(parent)
    assert not top.exists()
    assert keep.read_text() == "x"


def opened_up(tmp_path: Path) -> Path:
    """Return a directory in which any user may make something."""
    for folder in (tmp_path, *tmp_path.parents):
        if "pytest" in str(folder):
            folder.chmod(0o711)
    state = tmp_path / "state"
    state.mkdir()
    state.chmod(0o777)
    return state


@pytest.mark.root
@pytest.mark.parametrize("mode", [0o555, 0o300, 0])
def test_generations_with_closed_directories_are_given_back_to_a_user_without_privileges(
    tmp_path: Path, mode: int
) -> None:
    state, uid, boot_id = str(opened_up(tmp_path)), 4711, blobs.this_boot_id()

    def save_often_and_forget() -> None:
        files = TaskFiles(state, boot_id)
        task = Path(files.directory(12))
        blobs.prepare(str(task), 1, uid, -1, fresh=False)
        for number in range(1, 7):
            closed = task / "stage" / "x" / "cache" / "module" / "deep"
            closed.mkdir(parents=True)
            (closed / "a").write_text("x")
            for folder in (closed, closed.parent, closed.parent.parent):
                folder.chmod(0o555 if number > 4 else mode)
            (task / "stage" / "x").rename(task / "ckpt" / str(number))
            files.mark(12, 1, uid)
        assert {name for name in os.listdir(task / "ckpt") if not name.isdigit()} == set()
        assert sorted(os.listdir(task / "ckpt")) == ["5", "6"]
        files.deletion(12)()
        assert not task.exists()

    as_user(uid, save_often_and_forget)


@pytest.mark.root
def test_a_closed_directory_of_somebody_else_stays_as_it_is_and_keeps_no_other(
    tmp_path: Path,
) -> None:
    state, uid = opened_up(tmp_path), 4711
    task_dir = str(state / "12")
    blobs.prepare(task_dir, 1, uid, uid, fresh=False)
    foreign = state / "12" / "ckpt" / ".leftover-1" / "foreign"
    own = state / "12" / ".leftover-2"
    foreign.mkdir(parents=True)
    (foreign / "a").write_text("x")
    foreign.chmod(0o511)
    own.mkdir()
    for path in (foreign.parent, own):
        os.chown(path, uid, uid)

    as_user(uid, lambda: blobs.prune(task_dir, uid) and None)

    assert (foreign.stat().st_mode & 0o777, os.listdir(foreign)) == (0o511, ["a"])
    assert not own.exists()


@pytest.mark.root
def test_a_link_is_not_followed_by_what_opens_closed_directories(tmp_path: Path) -> None:
    state, uid = opened_up(tmp_path), 4711

    def remove_a_tree_of_links() -> None:
        kept = state / "kept"
        kept.mkdir()
        (kept / "a").write_text("x")
        kept.chmod(0o500)
        (state / "top" / "in").mkdir(parents=True)
        for folder in ("top", "top/in"):
            (state / folder / "link").symlink_to(kept)
        (state / "top" / "in").chmod(0)
        fd = os.open(state, os.O_RDONLY)
        remove_tree("top", fd)
        os.close(fd)
        assert not (state / "top").exists()
        assert (kept.stat().st_mode & 0o777, os.listdir(kept)) == (0o500, ["a"])

    as_user(uid, remove_a_tree_of_links)


@pytest.mark.parametrize("depth", [65, 500, 980, 5_000, 200_000])
def test_json_nested_at_any_depth_is_refused_and_never_exhausts_the_stack(depth: int) -> None:
    with pytest.raises(ValueError, match="nested"):
        parse_json(b"[" * depth + b"]" * depth)
