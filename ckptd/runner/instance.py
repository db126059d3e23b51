r"""One attempt as the runner knows it: from the effect that asked for it to the end it came to.

    PREPARING -> ORDERED -> RUNNING -> ENDING -> OVER
                    \_____________________/         (a supervisor can die anywhere)

Signals and freezing that are asked for before there is anything to signal are kept for its start.
Read next: `fork.py`.
"""

import signal
from enum import IntEnum

import msgspec

from ckptd.core.port import EndSeen, Identity, MarkSeen, Start
from ckptd.protocol.codec import UNREADABLE
from ckptd.protocol.ids import unit_name
from ckptd.runner.files import NOT_KNOWN
from ckptd.runner.notify import Listener
from ckptd.runner.spawn import Link
from ckptd.runner.stop import Tree

ORDERS_MAX = 3  # supervisors may die before they read one
UNIT_ORDERS_MAX = 5  # of one attempt, where nobody knows what became of the one before
RECORD_COMES_S = 0.25  # after the main process; later the unit is asked


class Stage(IntEnum):
    """How far an attempt is."""

    PREPARING = 0  # its checkpoint is looked for, nothing was sent
    ORDERED = 1  # a supervisor has the order
    RUNNING = 2  # its main process was seen
    ENDING = 3  # its end is known; its files are read, or the rest of its tree dies
    OVER = 4  # the end was reported


class Began(msgspec.Struct, frozen=True):
    """A claim (without `pid`) or a start, as a supervisor tells and keeps it."""

    boot_id: str
    shim_pid: int
    shim_ticks: int  # 0: a daemon's own claim
    pid: int = 0
    ticks: int = 0
    started_ns: int = 0
    resumed_from: int = 0
    home: str = ""  # for which directory it was made; "": by a version that did not say

    @property
    def shim(self) -> Identity:
        """Return who holds the attempt."""
        return Identity(self.boot_id, self.shim_pid, self.shim_ticks)

    @property
    def is_refusal(self) -> bool:
        """Return whether a daemon took the claim, so that nobody will ever run the attempt."""
        return self.shim_ticks == 0

    def is_of(self, home: str) -> bool:
        """Tell whether it was made in this directory, and did not come there in a copy."""
        return self.home in {"", home}


class ExitRecord(msgspec.Struct, frozen=True):
    """The exit record (`attempt.Record`); what never started has no `pid`."""

    task: int
    attempt: int
    cause: str
    code: int
    signal: int
    core: bool
    ended_ns: int
    cpu_s: float
    rss_bytes: int
    oom: bool
    text: str
    started_ns: int = 0
    pid: int = 0
    blame: str = ""

    def seen(self) -> EndSeen:
        """Return it as the sighting that the daemon waits for."""
        return EndSeen(
            self.task, self.attempt, self.cause, self.code, self.signal, self.core,
            self.started_ns, self.ended_ns, self.cpu_s, self.rss_bytes, self.text, self.blame,
        )  # fmt: skip


_began = msgspec.json.Decoder(Began)
_exit = msgspec.json.Decoder(ExitRecord)


def began_of(line: bytes | None) -> Began | None:
    """Return a claim or a start, None where it is missing or nothing that we wrote."""
    try:
        return _began.decode(line) if line else None
    except UNREADABLE:
        return None


def exit_of(line: bytes | None) -> ExitRecord | None:
    """Return an exit record, None where it is missing or nothing that we wrote."""
    try:
        return _exit.decode(line) if line else None
    except UNREADABLE:
        return None


class Instance:
    """What every back end keeps of one attempt until it is forgotten."""

    def __init__(self, task: int, attempt: int, uid: int) -> None:
        self.task = task
        self.attempt = attempt
        self.uid = uid
        self.stage = Stage.PREPARING
        self.pending: list[tuple[int, bool]] = []  # signals that came before the start
        self.is_frozen = False
        self.is_dying = False  # SIGKILL was asked for: its end is to come soon
        self.listener: Listener | None = None
        self.published_ns = NOT_KNOWN  # when `ckpt/` changed last before the start
        self.is_marking = False
        self.wants_mark = False
        self.rests_until_s = 0.0  # monotonic; after a look
        self.marked: MarkSeen | None = None
        self.has_journal = False  # durably, as far as it was looked at
        self.end: EndSeen | None = None
        self.is_synced = False  # whoever recorded the end has synced all files before
        self.warning = ""  # about the checkpoint that was not used

    @property
    def key(self) -> tuple[int, int]:
        """Return its name."""
        return self.task, self.attempt

    @property
    def may_be_frozen(self) -> bool:
        """Tell whether it must be thawed to hear or do anything."""
        return self.is_frozen

    def keep_for_start(self, number: int, *, tree: bool) -> None:
        """Remember a signal that there is nothing to send to yet.

        Bound: each waits once, as the latest of them, as the kernel merges what is pending.
        """
        if (number, tree) in self.pending:
            self.pending.remove((number, tree))
        self.pending.append((number, tree))


class Supervised(Instance):
    """An attempt under a supervisor of the fork back end."""

    def __init__(self, task: int, attempt: int, uid: int) -> None:
        super().__init__(task, attempt, uid)
        self.empty_looks = 0  # in a row, after its supervisor was killed
        self.order = b""  # kept until it is known that a supervisor has read it
        self.orders_left = ORDERS_MAX
        self.spare = -1  # number of its record file; -1: of an earlier daemon
        self.link: Link | None = None  # None: adopted, or not sent yet
        self.shim: Identity | None = None
        self.shim_fd = -1  # pidfd of an adopted supervisor
        self.tree: Tree | None = None

    @property
    def may_be_frozen(self) -> bool:
        """Tell so of what was adopted, too: nobody has told us."""
        return self.is_frozen or self.link is None

    def signal(self, number: int, *, tree: bool) -> None:
        """Signal the main process or the whole tree, now or as soon as there is one."""
        if self.stage != Stage.RUNNING or self.tree is None:
            self.keep_for_start(number, tree=tree)
            return
        if tree:
            self.tree.signal_all(number)
            if self.link is not None and number == signal.SIGKILL:
                self.link.is_worn = True  # see `Group.renew`: its group takes no more births
        else:
            self.tree.signal_main(number)
        if number == signal.SIGKILL and self.is_frozen:  # frozen on v1, it cannot even die
            self.freeze(frozen=False)

    def freeze(self, *, frozen: bool) -> None:
        """Stop the tree where it is, or let it go on."""
        self.is_frozen = frozen
        if self.tree is not None:
            self.tree.freeze(frozen=frozen)

    def catch_up(self) -> None:
        """It has just started: do what was asked of it before."""
        if self.is_frozen:
            self.freeze(frozen=True)
        while self.pending:
            number, tree = self.pending[0]
            self.signal(number, tree=tree)
            del self.pending[0]


class Unit(Instance):
    """An attempt that is a unit."""

    def __init__(self, task: int, attempt: int, uid: int) -> None:
        super().__init__(task, attempt, uid)
        self.name = unit_name(task, attempt)
        self.start: Start | None = None  # None: of an earlier daemon
        self.resumed_from = 0
        self.orders_left = UNIT_ORDERS_MAX
        self.pidfd = -1
        self.is_main_gone = False  # seen to be: the rest is the manager's, and the recorder's
        self.under_way: tuple[int, bool] | None = None  # a signal that is not answered yet
        self.rest_s = RECORD_COMES_S
        self.has_new_job = False  # somebody stops or restarts it, maybe
        # An earlier daemon ordered it. Invariant: never one whose checkpoint we are looking for.
        self.is_taken_up = False
        self.has_left_frozen = False  # adopted: nobody has told us
        self.wish: bool | None = None  # to be frozen or thawed; None: the manager has heard it
        self.is_dying_whole = False  # SIGKILL is for all of it: nothing will follow that

    @property
    def may_be_frozen(self) -> bool:
        """Tell so until an adopted one was thawed."""
        return self.is_frozen or self.has_left_frozen
