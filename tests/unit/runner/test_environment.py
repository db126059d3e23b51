"""What a task finds in its environment and its argument words."""

from typing import Any

import pytest

from ckptd.core.port import Start
from ckptd.runner.environment import Place, environment, expand, order
from ckptd.storage.blobs import Found

PLACE = Place("/state/tasks/7", "/state/output/7.log", "/run/notify/7.sock")
FOUND = Found(4, "/state/tasks/7/ckpt/00000004", 1)
NONE = Found()


def started(*argv: str, **fields: Any) -> Start:
    given: dict[str, Any] = {
        "env": {"PATH": "/bin"}, "cwd": "/", "uid": 1, "gid": 1, "stdin": "", "umask": 0,
        "memory_bytes": 0, "epoch": 3, "deadline_ns": 0, "fresh": False, **fields,
    }  # fmt: skip
    return Start(task=7, attempt=2, argv=argv, **given)


@pytest.mark.parametrize(
    ("argv", "resuming", "fresh"),
    [
        (("a", "b"), ("a", "b"), ("a", "b")),
        (("a", "{resume:--from {last}}"), ("a", "--from", FOUND.path), ("a",)),
        (("a", "{resume:}", "b"), ("a", "b"), ("a", "b")),
        (("a", "{resume:-d '{dir}/x y'}"), ("a", "-d", "/state/tasks/7/x y"), ("a",)),
        (("a", "x{resume:b}"), ("a", "x{resume:b}"), ("a", "x{resume:b}")),
        (("a", "{resume:b", "}"), ("a", "{resume:b", "}"), ("a", "{resume:b", "}")),
        (("a", "{last}"), ("a", "{last}"), ("a", "{last}")),
    ],
)
def test_the_placeholder_is_spelt_out_or_vanishes_as_a_whole(
    argv: tuple[str, ...], resuming: tuple[str, ...], fresh: tuple[str, ...]
) -> None:
    assert expand(argv, FOUND, PLACE.directory) == resuming
    assert expand(argv, NONE, PLACE.directory) == fresh


def test_the_contract_is_in_the_environment() -> None:
    env = environment(started("a", deadline_ns=5_500_000_000), PLACE, FOUND, "/opt/ckpt/bin")

    assert env == {
        "PATH": "/bin:/opt/ckpt/bin",
        "CKPTD_TASK_ID": "7",
        "CKPTD_ATTEMPT": "2",
        "CKPTD_EPOCH": "3",
        "CKPTD_DIR": "/state/tasks/7",
        "CKPTD_RESUME": "1",
        "CKPTD_LAST": FOUND.path,
        "CKPTD_SEQ": "4",
        "CKPTD_CONTROL": "/state/tasks/7/control.json",
        "CKPTD_JOURNAL": "/state/tasks/7/journal/000002.j",
        "CKPTD_DEADLINE": "5",
        "CKPTD_OUTPUT": "/state/output/7.log",
        "NOTIFY_SOCKET": "/run/notify/7.sock",
    }


def test_a_first_attempt_resumes_from_nothing() -> None:
    env = environment(started("a"), PLACE, NONE, None)

    assert (env["CKPTD_RESUME"], env["CKPTD_LAST"], env["CKPTD_SEQ"]) == ("0", "", "0")


def test_the_managers_variables_of_whoever_submitted_do_not_leak_in() -> None:
    leaks = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "INVOCATION_ID")
    env = environment(
        started("a", env=dict.fromkeys(leaks, "x")), PLACE._replace(notify=""), NONE, None
    )

    assert not set(leaks) & set(env)


def test_a_program_without_a_slash_is_looked_for_along_the_tasks_path() -> None:
    made = order(started("prog", env={"PATH": "/a::/b"}), PLACE, NONE, None, "reign")

    assert made.programs == (b"/a/prog", b"./prog", b"/b/prog")


@pytest.mark.parametrize(
    ("argv", "env"),
    [(("a", "{resume:'open}"), {}), (("a\0b",), {}), (("a",), {"X": "y\0z"})],
    ids=["open quote", "NUL in a word", "NUL in a variable"],
)
def test_what_execve_could_not_express_is_refused(
    argv: tuple[str, ...], env: dict[str, str]
) -> None:
    with pytest.raises(ValueError, match=r"NUL|quotation"):
        order(started(*argv, env=env), PLACE, FOUND, None, "reign")


def test_a_command_that_is_for_resuming_only_cannot_start_from_nothing() -> None:
    with pytest.raises(ValueError, match="nothing is left"):
        order(started("{resume:again}"), PLACE, NONE, None, "reign")
