"""What resuming costs a Python task: durable items, their grouping, saving, and the import.

Each figure is a ratio to a reference that took turns with it. The overhead of `automatic` is
that of two equal runs of real work, one that saves and one that cannot, in pairs.
"""

import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from bench import references
from bench.measures import Figure
from ckptd.sdk.aio import ResumableContext
from ckptd.sdk.context import SyncResumableContext
from ckptd.sdk.declare import as_task
from ckptd.sdk.local import begin, run_local
from ckptd.sdk.strategy import Automatic, Manual, Strategy
from ckptd.sdk.work import Work

ITEMS = 1_000
WORKERS = 8
REWRITTEN = 500
ROUNDS = 5
BATCHES = 2
BATCH_ITEMS = 10_000
IMPORTS = 15
PAIRS = int(os.environ.get("CKPTD_BENCH_PAIRS", "6"))
WORK_S = float(os.environ.get("CKPTD_BENCH_WORK_S", "12"))
SAVE_S = 0.05


def sdk(base: str) -> list[Figure]:
    """Measure all of it."""
    return [*_items(base), *_saving(base), *_imports()]


# --- items ---------------------------------------------------------------------------------------


def _items(base: str) -> list[Figure]:
    took: dict[str, list[float]] = {"sync": [], "one": [], "many": [], "loop": [], "sqlite": []}
    batch: dict[int, list[float]] = {1: [], WORKERS: []}
    for turn in range(ROUNDS):
        took["sync"].append(references.sync_s(Path(base)))
        took["one"].append(_recording_s(base, 1))
        took["many"].append(_recording_s(base, WORKERS))
        took["loop"].append(_awaiting_s(base))
        took["sqlite"].append(1 / references.sqlite_per_s(Path(base)))
        if turn < BATCHES:
            for jobs, some in batch.items():
                some.append(_batch_s(base, jobs))
    sync_s, one_s, many_s, loop_s, sqlite_s = (statistics.median(some) for some in took.values())
    batch_one_s, batch_many_s = (statistics.median(some) for some in batch.values())
    rewriting_s = _rewriting_s(base)
    return [
        Figure("item result, 1 worker", one_s / sync_s, "x", "<=", 1.3,
               f"{one_s * 1e6:.0f} us of {sync_s * 1e6:.0f} us for one sync"),
        Figure(f"batch, {WORKERS} workers", batch_one_s / batch_many_s, "x", ">=", 4,
               f"of one worker: {1 / batch_many_s:,.0f}/s against {1 / batch_one_s:,.0f}/s"),
        Figure(f"item results, {WORKERS} coroutines", one_s / loop_s, "x", ">=", 4,
               f"of one thread: {1 / loop_s:,.0f}/s"),
        Figure(f"item results, {WORKERS} threads", one_s / many_s, "x", ">=", 4,
               f"of one thread, in one interpreter: {1 / many_s:,.0f}/s"),
        Figure("item result, SQLite", sqlite_s / one_s, "x", ">=", 1,
               f"of ours, a row per commit in WAL, FULL: {sqlite_s * 1e6:.0f} us"),
        Figure("item result, JSON rewritten", rewriting_s / one_s, "x", ">=", 5,
               f"of ours over {REWRITTEN} items, and grows with them: {rewriting_s * 1e6:.0f} us"),
    ]  # fmt: skip


def _recording_s(base: str, workers: int) -> float:
    """Return the seconds per durable result with so many threads recording; of one, the p50."""
    took: list[float] = []

    def nothing(ctx: SyncResumableContext) -> None:
        del ctx

    with tempfile.TemporaryDirectory(dir=base) as directory:
        work = Work(begin(f"{directory}/task"), as_task(nothing), {})
        ctx = SyncResumableContext(work)
        ctx.record_item("first", "pass")  # makes the journal

        def record(worker: int) -> None:
            for number in range(ITEMS // workers):
                began = time.perf_counter()
                ctx._record_item(f"item-{worker}-{number}", "pass", {"rows": number})
                took.append(time.perf_counter() - began)

        threads = [threading.Thread(target=record, args=(worker,)) for worker in range(workers)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took_s = time.perf_counter() - began
        work.close()
    return statistics.median(took) if workers == 1 else took_s / (ITEMS // workers * workers)


def _awaiting_s(base: str) -> float:
    """Return the seconds per durable result with so many coroutines recording."""

    async def nothing(ctx: ResumableContext) -> None:
        del ctx

    with tempfile.TemporaryDirectory(dir=base) as directory:
        work = Work(begin(f"{directory}/task"), as_task(nothing), {})

        async def record(ctx: ResumableContext, worker: int) -> None:
            for number in range(ITEMS // WORKERS):
                await ctx._record_item(f"item-{worker}-{number}", "pass", {"rows": number})

        async def everybody() -> float:
            ctx = ResumableContext(work)
            await ctx.record_item("first", "pass")
            began = time.perf_counter()
            await asyncio.gather(*(record(ctx, worker) for worker in range(WORKERS)))
            return time.perf_counter() - began

        took_s = asyncio.run(everybody())
        work.close()
    return took_s / (ITEMS // WORKERS * WORKERS)


def _batch_s(base: str, jobs: int) -> float:
    """Return the seconds per item of a batch of trivial calls, as the runner counts them."""
    with tempfile.TemporaryDirectory(dir=base) as directory:
        place = Path(directory)
        (place / "trivial.py").write_text("def work(item):\n    return len(item)\n")
        (place / "items").write_text("".join(f"{number}\n" for number in range(BATCH_ITEMS)))
        words = ["batch", "run", "--name", "b", "--items", "items", "--python", "trivial:work"]
        done = subprocess.run(
            [sys.executable, "-m", "ckptctl", *words, "-j", str(jobs)],
            cwd=place,
            env={**os.environ, "CKPTD_BATCH_DIR": f"{directory}/batches"},
            capture_output=True,
            text=True,
            check=True,
        )
    took = re.search(r" in ([\d.]+) s$", done.stderr.strip())
    assert took is not None, done.stderr
    return float(took[1]) / BATCH_ITEMS


def _rewriting_s(base: str) -> float:
    """Return the seconds per result where each one rewrites, syncs and renames the whole file."""
    with tempfile.TemporaryDirectory(dir=base) as directory:
        path, results = Path(directory, "results.json"), []
        began = time.perf_counter()
        for number in range(REWRITTEN):
            results.append({"key": f"item-{number}", "status": "pass", "result": {"rows": number}})
            temporary = path.with_suffix(".tmp")
            with temporary.open("w") as file:
                json.dump(results, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        return (time.perf_counter() - began) / REWRITTEN


# --- saving --------------------------------------------------------------------------------------


def _saving(base: str) -> list[Figure]:
    """Compare equal work with and without saves of 50 ms, in pairs that take turns."""
    ratios, saves = [], 0
    for pair in range(PAIRS):
        took = {}
        order = (Automatic(), Manual()) if pair % 2 else (Manual(), Automatic())
        for strategy in order:
            took[strategy.name], made = _working_s(base, strategy)
            saves += made
        ratios.append(took["automatic"] / took["manual"])
    overhead = statistics.median(ratios) - 1
    told = ", ".join(f"{(ratio - 1) * 100:+.2f}" for ratio in sorted(ratios))
    return [
        Figure("`automatic`, save of 50 ms", overhead * 100, "%", "<=", 1,
               f"of {WORK_S:.0f} s of work, median of {PAIRS} pairs ({told}); {saves} saves"),
    ]  # fmt: skip


def _working_s(base: str, strategy: Strategy) -> tuple[float, int]:
    """Return the CPU-bound seconds that a fixed amount of work took, and how often it saved."""
    turns = int(WORK_S / _turn_s())

    def counted(ctx: SyncResumableContext) -> list[float]:
        ctx.on_checkpoint(lambda: time.sleep(SAVE_S))
        began = time.perf_counter()
        for number in range(turns):
            _turn()
            ctx.state["turn"] = number
            ctx.checkpoint_if_needed(progress=(number + 1, turns))
        return [time.perf_counter() - began, ctx._work.pace.saves]

    with tempfile.TemporaryDirectory(dir=base) as directory:
        task = as_task(counted)
        task.strategy = strategy
        took_s, saves = run_local(task, f"{directory}/task")
    return took_s, int(saves)


_measured: list[float] = []


def _turn_s() -> float:
    if not _measured:
        began = time.perf_counter()
        for _ in range(200):
            _turn()
        _measured.append((time.perf_counter() - began) / 200)
    return _measured[0]


def _turn() -> int:
    return sum(n * n for n in range(20_000))


# --- the import ----------------------------------------------------------------------------------


def _imports() -> list[Figure]:
    code = "from ckptd.sdk import SyncResumableContext, run_local, task"
    bare, with_sdk = [], []
    with tempfile.TemporaryDirectory() as cache:  # with bytecode, as an installed package has it
        env = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        _python_s(code, env)
        for _ in range(IMPORTS):
            bare.append(_python_s("", env))
            with_sdk.append(_python_s(code, env))
    more_s = statistics.median(with_sdk) - statistics.median(bare)
    return [
        Figure("import of the SDK", more_s * 1e3, "ms", "<=", 60,
               f"beyond {statistics.median(bare) * 1e3:.0f} ms of a bare interpreter"),
    ]  # fmt: skip


def _python_s(code: str, env: dict[str, str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    return time.perf_counter() - began
