"""From a damaged log back to a daemon that starts: what a salvage loses is said and held."""

from pathlib import Path

import pytest

from ckptd.core.decide import Case, decide
from ckptd.core.policy import Caller, Now, Policy
from ckptd.core.records import AnyRecord, DaemonStarted, GroupChanged, Phase
from ckptd.daemon import offline_wal
from ckptd.daemon.engine import Engine
from ckptd.daemon.recovery import Replayed, replay
from ckptd.daemon.sweep import set_aside
from ckptd.protocol import messages as m
from ckptd.storage.disk import RealDisk
from ckptd.storage.store import Store

ROOT = Caller(0, 0, admin=True)


def open_engine(state: Path) -> tuple[Store, Engine, Replayed]:
    store = Store.open(str(state))
    found = store.recover()
    replayed = replay(found.chunks(), found.frames())
    epoch = max(found.epoch, replayed.state.epoch) + 1
    engine = Engine(replayed.state, store.arm(found, epoch=epoch, boot_id="b", at_ns=1), Policy())
    begin: list[AnyRecord] = [DaemonStarted(1, epoch, "b", "0", 1, clean=True)]
    engine.stage(begin + replayed.holds(1))
    engine.commit()
    return store, engine, replayed


def submit(engine: Engine, name: str) -> int:
    command = m.Submit((m.TaskSpec((name,)),))
    records, answer = decide(Case(engine.state, ROOT, Now(5), Policy()), command)
    engine.admit(records, is_small=False)
    engine.commit()
    assert isinstance(answer, m.Submitted)
    return answer.ids[0]


def damage(state: Path, word: bytes) -> None:
    """Flip one bit inside the record that holds a word."""
    (segment,) = [path for path in (state / "wal").glob("*-*.wal") if word in path.read_bytes()]
    data = bytearray(segment.read_bytes())
    data[data.index(word)] ^= 1
    segment.write_bytes(data)


def test_a_salvaged_log_starts_the_daemon_and_gives_no_lost_id_again(tmp_path: Path) -> None:
    state = tmp_path / "state"
    store, engine, _ = open_engine(state)
    first = submit(engine, "before-the-damage")
    lost = submit(engine, "in-the-damage-lost")
    last = submit(engine, "behind-the-damage")
    engine.wal.mark_idle()
    store.close()
    damage(state, b"in-the-damage-lost")

    assert offline_wal.main(["verify", "--state", str(state)]) == 65
    assert offline_wal.main(["salvage", "--state", str(state)]) == 0
    store, engine, replayed = open_engine(state)

    assert replayed.lost == 1
    kept = {task.id: task.phase for task in engine.state.tasks.ascending(0)}
    assert kept == {first: Phase.HELD, last: Phase.QUEUED}
    assert submit(engine, "new") > max(last, lost)
    store.close()


def test_a_lost_record_takes_no_healthy_task_behind_it_with_it(tmp_path: Path) -> None:
    state = tmp_path / "state"
    store, engine, _ = open_engine(state)
    first = submit(engine, "before")
    lost: list[AnyRecord] = [GroupChanged(f"lost-in-the-damage-{n}", 1, False) for n in range(5)]
    engine.stage(lost)
    engine.commit()
    second = submit(engine, "behind")
    engine.wal.mark_idle()
    store.close()
    damage(state, b"lost-in-the-damage-3")
    offline_wal.main(["salvage", "--state", str(state)])

    store, engine, replayed = open_engine(state)
    assert replayed.lost == 5
    assert [task.id for task in engine.state.tasks.ascending(0)] == [first, second]
    store.close()


def test_salvaging_a_healthy_log_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    store, engine, _ = open_engine(state)
    submit(engine, "healthy")
    engine.wal.mark_idle(closed=True)
    store.close()
    before = {path.name: path.read_bytes() for path in (state / "wal").iterdir()}
    assert offline_wal.main(["salvage", "--state", str(state)]) == 0
    assert "nothing was changed" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (state / "wal").iterdir()} == before


def test_files_of_a_lost_task_are_set_aside_and_not_swept(tmp_path: Path) -> None:
    state = tmp_path / "state"
    store, engine, _ = open_engine(state)
    number = submit(engine, "known")
    for name in (number, number + 1):
        (state / "tasks" / str(name)).mkdir(parents=True)
    assert set_aside(engine.state, str(state), RealDisk()) == 1
    assert (state / "tasks" / str(number)).is_dir()
    assert (state / "quarantine" / f"tasks-{number + 1}").is_dir()
    store.close()


def test_what_a_person_released_after_a_salvage_is_not_held_again(tmp_path: Path) -> None:
    state = tmp_path / "state"
    store, engine, _ = open_engine(state)
    number = submit(engine, "before-the-damage")
    submit(engine, "in-the-damage-lost")
    submit(engine, "behind-the-damage")
    engine.wal.mark_idle()
    store.close()
    damage(state, b"in-the-damage-lost")
    offline_wal.main(["salvage", "--state", str(state)])

    store, engine, _ = open_engine(state)
    case = Case(engine.state, ROOT, Now(5), Policy())
    engine.stage(decide(case, m.Release(m.Selector(ids=(number,))))[0])
    engine.commit()
    store.close()
    store, engine, _ = open_engine(state)
    task = engine.state.tasks.get(number)
    assert task is not None
    assert task.phase is Phase.QUEUED
    store.close()
