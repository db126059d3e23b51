"""What a task was told, by whichever door, is there when the power goes and takes all unsynced."""

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.sdk import ResumableContext, ckpt, run_local
from ckptd.sdk.pipe import Pipe
from ckptd.sdk.surroundings import Surroundings
from ckptd.storage import facts
from tests.fakes.durable_image import DurableImage
from tests.task_world import TaskWorld


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TaskWorld:
    (tmp_path / "disk").mkdir()
    found = TaskWorld(tmp_path / "disk")
    for name, value in found.environ().items():
        monkeypatch.setenv(name, value)
    return found


@pytest.fixture
def image(world: TaskWorld, monkeypatch: pytest.MonkeyPatch) -> Iterator[DurableImage]:
    """Listen from here on, to a task whose last process was killed before its sync."""
    found = DurableImage(Path(world.dir).parent.parent, monkeypatch)
    group = [facts.step_done("a"), facts.set_value("k", "v"), facts.item_done("i", "pass")]
    world.journal().append(group, is_synced=False)
    yield found
    found.close()


@pytest.mark.parametrize(
    "words",
    [["done", "a"], ["step", "a", "--", "false"], ["get", "k"], ["items"], ["resume"]],
    ids=" ".join,
)
def test_what_a_verb_tells_is_not_lost_with_the_power(
    world: TaskWorld, image: DurableImage, words: list[str]
) -> None:
    assert ckpt.run(words) == 0
    image.cut()
    assert list(world.facts().steps) == ["a"]


def test_what_a_pipe_tells_is_not_lost_with_the_power(
    world: TaskWorld, image: DurableImage
) -> None:
    request = {"op": "step_query", "name": "a"}
    (source, to_pipe), (from_pipe, sink) = os.pipe(), os.pipe()
    os.write(to_pipe, json.dumps(request).encode() + b"\n")
    os.close(to_pipe)

    assert Pipe(Surroundings()).run(source, sink) == 0

    assert json.loads(os.read(from_pipe, 1 << 16))["done"]
    image.cut()
    assert list(world.facts().steps) == ["a"]


def test_what_a_checkpoint_repeats_of_the_journal_is_not_lost_beside_it(
    world: TaskWorld, image: DurableImage
) -> None:
    assert ckpt.run(["save", "--state", "1"]) == 0
    image.cut()
    assert world.newest().seq == 1
    assert list(world.facts().steps) == ["a"]


def answered(request: dict[str, object]) -> dict[str, object]:
    pipe = Pipe(Surroundings())
    pipe.take(json.dumps(request).encode())
    return pipe.answers[0]


@pytest.mark.parametrize(
    "told",
    [
        lambda _: ckpt.run(["last"]) == 0,
        lambda _: answered({"op": "hello"})["seq"] == 1,
        lambda world: world.newest().seq == 1,
        lambda world: world.mark().checkpoint == 1,
    ],
    ids=["ckpt last", "hello of a pipe", "the next start", "status"],
)
def test_a_checkpoint_that_was_told_is_there_though_its_saver_died_before_the_last_sync(
    world: TaskWorld, monkeypatch: pytest.MonkeyPatch, told: Callable[[TaskWorld], bool]
) -> None:
    assert ckpt.run(["save", "--state", "1"]) == 0
    sealed, number = world.path("ckpt", ".leftover-new-4711"), world.path("ckpt", "00000001")
    number.rename(sealed)
    listening = DurableImage(Path(world.dir).parent.parent, monkeypatch)
    sealed.rename(number)  # and SIGKILL
    assert told(world)
    listening.cut()
    assert world.newest().seq == 1
    listening.close()


def test_an_author_who_cancels_all_tasks_does_not_hang_in_the_next_record(tmp_path: Path) -> None:
    async def function(ctx: ResumableContext) -> object:
        first = asyncio.create_task(ctx.set_intermediate_result("a", 1))
        await asyncio.sleep(0)  # it has asked for a flush, which has not begun
        for one in asyncio.all_tasks() - {asyncio.current_task(), first}:
            one.cancel()
        await first
        await ctx.set_intermediate_result("b", 2)
        return [ctx.get_intermediate_result(key) for key in "ab"]

    assert run_local(function, tmp_path / "t") == [1, 2]
