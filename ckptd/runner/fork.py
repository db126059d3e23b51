"""The fork back end of the Runner port: a supervisor process per running attempt.

Start:  prepare files -> (worker: find the checkpoint) -> order to a supervisor -> StartSeen.
End:    exit record -> (worker: read what was saved -> MarkSeen) -> EndSeen.
Killed supervisor: its socket (adopted: its pidfd) says so at once; without an exit record the tree
is killed until it is empty, and only then the end is told: `lost`.
Adoption: by the files in `attempts/`, see `adopt`. The daemon's own death needs no code here.
Read next: `instance.py`, `shim.py`, `marks.py`.
"""

import errno
import os
import signal
import time
from functools import partial

from ckptd.core.port import Deliver, EndSeen, Identity, Start, StartSeen
from ckptd.runner import attempt, cgroup, environment, identity, original, spawn
from ckptd.runner.backend import Backend
from ckptd.runner.cgroup import Group
from ckptd.runner.claims import Claims
from ckptd.runner.environment import Users
from ckptd.runner.instance import Began, Stage, Supervised, began_of, exit_of
from ckptd.runner.spawn import ENDED, FENCED, STARTED, Key, Pool
from ckptd.runner.stop import Tree, send
from ckptd.storage.blobs import Found

SIGHTINGS_PER_POLL_MAX = 1_000
EMPTY_LOOKS = 2  # one look at /proc can miss what forks or executes at that very moment
LOOK_AGAIN_S = 0.01  # at a tree that does not die at once, or a start that is not written yet
LOOK_LATER_S = 1.0  # at a tree that has not died for long
KILL_ENDS_S = 5.0  # a supervisor that has not told the end by then may be stopped
WATCH_FILES_AFTER_S = 1.0  # adding and removing an inotify watch costs as much as running true
SPARE_SUPERVISORS = 2  # made before they are needed


class ForkRunner(Backend[Supervised]):
    """Runs attempts under supervisors of its own."""

    name = "fork"

    def __init__(
        self,
        state_dir: str,
        run_dir: str,
        *,
        boot_id: str = "",
        ckpt_dir: str | None = None,
        has_cgroups: bool = True,
    ) -> None:
        super().__init__(state_dir, run_dir, boot_id, ckpt_dir)
        self._claims = Claims(state_dir, self.boot_id)
        self._roots = (
            cgroup.discover(os.path.realpath(state_dir)) if has_cgroups else cgroup.Roots()
        )
        self.cgroup = str(self._roots)
        cgroup.sweep(self._roots, lambda pid, ticks: not identity.is_alive(pid, ticks))
        self._users = Users()
        self._pool = Pool(state_dir, self.boot_id, self._roots, self._watch, self._told)
        self._pool.warm(SPARE_SUPERVISORS)

    def _made(self, task: int, attempt: int, uid: int) -> Supervised:
        return Supervised(task, attempt, uid)

    def _let_go(self) -> None:
        """Idle supervisors exit, busy ones finish their attempt and keep its record."""
        for one in self._instances.values():
            if one.link is not None:
                one.link.socket.close()
            if one.shim_fd >= 0:
                os.close(one.shim_fd)
        self._pool.close()

    # --- starting ---------------------------------------------------------------------------

    def _launch(self, one: Supervised, start: Start, found: Found) -> None:
        place = self._place(one)
        try:
            order = environment.order(start, place, found, self._ckpt_dir, self._claims.reign)
        except ValueError as error:
            self._refuse(one, "spawn_error", str(error))
            return
        self._users.set(order, start.uid, start.gid)
        order.spare = one.spare = self._claims.take_spare()
        roots = self._roots
        self._warn_of_limits(one, start, roots.controllers, has_memory=roots.has_memory)
        one.stage = Stage.ORDERED
        one.order = order.pack()
        self._hand_over(one)

    def _hand_over(self, one: Supervised) -> None:
        if one.orders_left == 0:  # its forks are refused, or somebody kills them
            self._refuse(one, "spawn_error", "its supervisors died unborn", spawn.shortage())
            return
        one.orders_left -= 1
        try:
            one.link = self._pool.hand_over(one.key, one.order)
        except OSError as error:  # its number tells whether another try is worth it
            text = f"no supervisor process can be made: {error.strerror}"
            self._refuse(one, "spawn_error", text, error)

    def _refuse(
        self, one: Supervised, cause: str, text: str, error: Exception | None = None
    ) -> None:
        """End an attempt that no supervisor has: take the claim first, so that none ever will."""
        self._claims.refuse(*one.key)
        is_error = cause == "spawn_error"
        code = (getattr(error, "errno", 0) or errno.EINVAL) if is_error else 0
        self._over(one, EndSeen(*one.key, cause, code, ended_ns=time.time_ns(), text=text))

    # --- what supervisors say -----------------------------------------------------------------

    def _told(self, key: Key, kind: bytes, body: bytes) -> None:
        one = self._instances.get(key)
        if one is None:
            return
        if kind == STARTED:
            began = began_of(attempt.checked(body))
            assert began is not None, "a supervisor told a start that is none"
            self._began(one, began)
            return
        one.link = None
        if kind == ENDED:
            record = exit_of(attempt.checked(body))
            assert record is not None, "a supervisor told an end that is none"
            self._over(one, record.seen())
        elif kind == FENCED:
            self._watch.patiently(partial(self._take_up, one))
        else:
            self._watch.patiently(partial(self._supervisor_died, one))

    def _began(self, one: Supervised, began: Began) -> None:
        one.order = b""
        one.shim = began.shim
        one.tree = self._tree(one, began)
        one.stage = Stage.RUNNING
        self._see(
            StartSeen(
                *one.key, one.shim, began.pid, began.started_ns, began.resumed_from, one.warning
            )
        )
        self._watch.patiently(one.catch_up)

    def _tree(self, one: Supervised, began: Began | None) -> Tree:
        shim = one.shim or Identity(self.boot_id, 0, 0)
        group = Group(self._roots if shim.pid else cgroup.Roots(), f"{shim.pid}.{shim.ticks}")
        named = f"CKPTD_DIR={self._files.directory(one.task)}", f"CKPTD_ATTEMPT={one.attempt}"
        main = (began.pid, began.ticks) if began else (0, 0)
        return Tree(group, main, (shim.pid, shim.ticks), tuple(map(os.fsencode, named)))

    # --- ends -----------------------------------------------------------------------------------

    def _over(self, one: Supervised, end: EndSeen) -> None:
        self._unfollow(one)
        if one.is_frozen:  # the group is the next attempt's
            self._watch.patiently(partial(one.freeze, frozen=False))
        super()._over(one, end)

    # --- dead supervisors and adoption ----------------------------------------------------------

    def _take_up(self, one: Supervised) -> None:
        """Find out what became of an attempt that an earlier daemon ordered.

        | exit record | claim              | then                                       |
        | whole       |                    | EndSeen as recorded                        |
        | none        | of another boot    | EndSeen(reboot)                            |
        | none        | of another store   | once that has ended: EndSeen(lost)         |
        | none        | its process lives  | StartSeen, and watched by pidfd            |
        | none        | its process is dead| tree killed, then EndSeen(lost)            |
        | none        | none               | claimed by us, then EndSeen(not_started)   |
        """
        found = self._claims.read(*one.key)
        if found is None:
            self._claims.refuse(*one.key)
            found = self._claims.read(*one.key)
        if found is None:  # a full disk, and nobody to run it
            self._end_without_record(one, "not_started", "the order never reached a supervisor")
            return
        record = exit_of(found.exit)
        claim = began_of(found.claim)
        if record is not None and (record.task, record.attempt) == one.key:
            self._over(one, record.seen())
        elif claim is None or claim.boot_id != self.boot_id:  # none: torn by a power loss
            self._end_without_record(one, "reboot", "the machine was restarted meanwhile")
        elif claim.is_refusal:
            self._end_without_record(one, "not_started", "the order never reached a supervisor")
        elif not claim.is_of(self._claims.home):
            self._outlast(one, claim, began_of(found.start))
        else:
            one.shim = claim.shim
            self._follow(one)

    def _outlast(self, one: Supervised, claim: Began, start: Began | None) -> None:
        """Wait for the end of an attempt that runs in the store that ours is a copy of.

        Its processes are that store's: we neither hear of them nor send them anything. The daemon
        does not start beside them; this is for one whose record could not be read by then.
        """
        if original.runs(claim, start):
            self._watch.after(
                LOOK_LATER_S, partial(self._watch.patiently, partial(self._take_up, one))
            )
        else:
            self._end_without_record(one, "lost", "it ran in the store that this is a copy of")

    def _end_without_record(self, one: Supervised, cause: str, text: str) -> None:
        found = self._claims.read(*one.key)
        start = began_of(found.start) if found else None
        started_ns = start.started_ns if start else 0
        end = EndSeen(*one.key, cause, started_ns=started_ns, ended_ns=time.time_ns(), text=text)
        self._over(one, end)

    def _follow(self, one: Supervised) -> None:
        """Watch a supervisor that is not ours by its pidfd."""
        assert one.shim is not None
        fd = identity.open_exactly(one.shim.pid, one.shim.ticks)
        if fd < 0:
            self._supervisor_died(one)
            return
        one.shim_fd = fd
        self._watch.add(fd, partial(self._pidfd_fired, one))
        one.stage = Stage.ORDERED
        self._listen(one)
        self._watch.patiently(partial(self._look_for_start, one))
        self._marks.hinted(one)

    def _look_for_start(self, one: Supervised) -> None:
        if one.stage != Stage.ORDERED:
            return
        found = self._claims.read(*one.key)
        start = began_of(found.start) if found else None
        if start is not None:
            self._began(one, start)
        else:
            look = partial(self._look_for_start, one)
            self._watch.after(LOOK_AGAIN_S, partial(self._watch.patiently, look))

    def _pidfd_fired(self, one: Supervised) -> None:
        self._unfollow(one)
        self._watch.patiently(partial(self._supervisor_died, one))

    def _unfollow(self, one: Supervised) -> None:
        if one.shim_fd >= 0:
            self._watch.remove(one.shim_fd)
            os.close(one.shim_fd)
            one.shim_fd = -1

    def _supervisor_died(self, one: Supervised) -> None:
        """Its exit record, or the death of its whole tree, comes before the end is told."""
        found = self._claims.read(*one.key)
        claim = began_of(found.claim) if found else None
        if found is None and one.order and not one.is_dying:
            self._hand_over(one)  # nobody has read it, nobody else ever can
        elif found is None or found.exit is not None or claim is None or claim.is_refusal:
            self._take_up(one)
        else:
            one.stage = Stage.ENDING
            one.shim = claim.shim
            one.tree = self._tree(one, began_of(found.start))
            one.tree.is_orphaned = True
            self._watch.patiently(partial(self._kill_rest, one, LOOK_AGAIN_S))

    def _kill_rest(self, one: Supervised, rest_s: float) -> None:
        assert one.tree is not None
        one.tree.signal_all(signal.SIGKILL)
        one.empty_looks = one.empty_looks + 1 if one.tree.is_empty() else 0
        if one.empty_looks >= EMPTY_LOOKS:
            one.tree.group.remove()
            self._end_without_record(one, "lost", "its supervisor was killed; what it ran, too")
        else:
            again = partial(self._kill_rest, one, min(2 * rest_s, LOOK_LATER_S))
            self._watch.after(rest_s, partial(self._watch.patiently, again))

    # --- the other effects ------------------------------------------------------------------------

    def _freeze(self, one: Supervised, *, frozen: bool) -> None:
        one.freeze(frozen=frozen)

    def _deliver(self, effect: Deliver) -> None:
        one = self._running(effect.task, effect.attempt)
        if one is None:
            return
        if effect.signal == signal.SIGKILL and not one.is_dying:
            one.is_dying = True
            self._rouse(one, signal.SIGCONT)
            self._watch.after(KILL_ENDS_S, partial(self._watch.patiently, partial(self._end, one)))
        one.signal(effect.signal, tree=effect.tree)

    def _rouse(self, one: Supervised, number: int) -> None:
        """Signal who is to tell the end, where it is known; else who of ours stands still."""
        if one.shim is not None:
            send(one.shim.pid, one.shim.ticks, number)
        elif one.stage == Stage.ORDERED:
            shims = {other.shim.pid for other in self._instances.values() if other.shim}
            self._pool.signal_stopped(number, shims)

    def _end(self, one: Supervised) -> None:
        """End a supervisor that does not tell an end: its attempt is `lost`, and so is the tree."""
        if one.stage >= Stage.ENDING or self._instances.get(one.key) is not one:
            return
        stat = identity.look(one.shim.pid) if one.shim else None
        if stat is None or stat.is_stopped or (one.tree and one.tree.is_empty()):
            self._rouse(one, signal.SIGKILL)
        self._watch.after(KILL_ENDS_S, partial(self._watch.patiently, partial(self._end, one)))

    def _forget(self, one: Supervised | None, task: int, attempt: int) -> None:
        self._claims.forget(task, attempt, one.spare if one is not None else -1)
