"""One request in, one reply out, now or later: what every verb does in the daemon.

Mutating verbs go through `decide` and leave an Answered record, so that a resend under the same
id gets the same answer. Waiting verbs are parked until State moves. Replies are only collected
here; `loop.py` sends them after the commit. Read next: `engine.py`, `parked.py`.
"""

import os
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import msgspec

from ckptd.core import query
from ckptd.core.decide import Case, decide
from ckptd.core.events import event, fitted, may_follow
from ckptd.core.policy import Caller, Now
from ckptd.core.records import ENDED, STUCK, Answered
from ckptd.core.rights import check_verb, may_open
from ckptd.core.rights import roles as roles_of
from ckptd.core.select import one
from ckptd.daemon.engine import Engine, decode
from ckptd.daemon.files import Files
from ckptd.daemon.parked import Parked
from ckptd.door.access import Roles, accounts
from ckptd.door.server import Incoming
from ckptd.host.journal import ERROR, Journal, Kind
from ckptd.protocol import codec
from ckptd.protocol import messages as m
from ckptd.protocol.errors import BadRequest, Busy, CkptdError, Internal, ShuttingDown
from ckptd.protocol.limits import PROTOCOL_VERSION, REPLY_BYTES_MAX
from ckptd.protocol.messages import VERBS
from ckptd.protocol.version import VERSION

LATE_MAX = 64
LOG_BYTES_MAX = 1 << 20  # of log read for one page of events; one frame may be larger
PAGE_BYTES_MAX = REPLY_BYTES_MAX // 2  # of events in it
USES_RESERVE = frozenset(
    {"cancel", "kill", "signal", "pause", "resume", "hold", "group_set", "clean"}
)
"""What must be possible on a full disk; everything else waits for room."""

Outbox = list[tuple[Incoming, bytes]]


class Control(Protocol):
    """What requests may ask of the daemon itself; `loop.py` is it."""

    def daemon_status(self) -> m.DaemonStatus:
        """Return how the daemon is."""
        ...

    def effective_config(self) -> m.EffectiveConfig:
        """Return the configuration in force."""
        ...

    def reload(self) -> m.Reloaded:
        """Read the configuration again. Raises BadConfig."""
        ...

    def shut_down(self, tasks: str) -> None:
        """Begin to stop."""
        ...

    def counters(self) -> dict[str, float]:
        """Return what was counted since the start."""
        ...

    def hold_max_s(self) -> float:
        """Return the longest time that a request may be parked."""
        ...


class Requests:
    """The daemon's desk."""

    def __init__(
        self, engine: Engine, control: Control, files: Files, journal: Journal, roles: Roles
    ) -> None:
        self._engine, self._control, self._files = engine, control, files
        self._journal, self._roles, self._mono_ns = journal, roles, 0
        self._parked = Parked()
        self._worker = ThreadPoolExecutor(1, "ckptd-verify")
        self._late: list[tuple[Incoming, Future[m.CheckpointList]]] = []
        self.outbox: Outbox = []
        self.on_late: Callable[[], None] = lambda: None
        self._queries: dict[str, Callable[[Incoming, Any, Now], m.Answer | None]] = {
            "status": lambda r, q, now: query.status(self._view(r, now), q),
            "show": lambda r, q, now: query.show(self._view(r, now), q, self._files.state_dir),
            "groups": lambda r, _, now: query.groups(self._view(r, now)),
            "wait": self._wait,
            "events": self._events,
            "output": self._output,
            "checkpoints": self._checkpoints,
            "stats": self._stats,
            "ping": lambda r, _q, _n: self._pong(r),
            "daemon": self._daemon,
            "config": lambda _r, _q, _n: self._control.effective_config(),
            "reload": self._reload,
            "shutdown": self._shutdown,
        }

    # --- one request --------------------------------------------------------------------------

    def take(self, request: Incoming, now: Now, mono_ns: int) -> None:
        """Answer one request, or park it."""
        self._mono_ns = mono_ns
        try:
            if VERBS[request.verb][2]:
                answer = self._change(request, now)
            else:
                rules = self._engine.policy.rules
                check_verb(request.verb, self._caller(request), rules)
                found = self._queries[request.verb](request, request.args, now)
                if found is None:
                    return
                answer = _encoded(request.verb, found)
            self.outbox.append((request, codec.encode_reply(request.request_id, answer)))
        except CkptdError as refused:
            self.outbox.append((request, codec.encode_error(request.request_id, refused)))
        except Exception as bug:  # noqa: BLE001 - a bug in one verb must not end the daemon
            self._journal.event(Kind.INTERNAL_ERROR, traceback.format_exc(), ERROR)
            error = Internal(f"{request.verb} failed: {bug!r}", "this is a bug in ckptd")
            self.outbox.append((request, codec.encode_error(request.request_id, error)))

    def _change(self, request: Incoming, now: Now) -> bytes:
        engine, uid = self._engine, request.peer.uid
        known = engine.state.answers.get(f"{uid}:{request.request_id}")
        if known is not None:
            return known
        is_small = request.verb in USES_RESERVE
        if engine.draining and not is_small:
            raise ShuttingDown("the daemon is shutting down", "it takes requests after its start")
        case = Case(engine.state, self._author(request), now, engine.policy)
        records, result = decide(case, request.args)
        answer = _encoded(request.verb, result)  # refused before anything is changed
        if not _is_dry(request.args):
            # Also "nothing was changed" is an answer: a copy that comes later must not change it.
            records.append(Answered(request.request_id, uid, answer))
            engine.admit(records, is_small=is_small)
        return answer

    def _caller(self, request: Incoming) -> Caller:
        return self._roles.caller(request.peer, self._engine.policy.rules, self._mono_ns)

    def _author(self, request: Incoming) -> Caller:
        """Return who asks for a change, with the accounts that a submit for others needs."""
        caller, asked = self._caller(request), request.args
        if caller.uid != 0 or not isinstance(asked, m.Submit):
            return caller
        others = {task.uid for task in asked.tasks if task.uid is not None}
        if not others or not self._engine.policy.rules.submit_as:
            return caller
        return msgspec.structs.replace(caller, accounts=accounts(others))

    def _view(self, request: Incoming, now: Now) -> query.View:
        engine = self._engine
        caller = self._caller(request)
        return query.View(engine.state, engine.observed, caller, now, engine.policy)

    # --- waiting ------------------------------------------------------------------------------

    def _wait(self, request: Incoming, asked: m.Wait, now: Now) -> m.Waited | None:
        view = self._view(request, now)
        found = query.waited(view, asked)
        if found.met or not self._may_park(request, asked.hold_s):
            return found
        until = self._until(request, asked.hold_s)
        ids = [row.id for row in found.tasks]
        # By ids from now on: a name or a label would be looked for among all tasks every time.
        named = msgspec.structs.replace(asked, select=m.Selector(ids=tuple(ids)))
        if asked.goal == "done" and not asked.any:  # nothing is met before the last open one ends
            ids = [row.id for row in found.tasks if row.phase not in m.FINISHED][-1:] or ids
        self._parked.park_wait(request.again(named), ids, until)
        return None

    def _events(self, request: Incoming, asked: m.Events, _: Now) -> m.EventPage | None:
        wal = self._engine.wal
        since = wal.durable_lsn if asked.since < 0 else asked.since
        page = self._page(request, asked, since)
        is_read_out = page.next >= wal.durable_lsn
        if page.events or not is_read_out or not self._may_park(request, asked.hold_s):
            return page
        until = self._until(request, asked.hold_s)
        parked = request.again(msgspec.structs.replace(asked, since=page.next))
        self._parked.park_follow(parked, until)
        return None

    def _page(self, request: Incoming, asked: m.Events, since: int) -> m.EventPage:
        caller, last = self._caller(request), since
        found: list[m.Event] = []
        left_bytes = PAGE_BYTES_MAX
        for frame in self._engine.wal.read(since, LOG_BYTES_MAX):
            records = decode(frame.payload) if frame.payload else ()  # none: lost to a salvage
            for offset, record in enumerate(records):
                lsn = frame.first_lsn + offset
                if lsn <= since:
                    continue
                if len(found) == asked.limit:
                    return m.EventPage(tuple(found), last)
                told = event(lsn, record)
                is_asked = told is not None and asked.task in (0, told.task)
                if told is not None and is_asked and may_follow(self._engine.state, told, caller):
                    told, size = fitted(told)
                    left_bytes -= size
                    if left_bytes < 0:
                        return m.EventPage(tuple(found), last)
                    found.append(told)
                last = lsn
            last = max(last, frame.first_lsn + frame.count - 1)
        return m.EventPage(tuple(found), last)

    def _may_park(self, request: Incoming, hold_s: float) -> bool:
        return hold_s > 0 and (not request.until_mono_ns or request.until_mono_ns > self._mono_ns)

    def _until(self, request: Incoming, hold_s: float) -> int:
        if not request.until_mono_ns:
            held_s = min(hold_s, self._control.hold_max_s())
            request.until_mono_ns = self._mono_ns + int(held_s * 1e9)
        return request.until_mono_ns

    def revisit(self, touched: Iterable[int], now: Now, mono_ns: int, *, grown: bool) -> None:
        """Ask parked requests again that this turn concerns or whose time is over."""
        again = self._parked.concerned(touched) + self._parked.expired(mono_ns)
        if grown:
            again += self._parked.followers()
        for request in again:
            self.take(request, now, mono_ns)
        done = [pair for pair in self._late if pair[1].done()]
        self._late = [pair for pair in self._late if not pair[1].done()]
        for request, future in done:
            self._tell_late(request, future)

    def wake_mono_ns(self) -> int:
        """Return when a parked request must be answered, 0 for never."""
        return self._parked.wake_mono_ns()

    # --- files --------------------------------------------------------------------------------

    def _output(self, request: Incoming, asked: m.Output, _: Now) -> m.Answer:
        task = one(self._engine.state, asked.task, self._caller(request), may_open)
        over = task.phase in ENDED or task.phase in STUCK
        return self._files.output(asked, over=over)

    def _checkpoints(self, request: Incoming, asked: m.Checkpoints, _: Now) -> None:
        """Read a task's files, which may be many and large, off the loop."""
        task = one(self._engine.state, asked.task, self._caller(request), may_open)
        if len(self._late) >= LATE_MAX:
            raise Busy(f"{LATE_MAX} requests read checkpoints already", "try again in a moment")
        future: Future[m.CheckpointList] = self._worker.submit(
            self._files.checkpoints,
            task.id,
            task.uid,
            verify=asked.verify,
            result=asked.result,
        )
        self._late.append((request, future))
        future.add_done_callback(lambda _: self.on_late())

    def _tell_late(self, request: Incoming, future: Future[m.CheckpointList]) -> None:
        try:
            answer = codec.encode_answer(future.result())
            self.outbox.append((request, codec.encode_reply(request.request_id, answer)))
        except Exception as failed:  # noqa: BLE001 - a hostile file must not end the daemon
            text = f"cannot read the checkpoints: {failed!r}"
            error = Internal(text, "look at the files of the task")
            self.outbox.append((request, codec.encode_error(request.request_id, error)))

    # --- the daemon ---------------------------------------------------------------------------

    def _pong(self, request: Incoming) -> m.Pong:
        epoch, caller = self._engine.state.epoch, self._caller(request)
        us = VERSION, PROTOCOL_VERSION, os.getpid(), os.geteuid(), epoch
        return m.Pong(*us, caller.uid, roles_of(caller))

    def _daemon(self, request: Incoming, _: m.Empty, now: Now) -> m.Answer:
        status = self._control.daemon_status()
        seen = query.totals_of(self._view(request, now))  # how busy others are is theirs to know
        return msgspec.structs.replace(status, totals=seen)

    def _stats(self, request: Incoming, _: m.Empty, now: Now) -> m.Stats:
        view = self._view(request, now)
        sees_all = view.caller.admin or view.caller.reads
        by_group = {row.name: row.phases for row in query.groups(view).groups if sees_all}
        return m.Stats(query.totals_of(view), by_group, self._control.counters())

    def _reload(self, _: Incoming, __: m.Empty, ___: Now) -> m.Answer:
        return self._control.reload()

    def _shutdown(self, _: Incoming, asked: m.Shutdown, __: Now) -> m.Answer:
        self._control.shut_down(asked.tasks)
        return m.Done()

    def close(self) -> None:
        """Let the worker go."""
        self._worker.shutdown(wait=False, cancel_futures=True)


def _encoded(verb: str, result: m.Answer) -> bytes:
    """Return the bytes of an answer. Raises BadRequest where no reply can carry them."""
    answer = codec.encode_answer(result)
    if len(answer) > REPLY_BYTES_MAX:
        raise BadRequest(
            f"the answer to {verb} has {len(answer)} bytes, over {REPLY_BYTES_MAX}",
            "narrow the selection or the limit",
        )
    return answer


def _is_dry(args: m.Message) -> bool:
    """Tell whether a changing verb was only asked what it would change."""
    return isinstance(args, m.Clean) and args.dry_run
