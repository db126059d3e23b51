"""The work that is handed in: one kind for each way in which a task can live, fail and go on.

A work has a number that is never used again; it is its name, its key and the first word of all
its facts. What an audit must know of a kind stands here: `LANES` and `ENDS`.
"""

import random
import sys
from typing import Any, Final

from tests.daemon_fixture import ROOT

RUN: Final = str(ROOT / "ckptd" / "sdk" / "run.py")

_BEGIN: Final = """
say() { echo "$WORK $CKPTD_TASK_ID $CKPTD_ATTEMPT $$ $*" >>"$EVIDENCE/facts"; }
leave() { say end $1; exit $1; }
exec 9>>"$EVIDENCE/locks/$WORK"
until flock -n -E 9 9; do # 9: somebody has it; anything else: flock itself was hit
    [ $? -eq 9 ] && say overlap && break
done
say start
"""
_SCRIPTS: Final = {
    "plain": "leave 0",
    "short": "sleep 0.0$MOMENT; leave 0",
    "flaky": "[ $CKPTD_ATTEMPT -gt 2 ] || leave 3; leave 0",
    "hopeless": "leave 4",
    "patient": "[ $CKPTD_ATTEMPT -gt 2 ] || leave 75; leave 0",
    "deaf": "trap '' TERM; sleep 0.2; sleep 0.2; leave 0",
    "steady": "for n in 1 2 3 4 5 6 7 8; do sleep 0.05; done; leave 0",
    "verbs": """
done=$(ckpt items --keys) || leave 9
for key in a b c; do
    case "
$done
" in *"
$key
"*) continue ;; esac
    say item $key
    ckpt item $key pass "result of $key" || leave 9
done
leave 0
""",
    "saver": """
at=0
if [ "$CKPTD_RESUME" = 1 ]; then read -r at <"$CKPTD_LAST/state" || leave 9; fi
while [ $at -lt 3 ]; do
    say at $at
    at=$((at + 1))
    echo $at >"$CKPTD_DIR/state" || leave 9
    ckpt save "$CKPTD_DIR/state" >/dev/null || leave 9
    say saved $at
done
leave 0
""",
    "mover": """
at=0
if [ "$CKPTD_RESUME" = 1 ]; then read -r at <"$CKPTD_LAST/state" || leave 9; fi
[ $at -lt 3 ] || leave 0
say at $at
echo $((at + 1)) >"$CKPTD_DIR/stage/state"
mv "$CKPTD_DIR/stage" "$CKPTD_DIR/ckpt/$((CKPTD_SEQ + 1))" || leave 9
leave 85
""",
}
_FUNCTIONS: Final = (
    "items", "lanes", "steps", "manual", "by_time", "by_share", "automatic",
)  # fmt: skip
_ODDS: Final = {"plain": 60, "short": 20, "flaky": 4, "hopeless": 2, "patient": 2, "lanes": 12}

LANES: Final = {"verbs": 1, "items": 1, "steps": 1, "lanes": 4}
"""How many items are under way at once, for the kinds that have any."""
ITEMS: Final = {"verbs": 3, "items": 12, "steps": 5, "lanes": 24}
"""How many there are in all."""
TURNS: Final = {
    "saver": 3,
    "mover": 3,
    **dict.fromkeys(("manual", "by_time", "by_share", "automatic"), 30),
}
"""How many turns, one after the other, for the kinds that count them."""
BATCH_ITEMS: Final = 25
BATCH_JOBS: Final = 3
CODES: Final = {"flaky": {0, 3}, "hopeless": {4}, "patient": {0, 75}, "mover": {0, 85}}
"""Exit codes that are in order, where it is not 0 alone."""


def kinds() -> list[str]:
    """Return every kind of task."""
    return [*_SCRIPTS, *_FUNCTIONS]


def draw(chance: random.Random, *, is_fast: bool) -> str:
    """Draw a kind: many that are over at once, the more so where speed counts, some of each."""
    known = kinds()
    odds = [_ODDS.get(kind, 3) * (4 if is_fast and kind == "plain" else 1) for kind in known]
    return chance.choices(known, odds)[0]


def spec(number: int, kind: str, cwd: str, *, is_keyed: bool) -> dict[str, Any]:
    """Return what to submit for a work of this kind."""
    name = f"w{number}"
    if kind in _SCRIPTS:
        argv = ["/bin/sh", "-c", _BEGIN + _SCRIPTS[kind]]
    else:
        argv = [sys.executable, RUN, f"tests.torture.jobs:{kind}"]
    few = {"hopeless": 1}
    return {
        "argv": argv,
        "cwd": cwd,
        "env": {"WORK": name, "MOMENT": str(number % 10)},
        "name": name,
        "key": name if is_keyed else "",
        "labels": {"kind": kind},
        "retries": few.get(kind, 1_000),
        "grace_s": 0.3,
    }
