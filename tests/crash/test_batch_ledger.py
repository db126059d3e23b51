"""A ledger cut at every byte: what is torn is not done, and everything before it stands."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.batch import ledger, place
from tests.batch_world import BatchWorld

NAMES = ["a", "b", "c", "d"]


@pytest.fixture
def world(tmp_path: Path) -> BatchWorld:
    """Return a finished batch of four items, one after the other."""
    made = BatchWorld(tmp_path)
    made.prepare(argv=["sh", "-c", "echo $1 >>runs; echo $1", "sh"], items=NAMES, jobs=1)
    made.run()
    return made


def journal(world: BatchWorld) -> Path:
    (path,) = (world.dir / "journal").glob("*.j")
    return path


def done(world: BatchWorld) -> list[str]:
    found = ledger.read(str(world.dir), place.load(str(world.dir))).items
    assert all(found[key]["result"] == key for key in found)
    return list(found)


@pytest.mark.parametrize("room", [0, 4096], ids=["cut", "cut and zeros"])
def test_a_record_cut_at_any_byte_is_not_done_and_those_before_are(
    world: BatchWorld, room: int
) -> None:
    path = journal(world)
    whole = path.read_bytes().rstrip(b"\0")
    lengths = []
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut] + bytes(room))
        lengths.append(len(done(world)))
        assert done(world) == NAMES[: lengths[-1]]

    assert lengths == sorted(lengths)
    assert set(lengths) == set(range(len(NAMES) + 1))


@pytest.mark.parametrize("part", range(1, 8))
def test_a_batch_goes_on_from_a_cut_ledger_with_what_was_lost(world: BatchWorld, part: int) -> None:
    path = journal(world)
    whole = path.read_bytes().rstrip(b"\0")
    path.write_bytes(whole[: len(whole) * part // 8])
    kept = done(world)

    world.run()

    assert sorted(done(world)) == NAMES
    ran = (world.work / "runs").read_text().split()[len(NAMES) :]
    assert ran == [name for name in NAMES if name not in kept]


def test_a_ledger_damaged_in_the_middle_is_refused_and_fresh_goes_on(world: BatchWorld) -> None:
    path = journal(world)
    data = bytearray(path.read_bytes())
    data[data.index(b'"key":"b"') + 7] ^= 1
    path.write_bytes(data)

    said = world.run(code=65).stderr

    assert "the ledger of b does not check" in said
    assert "--fresh" in said
    assert path.read_bytes() == bytes(data)
    world.prepare("--fresh", items=NAMES)
    world.run()
    assert done(world) == NAMES


def test_a_ledger_of_another_batch_is_no_ledger_of_this(world: BatchWorld, tmp_path: Path) -> None:
    other = BatchWorld(tmp_path, "other")
    other.prepare(argv=["true"], items=NAMES)
    other.run()
    journal(other).write_bytes(journal(world).read_bytes())

    assert done(other) == []


def test_a_disk_that_takes_nothing_more_costs_no_result(world: BatchWorld, tmp_path: Path) -> None:
    small = BatchWorld(tmp_path, "small")
    small.prepare(argv=["echo"], items=[f"item {n}" for n in range(200)], jobs=4)
    limited = f"ulimit -f 32; exec {sys.executable} -m ckptd.batch run {small.dir}"
    full = subprocess.run(
        ["sh", "-c", limited],
        env=small.env,
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    kept = small.results()

    assert full.returncode == 2
    assert "what was recorded before is kept; run it again" in full.stderr
    assert 0 < len(kept) < 200
    assert set(full.stdout.splitlines()) <= set(kept)  # nothing was told that is not recorded
    small.run()
    assert len(small.results()) == 200
    assert {key: small.results()[key] for key in kept} == kept


FILLS = """
echo "$2" >>ran
[ "$2" = b ] && [ ! -e filled ] && touch filled && dd if=/dev/zero of=$1/balloon bs=4k 2>/dev/null
echo "$2"
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of the batch's own that is soon full."""
    (tmp_path / "batches").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path / "batches")]
    made = subprocess.run(mount, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"cannot mount a tmpfs: {made.stderr.strip()}")
    yield tmp_path / "batches"
    subprocess.run(["umount", "--lazy", str(tmp_path / "batches")], check=True)


@pytest.mark.root
def test_an_item_that_fails_while_the_disk_is_full_has_no_result_and_runs_again(
    small_disk: Path, tmp_path: Path
) -> None:
    world = BatchWorld(tmp_path)
    world.prepare(argv=["sh", "-c", FILLS, "sh", str(small_disk)], items=NAMES, jobs=1)

    said = world.run(code=2).stderr

    assert "No space left on device" in said
    assert "what was recorded before is kept; run it again" in said
    assert world.statuses() == {"a": "pass"}
    (ran,) = {*tmp_path.rglob("ran")} - {*small_disk.rglob("ran")}
    assert ran.read_text() == "a\nb\n"  # not over and over, while a small fact still has room
    (small_disk / "balloon").unlink()
    world.run()
    assert world.statuses() == dict.fromkeys(NAMES, "pass")


@pytest.mark.root
def test_what_the_author_says_of_a_code_is_a_result_on_a_full_disk_too(
    small_disk: Path, tmp_path: Path
) -> None:
    world = BatchWorld(tmp_path)
    argv = ["sh", "-c", FILLS + "exit 3", "sh", str(small_disk)]
    world.prepare(argv=argv, items=["b"], jobs=1, on_exit={"3": "skipped"})
    world.run()
    assert world.statuses() == {"b": "skipped"}
