"""Which tasks: from words (`7 3-9 @last key:K name:GLOB -`) and filters to a Selector.

It only reads words; what exists is the daemon's to say. Read next: `ckptd/protocol/messages.py`.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, Final

import msgspec

from ckptctl import units
from ckptctl.units import nearest
from ckptd.protocol.errors import BadRequest
from ckptd.protocol.messages import FINISHED, PHASES, Selector

ACTIVE: Final = ("starting", "running", "paused", "stopping")
PENDING: Final = ("waiting", "queued", "held")
STUCK: Final = ("quarantined", "blocked")
ENDED: Final = ("succeeded", "failed", "cancelled")
STATES: Final = {
    "active": ACTIVE,
    "pending": PENDING,
    "stuck": STUCK,
    "live": ACTIVE + PENDING,
    "ended": ENDED,
    "done": FINISHED,
    **{phase: (phase,) for phase in PHASES},
}
EXAMPLES: Final = "examples: 7 3-9 4,8 @last @~2 key:nightly name:'build*' -g batch --state failed"


class _Once(argparse.Action):
    """One value: of two groups the last alone would be acted on, without a word."""

    def __call__(
        self,
        _parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        value: Any,
        _flag: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest)
        if before not in (self.default, value):
            raise units.twice(self.option_strings[-1], before, value)
        setattr(namespace, self.dest, value)


def add_options(parser: argparse.ArgumentParser, *, many: bool = True) -> None:
    """Add the words and the filters that select tasks."""
    group = parser.add_argument_group("which tasks")
    group.add_argument(
        "tasks",
        nargs="*",
        metavar="TASK",
        help="7, 3-9, @last, @~2 (second before the last), key:K, name:GLOB, - (ids from stdin)",
    )
    if not many:
        return
    group.add_argument(
        "-g", "--group", metavar="GROUP", action=_Once, default="", help="tasks of this group"
    )
    group.add_argument(
        "-l", "--label", metavar="K=V", action="append", default=[], help="tasks with this label"
    )
    group.add_argument(
        "--state",
        metavar="S[,S]",
        action="append",
        default=[],
        help="tasks in these states; also: active, pending, stuck, live, ended",
    )
    group.add_argument("-a", "--all", action="store_true", help="every task that you may see")


def parse_states(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the phases of every `failed,active`. Raises BadRequest naming the nearest."""
    phases: list[str] = []
    for word in (word for text in texts for word in units.listed("--state", "state", text)):
        if word not in STATES:
            hint = nearest(word, STATES) or f"one of: {', '.join(STATES)}"
            raise BadRequest(f"--state: unknown state {word!r}", hint)
        phases.extend(phase for phase in STATES[word] if phase not in phases)
    return tuple(phases)


class Words(msgspec.Struct):
    """What the words name."""

    ids: list[int] = []
    ranges: list[tuple[int, int]] = []
    last: list[int] = []
    keys: list[str] = []
    names: list[str] = []


def selector(
    args: argparse.Namespace,
    existing: Callable[[int, int], list[int]],
    *,
    default_last: bool = False,
) -> Selector:
    """Return the Selector of the parsed options; `existing` tells the ids of a range.

    Without any option, it is the caller's last task where `default_last`, else a BadRequest.
    """
    words = words_of(args.tasks)
    group = getattr(args, "group", "")
    labels = units.named("--label", _labels, getattr(args, "label", []))
    phases = parse_states(getattr(args, "state", []))
    is_narrowed = bool(group or labels or phases)
    is_all = getattr(args, "all", False)
    if not (args.tasks or is_narrowed or is_all):
        if not default_last:
            raise BadRequest("which tasks? none is named", EXAMPLES)
        words.last = [0]
    elif args.tasks and words == Words():
        raise BadRequest("which tasks? stdin named none", EXAMPLES)
    for first, end in words.ranges:
        words.ids += existing(first, end)
    return Selector(
        ids=tuple(dict.fromkeys(words.ids)),
        last=tuple(words.last),
        keys=tuple(words.keys),
        names=tuple(words.names),
        all=is_all or (is_narrowed and not args.tasks),
        group=group,
        labels=labels,
        phases=phases,
    )


def _labels(words: Iterable[str]) -> dict[str, str]:
    return units.parse_pairs(words, "label")


def words_of(words: Iterable[str]) -> Words:
    """Return what the words name; `-` is replaced by what stdin says."""
    found = Words()
    for word in _with_stdin(words):
        if word == "@last":
            found.last.append(0)
        elif back := re.fullmatch(r"@~([0-9]{1,6})", word):
            found.last.append(int(back[1]))
        elif word.startswith("key:"):
            found.keys.append(_behind(word, "key"))
        elif word.startswith("name:"):
            found.names.append(_behind(word, "name"))
        else:
            _numbers(word, found)
    return found


def _behind(word: str, what: str) -> str:
    text = word.partition(":")[2]
    if not text:
        raise BadRequest(f"TASK: {word!r} names no {what}", EXAMPLES)
    return text


def _with_stdin(words: Iterable[str]) -> Iterable[str]:
    for word in words:
        if word == "-":
            yield from sys.stdin.read().split()
        else:
            yield word


def _numbers(word: str, into: Words) -> None:
    """Take in the ids of `7`, `3-9` or `1,4-6`."""
    for part in word.split(","):
        found = re.fullmatch(r"([0-9]{1,14})(?:(?:-|\.\.)([0-9]{1,14}))?", part)
        if found is None or int(found[1]) < 1:
            hint = f"for a name write name:{word}" if word.isidentifier() else EXAMPLES
            raise BadRequest(f"not a task: {units.told(word)}", hint)
        first, end = int(found[1]), int(found[2] or found[1])
        if end < first:
            raise BadRequest(
                f"not a range of tasks: {part!r}: it ends before it begins", f"{end}-{first}?"
            )
        if found[2]:
            into.ranges.append((first, end))
        else:
            into.ids.append(first)
