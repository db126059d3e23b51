"""Journals under anything: two writers in turn, kills, power cuts that keep any sector or none."""

import os
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.storage import facts, frame
from ckptd.storage.journal import Journal
from tests.task_world import TASK, TaskWorld

SECTOR_BYTES = 512
SEED = frame.crc32(b"ckptd journal 12.1")

acts = st.one_of(
    st.tuples(st.just("append"), st.sampled_from((0, 1)), st.integers(1, 40)),
    st.tuples(st.just("ride"), st.sampled_from((0, 1)), st.integers(1, 5)),
    st.tuples(st.sampled_from(("close", "kill")), st.sampled_from((0, 1)), st.just(0)),
    st.tuples(st.just("power cut"), st.just(0), st.integers(0, 1 << 30)),
)


class Model:
    """What was written, what of it is durable, and where the durable part of the file ends."""

    def __init__(self, world: TaskWorld) -> None:
        self.world = world
        self.writers: dict[int, Journal] = {}
        self.written: list[str] = []
        self.ends: list[int] = []  # of the frames of `written`
        self.durable_bytes = 0

    def writer(self, who: int) -> Journal:
        if who not in self.writers:
            self.writers[who] = Journal(self.world.dir, TASK, self.world.attempt, 1)
        return self.writers[who]

    def append(self, who: int, *, is_synced: bool) -> None:
        key = str(len(self.written))
        journal = self.writer(who)
        journal.append([facts.item_done(key, "pass", "x" * (len(key) * 37))], is_synced=is_synced)
        self.written.append(key)
        self.ends.append(journal._end_bytes)
        if is_synced:
            assert journal._synced_bytes == journal._end_bytes
        # Who takes in what others wrote syncs it, also when its own facts ride.
        self.durable_bytes = max(self.durable_bytes, journal._synced_bytes)

    def promised(self) -> int:
        """Return how many items the last frame says had been synced before it."""
        path = self.world.journal_path()
        data = memoryview(path.read_bytes() if path.exists() else b"")
        heads = [head for _, head in frame.find_later(data, 0, SEED)]
        return max(0, heads[-1].durable_lsn - 1) if heads else 0  # fact 1 opens the file

    def end(self, who: int, *, is_killed: bool) -> None:
        journal = self.writers.pop(who, None)
        if journal is not None and is_killed:
            os.close(journal._fd)
            os.close(journal._task_fd)
        elif journal is not None:
            journal.close()

    def cut_power(self, choice: int) -> None:
        """Keep each sector behind the durable part, or zero it; maybe lose the file's length."""
        for who in (0, 1):
            self.end(who, is_killed=True)
        path = self.world.journal_path()
        if not path.exists():
            return
        data = bytearray(path.read_bytes())
        for sector in range(self.durable_bytes // SECTOR_BYTES, len(data) // SECTOR_BYTES + 1):
            begin = max(sector * SECTOR_BYTES, self.durable_bytes)
            end = min((sector + 1) * SECTOR_BYTES, len(data))
            if choice >> sector % 29 & 1 and begin < end:
                data[begin:end] = bytes(end - begin)
        if choice & 1:
            left_bytes = len(data) - self.durable_bytes
            data = data[: self.durable_bytes + choice % (left_bytes + 1)]
        path.write_bytes(data)
        kept = self.found()
        assert len(kept) >= sum(end <= self.durable_bytes for end in self.ends)
        assert kept == self.written[: len(kept)]
        self.written, self.ends = kept, self.ends[: len(kept)]

    def found(self) -> list[str]:
        return list(self.world.facts().items)


@settings(max_examples=60)
@given(st.lists(acts, max_size=25))
def test_what_was_acknowledged_is_there_in_order_whatever_dies(
    steps: list[tuple[str, int, int]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = Model(TaskWorld(Path(folder)))
        for what, who, count in steps:
            match what:
                case "append" | "ride":
                    for _ in range(count):
                        model.append(who, is_synced=what == "append")
                case "power cut":
                    model.cut_power(count)
                case _:
                    model.end(who, is_killed=what == "kill")
            assert model.found() == model.written
            assert model.promised() <= sum(end <= model.durable_bytes for end in model.ends)
        for who in (0, 1):
            model.end(who, is_killed=False)
        assert model.found() == model.written
