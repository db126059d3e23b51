"""What the tortured tasks do: each leaves facts that no daemon had a hand in.

A fact is one line of `$EVIDENCE/facts`: WORK TASK ATTEMPT PID FACT. A line is one write(2) to a
file opened with O_APPEND, so lines of many processes never mix and no kill takes one back. Where
many items are under way, the fact of one ends with `lane THREAD`: a thread that begins another
item has the result of the one before on disk. Every instance holds an exclusive flock on the file
of its work, which its children inherit: who does not get it has found two instances at once.
"""

import fcntl
import os
import sys
import threading

from ckptd.sdk import Automatic, Manual, Progress, Time, task
from ckptd.sdk import SyncResumableContext as Context
from tests.waiting import let_pass

TURNS = 30
ITEMS = 12
LANES = 4
IN_LANES = 24
LANE_S = 0.05  # of the shortest item there: a kill finds some recorded, some not
STEPS = ("fetch", "unpack", "check", "pay", "tell")


def say(fact: str) -> None:
    """Append one fact."""
    env = os.environ
    who = f"{env['WORK']} {env['CKPTD_TASK_ID']} {env['CKPTD_ATTEMPT']} {os.getpid()}"
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_DSYNC
    fd = os.open(f"{env['EVIDENCE']}/facts", flags, 0o644)
    os.write(fd, f"{who} {fact}\n".encode())
    os.close(fd)


def begin() -> None:
    """Claim to be the only instance of this work; held until the last process of it is gone."""
    env = os.environ
    place = f"{env['EVIDENCE']}/locks/{env['WORK']}"
    fd = os.open(place, os.O_WRONLY | os.O_CREAT, 0o644)
    os.set_inheritable(fd, True)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("overlap")
    say("start")


def pause(moment_s: float = 0.005) -> None:
    """Take a moment, so that there is something to hit."""
    let_pass(moment_s)


def items(ctx: Context) -> int:
    """Work items off one by one."""
    begin()
    for item in ctx.items([str(n) for n in range(ITEMS)]):
        say(f"item {item.key}")
        pause()
    done = ctx.item_results()
    _check(len(done) == ITEMS, f"{len(done)} results")
    say("end 0")
    return ITEMS


def lanes(ctx: Context) -> int:
    """Work items off, four at a time."""
    begin()

    def one(item: str) -> str:
        say(f"item {item} lane {threading.get_native_id()}")
        pause(LANE_S * (1 + int(item) % 3))  # no two lanes in step
        return item * 2

    ctx.items([str(n) for n in range(IN_LANES)], concurrency=LANES).run(one)
    done = ctx.item_results()
    _check(done == {str(n): str(n) * 2 for n in range(IN_LANES)}, f"results {done}")
    say("end 0")
    return IN_LANES


def steps(ctx: Context) -> str:
    """Take steps, each of which builds on what the one before returned."""
    begin()
    text = ""
    for name in STEPS:
        text = ctx.step(name, _step, name, text)
    _check(text == "".join(STEPS), f"steps gave {text}")
    say("end 0")
    return text


def _step(name: str, before: str) -> str:
    say(f"item {name}")
    pause()
    return before + name


def _state(ctx: Context) -> int:
    """Add numbers up in the bulk state, beside a file that must fit to it."""
    begin()

    @ctx.on_restore
    def _() -> None:
        with open(str(ctx.saved_file("sum"))) as file:
            _check(int(file.read()) == ctx.state["sum"], "file and state differ")

    @ctx.on_checkpoint
    def _() -> None:
        with open(ctx.file("sum"), "w") as file:
            file.write(str(ctx.state["sum"]))

    ctx.state.setdefault("sum", 0)
    for turn in ctx.track(range(TURNS)):
        say(f"at {turn}")
        _check(ctx.state["sum"] == sum(range(turn)), f"sum before {turn} is {ctx.state['sum']}")
        if turn % 5 == 4:
            ctx.checkpoint()
            say(f"saved {turn}")
        ctx.state["sum"] += turn
        pause()
    say("end 0")
    return int(ctx.state["sum"])


def _with(strategy: Automatic | Manual | Progress | Time, name: str) -> object:
    return task(_state, name=name, strategy=strategy)


manual = _with(Manual(), "manual")
by_time = _with(Time(0.05), "by_time")
by_share = _with(Progress(items=7), "by_share")
automatic = _with(Automatic(), "automatic")


def double(item: str) -> int:
    """Be the function of a batch."""
    _batch_fact(item)
    return int(item) * 2


def _batch_fact(item: str) -> None:
    env = os.environ
    line = f"{env['WORK']} 0 0 {os.getpid()} item {item}\n"
    fd = os.open(f"{env['EVIDENCE']}/facts", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(fd, line.encode())
    os.close(fd)
    pause()


def _check(is_right: bool, what: str) -> None:  # noqa: FBT001
    if not is_right:
        say(f"wrong {what.replace(' ', '_')}")
        sys.exit(99)
