"""Clients: they ask, ask again under the same id, wait, give up; as ckptd/client.py does it."""

import random
from collections.abc import Callable
from typing import Any

import msgspec

from ckptd.protocol import codec
from ckptd.protocol import messages as m
from ckptd.protocol.messages import VERBS
from tests.sim.agenda import Agenda, S
from tests.sim.jobs import MOODS, Job
from tests.sim.model import Model
from tests.sim.network import Network

RESEND_S = 2.0
TIMEOUT_S = 10.0
NEVER_RESENT = frozenset({"shutdown"})
PENDING = frozenset({"queued", "waiting"})


class Client:
    """One conversation: at most one call is under way."""

    def __init__(
        self, name: str, agenda: Agenda, network: Network, model: Model, dice: random.Random
    ) -> None:
        self.name, self.agenda, self.network = name, agenda, network
        self.model, self.dice = model, dice
        self.identity = name.encode()
        self.request = ""
        self.calls = self.given_up = 0
        self._frame, self._verb, self._asked_at = b"", "", 0
        self._resend_ns = self._give_up_ns = 0
        self._hold_s = 0.0
        self.seen_running: list[int] = []  # in the rows that it was told last
        self.seen_pending: list[int] = []
        self._then: Callable[[dict[str, Any] | None], None] = lambda _: None
        network.clients[self.identity] = self.hear

    def call(
        self,
        verb: str,
        args: m.Message,
        then: Callable[[dict[str, Any] | None], None],
        *,
        patient: bool,
    ) -> None:
        """Ask; `then` gets the result, None where it was refused or given up."""
        self.calls += 1
        self.request = f"{self.name}-{self.calls}"
        self._frame = codec.encode_request(self.request, verb, args)
        self._verb, self._then = verb, then
        self._hold_s = float(getattr(args, "hold_s", 0.0))
        plain = msgspec.to_builtins(args)
        uniques = [task["argv"][1] for task in plain.get("tasks", ())] if verb == "submit" else []
        if VERBS[verb][2] or verb == "shutdown":
            self.model.sent(self.request, verb, plain, uniques)
        self._asked_at = self.model.now
        now_ns = self.agenda.elapsed_ns
        self._give_up_ns = 0 if patient else now_ns + int((self._hold_s + TIMEOUT_S) * S)
        self._send(is_first=True)

    def _send(self, *, is_first: bool = False) -> None:
        if not is_first:
            self.model.resent(self.request)
        self.network.ask(self.identity, self._frame)
        self._resend_ns = self.agenda.elapsed_ns + int((self._hold_s + RESEND_S) * S)
        request = self.request
        self.agenda.at(self._resend_ns, lambda: self._look(request))

    def _look(self, request: str) -> None:
        """Send again, or give up; what was given up may still be carried out."""
        if self.request != request or self.agenda.elapsed_ns < self._resend_ns:
            return
        if self._give_up_ns and self.agenda.elapsed_ns >= self._give_up_ns:
            self._over(None)
        elif self._verb in NEVER_RESENT:
            self.agenda.after(RESEND_S, lambda: self._look(request))
        else:
            self._send()

    def reconnected(self) -> None:
        """A daemon is there again: what is unanswered is sent at once."""
        if self.request and self._verb not in NEVER_RESENT:
            self._send()
        elif self.request:
            self._over(None)

    def _over(self, result: dict[str, Any] | None) -> None:
        self.given_up += result is None
        self.request = ""
        self._then(result)

    def hear(self, frame: bytes) -> None:
        """Take a reply in; one to an earlier request must be the answer that it had."""
        reply = codec.decode_reply(frame)
        result = msgspec.json.decode(reply.result) if reply.ok else None
        if reply.ok or (reply.error is not None and not reply.error.retryable):
            self.model.answered(reply.id, bytes(reply.result), result)
        if reply.id != self.request:
            return
        if result is not None and "tasks" in result and not VERBS[self._verb][2]:
            self._seen(result["tasks"])
        self._over(result)

    def _seen(self, rows: list[dict[str, Any]]) -> None:
        if self._verb == "show":
            self.model.details(rows)
            rows = [row["row"] for row in rows]
        self.model.seen(rows, self._asked_at)
        self.seen_running = [row["id"] for row in rows if row["phase"] == "running"]
        self.seen_pending = [row["id"] for row in rows if row["phase"] in PENDING]


class Person(Client):
    """A client that does what people do, by chance; `is_leaving` ends it at its next rest."""

    def __init__(
        self, name: str, agenda: Agenda, network: Network, model: Model, dice: random.Random
    ) -> None:
        super().__init__(name, agenda, network, model, dice)
        self.ids: list[int] = []
        self.is_leaving = self.has_left = False
        self.acts_left = 1
        self.pause_s = 1.0
        self._submits = 0
        self._keys = 0
        self._keyed: list[m.TaskSpec] = []
        self.wall_ns: Callable[[], int] = lambda: 0

    def live(self) -> None:
        """Do one thing after the other."""
        self.acts_left -= 1
        if self.is_leaving or self.acts_left < 0:
            self.has_left = True
            return
        act = self.dice.choices(*_ACTS)[0]
        getattr(self, act)()

    def _next(self, _: dict[str, Any] | None) -> None:
        self.agenda.after(self.dice.random() * self.pause_s, self.live)

    def _select(self) -> m.Selector:
        ids = self.ids[-8:] or [1]
        return m.Selector(
            ids=tuple(sorted(set(self.dice.choices(ids, k=self.dice.choice([1, 1, 2])))))
        )

    def _change(self, verb: str, args: m.Message) -> None:
        self.call(verb, args, self._next, patient=self.dice.random() < 0.7)

    # --- acts ---

    def submit(self) -> None:
        tasks = tuple(self._spec() for _ in range(self.dice.choice([1, 1, 1, 2, 4])))
        env = {"A": self.name} if self.dice.random() < 0.3 else {}
        self.call("submit", m.Submit(tasks, env), self._submitted, patient=self.dice.random() < 0.7)

    def _spec(self) -> m.TaskSpec:
        dice = self.dice
        self._submits += 1
        unique = f"{self.name}.{self._submits}"
        items = dice.randint(1, 6)
        mood = dice.choice(MOODS) if dice.random() < 0.6 else "calm"
        job = Job(unique, items, dice.choice([0.01, 0.1, 1.0, 5.0]), dice.random() < 0.6, mood)
        needs: tuple[m.Dependency, ...] = ()
        if self.ids and dice.random() < 0.15:
            when = dice.choice(["ok", "fail", "any"])
            needs = (m.Dependency(dice.choice(self.ids[-5:]), when=when),)
        key = ""
        if dice.random() < 0.2:
            self._keys += dice.random() < 0.8
            key = f"{self.name}-key-{self._keys}"
        spec = m.TaskSpec(
            job.argv(),
            key=key,
            priority=dice.randint(-2, 2),
            after=needs,
            hold=dice.random() < 0.05,
            in_s=dice.choice([0.0, 0.0, 0.0, 3.0, 60.0]),
            timeout_s=dice.choice([0.0, 0.0, 4.0, 60.0]),
            deadline_ns=self.wall_ns() + 40 * S if dice.random() < 0.05 else 0,
            retries=dice.choice([None, 0, 1, 3]),
            grace_s=dice.choice([None, 0.0, 1.0]),
            memory_bytes=4 << 20 if mood == "hungry" else 0,
            on_oom=dice.choice(["", "fail", "hold", "retry:x2,max=8M"]) if mood == "hungry" else "",
            labels={"u": unique},
            on_exit={"1": dice.choice(["transient", "again", "fail"])}
            if dice.random() < 0.1
            else {},
        )
        if key:
            self._keyed.append(spec)
        return spec

    def _submitted(self, result: dict[str, Any] | None) -> None:
        if result is not None:
            self.ids += result["ids"]
        self._next(result)

    def again(self) -> None:
        """Submit what was submitted under a key before: it must not become a second task."""
        if not self._keyed:
            self.submit()
            return
        spec = self.dice.choice(self._keyed)
        self.call("submit", m.Submit((spec,)), self._submitted, patient=True)

    def wait(self) -> None:
        goal = self.dice.choice(["done", "done", "running", "checkpoint"])
        hold_s = self.dice.choice([0.0, 1.0, 30.0])
        asked = m.Wait(self._select(), goal=goal, any=self.dice.random() < 0.3, hold_s=hold_s)
        self.call("wait", asked, self._next, patient=self.dice.random() < 0.7)

    def status(self) -> None:
        newest = self.dice.random() < 0.5
        self.call("status", m.Status(limit=100, newest=newest), self._next, patient=False)

    def show(self) -> None:
        self.call("show", m.Show(self._select()), self._next, patient=False)

    def cancel(self) -> None:
        grace_s = self.dice.choice([None, 0.0, 2.0])
        self._change("cancel", m.Cancel(self._select(), grace_s, self.dice.random() < 0.7))

    def kill(self) -> None:
        self._change("kill", m.Kill(self._select()))

    def signal(self) -> None:
        chosen = self._one_of(self.seen_running) if self.dice.random() < 0.7 else self._select()
        self._change("signal", m.Signal(chosen, self.dice.choice([10, 15, 9, 17])))

    def retry(self) -> None:
        self._change("retry", m.Retry(self._select(), fresh=self.dice.random() < 0.3))

    def pause(self) -> None:
        """Pause what was seen to run."""
        chosen = self._one_of(self.seen_running)
        self._for_a_while("pause", m.Pause(chosen), "resume", m.Resume(chosen))

    def hold(self) -> None:
        """Hold what was seen to wait for its turn."""
        chosen = self._one_of(self.seen_pending)
        self._for_a_while("hold", m.Hold(chosen), "release", m.Release(chosen))

    def _one_of(self, ids: list[int]) -> m.Selector:
        return m.Selector(ids=(self.dice.choice(ids[-4:] or self.ids[-1:] or [1]),))

    def _for_a_while(self, verb: str, args: m.Message, back: str, again: m.Message) -> None:
        """Ask for something, and mostly for the contrary a moment later."""

        def go_on(_: dict[str, Any] | None) -> None:
            if self.dice.random() < 0.7:
                self.agenda.after(self.dice.random() * 5, lambda: self._change(back, again))
            else:
                self._next(None)

        self.call(verb, args, go_on, patient=self.dice.random() < 0.7)

    def edit(self) -> None:
        self._change("edit", m.Edit(self._select(), priority=self.dice.randint(-9, 9)))

    def group(self) -> None:
        parallel = self.dice.choice([1, 2, 4])
        paused = self.dice.random() < 0.2
        self._change("group_set", m.GroupSet("default", parallel, paused))

    def clean(self) -> None:
        self._change("clean", m.Clean(self._select()))

    def other(self) -> None:
        """Do what takes nothing but a selection."""
        verb = self.dice.choice(["pause", "resume", "hold", "release", "checkpoint_now", "drop"])
        self._change(verb, m.TASK_CHANGES[verb](self._select()))  # type: ignore[call-arg]

    def events(self) -> None:
        self.call("events", m.Events(since=0, limit=100), self._next, patient=False)

    def shutdown(self) -> None:
        tasks = self.dice.choice(["keep", "keep", "checkpoint", "kill"])
        self.call("shutdown", m.Shutdown(tasks), self._next, patient=False)


_WEIGHTS = {
    "submit": 30, "again": 3, "wait": 20, "status": 6, "show": 10, "cancel": 5, "kill": 2,
    "signal": 3, "retry": 6, "edit": 2, "group": 2, "pause": 4, "hold": 4, "clean": 3,
    "other": 10, "events": 3, "shutdown": 1,
}  # fmt: skip
_ACTS = (list(_WEIGHTS), list(_WEIGHTS.values()))


class Janitor(Client):
    """Comes when all is quiet: lets everything go on that waits for a person, and waits for all."""

    def __init__(self, agenda: Agenda, network: Network, model: Model, dice: random.Random) -> None:
        super().__init__("janitor", agenda, network, model, dice)
        self.is_done = False
        self.rows: list[dict[str, Any]] = []

    def begin(self, _: object = None) -> None:
        group = m.GroupSet("default", 4, paused=False)
        self.call("group_set", group, self._release, patient=True)

    def _release(self, _: object) -> None:
        held = m.Selector(all=True, phases=("held",))
        self.call("release", m.Release(held), self._resume, patient=True)

    def _resume(self, _: object) -> None:
        paused = m.Selector(all=True, phases=("paused",))
        self.call("resume", m.Resume(paused), self._drop, patient=True)

    def _drop(self, _: object) -> None:
        """Give up what only a person could free, so that what waits for it goes on."""
        stuck = m.Selector(all=True, phases=("quarantined", "blocked"))
        self.call("drop", m.Drop(stuck), self._wait, patient=True)

    def _wait(self, _: object) -> None:
        asked = m.Wait(m.Selector(all=True), hold_s=30.0)
        self.call("wait", asked, self._waited, patient=True)

    def _waited(self, result: dict[str, Any] | None) -> None:
        rows = result["tasks"] if result is not None else ()
        stuck = any(row["phase"] in {"quarantined", "blocked"} for row in rows)
        if result is None or not result["met"] or stuck:
            self.agenda.after(1.0, self.begin)
            return
        self.rows = rows
        self.is_done = True
