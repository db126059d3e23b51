"""`ckpt pipe`: the contract for every language, one JSON object per line, answered once durable.

    -> {"op":"hello","protocol":1}
    <- {"ok":true,"protocol":1,"task":12,"attempt":3,"epoch":4,"resume":true,"last":"...","seq":7}
    -> {"op":"step_done","name":"fetch","result":{"rows":700}}
    <- {"ok":true,"seq":5}
    -> {"op":"step_query","name":"fetch"}
    <- {"ok":true,"done":true,"started":false,"result":{"rows":700}}
    -> {"op":"fly"}
    <- {"ok":false,"error":{"code":"unknown_op","message":"..."}}

Answers come in the order of the requests; an "id" is handed back. All requests that lie on stdin
together are made durable by one sync, so a task may write many before it reads.
Invariant: no answer leaves before the facts of every request up to it are durable.
Invariant: a line without its newline at the end of the input is no request.
Read next: `docs/CHECKPOINTS.md`.
"""

import json
import math
import os
from typing import Any, Final

from ckptd.sdk.save import save_from
from ckptd.sdk.surroundings import Surroundings
from ckptd.storage import facts
from ckptd.storage.blobs import newest_sealed
from ckptd.storage.disk import append_all
from ckptd.storage.facts import Facts, read_durable
from ckptd.storage.journal import FACT_BYTES_MAX, Fact, Journal, StaleAttempt, TooLarge
from ckptd.storage.untrusted import Damaged, NotTrusted, refuse_deep
from ckptd.streams import broken

PROTOCOL: Final = 1
LINE_BYTES_MAX: Final = 1 << 20
_READ_BYTES: Final = 1 << 18
_FACT_BYTES_MAX: Final = FACT_BYTES_MAX - 1_024  # with what the journal adds to it
_GROUP_FACTS_MAX: Final = 1_000
_GROUP_BYTES_MAX: Final = 2 << 20

Answer = dict[str, Any]


class Refused(Exception):
    """The request cannot be carried out; `code` is stable, the text is for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Pipe:
    """One conversation with a task: reads requests, groups their facts, answers."""

    def __init__(self, around: Surroundings) -> None:
        self.around = around
        self.journal = Journal(around.dir, around.task, around.attempt, around.epoch)
        self.known = self._read()
        self.group: list[Fact] = []
        self.group_bytes = 0
        self.answers: list[Answer] = []
        self.settled = 0  # so many of them cannot be taken back any more
        self.waiting: list[Answer] = []  # answers whose "seq" is that of a fact in the group
        self.is_over = False

    def _read(self) -> Facts:
        around = self.around
        found = read_durable(around.dir, around.task, os.getuid(), around.attempt)
        if found.problem:
            raise Damaged(found.problem)
        return found

    def run(self, source: int, sink: int) -> int:
        """Answer until the input ends; return the exit code, 75 where a newer attempt exists."""
        rest, is_skipping = b"", False
        while data := os.read(source, _READ_BYTES):  # Bound: the task closes its end
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if is_skipping or len(line) > LINE_BYTES_MAX:
                    self._refuse_long()
                else:
                    self.take(line)
                is_skipping = False
            if len(rest) > LINE_BYTES_MAX:
                rest, is_skipping = b"", True
            self.commit()
            try:
                append_all(sink, self._said())
            except OSError as error:  # not the journal's: all that was to be told is durable
                raise broken(error) from error
            if self.is_over:
                return 75
        return 0

    def _said(self) -> bytes:
        lines = [json.dumps(answer, separators=(",", ":")).encode() for answer in self.answers]
        self.answers, self.settled = [], 0
        return b"".join(line + b"\n" for line in lines)

    def _refuse_long(self) -> None:
        text = f"a line is longer than {LINE_BYTES_MAX} bytes; save it as a file"
        self.answers.append(_refusal("too_large", text))

    def take(self, line: bytes) -> None:
        """Take one request in; its answer stands in `answers`, to be told after `commit`."""
        if not line.strip():
            return
        request: Any = None
        try:
            request = json.loads(line, parse_constant=_no_constant, parse_float=_finite)
            refuse_deep([request])  # a fact stands one deeper in the journal, and in a manifest
            if not isinstance(request, dict) or not isinstance(request.get("op"), str):
                raise Refused("bad_request", 'expected an object with an "op"')  # noqa: TRY301
            answer = self._answer(request)
        except Refused as error:
            answer = _refusal(error.code, str(error))
        except KeyError as error:
            answer = _refusal("bad_request", f"{error.args[0]!r} is missing")
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            answer = _refusal("bad_request", str(error))
        except (Damaged, NotTrusted, TooLarge, StaleAttempt, OSError) as error:
            answer = self._failed(error)
        if isinstance(request, dict) and "id" in request:
            answer["id"] = request["id"]
        self.answers.append(answer)

    def commit(self) -> None:
        """Make the group durable and fill in the numbers; on failure nothing of it is told done.

        Durable: the facts of every request taken so far.
        """
        if not self.group:
            return
        try:
            last = self.journal.append(self.group)
        except (Damaged, NotTrusted, TooLarge, StaleAttempt, OSError) as error:
            refusal = self._failed(error)
            for answer in self.answers[
                self.settled :
            ]:  # queries too: they may have seen what was not kept
                kept = {"id": answer["id"]} if "id" in answer else {}
                answer.clear()
                answer.update({**refusal, **kept})
            self.known = self._read()
        else:
            first = last - len(self.group) + 1
            for number, answer in enumerate(self.waiting):
                answer["seq"] = first + number
        self.group, self.waiting, self.group_bytes = [], [], 0
        self.settled = len(self.answers)

    def _failed(self, error: Exception) -> Answer:
        if isinstance(error, StaleAttempt):
            self.is_over = True
            return _refusal("stale_attempt", str(error))
        if isinstance(error, OSError):
            return _refusal("io_error", str(error))
        return _refusal("too_large" if isinstance(error, TooLarge) else "damaged", str(error))

    def _record(self, fact: Fact) -> Answer:
        if len(self.group) >= _GROUP_FACTS_MAX or self.group_bytes > _GROUP_BYTES_MAX:
            self.commit()
        answer: Answer = {"ok": True, "seq": 0}
        size = len(json.dumps(fact))
        if size > _FACT_BYTES_MAX:
            raise TooLarge(
                f"a fact of {size} bytes; at most {_FACT_BYTES_MAX}, or save it as a file"
            )
        self.group_bytes += size
        self.group.append(fact)
        self.waiting.append(answer)
        self.known.take(self.around.attempt, {**fact, "at_ns": 0})
        return answer

    def _answer(self, request: dict[str, Any]) -> Answer:
        match request["op"]:
            case "hello":
                return self._hello(request)
            case "step_start":
                return self._step_start(request)
            case "step_done":
                version = int(request.get("version", 1))
                return self._record(
                    facts.step_done(request["name"], request.get("result"), version)
                )
            case "step_query":
                return self._step_query(str(request["name"]))
            case "set":
                return self._record(facts.set_value(request["key"], request["value"]))
            case "delete":
                return self._record(facts.delete_value(request["key"]))
            case "get":
                key = str(request["key"])
                is_found = key in self.known.values
                return {"ok": True, "found": is_found, "value": self.known.values.get(key)}
            case "item":
                text = str(request.get("text", ""))
                result = request.get("result")
                return self._record(
                    facts.item_done(request["key"], request["status"], result, text)
                )
            case "items_done":
                return self._items_done(request)
            case "checkpoint":
                return self._checkpoint(request)
            case "progress":
                return self._progress(request)
            case "retry_after":
                scope = str(request.get("scope", ""))
                return self._record(facts.retry_after(float(request["seconds"]), scope))
            case "should_stop":
                return self._should_stop()
            case op:
                raise Refused("unknown_op", f"this version does not know the op {op!r}")

    def _hello(self, request: dict[str, Any]) -> Answer:
        if request.get("protocol", PROTOCOL) != PROTOCOL:
            raise Refused("unknown_protocol", f"this version speaks protocol {PROTOCOL}")
        around = self.around
        seq, last = newest_sealed(around.dir, os.getuid())
        return {
            "ok": True,
            "protocol": PROTOCOL,
            "task": around.task,
            "attempt": around.attempt,
            "epoch": around.epoch,
            "resume": around.is_resuming or self.known.has_any,
            "last": last,
            "seq": seq,
        }

    def _step_start(self, request: dict[str, Any]) -> Answer:
        name = str(request["name"])
        if request.get("once") and name in self.known.started:
            raise Refused("step_interrupted", f"step {name!r} was begun and must not run twice")
        return self._record(facts.step_start(request["name"], int(request.get("version", 1))))

    def _step_query(self, name: str) -> Answer:
        fact = self.known.steps.get(name)
        answer = {"ok": True, "done": fact is not None, "started": name in self.known.started}
        return {**answer, "result": fact.get("result")} if fact else answer

    def _items_done(self, request: dict[str, Any]) -> Answer:
        keys = request.get("keys")
        wanted = self.known.items if keys is None else dict.fromkeys(keys)
        found = {key: fact for key, fact in self.known.items.items() if key in wanted}
        answer: Answer = {"ok": True, "items": {key: found[key]["status"] for key in found}}
        if request.get("results"):
            answer["results"] = {key: found[key].get("result") for key in found}
        return answer

    def _checkpoint(self, request: dict[str, Any]) -> Answer:
        """Durable: all facts before it, then the checkpoint."""
        files = request.get("files", [])
        if not isinstance(files, list) or not all(isinstance(path, str) for path in files):
            raise Refused("bad_request", '"files" is a list of paths')
        progress = request.get("progress")
        if progress and not (isinstance(progress, list) and len(progress) == 2):
            raise Refused("bad_request", '"progress" is [DONE,TOTAL]')
        made = facts.progress_made(float(progress[0]), float(progress[1])) if progress else None
        done_total = (made["done"], made["total"]) if made else None
        self.commit()
        saved = save_from(self.around, files, request.get("state"), done_total)
        return {"ok": True, "seq": saved.seq, "path": saved.path}

    def _progress(self, request: dict[str, Any]) -> Answer:
        text = str(request.get("text", ""))
        fact = facts.progress_made(float(request["done"]), float(request.get("total", 0)), text)
        status = [f"STATUS={text}"] if text else []
        self.around.notify(f"PROGRESS={fact['done']:.15g}/{fact['total']:.15g}", *status)
        return self._record(fact) if request.get("durable") else {"ok": True}

    def _should_stop(self) -> Answer:
        control = self.around.read_control()
        return {
            "ok": True,
            "stop": control.get("stop") or None,
            "deadline": control.get("deadline") or None,
            "checkpoint": self.around.is_checkpoint_wanted(),
        }


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _finite(text: str) -> float:
    """Return a number; 1e999 would be infinite, and what says so in the journal is no JSON."""
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is too large for a number")
    return number


def _refusal(code: str, message: str) -> Answer:
    return {"ok": False, "error": {"code": code, "message": message}}
