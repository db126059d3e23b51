"""Damage that a hostile review found in the SDK, one test each; the name says what was lost."""

import multiprocessing
import os
from pathlib import Path
from typing import Any

from ckptd.sdk import SyncResumableContext, run_local
from ckptd.storage.facts import read_facts

FORK = multiprocessing.get_context("fork")


def values_on_disk(directory: Path) -> dict[str, Any]:
    return read_facts(str(directory), 0, os.getuid(), 99).values


# --- two processes of one attempt ----------------------------------------------------------------


def test_forked_children_that_record_beside_their_parent_damage_no_journal(tmp_path: Path) -> None:
    def function(ctx: SyncResumableContext) -> list[int | None]:
        ctx.step("opens the journal", os.getpid)

        def record(of: int) -> None:
            for serial in range(60):
                ctx.set_intermediate_result(f"{of}-{serial}", serial)

        children = [FORK.Process(target=record, args=(of,)) for of in (1, 2)]
        for child in children:
            child.start()
        record(0)
        for child in children:
            child.join(20)
        return [child.exitcode for child in children]

    assert run_local(function, tmp_path / "t") == [0, 0]

    told = {f"{of}-{serial}" for of in range(3) for serial in range(60)}
    assert told - set(values_on_disk(tmp_path / "t")) == set()


def test_forked_children_agree_on_idempotency_keys_with_later_attempts(tmp_path: Path) -> None:
    def function(ctx: SyncResumableContext) -> list[str]:
        ours, theirs = FORK.Pipe()

        def ask() -> None:
            theirs.send(ctx.idempotency_key("pay"))

        children = [FORK.Process(target=ask) for _ in range(3)]
        for child in children:
            child.start()
            child.join(20)
        keys = {ours.recv() for _ in children} | {ctx.idempotency_key("pay")}
        if ctx.attempt == 1:
            (tmp_path / "keys").write_text("\n".join(keys))
            raise ZeroDivisionError
        return sorted(keys)

    try:
        run_local(function, tmp_path / "t")
    except ZeroDivisionError:
        before = (tmp_path / "keys").read_text().splitlines()
    assert run_local(function, tmp_path / "t") == before
