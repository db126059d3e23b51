"""Why a task is where it is, in one or two sentences that a person can act on."""

from ckptd.core.policy import Now, Policy
from ckptd.core.port import DISK
from ckptd.core.records import DRILL_OOM, Phase
from ckptd.core.state import Past, State, Task, ready_key

_SIGNALS = {1: "HUP", 2: "INT", 3: "QUIT", 4: "ILL", 6: "ABRT", 7: "BUS", 8: "FPE", 9: "KILL",
            10: "USR1", 11: "SEGV", 12: "USR2", 13: "PIPE", 14: "ALRM", 15: "TERM"}  # fmt: skip
AHEAD_COUNTED_MAX = 10_000
_SAID = {"cancel": "", "stopped": "its unit was stopped by hand (systemctl stop)"}
_UNITS = ((86_400, "d"), (3_600, "h"), (60, "m"))


def lasting(seconds: float) -> str:
    """Return a duration in the two units that matter: `7h36m`, `12.5s`."""
    for index, (size, unit) in enumerate(_UNITS):
        if seconds >= size:
            rest = int(seconds % size)
            finer, finer_unit = _UNITS[index + 1] if index + 1 < len(_UNITS) else (1, "s")
            return f"{int(seconds // size)}{unit}{rest // finer:02d}{finer_unit}"
    return f"{max(0.0, seconds):.1f}s"


def explain(state: State, task: Task, now: Now, policy: Policy) -> str:
    """Return the explanation."""
    match task.phase:
        case Phase.QUEUED:
            text = _queued(state, task, policy)
        case Phase.WAITING:
            text = _waiting(state, task, now)
        case Phase.HELD if task.reason == "oom":
            text = (
                f"held because it went over its memory limit; `ckptctl edit {task.id} --memory "
                f"SIZE`, then `ckptctl release {task.id}` goes on"
            )
        case Phase.HELD:
            text = f"held by a person; `ckptctl release {task.id}` lets it go on"
        case Phase.BLOCKED:
            text = _blocked(state, task)
        case Phase.QUARANTINED:
            text = (
                f"quarantined: {task.reason}. Its files are kept; `ckptctl logs {task.id}`, then "
                f"`ckptctl quarantine release {task.id}` or `drop`"
            )
        case Phase.STOPPING:
            text = _stopping(task, now)
        case Phase.STARTING:
            text = "its start is logged and under way"
        case Phase.RUNNING:
            text = _running(task, now)
        case Phase.PAUSED:
            text = f"frozen by a person; `ckptctl resume {task.id}`"
        case Phase.FAILED:
            text = _failed(task)
        case Phase.SUCCEEDED if task.run is not None and task.run.dropped_ns:
            ago = lasting((now.at_ns - task.run.dropped_ns) / 1e9)
            text = (
                f"succeeded; its checkpoints were deleted {ago} ago, so that "
                f"`ckptctl retry {task.id}` starts from nothing"
            )
        case _:
            said = _SAID.get(task.reason, task.reason)
            text = f"{task.phase.word}" + (f": {said}" if said else "")
    last = task.run.past[-1] if task.run is not None and task.run.past else None
    return f"{text}. Last attempt: {ending(last)}" if last is not None else text


UNSEEN = frozenset({"lost", "reboot"})  # nobody saw when: its time is when it was found


def ending(past: Past) -> str:
    """Return how an attempt ended, in words."""
    how = {
        "exit": f"exited with {past.code}",
        "oom": _out_of_memory(past),
        "lost": "lost" if past.text else "lost: its supervisor was killed",
        "reboot": "cut off when the machine went down",
        "not_started": "never began",
        "spawn_error": "could not be started",
        "cancel": "stopped by cancel",
        "kill": "killed by a person",
        "timeout": "stopped: its timeout was over",
        "deadline": "stopped: its deadline had passed",
        "shutdown": "interrupted by a shutdown",
        "drill": "interrupted by a drill",
        "drill_oom": "left without memory by a drill, and not killed by the kernel",
        "stopped": "stopped by a stop of its unit",
    }.get(past.cause, past.cause)
    if past.cause == "signal":
        how = f"killed by SIG{_SIGNALS.get(past.signal, past.signal)}"
    elif past.signal and past.cause != "oom":
        how += f" (SIG{_SIGNALS.get(past.signal, past.signal)})"
    most = "at most " if past.cause in UNSEEN else ""
    if past.cause not in ("not_started", "spawn_error"):
        how += f" after {most}{lasting((past.ended_ns - past.started_ns) / 1e9)}"
    if past.lost_s >= 0.1:
        how += f", {most}{lasting(past.lost_s)} of work lost"
    return f"{how} ({past.text})" if past.text else how


def _out_of_memory(past: Past) -> str:
    """Return whose memory ran out and who paid for it, as far as the runner could tell."""
    if past.blame == "host":
        why = "because the host ran out of memory, not at its own limit"
        return f"lost a child, killed {why}" if past.code else f"killed {why}"
    if past.blame == "limit" and past.code:
        return (
            "went over its memory limit: a child process was killed by the kernel (OOM); "
            f"the task itself exited with {past.code}"
        )
    if past.blame == "limit":
        return "went over its memory limit: its main process was killed by the kernel (OOM)"
    return "killed by the kernel for want of memory (OOM)"


def _failed(task: Task) -> str:
    if task.reason == "oom":
        return f"failed: over its memory limit (--on-oom fail); {_again(task)}"
    if task.reason == "usage error":
        return (
            "failed: exit 2 in under 2 s, three times in a row: that is how shells and argument "
            f"parsers refuse a mistyped line; see its output, `ckptctl edit {task.id}`, then retry"
        )
    if task.reason:
        return f"failed: {task.reason}; {_again(task)}"
    limit = task.unpacked().max_failures
    if limit > 1:
        return f"failed: all {limit} failures that it may have are used up"
    if limit == 1:
        return "failed: it was submitted to be tried once"
    return "failed: without --retries a failure is final, unless the attempt saved something new"


def _again(task: Task) -> str:
    return f"`ckptctl retry {task.id}` runs it again"


def _queued(state: State, task: Task, policy: Policy) -> str:
    text = _in_line(state, task, policy)
    if task.reason == "oom":
        limit_mib = task.unpacked().memory_bytes / (1 << 20)
        return f"{text}; it goes on with a memory limit of {limit_mib:,.0f} MiB"
    return text


def _in_line(state: State, task: Task, policy: Policy) -> str:
    group = state.groups.get(task.group)
    if group is None:
        return f"its group {task.group!r} does not exist"
    if group.paused:
        return f"group {group.name!r} is paused; `ckptctl group resume {group.name}`"
    slots, used = group.parallel or policy.slots, state.slots_used(group.name)
    if used < slots:
        return "about to start"
    heap = state.ready.get(task.group, [])
    own = ready_key(task)
    many = len(heap) > AHEAD_COUNTED_MAX
    ahead = "many" if many else str(sum(1 for key in heap if key < own))
    return (
        f"the {slots} slots of group {group.name!r} are taken, {ahead} ahead of it; "
        f"`ckptctl group set {group.name} --parallel N` changes that"
    )


def _waiting(state: State, task: Task, now: Now) -> str:
    left = lasting((task.until_ns - now.at_ns) / 1e9)
    run = task.run
    match task.reason:
        case "after":
            open_needs = [
                f"{need.task} ({other.phase.word})"
                for need in task.needs
                if (other := state.tasks.get(need.task)) is not None and other.phase < 7
            ]
            return f"waits for tasks {', '.join(open_needs[:20]) or 'to be judged'}"
        case "at":
            return f"is to start in {left}"
        case "backoff":
            return f"tries again in {left}, after failure {run.failures if run else 0}"
        case "rate_limit":
            return f"asked to wait (rate limit), goes on in {left}; no failure is counted"
        case _ if run is not None and run.past and run.past[-1].blame == DISK:
            return (
                f"the disk of its output was full when it failed: free space there; it tries "
                f"again in {left}, no failure is counted"
            )
        case _:
            return f"met something transient, tries again in {left}; no failure is counted"


def _blocked(state: State, task: Task) -> str:
    if task.reason != "dependency":
        fresh = f"`ckptctl retry --fresh {task.id}` starts from nothing"
        if task.reason == "version":
            return (
                "blocked: what was saved and the code are of versions that do not fit; mend that, "
                f"then `ckptctl release {task.id}` goes on; {fresh}"
            )
        return (
            f"blocked: {task.reason}; once what it misses is put right, "
            f"`ckptctl release {task.id}` goes on; {fresh}"
        )
    unmet = ", ".join(
        f"{need.task} ({other.phase.word if other else 'cleaned'}, wanted {need.when})"
        for need in task.needs[:20]
        for other in (state.tasks.get(need.task),)
    )
    return f"can never start as asked, it depends on {unmet}; `ckptctl release {task.id}` starts it"


def _stopping(task: Task, now: Now) -> str:
    stop = task.run.stop if task.run is not None else None
    if stop is None:
        return "stopping"
    first = "its memory is taken away" if stop.why == DRILL_OOM else "got its stop signal"
    step = ("asked for a checkpoint", first, "killed")[stop.rung]
    left = f", force in {lasting((stop.next_ns - now.at_ns) / 1e9)}" if stop.next_ns else ""
    return f"stopping ({stop.why}): {step}{left}"


def _running(task: Task, now: Now) -> str:
    run = task.run
    if run is None:
        return "running"
    text = f"runs for {lasting((now.at_ns - run.started_ns) / 1e9)}, attempt {run.attempt}"
    if run.resumed_from:
        text += f", resumed from checkpoint {run.resumed_from}"
    return f"{text} ({run.warning})" if run.warning else text
