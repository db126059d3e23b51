"""Who may do what: roles by group, what each verb needs, and whose task is whose. Pure.

    read    sees all tasks: status, events, statistics; of others' neither output nor environment
    submit  has tasks of its own, and steers those
    admin   sees and steers the tasks of all, changes groups, reloads, shuts down

Roles add up. Root and the daemon's own uid are admin whatever the configuration says.
Invariant: no role makes a command run as anybody but who asks; that takes root (`submit_as`).
Read next: `ckptd/door/access.py` (who is in which group), PROTOCOL.md "Who may do what".
"""

from collections.abc import Iterable
from typing import Final

from ckptd.core.policy import Caller, Policy, Rules
from ckptd.core.records import ACTIVE
from ckptd.core.state import Task
from ckptd.protocol import messages as m
from ckptd.protocol.errors import Denied

EVERYBODY: Final = "*"
"""As the name of a group: everybody who may connect."""
ROOT: Final = 0

_ANY: Final = ("read", "submit", "admin")
_FREE: Final = frozenset({"ping"})
_STEERS: Final = frozenset({"submit", *m.TASK_CHANGES})
_RULES: Final = frozenset({"group_set", "group_remove", "reload", "shutdown"})
_VERB_OF: Final[dict[type[m.Message], str]] = {
    m.VERBS[verb][0]: verb for verb in m.VERBS if m.VERBS[verb][2]
}


def caller_of(rules: Rules, uid: int, gid: int, own_uid: int, member_of: Iterable[str]) -> Caller:
    """Return who asks. `member_of`: the groups of this uid, EVERYBODY among them if it may connect.

    A connection that was made before its user lost the right to make it has no groups: no role.
    """
    groups = frozenset(member_of)
    admin = uid in {ROOT, own_uid} or not groups.isdisjoint(rules.admin)
    return Caller(
        uid,
        gid,
        admin=admin,
        reads=admin or not groups.isdisjoint(rules.read),
        submits=admin or not groups.isdisjoint(rules.submit),
    )


def roles(caller: Caller) -> tuple[str, ...]:
    """Return the roles of a caller, the lowest first; those that a higher one includes, too."""
    held = (caller.reads or caller.admin, caller.submits or caller.admin, caller.admin)
    return tuple(role for role, has in zip(_ANY, held, strict=True) if has)


def check_verb(verb: str, caller: Caller, rules: Rules) -> None:
    """Raise Denied where none of the caller's roles allows the verb at all."""
    if caller.admin or verb in _FREE:
        return
    if verb in _RULES:
        role, allowed = "admin", False
    elif verb in _STEERS:
        role, allowed = "submit", caller.submits
    else:
        role, allowed = "", caller.submits or caller.reads
    if allowed:
        return
    held = ", ".join(roles(caller)) or "none"
    raise Denied(f"uid {caller.uid} may not {verb}: its roles are: {held}", _way_in(role, rules))


def check_command(command: m.Message, caller: Caller, rules: Rules) -> None:
    """Raise Denied as `check_verb` does; for commands, which are told by their type."""
    check_verb(_VERB_OF[type(command)], caller, rules)


def _way_in(role: str, rules: Rules) -> str:
    """Return which groups to join for a role; "" asks for any."""
    wanted = (role,) if role else ("submit", "read")
    ways = [f"{', '.join(names)} ({name})" for name in wanted if (names := _groups(rules, name))]
    if not ways:
        return "ask root: no group has that right (table [access] of the configuration)"
    return f"members of these groups may: {'; '.join(ways)}"


def _groups(rules: Rules, role: str) -> tuple[str, ...]:
    named = {"read": rules.read, "submit": rules.submit, "admin": rules.admin}[role]
    return tuple(name for name in named if name != EVERYBODY)


# --- whose task -----------------------------------------------------------------------------


def may_see(task: Task, caller: Caller) -> bool:
    """Tell whether the caller may see that there is this task, and how it does."""
    return caller.admin or caller.reads or task.uid == caller.uid


def may_open(task: Task, caller: Caller) -> bool:
    """Tell whether the caller may see what the task says and holds: output, environment, files."""
    return caller.admin or task.uid == caller.uid


def may_change(task: Task, caller: Caller) -> bool:
    """Tell whether the caller may steer the task."""
    return caller.admin or (caller.submits and task.uid == caller.uid)


def check_task(task: Task, command: m.Message, caller: Caller, rules: Rules) -> None:
    """Raise Denied for what not even everybody who may change a task may do to it."""
    renews = isinstance(command, m.Edit) and (command.argv is not None or command.cwd is not None)
    if renews and caller.uid not in {ROOT, task.uid}:
        raise Denied(
            f"task {task.id} runs as uid {task.uid}: uid {caller.uid} may not change its command",
            "cancel it, and submit your own",
        )
    starts = isinstance(command, m.Retry | m.Release) and task.phase not in ACTIVE
    if task.uid == ROOT and not rules.root_tasks and (renews or starts):
        raise _no_root_tasks(f"task {task.id}")


# --- whom a task runs as ----------------------------------------------------------------------


def identity(asked: m.TaskSpec, caller: Caller, policy: Policy) -> tuple[int, int]:
    """Return (uid, gid) that a task runs as. Raises Denied.

    The gid of another user is that of the user database, never one of the request.
    """
    uid = caller.uid if asked.uid is None else asked.uid
    if policy.runs_as >= 0 and uid != policy.runs_as:
        raise Denied(
            f"this daemon runs everything as uid {policy.runs_as}, nothing as uid {uid}",
            "the daemon of root runs tasks as their users: --endpoint /run/ckptd/ctl.sock",
        )
    if uid == ROOT and not policy.rules.root_tasks:
        raise _no_root_tasks("the task")
    if uid == caller.uid:
        return uid, caller.gid
    if caller.uid != ROOT:
        raise Denied(
            f"uid {caller.uid} may not submit for uid {uid}: only root may",
            f"become that user first, such as: sudo -u '#{uid}' ckptctl submit ...",
        )
    if not policy.rules.submit_as:
        raise Denied(
            f"cannot submit for uid {uid}: submitting for other users is switched off",
            "set submit_as = true in the table [access], then: ckptctl daemon reload",
        )
    if uid not in caller.accounts:
        raise Denied(f"there is no user with uid {uid} on this machine", "see: getent passwd")
    return uid, caller.accounts[uid]


def _no_root_tasks(what: str) -> Denied:
    return Denied(
        f"{what} would run as root: that is switched off",
        "set root_tasks = true in the table [access], or submit as another user",
    )
