"""`completion`: a script for bash, zsh or fish, made from the table of verbs and their parsers."""

import argparse
from typing import Final

from ckptctl import cli
from ckptctl.call import Call
from ckptctl.table import ALIASES, NOUNS, VERBS

_BASH: Final = """\
# bash completion of ckptctl; load it with: source <(ckptctl completion bash)
_ckptctl() {
    local cur=${COMP_WORDS[COMP_CWORD]} verb= word i
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        [[ $word == -* ]] && continue
        verb="${verb:+$verb }$word"
        [[ " @NOUNS@ " == *" ${verb%% *} "* && $verb != *" "* ]] || break
    done
    local words= is_task= is_batch=
    case $verb in
@CASES@
    esac
    if [[ $is_task && $cur != -* ]]; then
        words="@last $(ckptctl status -q -n 50 --timeout 1s 2>/dev/null)"
    elif [[ $is_batch && $cur != -* ]]; then
        words=$(ckptctl batch status -q 2>/dev/null)
    elif [[ -z $words ]]; then
        COMPREPLY=($(compgen -c -f -- "$cur"))
        return
    fi
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
}
complete -o default -F _ckptctl ckptctl
"""


def completion_options(parser: argparse.ArgumentParser) -> None:
    """Add the shell."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), metavar="SHELL")


def completion(call: Call) -> int:
    """Print the script."""
    match call.args.shell:
        case "fish":
            lines = _fish()
        case "zsh":
            lines = ["autoload -U +X bashcompinit && bashcompinit", *_bash()]
        case _:
            lines = _bash()
    call.out(lines)
    return 0


def _flags(name: str) -> list[str]:
    return sorted(cli.parser_of(VERBS[name])[0]._option_string_actions)


def _firsts() -> list[str]:
    flat = {name for name in (*VERBS, *ALIASES) if " " not in name}
    return sorted(flat | set(NOUNS))


def _bash() -> list[str]:
    cases = [f'        "") words="{" ".join(_firsts())}";;']
    for noun in NOUNS:
        seconds = " ".join(name.split()[1] for name in VERBS if name.startswith(f"{noun} "))
        cases.append(f'        "{noun}") words="{seconds}";;')
    for name, verb in VERBS.items():
        names = "|".join(f'"{word}"' for word in (name, *verb.aliases))
        is_task = " is_task=1" if "TASK" in verb.takes else ""
        if name.startswith("batch ") and "NAME" in verb.takes:
            is_task = " is_batch=1"
        if verb.has_command:
            cases.append(f'        {names}) [[ $cur == -* ]] && words="{" ".join(_flags(name))}";;')
        else:
            cases.append(f'        {names}) words="{" ".join(_flags(name))}"{is_task};;')
    script = _BASH.replace("@NOUNS@", " ".join(NOUNS)).replace("@CASES@", "\n".join(cases))
    return script.splitlines()


def _fish() -> list[str]:
    lines = ["# fish completion of ckptctl", "complete -c ckptctl -f"]
    no_verb = "__fish_use_subcommand"
    lines += [f"complete -c ckptctl -n {no_verb} -a {noun}" for noun in NOUNS]
    for name, verb in VERBS.items():
        first, _, second = name.partition(" ")
        summary = verb.summary.replace("'", "\\'")
        seen = f"'__fish_seen_subcommand_from {first}'"
        if second:
            lines.append(f"complete -c ckptctl -n {seen} -a {second} -d '{summary}'")
            continue
        lines.append(f"complete -c ckptctl -n {no_verb} -a {first} -d '{summary}'")
        kinds = (f"-l {f[2:]}" if f.startswith("--") else f"-s {f[1:]}" for f in _flags(name))
        lines.extend(f"complete -c ckptctl -n {seen} {kind}" for kind in kinds)
    return lines
