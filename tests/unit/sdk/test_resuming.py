"""Versions, migrations, damage: gone on from, or refused with a reason."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ckptd.sdk import (
    CorruptCheckpointError,
    StateVersionError,
    SyncResumableContext,
    Time,
    TransientError,
    run_local,
    task,
)
from ckptd.sdk.declare import RetryPolicy, Task, as_task
from ckptd.sdk.save import Saved, Saving
from ckptd.sdk.work import Ports
from ckptd.storage.blobs import generations, mark, this_boot_id
from ckptd.storage.facts import (
    SECRET,
    Facts,
    read_facts,
    result_made,
    set_value,
    step_done,
    step_reset,
)
from ckptd.storage.manifest import Manifest


def saved_by(version: int, path: Path, **state: Any) -> None:
    """Leave state that this version saved before it crashed."""

    @task(version=version)
    def old(ctx: SyncResumableContext) -> None:
        ctx.state = state
        ctx.checkpoint()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_local(old, path)


def asked(path: Path, attempt: int) -> tuple[str, str]:
    """Return the problem that the daemon would see, and what it is about."""
    found = mark(str(path), attempt, os.getuid(), this_boot_id())
    return found.problem, found.why


def bytes_below(path: Path) -> dict[str, bytes]:
    return {str(one): one.read_bytes() for one in path.rglob("*") if one.is_file()}


def state_of(ctx: SyncResumableContext) -> Any:
    return dict(ctx.state)


def version(number: int, **migrations: Callable[[Any], Any]) -> Task:
    made: Task = task(version=number)(state_of)
    for name, function in migrations.items():
        made.migrate(from_=int(name[1:]))(function)
    return made


def test_the_same_version_loads_and_a_first_start_has_none(tmp_path: Path) -> None:
    assert run_local(version(1), tmp_path / "new") == {}
    saved_by(2, tmp_path / "t", n=1)
    assert run_local(version(2), tmp_path / "t") == {"n": 1}


def test_a_lower_version_is_migrated_in_a_chain_and_saved_once_with_its_provenance(
    tmp_path: Path,
) -> None:
    saved_by(1, tmp_path / "t", n=1)
    made = version(3, v1=lambda s: {**s, "two": 2}, v2=lambda s: {**s, "three": s["n"] + 2})

    assert run_local(made, tmp_path / "t") == {"n": 1, "two": 2, "three": 3}

    newest, before = generations(str(tmp_path / "t"), os.getuid(), verify=True)
    assert newest.manifest["provenance"] == {"migrated_from": 1, "of": before.seq}
    assert newest.manifest["state_version"] == 3
    assert before.manifest["state"] == {"n": 1}, "what was saved is untouched"


def fails(state: Any) -> Any:
    state["n"] = "spoilt"
    raise KeyError("gone")


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (version(3, v2=lambda s: s), "no migration from 1"),
        (version(2, v1=fails), "the migration of state_of from 1 failed: KeyError"),
    ],
)
def test_what_cannot_be_migrated_blocks_the_task_and_stays_untouched(
    tmp_path: Path, made: Task, told: str
) -> None:
    saved_by(1, tmp_path / "t", n=1)
    before = bytes_below(tmp_path / "t" / "ckpt")

    with pytest.raises(StateVersionError, match=told):
        run_local(made, tmp_path / "t")

    assert bytes_below(tmp_path / "t" / "ckpt") == before
    problem, why = asked(tmp_path / "t", 2)
    assert told in problem
    assert why == "version"
    mended = version(2, v1=lambda s: {**s, "is_mended": True})
    assert run_local(mended, tmp_path / "t") == {"n": 1, "is_mended": True}


def test_a_higher_version_blocks_the_task(tmp_path: Path) -> None:
    saved_by(5, tmp_path / "t", n=1)

    with pytest.raises(StateVersionError, match="saved by version 5, this code has version 2"):
        run_local(version(2), tmp_path / "t")

    assert asked(tmp_path / "t", 2)[1] == "version"
    assert run_local(version(5), tmp_path / "t") == {"n": 1}, "the newer code goes on"


class Shape(msgspec.Struct):
    n: int = 0


class Needy(msgspec.Struct):
    n: int


def test_a_state_that_does_not_fit_its_schema_blocks_the_task(tmp_path: Path) -> None:
    saved_by(1, tmp_path / "t", n="a text")
    made = task(state_schema=Shape)(lambda ctx: ctx.state.n)

    with pytest.raises(StateVersionError, match="does not fit Shape"):
        run_local(made, tmp_path / "t")

    assert asked(tmp_path / "t", 2)[1] == "version"


def test_a_schema_that_cannot_be_empty_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(StateVersionError, match="give each field of a state schema a default"):
        run_local(task(state_schema=Needy)(lambda ctx: 1), tmp_path / "t")


def spoil(path: Path, seq: int) -> None:
    manifest = path / "ckpt" / f"{seq:08d}" / "MANIFEST.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"n"', b'"m"'))


def save_twice(path: Path) -> None:
    def twice(ctx: SyncResumableContext) -> None:
        for number in (1, 2):
            ctx.state["n"] = number
            ctx.checkpoint()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_local(twice, path)


def test_a_corrupt_newest_checkpoint_falls_back_to_the_one_before_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_twice(tmp_path / "t")
    spoil(tmp_path / "t", 2)

    assert run_local(state_of, tmp_path / "t") == {"n": 1}

    assert "checkpoint 2 is damaged" in capsys.readouterr().err
    assert (tmp_path / "t" / "ckpt" / "00000002.damaged").is_dir(), "kept for inspection"


def test_where_no_checkpoint_is_valid_nothing_starts_and_fresh_archives(tmp_path: Path) -> None:
    save_twice(tmp_path / "t")
    spoil(tmp_path / "t", 1)
    spoil(tmp_path / "t", 2)

    with pytest.raises(CorruptCheckpointError, match="no valid checkpoint is left"):
        run_local(state_of, tmp_path / "t")

    assert run_local(state_of, tmp_path / "t", fresh=True) == {}
    assert len(list((tmp_path / "t" / "archive").rglob("MANIFEST.json"))) == 2


def test_a_damaged_journal_is_refused_not_taken_for_empty(tmp_path: Path) -> None:
    def records(ctx: SyncResumableContext) -> None:
        for number in range(5):
            ctx.set_intermediate_result(f"{number}", number)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_local(records, tmp_path / "t")
    journal = tmp_path / "t" / "journal" / "000001.j"
    data = bytearray(journal.read_bytes())
    data[60] ^= 0xFF
    journal.write_bytes(data)

    with pytest.raises(CorruptCheckpointError, match="the journal does not check"):
        run_local(records, tmp_path / "t")


def test_files_of_a_checkpoint_are_carried_on_until_they_are_dropped(tmp_path: Path) -> None:
    def function(ctx: SyncResumableContext) -> list[list[str]]:
        seen = []
        for name in ("a", "sub/b"):
            Path(ctx.file(name)).write_text(name)
        ctx.checkpoint()
        Path(ctx.file("a")).write_text("anew")
        ctx.checkpoint()
        seen.append(ctx.files())
        ctx.drop_file("sub/b")
        ctx.checkpoint()
        seen.append(ctx.files())
        saved = ctx.saved_file("a")
        assert saved is not None
        assert Path(saved).read_text() == "anew"
        return seen

    assert run_local(function, tmp_path / "t") == [["a", "sub/b"], ["a"]]


@pytest.mark.parametrize("name", ["", "../x", "a//b", "/etc/x", "MANIFEST.json", "a/./b"])
def test_a_file_outside_of_the_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be a file's name"):
        run_local(lambda ctx: ctx.file(name), tmp_path / "t")


@pytest.mark.parametrize("number", [0, -1, 1 << 31, "2", 1.5])
def test_a_version_that_is_none_is_refused(number: Any) -> None:
    with pytest.raises(ValueError, match="expected a whole number from 1"):
        Task(state_of, version=number)


def test_declarations_are_checked() -> None:
    made = version(3, v1=lambda s: s)
    for from_ in (0, 1, 3):
        with pytest.raises(ValueError, match="cannot register a migration"):
            made.migrate(from_=from_)
    with pytest.raises(ValueError, match="printable"):
        Task(state_of, name="a\nb")
    with pytest.raises(TypeError, match="is no function"):
        as_task(7)
    with pytest.raises(ValueError, match="max_failures is 0"):
        Task(state_of, retry=RetryPolicy(max_failures=0))
    assert [RetryPolicy(backoff=1).delay_s(n) for n in (1, 2, 3, 50)] == [1, 2, 4, 900]


def test_idempotency_keys_are_the_same_in_every_attempt(tmp_path: Path) -> None:
    told: list[list[str]] = []

    def function(ctx: SyncResumableContext) -> None:
        told.append([ctx.idempotency_key("a"), ctx.idempotency_key("a", "1")])
        if ctx.attempt < 3:
            raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            run_local(function, tmp_path / "t")
    run_local(function, tmp_path / "t")

    assert told[0] == told[1] == told[2]
    assert len(set(told[0])) == 2
    run_local(lambda ctx: told.append([ctx.idempotency_key("a")]), tmp_path / "other")
    assert told[3][0] not in told[0]


def test_a_result_of_work_of_which_a_step_is_to_be_done_anew_is_none_any_more() -> None:
    known = Facts()
    for fact in (step_done("fetch", 1, 1), result_made(7), step_reset("fetch")):
        known.take(1, fact)
    assert (known.steps, known.result) == ({}, {})


def test_of_two_processes_that_made_a_secret_for_keys_the_first_is_right_for_ever() -> None:
    known = Facts()
    for secret in ("first", "second"):
        known.take(1, set_value(SECRET, secret))
    assert known.values[SECRET] == "first", "keys made with it are out there"


def test_a_result_is_remembered_and_fresh_archives_it(tmp_path: Path) -> None:
    calls: list[int] = []

    def function(ctx: SyncResumableContext, n: int) -> int:
        calls.append(n)
        return n

    assert [run_local(function, tmp_path / "t", n=1) for _ in range(2)] == [1, 1]
    assert calls == [1]
    with pytest.raises(ValueError, match="not with the input that is given now"):
        run_local(function, tmp_path / "t", n=2)
    assert run_local(function, tmp_path / "t", fresh=True, n=2) == 2
    assert read_facts(str(tmp_path / "t"), 0, os.getuid(), 99).result["value"] == 2


def test_state_that_a_failed_save_did_not_keep_is_saved_by_the_next(tmp_path: Path) -> None:
    place = tmp_path / "t"

    class Full:
        failures = 1

        def save(self, saving: Saving, header: Manifest) -> Saved:
            if self.failures:
                self.failures -= 1
                raise OSError(errno.ENOSPC, "no space left")
            return Ports().save(saving, header)

    @task(strategy=Time(1e-9))
    def function(ctx: SyncResumableContext) -> list[int]:
        ctx.state["n"] = 1
        with pytest.raises(TransientError):
            ctx.checkpoint()
        ctx.checkpoint_if_needed()
        return [
            one.manifest["state"]["n"] for one in generations(str(place), os.getuid(), verify=True)
        ]

    assert run_local(function, place, ports=Ports(save=Full().save)) == [1]
