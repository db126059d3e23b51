"""A result that was told is there after a power cut that keeps nothing else."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.batch import ledger, place
from ckptd.batch.__main__ import main
from ckptd.batch.prepare import Wishes, prepare
from ckptd.storage import facts
from tests.batch_world import BatchWorld
from tests.fakes.durable_image import DurableImage


@pytest.fixture
def world(tmp_path: Path) -> BatchWorld:
    made = BatchWorld(tmp_path)
    made.prepare(argv=["sh", "-c", "echo did-$1", "sh"], items=["a", "b", "c"], jobs=1)
    return made


@pytest.fixture
def image(world: BatchWorld, monkeypatch: pytest.MonkeyPatch) -> Iterator[DurableImage]:
    found = DurableImage(world.dir, monkeypatch)
    yield found
    found.close()


def test_results_of_a_run_that_the_power_cut_short_are_there(
    world: BatchWorld, image: DurableImage
) -> None:
    path, keys = str(world.dir), []
    for key in ("a", "b"):
        ours = ledger.Ledger(path, place.load(path), ledger.begin(path))
        ours.append([facts.item_start(key)], is_synced=False)
        ours.append([facts.item_done(key, "pass")])
        ours.append([facts.item_start("c")], is_synced=False)
        image.cut()
        keys.append(key)
        assert list(world.results()) == keys


@pytest.mark.parametrize("words", [["run", "{dir}"], ["export", "b"]])
def test_results_of_a_run_that_was_killed_before_its_sync_are_there_once_they_are_told(
    world: BatchWorld, image: DurableImage, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """The next run has nothing to do, ends with 0 and appends nothing: who else would sync?"""
    path = str(world.dir)
    killed = ledger.Ledger(path, place.load(path), ledger.begin(path))
    for key in ("a", "b", "c"):
        killed.append([facts.item_done(key, "pass")], is_synced=False)
    monkeypatch.chdir(world.work)
    monkeypatch.setenv("CKPTD_BATCH_DIR", str(world.dir.parent))
    assert main([word.format(dir=path) for word in words]) == 0
    image.cut()
    assert list(world.results()) == ["a", "b", "c"]


@pytest.fixture
def at_home(world: BatchWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.work)
    monkeypatch.setenv("CKPTD_BATCH_DIR", str(world.dir.parent))


def recorded(path: str, *keys: str) -> None:
    ours = ledger.Ledger(path, place.load(path), ledger.begin(path))
    ours.append([facts.item_done(key, "pass") for key in keys])
    ours.close()


@pytest.mark.usefixtures("at_home")
def test_what_fresh_put_away_is_there_after_a_power_cut(
    world: BatchWorld, image: DurableImage
) -> None:
    recorded(str(world.dir), "a", "b")
    prepare("b", {}, Wishes(is_fresh=True))
    image.cut()
    kept = [path.relative_to(world.dir) for path in world.dir.rglob("*.j")]
    assert kept == [Path("archive/2/journal/000001.j")]
    assert (world.dir / kept[0]).stat().st_size


@pytest.mark.usefixtures("at_home")
def test_fresh_starts_anew_though_a_power_cut_took_back_the_number_of_the_run_before(
    world: BatchWorld, image: DurableImage
) -> None:
    path = str(world.dir)
    recorded(path, "a", "b")
    prepare("b", {}, Wishes(is_fresh=True))
    image.cut()
    recorded(path, "a", "b", "c")
    prepare("b", {}, Wishes(is_fresh=True))
    assert world.results() == {}
    assert len(list((world.dir / "archive").iterdir())) == 2


def test_what_an_item_printed_is_told_once_its_result_is_there(
    world: BatchWorld, image: DurableImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The power goes at every line that reaches stdout."""
    told: dict[str, bool] = {}
    write = os.write

    def heard(fd: int, data: bytes | memoryview) -> int:
        if fd == 1 and bytes(data[:4]) == b"did-":
            key = bytes(data).decode().strip().removeprefix("did-")
            left = tmp_path / "left" / "batches" / "b"
            left.parent.mkdir(parents=True, exist_ok=True)
            image.write_to(left)
            told[key] = key in ledger.read(str(left), place.load(str(left))).items
            shutil.rmtree(left)
        return write(fd, data)

    monkeypatch.setattr(os, "write", heard)
    monkeypatch.chdir(world.work)
    assert main(["run", str(world.dir)]) == 0
    assert told == {"a": True, "b": True, "c": True}


def test_an_item_finds_its_own_start_in_the_ledger(tmp_path: Path) -> None:
    world = BatchWorld(tmp_path)
    look = f'grep -aq item_start.*key.*$1 {world.dir}/journal/*.j && echo "named"'
    world.prepare(argv=["sh", "-c", look, "sh"], items=["first", "second"], jobs=1)
    world.run()
    assert {fact["result"] for fact in world.results().values()} == {"named"}


def test_a_batch_that_is_held_is_not_held_by_another(world: BatchWorld) -> None:
    path = str(world.dir)
    with place.locked(path, "b"), pytest.raises(place.Held, match="b"), place.locked(path, "b"):
        pass
    with place.locked(path, "b"):
        assert place.holder(path) is not None
