"""From the words of `batch submit` to name and spec: no process, no file."""

from typing import Any

import pytest

from ckptctl import batch_spec, cli
from ckptctl.table import VERBS
from ckptd.protocol import limits
from ckptd.protocol.errors import BadRequest


def batch(*words: str, has_stdin: bool = False) -> tuple[str, dict[str, Any]]:
    args, _ = cli.parse(VERBS["batch submit"], [], list(words))
    return batch_spec.batch_of(args, has_stdin=has_stdin)


def test_the_same_line_is_the_same_batch_whatever_the_items_and_the_pace_are() -> None:
    name, _ = batch("gzip", "-k", ":::", "a", "b")
    assert name.startswith("gzip-")
    assert batch("-j", "9", "--rate", "5/s", "gzip", "-k", ":::", "c")[0] == name
    assert batch("gzip", ":::", "a", "b")[0] != name
    assert batch("-d", "/elsewhere", "gzip", "-k", ":::", "a")[0] != name
    assert batch("-i", "list", "gzip", "-k")[0] not in (name, batch("-i", "other", "gzip", "-k")[0])
    assert batch("-n", "mine", "gzip", ":::", "a")[0] == "mine"


@pytest.mark.parametrize(
    ("words", "source"),
    [(["true", ":::", "a", "--", "b"],
      {"from": "lines", "lines": ["a", "--", "b"], "format": "lines"}),
     (["-i", "/x/y.csv", "true"], {"from": "file", "path": "/x/y.csv", "format": "csv"}),
     (["-i", "/x/y.ndjson", "--item-key", "id", "true"],
      {"from": "file", "path": "/x/y.ndjson", "format": "jsonl", "key": "id"}),
     (["-i", "-", "--format", "null", "true"], {"from": "stdin", "format": "null"}),
     (["true"], {"from": "stdin", "format": "lines"}),
     (["--items-from", "ls | head", "true"],
      {"from": "command", "argv": ["/bin/sh", "-c", "ls | head"], "format": "lines"})],
)  # fmt: skip
def test_items_come_from_one_place(words: list[str], source: dict[str, Any]) -> None:
    assert batch(*words, has_stdin=True)[1]["items"] == source


@pytest.mark.parametrize(
    ("words", "text"),
    [(["-i", "x", "true", ":::", "a"], "not from --items and :::"),
     (["true", ":::", "a", "--wait"], "--wait stands behind :::"),
     (["true"], "no items"), (["-i", "x"], "no command, and no --python"),
     (["-i", "x", "--python", "a:b", "true"], "not both"),
     (["-i", "x", "--python", "work.py"], "not module:function"),
     (["-i", "x", "--mode", "threads", "true"], "for functions"),
     (["-i", "x", "--on-exit", "3=skiped", "true"], "not an exit map"),
     (["-i", "x", "--on-exit", "300=fail", "true"], "not an exit map"),
     (["-i", "x", "--rate", "fast", "true"], "not a rate"),
     (["-i", "x", "--max-errors", "101%", "true"], "--max-errors"),
     (["-i", "x", "-j", "0", "true"], "--jobs"), (["-i", "x", "-n", "a/b", "true"], "not a name"),
     (["-i", "x", "--item-timeout", "soon", "true"], "not a duration"),
     (["-i", "x", "--preflight", "sh -c '", "true"], "--preflight")],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_in_words(words: list[str], text: str) -> None:
    with pytest.raises(BadRequest) as caught:
        batch(*words)
    assert text in caught.value.message


def test_a_line_says_all_of_it_what_it_leaves_out_is_as_usual() -> None:
    _, made = batch("-i", "x", "true")
    assert (made["jobs"], made["limit"], made["timeout_s"], made["on_exit"]) == (0, 0, 0.0, {})
    _, made = batch("-i", "x", "-j", "4", "--retries", "2", "--timeout", "90s", "--on-exit",
                    "3=skipped,7-8=transient", "--preflight", "up | grep -q y", "true")  # fmt: skip
    assert (made["jobs"], made["retries"], made["timeout_s"]) == (4, 2, 90.0)
    assert made["on_exit"] == {"3": "skipped", "7": "transient", "8": "transient"}
    assert made["preflight"] == ["/bin/sh", "-c", "up | grep -q y"]


def test_which_items_run_this_time_is_told_to_prepare() -> None:
    args, _ = cli.parse(
        VERBS["batch retry"], [],
        ["nightly", "--errors", "--status", "skipped", "--only=--odd", "--fresh"],
    )  # fmt: skip
    assert batch_spec.selection_words(args) == [
        "--fresh", "--retry-errors", "--retry-status=skipped", "--only=--odd",
    ]  # fmt: skip


def test_the_task_of_a_batch_knows_what_its_runner_s_exit_codes_mean() -> None:
    args, _ = cli.parse(
        VERBS["batch submit"], [], ["-g", "nightly", "--memory", "1G", "-l", "team=x", "true"]
    )
    task = batch_spec.task_of(args, "census", "batch:census:1", ["python", "run", "/d"], "/tmp")
    assert (task.name, task.key, task.group) == ("batch:census", "batch:census:1", "nightly")
    assert task.labels == {"team": "x", "batch": "census"}
    assert task.on_exit == {"1": "fail", "2": "transient", "130": "fail"}
    assert task.retries == limits.RETRIES_UNLIMITED
    assert (task.memory_bytes, task.cwd) == (1 << 30, "/tmp")
