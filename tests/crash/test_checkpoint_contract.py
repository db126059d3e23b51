"""kill -9 at random moments of saving and recording: what was answered stays, nothing is half."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from ckptd.storage import blobs, facts
from tests.task_world import CKPT, TaskWorld
from tests.waiting import let_pass, until

SAVER = """
import itertools, os, sys
from ckptd.sdk.save import save
files = [os.path.join(sys.argv[1], name) for name in ("a", "b")]
for n in itertools.count(int(sys.argv[2])):
    for path in files:
        with open(path, "w") as file:
            file.write(f"{n}\\n" * 20_000)
    saved = save(os.environ["CKPTD_DIR"], files, {"attempt": int(os.environ["CKPTD_ATTEMPT"])})
    print(n, saved.seq, flush=True)
"""


@pytest.fixture
def world(tmp_path: Path) -> TaskWorld:
    return TaskWorld(tmp_path)


def kill_at_a_random_moment(process: subprocess.Popen[str], *, answers: bool) -> str:
    """Kill it somewhere, after its first answer or at its start; return what it had answered."""
    assert process.stdout is not None
    first = process.stdout.readline() if answers else ""
    let_pass(random.uniform(0, 0.02) if answers else random.uniform(0.02, 0.06))
    process.kill()
    rest = process.stdout.read()
    process.wait()
    return first + rest[: rest.rfind("\n") + 1]


def test_killed_while_saving_the_newest_is_whole_and_no_older_than_answered(
    world: TaskWorld, tmp_path: Path, rounds: int
) -> None:
    n = 1
    for _ in range(rounds):
        command = [sys.executable, "-c", SAVER, str(tmp_path), str(n)]
        with subprocess.Popen(
            command, env=world.environ(), stdout=subprocess.PIPE, text=True
        ) as process:
            answered = kill_at_a_random_moment(process, answers=True).splitlines()
        world.begin()

        found = world.newest()

        answered_n, answered_seq = map(int, answered[-1].split())
        assert found.warning == found.problem == ""
        assert found.seq >= answered_seq
        texts = {Path(found.path, name).read_text() for name in ("a", "b")}
        assert len(texts) == 1, "files of two saves in one checkpoint"
        n = int(texts.pop().split()[0])
        assert answered_n <= n <= answered_n + 1
        blobs.prune(world.dir, world.uid)
        names = os.listdir(world.path("ckpt"))
        assert len(names) <= 2, f"leftovers: {names}"


def test_killed_pipe_has_recorded_what_it_answered_and_nothing_out_of_order(
    world: TaskWorld, rounds: int
) -> None:
    next_item = 0
    for _ in range(rounds):
        keys = [str(n) for n in range(next_item, next_item + 400)]
        requests = [{"op": "item", "key": key, "status": "pass"} for key in keys]
        with subprocess.Popen(
            [*CKPT, "pipe"],
            env=world.environ(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            feed(process, [json.dumps(one) + "\n" for one in requests])
            answered = kill_at_a_random_moment(process, answers=False).count('"ok":true')

        found = world.facts()

        assert not found.problem
        assert list(found.items) == [str(n) for n in range(len(found.items))]
        assert len(found.items) >= next_item + answered
        next_item = len(found.items)
        world.begin()


def feed(process: subprocess.Popen[str], lines: list[str]) -> None:
    """Write without waiting for answers; the process may be killed before it has read all."""
    assert process.stdin is not None
    os.set_blocking(process.stdin.fileno(), False)
    sent = "".join(lines).encode()
    assert os.write(process.stdin.fileno(), sent) == len(sent), "a pipe takes 64 KiB"


def test_killed_steps_of_a_script_are_never_skipped_and_repeated_at_most_once(
    world: TaskWorld, rounds: int
) -> None:
    log = world.path("ran")
    script = "".join(
        f"{' '.join(map(quoted, CKPT))} step s{n} -- sh -c 'echo s{n} >> {log}' || exit\n"
        for n in range(4)
    )
    kills = 0
    for _ in range(rounds):
        process = subprocess.Popen(["sh", "-c", script], env=world.environ(), process_group=0)
        let_pass(random.uniform(0, 0.3))
        os.killpg(process.pid, 9)
        kills += process.wait() != 0
        world.begin()
    assert subprocess.run(["sh", "-c", script], env=world.environ(), check=False).returncode == 0

    ran = log.read_text().split()
    assert sorted(set(ran)) == ["s0", "s1", "s2", "s3"]
    assert ran == sorted(ran), "a step ran again after a later one had been reached"
    assert len(ran) <= 4 + kills


def quoted(word: str) -> str:
    return f"'{word}'"


def test_sealing_beside_a_task_that_publishes_and_deletes_never_fails(
    world: TaskWorld,
) -> None:
    script = (
        'n=0; while [ $n -lt 300 ]; do n=$((n+1)); echo $n > "$CKPTD_DIR/stage/a"; '
        'mv "$CKPTD_DIR/stage" "$CKPTD_DIR/ckpt/$n"; mkdir "$CKPTD_DIR/stage"; '
        'rm -rf "$CKPTD_DIR/ckpt/$((n-3))"; done'
    )
    process = subprocess.Popen(["sh", "-c", script], env=world.environ())

    def sealed_until_the_end() -> bool:
        is_over = process.poll() is not None
        warnings = [text for text in world.seal() if text]
        assert all("removed" in text or "No such file" in text for text in warnings)
        return is_over

    until(sealed_until_the_end, timeout_s=50, every_s=0)

    found = world.newest()
    assert found.seq == 300
    assert Path(found.path, "a").read_text() == "300\n"


def test_two_savers_at_once_both_get_their_checkpoint(world: TaskWorld, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x" * 100_000)
    savers = [
        subprocess.Popen(
            [*CKPT, "save", str(tmp_path / "f")],
            env=world.environ(),
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]

    numbers = sorted(int(saver.communicate(timeout=30)[0]) for saver in savers)

    assert numbers == [1, 2, 3, 4]
    assert world.newest().seq == 4


def test_many_writers_of_one_journal_lose_nothing(world: TaskWorld) -> None:
    writers = [
        subprocess.Popen([*CKPT, "item", str(n), "pass"], env=world.environ()) for n in range(12)
    ]
    assert [writer.wait(timeout=30) for writer in writers] == [0] * 12

    assert sorted(map(int, world.facts().items)) == list(range(12))


def test_a_record_torn_by_a_full_disk_leaves_the_journal_writable(world: TaskWorld) -> None:
    world.record(facts.step_done("a"))
    path = world.journal_path()
    whole = path.read_bytes()
    world.record(facts.step_done("b"))
    frame = path.read_bytes()[len(whole) :]

    for kept in range(len(frame) - 8):  # up to where nothing but padding is missing
        path.write_bytes(whole + frame[:kept] + bytes(64 if kept % 2 else 0))
        assert list(world.facts().steps) == ["a"]
        world.record(facts.step_done("c"))
        assert list(world.facts().steps) == ["a", "c"]
        assert path.stat().st_size == len(whole) + len(frame), "nothing torn is left behind"
