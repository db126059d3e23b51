"""From words to a verb's function: finding the verb, its options, help and usage errors.

Only the chosen verb's module is imported and only its parser built: `ckptctl status` is quick.
Wrong usage ends with 64 (EX_USAGE) and names the nearest known word. Read next: `table.py`.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NoReturn

from ckptctl.call import Call
from ckptctl.table import ALIASES, DEFAULT, GUESSED, NOUNS, SECTIONS, VERBS, Verb
from ckptctl.units import empty, named, nearest, parse_duration
from ckptd.protocol.errors import BadRequest
from ckptd.protocol.version import VERSION


class Parser(argparse.ArgumentParser):
    """argparse that raises, instead of exiting with 2 (which means "try again" here).

    What it refuses begins with the option. An empty value is never taken for none: mostly it is
    a variable that a script did not set, and `kill -s "$SIG" 7` must not do something else.
    """

    def error(self, message: str) -> NoReturn:
        """Raise BadRequest, exit code 64."""
        raise BadRequest(message.removeprefix("argument "), f"see: {self.prog} -h")

    def _get_values(self, action: argparse.Action, words: list[str]) -> Any:
        if "" in words:
            raise empty(option_name(action))
        return super()._get_values(action, words)

    def _get_value(self, action: argparse.Action, word: str) -> Any:
        return named(option_name(action), partial(super()._get_value, action), word)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            hint = nearest(value, action.choices) or f"one of: {', '.join(action.choices)}"
            raise BadRequest(f"{option_name(action)}: there is no {value!r}", hint)
        super()._check_value(action, value)


def option_name(action: argparse.Action) -> str:
    """Return what people know an option by, `--name`, or a word of the line, `TASK`."""
    long = [flag for flag in action.option_strings if flag.startswith("--")]
    return (long or [*action.option_strings, str(action.metavar)])[0]


class _Help(argparse.RawDescriptionHelpFormatter):
    """One line per option, with its value named once."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=min(100, _width()))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, (action.metavar or action.dest).upper())  # type: ignore[union-attr]
        return f"{', '.join(action.option_strings)} {value}"


def add_globals(parser: argparse.ArgumentParser) -> None:
    """Add the options that every verb has, except those that it defines otherwise."""
    group = parser.add_argument_group("output and connection")
    for flags, options in (
        (("-o", "--output"), {"metavar": "FORMAT", "help": "table, wide, json, jsonl, csv, tsv, "
                              "name, or a template such as '{id} {phase}'"}),
        (("--columns",), {"metavar": "A,B", "help": "these columns or fields, in this order"}),
        (("--no-headers",), {"action": "store_true", "help": "no header line"}),
        (("--color",), {"metavar": "WHEN", "choices": ("auto", "always", "never"),
                        "help": "auto, always or never"}),
        (("-q", "--quiet", "--parsable"), {"action": "store_true", "help": "ids alone"}),
        (("--utc",), {"action": "store_true", "help": "show times in UTC"}),
        (("-y", "--yes"), {"action": "store_true", "help": "do not ask back"}),
        (("--endpoint",), {"metavar": "PATH", "help": "the daemon's socket (CKPTD_ENDPOINT)"}),
        (("--answer-within", "--timeout"), {"metavar": "TIME", "dest": "wait_s",
                                            "type": parse_duration,
                                            "help": "wait this long for the daemon (10s)"}),
    ):  # fmt: skip
        known = parser._option_string_actions
        free = [flag for flag in flags if flag not in known]
        if free:
            group.add_argument(*free, **options)


def main(argv: Sequence[str]) -> int:
    """Run one command line; returns its exit code. Raises CkptdError."""
    leading, words = split_leading(globals_parser(), argv)
    if "--version" in leading or "-V" in leading:
        print(f"ckptctl {VERSION}")
        return 0
    if not words and {"-h", "--help"} & set(leading):
        print("\n".join(overview()))
        return 0
    verb, rest = find_verb(words)
    if verb is None:
        print("\n".join(overview(words[0])))
        return 0
    if {"-h", "--help"} & set(leading):
        rest = ["-h"]
    args, function = parse(verb, leading, rest)
    return int(function(Call(args)))


def globals_parser() -> Parser:
    """Return a parser of what may stand before the verb."""
    parser = Parser("ckptctl", add_help=False, allow_abbrev=False, formatter_class=_Help)
    add_globals(parser)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("-V", "--version", action="store_true")
    return parser


def find_verb(words: Sequence[str]) -> tuple[Verb | None, list[str]]:
    """Return the verb and the words after it; None asks for the overview of a noun."""
    if not words or words[0].startswith("-"):
        return VERBS[DEFAULT], list(words)
    first = ALIASES.get(words[0], words[0])
    if first not in NOUNS:
        if first not in VERBS:
            hint = _meant(first, [*VERBS, *ALIASES, *NOUNS]) or "see: ckptctl -h"
            raise BadRequest(f"unknown verb {first!r}", hint)
        return VERBS[first], list(words[1:])
    second = words[1] if len(words) > 1 else ""
    if second in ("-h", "--help"):
        return None, [first]
    name = ALIASES.get(f"{first} {second}", f"{first} {second}")
    if name in VERBS:
        return VERBS[name], list(words[2:])
    if not second or second.startswith("-"):
        return VERBS[NOUNS[first]], list(words[1:])
    known = [verb.split()[1] for verb in VERBS if verb.startswith(f"{first} ")]
    hint = _meant(f"{first} {second}", []) or nearest(second, known) or f"known: {', '.join(known)}"
    raise BadRequest(f"unknown verb '{first} {second}'", hint)


def _meant(word: str, known: Iterable[str]) -> str:
    """Return "did you mean ...?" of a word that other programs have, else of the nearest."""
    return f"did you mean {GUESSED[word]}?" if word in GUESSED else nearest(word, known)


def parser_of(verb: Verb) -> tuple[Parser, Callable[[Call], int]]:
    """Return the parser of one verb, and its function."""
    module_name, function_name = verb.where.split(":")
    module = importlib.import_module(f"ckptctl.{module_name}")
    parser = Parser(
        prog=f"ckptctl {verb.name}",
        usage=f"ckptctl {verb.name} [options] {verb.takes}".rstrip(),
        description=verb.summary[0].upper() + verb.summary[1:] + ".",
        epilog=_epilog(verb),
        formatter_class=_Help,
        allow_abbrev=False,
    )
    options = getattr(module, f"{function_name}_options", None)
    if options is not None:
        options(parser)
    add_globals(parser)
    return parser, getattr(module, function_name)


def _width() -> int:
    try:
        return int(os.environ.get("COLUMNS", "")) or 80
    except ValueError:
        return os.get_terminal_size(1).columns if sys.stdout.isatty() else 80


def _epilog(verb: Verb) -> str:
    parts = []
    if verb.examples:
        parts += ["examples:", *(f"  {line}" for line in verb.examples.splitlines())]
    if verb.aliases:
        parts.append(f"also called: {', '.join(verb.aliases)}")
    return "\n".join(parts)


def parse(
    verb: Verb, leading: Sequence[str], rest: Sequence[str]
) -> tuple[argparse.Namespace, Callable[[Call], int]]:
    """Return the parsed options of a verb. Raises BadRequest naming the nearest option."""
    parser, function = parser_of(verb)
    if verb.passes_on and not {"-h", "--help"} & set(rest):
        args, extra = parser.parse_known_args([])
        args.words = list(rest)
    elif verb.has_command:
        options, command = split_leading(parser, rest)
        if command and command[0].startswith("-") and command[0] != "--":
            raise _unknown_option(parser, command[0])
        args, extra = parser.parse_known_args(options)
        args.command = command[1:] if command[:1] == ["--"] else command
    else:
        args, extra = parser.parse_known_intermixed_args(_with_values(parser, rest))
    if extra:
        raise _unknown_option(parser, extra[0])
    before = globals_parser().parse_args(leading)
    for name, value in vars(before).items():
        behind = getattr(args, name, None)
        if behind is None or behind is False or behind == "":  # 0 was given
            setattr(args, name, value)
    args.verb = verb.name
    return args, function


def _with_values(parser: Parser, words: Sequence[str]) -> list[str]:
    """Give a bare `--watch` its value, so that it never takes the next word for one."""
    actions = parser._option_string_actions
    return [
        f"{actions[word].option_strings[-1]}={actions[word].const}"
        if word in actions and actions[word].nargs == "?"
        else word
        for word in words
    ]


def _unknown_option(parser: Parser, word: str) -> BadRequest:
    if not word.startswith("-"):
        return BadRequest(f"unexpected word {word!r}", f"see: {parser.prog} -h")
    flag = word.partition("=")[0]
    known = parser._option_string_actions
    is_guessed = GUESSED.get(flag, "").partition(" ")[0] in known
    hint = (_meant if is_guessed else nearest)(flag, known) or f"see: {parser.prog} -h"
    return BadRequest(f"unknown option {flag}", hint)


def split_leading(
    parser: argparse.ArgumentParser, words: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Split into the options that the parser knows, with their values, and all after them."""
    known: dict[str, Any] = parser._option_string_actions
    place = 0
    while place < len(words):  # Bound: place grows each turn
        word = words[place]
        if word == "--" or not word.startswith("-") or word == "-":
            break
        flag = word if word in known else word.partition("=")[0]
        if flag in known:
            takes_value = known[flag].nargs != 0 and flag == word
            place += 2 if takes_value else 1
        elif not word.startswith("--") and word[:2] in known:  # -ojson, or -qy
            place += 1
        else:
            break
    return list(words[:place]), list(words[place:])


# --- help -------------------------------------------------------------------------------------


def overview(noun: str = "") -> list[str]:
    """Return the list of verbs, of all or of one noun."""
    lines = [f"usage: ckptctl [options] {noun or 'VERB'} ..."]
    if not noun:
        lines += ["", "Run commands that survive their own death, the daemon's and the machine's."]
    for title, verbs in SECTIONS.items():
        shown = [verb for verb in verbs if not noun or verb.name.startswith(f"{noun} ")]
        if shown:
            lines += ["", f"{title}:"] if not noun else [""]
            lines += [f"  {verb.name:<19} {verb.summary}" for verb in shown]
    if noun:
        return [*lines, "", f"`ckptctl {noun}` alone means `ckptctl {NOUNS[noun]}`"]
    return [
        *lines,
        "",
        "TASK is 7, 3-9, @last, @~2, key:K, name:GLOB or - (ids from stdin); or -g GROUP,",
        "-l K=V, --state S, --all. Help of one verb: ckptctl VERB -h",
        "Exit codes: 0 done, 1 a task failed, 2 try again, 3 not finished, 4 no such task,",
        "5 conflict, 64 usage, 65 damaged data, 69 protocol, 70 a bug or a bad disk, 74 stdout or",
        "stdin is broken, 77 denied, 78 config, 124 timeout, 130 interrupted, 141 the reader of",
        "the output is gone.",
    ]


def help_verb_options(parser: argparse.ArgumentParser) -> None:
    """Add the words of `help`."""
    parser.add_argument("words", nargs="*", metavar="VERB", help="whose help")


def help_verb(call: Call) -> int:
    """Print the overview, or the help of a verb."""
    words = call.args.words
    if not words:
        call.out(overview())
        return 0
    verb, rest = find_verb(words) if words[0] not in NOUNS or words[1:] else (None, words[:1])
    call.out(overview(rest[0]) if verb is None else [parser_of(verb)[0].format_help().rstrip()])
    return 0
