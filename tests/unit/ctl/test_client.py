import socket
import threading
import time
from pathlib import Path

import pytest

from ckptd.client import Client, as_error, find_endpoint, start_hint
from ckptd.protocol.errors import (
    Conflict,
    ErrorReply,
    NotFound,
    ProtocolMismatch,
    TimedOut,
    Unreachable,
)
from ckptd.protocol.messages import (
    Done,
    Empty,
    Pong,
    Selector,
    Shutdown,
    Submit,
    Submitted,
    TaskSpec,
    Wait,
    Waited,
)
from tests.fakes.scripted_daemon import ScriptedDaemon
from tests.unit.ctl.conftest import Scripted
from tests.unit.ctl.rows import row
from tests.waiting import until

PONG = Pong("0.1.0", 1, 42, 0, 3)
SUBMIT = Submit((TaskSpec(("true",)),))


def test_an_answer_comes_back_as_its_type(scripted: Scripted) -> None:
    daemon = scripted({"ping": lambda _: PONG})
    with Client(daemon.endpoint) as client:
        assert client.call("ping", Empty(), Pong) == PONG
        assert client.call("ping", Empty(), Pong) == PONG


def test_a_refusal_is_raised_with_its_code_exit_code_and_hint(scripted: Scripted) -> None:
    daemon = scripted({"submit": lambda _: Conflict("key 'k' names task 3", "choose another")})
    with Client(daemon.endpoint) as client, pytest.raises(Conflict) as caught:
        client.call("submit", SUBMIT, Submitted)
    assert (caught.value.exit_code, caught.value.hint) == (5, "choose another")


def test_an_error_of_a_newer_daemon_keeps_its_own_exit_code() -> None:
    error = as_error(ErrorReply("too_new", "no", exit_code=9))
    assert (error.code, error.exit_code) == ("too_new", 9)
    assert as_error(ErrorReply("not_found", "no")).exit_code == NotFound.exit_code


def test_a_missing_socket_fails_at_once(short_dir: Path) -> None:
    missing = pytest.raises(Unreachable, match=r"no daemon answers at .*none\.sock")
    with Client(f"ipc://{short_dir}/none.sock", timeout_s=3600) as client, missing as caught:
        client.call("ping", Empty(), Pong)
    assert "start one of your own with `ckptd`" in caught.value.hint


def test_a_service_manager_is_named_only_where_one_runs(tmp_path: Path) -> None:
    assert "systemctl start ckptd" in start_hint(str(tmp_path))
    assert "systemctl" not in start_hint(str(tmp_path / "none"))


def test_a_stale_socket_of_a_dead_daemon_fails_at_once(scripted: Scripted) -> None:
    daemon = scripted({})
    daemon.stop()
    assert daemon.path.exists() or not daemon.path.touch()
    with Client(daemon.endpoint, timeout_s=3600) as client, pytest.raises(Unreachable):
        client.call("ping", Empty(), Pong)


def test_a_silent_daemon_is_given_up_after_the_timeout(scripted: Scripted) -> None:
    daemon = scripted({"ping": lambda _: None})
    given_up = pytest.raises(Unreachable, match=r"did not answer `ping` within 0\.3 s")
    with Client(daemon.endpoint, timeout_s=0.3) as client, given_up:
        client.call("ping", Empty(), Pong)


def test_a_lost_answer_is_asked_for_again_under_the_same_id(scripted: Scripted) -> None:
    lost = iter([None, None])
    daemon = scripted({"submit": lambda _: next(lost, Submitted((7,), (True,)))})
    with Client(daemon.endpoint, resend_s=0.05) as client:
        assert client.call("submit", SUBMIT, Submitted).ids == (7,)
    ids = daemon.asked("submit")
    assert len(ids) >= 3
    assert len(set(ids)) == 1


def test_a_restart_in_mid_request_resends_it_at_once(scripted: Scripted) -> None:
    daemon = scripted({"submit": lambda _: None})
    restart = _restart_after(daemon, "submit", Submitted((7,), (True,)))
    with Client(daemon.endpoint, timeout_s=30, resend_s=3600) as client, restart:
        assert client.call("submit", SUBMIT, Submitted).ids == (7,)
    assert len(set(daemon.asked("submit"))) == 1


def test_a_wait_outlives_a_restart_and_says_so(scripted: Scripted) -> None:
    heard: list[str] = []
    daemon = scripted({"wait": lambda _: None})
    restart = _restart_after(daemon, "wait", Waited(met=True, tasks=(row(phase="succeeded"),)))
    with Client(daemon.endpoint, 0.2, heard.append, resend_s=3600) as client, restart:
        answer = client.call("wait", Wait(Selector(ids=(1,))), Waited, patient=True)
    assert answer.met
    assert heard == [
        "the daemon went away; waiting for it to come back",
        "the daemon is back",
    ]


def test_a_patient_call_ends_at_its_own_limit(scripted: Scripted) -> None:
    daemon = scripted({"ping": lambda _: PONG, "wait": lambda _: None})
    with Client(daemon.endpoint) as client:
        client.call("ping", Empty(), Pong)
        asked = Wait(Selector(ids=(1,)))
        with pytest.raises(TimedOut, match="while the daemon did not answer `wait`"):
            client.call("wait", asked, Waited, patient=True, until_mono_s=0.0)
        daemon.stop()
        until_s = time.monotonic() + 0.3
        with pytest.raises(TimedOut, match="while the daemon was away"):
            client.call("wait", asked, Waited, patient=True, until_mono_s=until_s)


def test_shutdown_is_never_sent_to_the_next_daemon(scripted: Scripted) -> None:
    daemon = scripted({"ping": lambda _: PONG, "shutdown": lambda _: None})
    with Client(daemon.endpoint, timeout_s=30, resend_s=0.05) as client:
        client.call("ping", Empty(), Pong)
        gone = pytest.raises(Unreachable, match="went away")
        with _restart_after(daemon, "shutdown", Done()), gone:
            client.call("shutdown", Shutdown(), Done)
    assert len(daemon.asked("shutdown")) == 1


def test_the_last_answer_of_a_daemon_that_ends_was_lost_with_its_connection(
    scripted: Scripted,
) -> None:
    class LateClient(Client):
        """Looks for the answer only once the connection is gone."""

        def _send(self, frame: bytes) -> None:
            super()._send(frame)
            assert self._monitor.poll(10_000)

    daemon = scripted({"ping": lambda _: PONG, "shutdown": lambda _: daemon.end(Done())})
    with LateClient(daemon.endpoint, reconnects=False) as client:
        client.call("ping", Empty(), Pong)
        assert client.call("shutdown", Shutdown(), Done) == Done()


def test_the_last_answer_is_heard_where_it_came_after_the_look_and_before_the_end(
    scripted: Scripted,
) -> None:
    class SlowClient(Client):
        """Has to wait for the processor between its look and the news of the connection."""

        def _watch(self, *, patient: bool) -> bool:
            is_back = super()._watch(patient=patient)
            while self._connected or not self._met:
                assert self._monitor.poll(10_000)
                is_back |= super()._watch(patient=patient)
            return is_back

    daemon = scripted({"shutdown": lambda _: daemon.end(Done())})
    with SlowClient(daemon.endpoint, reconnects=False) as client:
        assert client.call("shutdown", Shutdown(), Done) == Done()


def test_a_connection_that_is_made_once_is_not_made_again(scripted: Scripted) -> None:
    daemon = scripted({"ping": lambda _: PONG, "shutdown": lambda _: Done()})
    with Client(daemon.endpoint, timeout_s=1, reconnects=False) as client:
        client.call("shutdown", Shutdown(), Done)
        daemon.stop()
        assert client.until_gone(float("inf"))
        daemon.start()
        with pytest.raises(Unreachable):
            client.call("ping", Empty(), Pong)
    assert not daemon.asked("ping")


def test_a_first_request_to_a_daemon_that_is_about_to_start_waits_for_it(
    scripted: Scripted,
) -> None:
    daemon = scripted({"ping": lambda _: PONG})
    daemon.stop()
    daemon.path.unlink()
    kept = socket.socket(socket.AF_UNIX)
    kept.bind(str(daemon.path))
    kept.listen()

    def restart() -> None:
        kept.accept()[0].close()  # by a daemon that dies in the handshake
        daemon.start()
        kept.close()

    starting = threading.Thread(target=restart)
    starting.start()
    with Client(daemon.endpoint, timeout_s=30) as client:
        assert client.call("ping", Empty(), Pong) == PONG
    starting.join()


def test_a_frame_that_is_no_reply_is_a_protocol_mismatch(scripted: Scripted) -> None:
    daemon = scripted({"ping": lambda _: b"\xff\x00"})
    with Client(daemon.endpoint) as client, pytest.raises(ProtocolMismatch):
        client.call("ping", Empty(), Pong)


def test_an_answer_to_another_request_is_not_taken(scripted: Scripted) -> None:
    stray = b'{"v":1,"id":"other","ok":true,"result":{}}'
    answers = iter([stray])
    daemon = scripted({"ping": lambda _: next(answers, PONG)})
    with Client(daemon.endpoint, resend_s=0.05) as client:
        assert client.call("ping", Empty(), Pong) == PONG


def test_the_endpoint_is_the_given_one_then_the_variables_then_the_socket_that_exists(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPTD_ENDPOINT", "/b.sock")
    assert find_endpoint("tcp://host:1") == "tcp://host:1"
    assert find_endpoint("/a.sock") == "ipc:///a.sock"
    assert find_endpoint() == "ipc:///b.sock"
    monkeypatch.delenv("CKPTD_ENDPOINT")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_dir))
    socket = short_dir / "ckptd" / "ctl.sock"
    socket.parent.mkdir()
    socket.touch()
    if not Path("/run/ckptd/ctl.sock").exists():
        assert find_endpoint() == f"ipc://{socket}"


class _restart_after:  # noqa: N801 (reads as a verb)
    """Stop the daemon once it was asked for a verb, start it again with an answer to it."""

    def __init__(self, daemon: ScriptedDaemon, verb: str, answer: object) -> None:
        self.daemon, self.verb, self.answer = daemon, verb, answer
        self.thread = threading.Thread(target=self._restart)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.thread.join()

    def _restart(self) -> None:
        until(lambda: self.daemon.asked(self.verb))
        self.daemon.stop()
        self.daemon.script[self.verb] = lambda _: self.answer  # type: ignore[return-value,assignment]
        self.daemon.start()
