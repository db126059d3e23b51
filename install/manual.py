"""The man pages, made from what the programs themselves read, so that they cannot go stale.

    python3 install/manual.py DIRECTORY     writes ckptctl.1 ckpt.1 ckptd.toml.5 ckptd.8

ckptctl(1) is its table of verbs and their parsers, ckptd.toml(5) the comments of etc/ckptd.toml,
ckpt(1) and ckptd(8) a text beside this file with the program's own help in it. Needs ckptctl.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from ckptctl import cli
from ckptctl.table import ALIASES, NOUNS, SECTIONS, Verb
from ckptd.daemon.main import argument_parser
from ckptd.protocol.version import VERSION
from ckptd.sdk import ckpt

ROOT = Path(__file__).resolve().parent.parent
TEXTS = Path(__file__).resolve().parent / "man"


def pages() -> dict[str, str]:
    """Return every page: file name -> roff."""
    return {
        "ckptctl.1": _ckptctl(),
        "ckpt.1": _from_text("ckpt.1", "\n".join(_ckpt_verbs())),
        "ckptd.toml.5": _ckptd_toml(),
        "ckptd.8": _from_text("ckptd.8", "\n".join(_options(argument_parser()))),
    }


def escape(text: str) -> str:
    """Return text that roff prints as it is, also at the beginning of a line."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("^", "\\(ha").replace("~", "\\(ti")
    text = text.replace("'", "\\(aq").replace("`", "\\(ga")
    return "\n".join(f"\\&{line}" if line.startswith(".") else line for line in text.split("\n"))


def _head(name: str, section: int, summary: str) -> list[str]:
    return [
        f'.TH {name.upper()} {section} "" "ckptd {VERSION}"',
        ".SH NAME",
        f"{escape(name)} \\- {escape(summary)}",
    ]


def _from_text(name: str, generated: str) -> str:
    text = (TEXTS / name).read_text()
    return text.replace("@VERSION@", VERSION).replace("@GENERATED@\n", f"{generated}\n")


# --- ckptctl(1) ---------------------------------------------------------------------------------


def _ckptctl() -> str:
    lines = _head("ckptctl", 1, "run commands that survive their own death, and steer them")
    lines += [".SH SYNOPSIS", ".B ckptctl", "[options] VERB ...", ".SH DESCRIPTION"]
    lines += _paragraphs((TEXTS / "ckptctl.txt").read_text())
    lines += [".SH OPTIONS OF EVERY VERB", *_options(cli.globals_parser())]
    for title, verbs in SECTIONS.items():
        lines.append(f".SH {escape(title.upper())}")
        for verb in verbs:
            lines += _verb(verb)
    lines += [".SH SHORT FORMS"]
    for short, name in {**ALIASES, **NOUNS}.items():
        lines += [".TP", f".B {escape(short)}", escape(name)]
    lines += [".SH TASKS, EXIT CODES", ".nf"]
    tail = cli.overview()
    lines += [escape(line) for line in tail[_last_blank(tail) + 1 :]]
    lines += [".fi", ".SH ENVIRONMENT", ".TP", ".B CKPTD_ENDPOINT", "path of the daemon's socket"]
    lines += [".SH SEE ALSO", ".BR ckptd (8),", ".BR ckpt (1),", ".BR ckptd.toml (5)"]
    return "\n".join(lines) + "\n"


def _last_blank(lines: list[str]) -> int:
    return max(place for place, line in enumerate(lines) if not line)


def _verb(verb: Verb) -> Iterator[str]:
    yield f'.SS "{escape(f"ckptctl {verb.name} [options] {verb.takes}".rstrip())}"'
    yield escape(f"{verb.summary[0].upper()}{verb.summary[1:]}.")
    if verb.aliases:
        yield escape(f"Also called {', '.join(verb.aliases)}.")
    parser = cli.parser_of(verb)[0]
    everywhere = set(cli.globals_parser()._option_string_actions)
    yield from _options(parser, without=everywhere)
    if verb.examples:
        yield from (".PP", ".nf", ".RS")
        yield from (escape(line) for line in verb.examples.splitlines())
        yield from (".RE", ".fi")


def _options(parser: argparse.ArgumentParser, without: set[str] | None = None) -> Iterator[str]:
    for action in parser._actions:
        flags = [flag for flag in action.option_strings if flag not in (without or ())]
        if not flags or action.help == argparse.SUPPRESS:
            continue
        value = "" if action.nargs == 0 else _value(action)
        bold = ", ".join(f"\\fB{escape(flag)}\\fR" for flag in flags)
        yield from (".TP", bold + (f" \\fI{escape(value)}\\fR" if value else ""))
        yield escape((action.help or "").replace("%%", "%")) or "\\&"


def _value(action: argparse.Action) -> str:
    name = action.metavar or (action.dest or "").upper()
    return " ".join(name) if isinstance(name, tuple) else name


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in text.strip().split("\n\n"):
        yield from (".PP", escape(paragraph))


# --- ckpt(1) ------------------------------------------------------------------------------------


def _ckpt_verbs() -> Iterator[str]:
    """Turn the lines `  verb WORDS   what it does` of the program's help into items."""
    for line in ckpt.HELP.splitlines()[2:]:
        usage, _, text = line.strip().partition("   ")
        if not line.strip() or not line.startswith("  "):
            continue
        if line.startswith("   "):  # goes on from the line above
            yield escape(line.strip())
        elif text:
            yield from (".TP", f"\\fBckpt {escape(usage)}\\fR", escape(text.strip()))
        else:
            yield from (".TP", f"\\fBckpt {escape(usage)}\\fR")


# --- ckptd.toml(5) --------------------------------------------------------------------------------


def _ckptd_toml() -> str:
    lines = _head("ckptd.toml", 5, "configuration of the task daemon")
    lines += [".SH SYNOPSIS", "/etc/ckptd/ckptd.toml", ".br"]
    lines += ["$XDG_CONFIG_HOME/ckptd/ckptd.toml", ".SH DESCRIPTION"]
    comment: list[str] = []
    for line in (ROOT / "etc/ckptd.toml").read_text().splitlines():
        if line.startswith("#"):
            comment.append(line[1:].strip())
            continue
        if found := re.fullmatch(r"\[(.+)\]", line):
            lines += [f".SH SECTION [{escape(found[1])}]", *_comment(comment)]
        elif line:
            lines += [".TP", f"\\fB{escape(line)}\\fR", *_comment(comment)]
        elif comment:
            lines += _comment(comment)
        comment = []
    lines += [".SH SEE ALSO", ".BR ckptd (8),", ".BR ckptctl (1)"]
    return "\n".join(lines) + "\n"


def _comment(lines: list[str]) -> list[str]:
    text = [escape(line) if line else ".PP" for line in lines]
    while text and text[0] == ".PP":
        text.pop(0)
    return text


def main() -> None:
    """Write all pages."""
    directory = sys.argv[1]
    for name, text in pages().items():
        Path(directory, name).write_text(text)


if __name__ == "__main__":
    os.environ["COLUMNS"] = "100"
    main()
