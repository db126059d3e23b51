"""Deciding a submit: from task specs to records, all accepted or none.

Read next: `decide.py` (every other command), `plan.py` (what happens to a queued task).
"""

# The C half of hashlib: with its other half come 3.7 MB of OpenSSL that nobody here uses.
from _blake2 import blake2b

import msgspec

from ckptd.core.policy import Caller, Now, Policy
from ckptd.core.records import ENDED, AnyRecord, EnvStored, Need, Phase, Spec, Submitted
from ckptd.core.rights import identity, may_change
from ckptd.core.state import State, Task
from ckptd.protocol import limits
from ckptd.protocol import messages as m
from ckptd.protocol.errors import BadRequest, Conflict, Denied, NotFound
from ckptd.protocol.on_oom import EXAMPLES, parse_on_oom

_pack = msgspec.msgpack.Encoder(order="sorted")


def submit(
    state: State, command: m.Submit, caller: Caller, now: Now, policy: Policy
) -> tuple[list[AnyRecord], m.Submitted]:
    """Return the records and the ids. Raises Rejected: then nothing was accepted."""
    return _Submit(state, caller, now, policy).accept(command)


class _Submit:
    """One submit being decided; it sees its own earlier tasks as if they were accepted."""

    def __init__(self, state: State, caller: Caller, now: Now, policy: Policy) -> None:
        self.state, self.caller, self.now, self.policy = state, caller, now, policy
        self.records: list[AnyRecord] = []
        self.next_id = state.next_id
        self.keys: dict[tuple[int, str], tuple[int, bytes]] = {}

    def accept(self, command: m.Submit) -> tuple[list[AnyRecord], m.Submitted]:
        env = self._env(command.env)
        taken = [self._task(asked, env) for asked in command.tasks]
        ids, created = zip(*taken, strict=True)
        if not any(created):
            self.records.clear()  # nothing new: not even the environment
        return self.records, m.Submitted(ids, created)

    def _env(self, env: dict[str, str]) -> bytes:
        if not env:
            return b""
        check_env(env)
        data = _pack.encode(env)
        digest = blake2b(data, digest_size=16).digest()
        if digest in self.state.envs:
            return digest
        self.records.append(EnvStored(digest, data))
        return digest

    def _task(self, asked: m.TaskSpec, env: bytes) -> tuple[int, bool]:
        check_spec(asked)
        uid, gid = identity(asked, self.caller, self.policy)
        check_limits(asked, uid)
        if asked.group not in self.state.groups:
            known = ", ".join(sorted(self.state.groups))
            raise NotFound(
                f"no group {asked.group!r} (there are: {known})",
                f"ckptctl group add {asked.group} --parallel 1",
            )
        digest = _pack.encode(asked) if asked.key else b""
        digest = blake2b(digest, digest_size=16).digest() if digest else b""
        if asked.key:
            known_id = self._known(uid, asked.key, digest)
            if known_id:
                return known_id, False
        check_deadline(asked.deadline_ns, self.now)
        _check_start(asked.at_ns, self.now)
        needs = tuple(self._need(uid, need) for need in asked.after) if asked.after else ()
        number, self.next_id = self.next_id, self.next_id + 1
        if asked.key:
            self.keys[uid, asked.key] = number, digest
        phase, reason, until_ns = self._entry(asked, needs)
        self.records.append(
            Submitted(
                task=number,
                at_ns=self.now.at_ns,
                uid=uid,
                group=asked.group,
                priority=asked.priority,
                env=env,
                phase=phase,
                reason=reason,
                until_ns=until_ns,
                deadline_ns=asked.deadline_ns,
                key=asked.key,
                needs=needs,
                spec=msgspec.Raw(_pack.encode(self._spec(asked, gid, digest))),
                by=-1 if uid == self.caller.uid else self.caller.uid,
            )
        )
        return number, True

    def _known(self, uid: int, key: str, digest: bytes) -> int:
        number, old = self.keys.get((uid, key), (0, b""))
        if not number:
            number = self.state.keys.get((uid, key), 0)
            task = self.state.tasks.get(number)
            old = task.unpacked().digest if task is not None else b""
        if number and old != digest:
            raise Conflict(
                f"key {key!r} names task {number}, which was submitted with another spec",
                f"ckptctl show {number}; choose another key, or clean the old task",
            )
        return number

    def _need(self, uid: int, dependency: m.Dependency) -> Need:
        number = dependency.task
        if dependency.key:
            own = self.keys.get((uid, dependency.key))
            stored = self.state.keys.get((uid, dependency.key), 0)
            number = own[0] if own else stored
            if not number:
                raise NotFound(f"cannot start after key {dependency.key!r}: no such task")
        task = self.state.tasks.get(number)
        is_new = self.state.next_id <= number < self.next_id
        if task is None and not is_new:
            raise NotFound(f"cannot start after task {number}: no such task")
        if task is not None and not may_change(task, self.caller):
            raise Denied(f"cannot start after task {number}: it is not yours")
        return Need(number, dependency.when)

    def _entry(self, asked: m.TaskSpec, needs: tuple[Need, ...]) -> tuple[Phase, str, int]:
        at_ns = asked.at_ns
        if not at_ns and asked.in_s:
            at_ns = self.now.at_ns + int(asked.in_s * 1e9)
        if asked.hold:
            return Phase.HELD, "", at_ns
        return entry(self.state, needs, at_ns, self.now)

    def _spec(self, asked: m.TaskSpec, gid: int, digest: bytes) -> Spec:
        policy = self.policy
        retries = policy.retries if asked.retries is None else asked.retries
        return Spec(
            argv=asked.argv,
            cwd=asked.cwd,
            name=asked.name or asked.argv[0].rpartition("/")[2][: limits.NAME_CHARS_MAX],
            gid=gid,
            labels=asked.labels,
            env=asked.env,
            timeout_s=asked.timeout_s or policy.timeout_s,
            max_failures=retries + 1,
            backoff_s=policy.backoff_s if asked.backoff_s is None else asked.backoff_s,
            backoff_max_s=(
                policy.backoff_max_s if asked.backoff_max_s is None else asked.backoff_max_s
            ),
            on_exit=dict(asked.on_exit),
            stop_signal=asked.stop_signal,
            grace_s=policy.grace_s if asked.grace_s is None else asked.grace_s,
            checkpoint_signal=asked.checkpoint_signal,
            memory_bytes=asked.memory_bytes,
            stdin=asked.stdin,
            umask=asked.umask,
            journal=policy.journal if asked.journal is None else asked.journal,
            digest=digest,
            cpus=asked.cpus,
            tasks_max=asked.tasks_max,
            io_weight=asked.io_weight,
            nice=asked.nice,
            on_oom=asked.on_oom or policy.on_oom,
        )


def entry(
    state: State, needs: tuple[Need, ...], at_ns: int, now: Now, ran_ns: int = 0
) -> tuple[Phase, str, int]:
    """Return (phase, reason, until_ns) of a task that may go on as far as it can."""
    fate = needs_fate(state, needs, ran_ns)
    if fate == "never":
        return Phase.BLOCKED, "dependency", at_ns
    if fate == "wait":
        return Phase.WAITING, "after", at_ns
    if at_ns > now.at_ns:
        return Phase.WAITING, "at", at_ns
    return Phase.QUEUED, "", 0


def needs_fate(state: State, needs: tuple[Need, ...], ran_ns: int = 0) -> str:
    """Return "met", "wait" or (one can never be met) "never".

    `ran_ns`: when the task ran last and now waits again. What was over by then is judged already.
    """
    fate = "met"
    for need in needs:
        task = state.tasks.get(need.task)
        # A task of the same submit is not applied yet, a cleaned one cannot be judged any more.
        if task is None and need.task < state.next_id:
            if ran_ns:
                continue
            return "never"
        if task is None or task.phase not in ENDED:
            fate = "wait"
        elif not (_met(task, need.when) or 0 < task.until_ns <= ran_ns):
            return "never"
    return fate


def _met(task: Task, when: str) -> bool:
    return when == "any" or (task.phase is Phase.SUCCEEDED) == (when == "ok")


def check_spec(asked: m.TaskSpec) -> None:
    """Raise BadRequest for what the types cannot say about a spec."""
    for word in asked.argv:
        if "\0" in word:
            raise BadRequest(f"argument {word[:80]!r} has a NUL byte, which no command can get")
        if len(word) * 4 >= limits.ARGV_BYTES_MAX <= len(word.encode()):  # and its NUL
            raise BadRequest(
                f"an argument of {len(word)} characters is over {limits.ARGV_BYTES_MAX} bytes",
                "pass big input by a file",
            )
    if not asked.argv[0] or asked.argv[0].startswith("{resume:"):
        raise BadRequest("the command's first word is empty, or there only when it resumes")
    _check_path("cwd", asked.cwd)
    if asked.stdin:
        _check_path("stdin", asked.stdin)
    for code in asked.on_exit:
        if not (code.isascii() and code.isdigit() and int(code) < 256):
            raise BadRequest(f"on_exit: {code!r} is not an exit code from 0 to 255")
    first_s, most_s = asked.backoff_s, asked.backoff_max_s
    if first_s is not None and most_s is not None and most_s < first_s:
        raise BadRequest(f"backoff_max_s {most_s} is below backoff_s {first_s}")
    if asked.env:
        check_env(asked.env)


def check_deadline(deadline_ns: int, now: Now) -> None:
    """Raise BadRequest for a deadline that has passed: the task would fail without a start."""
    if 0 < deadline_ns <= now.at_ns:
        raise BadRequest("the deadline has passed already", "give one that lies ahead")


def _check_start(at_ns: int, now: Now) -> None:
    """Raise BadRequest for a start so long past that it was meant otherwise, as a wrong year is.

    What is known by its request id or key never comes here: it is answered as it was accepted.
    """
    late_ns = now.at_ns - at_ns
    if at_ns and late_ns > limits.START_PAST_S_MAX * 1_000_000_000:
        raise BadRequest(
            f"the start lies {late_ns // 1_000_000_000} s in the past",
            "look at its year and day; without a time it starts at once",
        )


def check_limits(asked: m.TaskSpec | Spec, uid: int) -> None:
    """Raise BadRequest for limits that cannot be, or cannot be together, of a task of `uid`."""
    if 0 < asked.memory_bytes < limits.MEMORY_BYTES_MIN:
        raise BadRequest(
            f"a memory limit of {asked.memory_bytes} bytes is below {limits.MEMORY_BYTES_MIN}:"
            " not even its end could be told truly",
            "with a unit, such as 512M; 0 is no limit",
        )
    if 0 < asked.cpus < limits.CPUS_MIN:
        raise BadRequest(f"cpus {asked.cpus:g} is below {limits.CPUS_MIN}", "0 is no limit")
    if asked.nice < 0 and uid != 0:
        raise BadRequest(
            f"nice {asked.nice} is for tasks that run as root, and this one runs as uid {uid}",
            "0 to 19 make a task step back behind others",
        )
    try:
        wanted = parse_on_oom(asked.on_oom)
    except ValueError as bad:
        raise BadRequest(f"on_oom: {bad}", EXAMPLES) from bad
    if wanted.action != "retry":
        return
    if not asked.memory_bytes:
        raise BadRequest(
            f"on_oom {asked.on_oom} multiplies a memory limit, and there is none",
            "add one, such as --memory 2G",
        )
    if wanted.max_bytes < asked.memory_bytes:
        raise BadRequest(
            f"on_oom {asked.on_oom} is below the memory limit of {asked.memory_bytes} bytes"
        )


def _check_path(name: str, path: str) -> None:
    if not path.startswith("/") or "\0" in path:
        raise BadRequest(f"{name} {path[:200]!r} is not an absolute path")


def check_env(env: dict[str, str]) -> None:
    """Raise BadRequest for an environment that execve would refuse."""
    size = 0
    for name, value in env.items():
        if not name or "=" in name or "\0" in name or "\0" in value:
            raise BadRequest(f"environment variable {name[:80]!r} cannot be set")
        length = len(f"{name}={value}".encode()) + 1
        if length > limits.ARGV_BYTES_MAX:
            raise BadRequest(
                f"environment variable {name[:80]!r} has {length} bytes, over"
                f" {limits.ARGV_BYTES_MAX}",
                "give it to the task in a file",
            )
        size += length
    if size > limits.ENV_BYTES_MAX:
        raise BadRequest(
            f"environment of {size} bytes is over {limits.ENV_BYTES_MAX}", "use --clean-env"
        )
