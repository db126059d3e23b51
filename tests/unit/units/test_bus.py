"""One connection to a message bus, held against a real dbus-daemon and against liars."""

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from jeepney import DBus, DBusAddress, HeaderFields, Message, new_method_call

from ckptd.runner.watch import Watch
from ckptd.units import bus as bus_module
from ckptd.units.bus import DISCONNECTED, NO_REPLY, UNSENDABLE, Bus, Reply, Rule
from ckptd.units.wire import socket_names
from tests.private_bus import Answer, PrivateBus, Service, turn_until

NAME, PATH, INTERFACE = "test.Service", "/test/Service", "test.Interface"
OBJECT = DBusAddress(PATH, NAME, INTERFACE)
NEWS = Rule(NAME, PATH, INTERFACE, "News")


def do(name: str, signature: str | None = None, body: tuple[object, ...] = ()) -> Message:
    return new_method_call(OBJECT, name, signature, body)


@pytest.fixture
def watch() -> Iterator[Watch]:
    made = Watch()
    yield made
    made.close()


@pytest.fixture
def private(tmp_path: Path) -> Iterator[PrivateBus]:
    made = PrivateBus(tmp_path)
    made.start()
    yield made
    made.kill()


class Client:
    """A bus and what it told its owner."""

    def __init__(self, address: str, watch: Watch, call_s: float = 10.0) -> None:
        self.told: list[str] = []
        self.watch = watch
        self.bus = Bus(
            address,
            watch,
            partial(self.told.append, "up"),
            partial(self.told.append, "down"),
            call_s=call_s,
        )

    def ask(self, message: Message) -> Reply:
        got: list[Reply] = []
        self.bus.call(message, got.append)
        assert not got, "never from inside the call"
        turn_until(self.watch, lambda: got)
        return got[0]


@pytest.fixture
def client(private: PrivateBus, watch: Watch) -> Iterator[Client]:
    made = Client(private.address, watch)
    turn_until(watch, lambda: made.bus.is_up)
    yield made
    made.bus.close()


def answer(message: Message) -> Answer | None:
    match message.header.fields[HeaderFields.member]:
        case "Echo":
            return "s", message.body
        case "Length":
            return "u", (len(message.body[0]),)
        case "Long":
            return "s", ("x" * message.body[0],)
        case "WriteTo":
            with message.body[0] as given:
                os.write(given.fileno(), b"written by the service")
            return "", ()
        case "GiveNull":
            return "h", (os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC),)
        case "BeSilent":
            return None
        case _:
            return "!", ("test.Error.Unknown", "no such thing")


@pytest.fixture
def service(private: PrivateBus) -> Iterator[Service]:
    made = private.service(NAME, answer)
    yield made
    made.close()


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_call_is_answered_and_an_error_comes_with_its_name(
    client: Client, service: Service
) -> None:
    assert client.ask(do("Echo", "s", ("żółw",))) == Reply(("żółw",))
    failed = client.ask(do("Nothing"))
    assert (failed.error, failed.text) == ("test.Error.Unknown", "no such thing")
    nobody = client.ask(new_method_call(DBusAddress("/x", "test.Nobody", "test.I"), "Do"))
    assert nobody.error == "org.freedesktop.DBus.Error.ServiceUnknown"


def test_descriptors_go_both_ways_and_none_is_left_open(client: Client, service: Service) -> None:
    before = open_fds()
    reader, writer = os.pipe()
    got: list[int] = []
    client.bus.call(do("WriteTo", "h", (writer,)), lambda reply: got.append(-bool(reply.error)))
    os.close(writer)  # what was given with the call was duplicated
    turn_until(client.watch, lambda: got)
    assert got == [0]
    assert os.read(reader, 100) == b"written by the service"
    assert os.read(reader, 100) == b"", "the duplicate was closed after sending"
    os.close(reader)

    def take(reply: Reply) -> None:
        got.append(reply.body[0].to_raw_fd())

    client.bus.call(do("GiveNull"), take)
    client.bus.call(do("GiveNull"), lambda _: got.append(-1))  # left behind: closed for us
    turn_until(client.watch, lambda: len(got) == 3)
    taken = got[1]
    assert os.readlink(f"/proc/self/fd/{taken}") == "/dev/null"
    assert not os.get_inheritable(taken)
    os.close(taken)
    # The service's own copies of /dev/null are its thread's: three per process stay at most.
    assert open_fds() <= before + 2


def test_two_thousand_calls_at_once_are_all_answered_within_the_limits_of_a_system_bus(
    client: Client,
) -> None:
    got: list[Reply] = []
    for _ in range(2_000):
        client.bus.call(DBus().GetId(), got.append)
    turn_until(client.watch, lambda: len(got) == 2_000)
    assert {reply.error for reply in got} == {""}
    assert client.told == ["up"]


def test_many_descriptors_at_once_do_not_fill_the_queue_of_the_receiver(
    client: Client, service: Service
) -> None:
    got: list[str] = []
    with open("/dev/null", "wb") as null:
        for _ in range(300):
            client.bus.call(do("WriteTo", "h", (null,)), lambda reply: got.append(reply.error))
    turn_until(client.watch, lambda: len(got) == 300)
    assert set(got) == {""}


def test_messages_larger_than_a_socket_takes_arrive_whole(client: Client, service: Service) -> None:
    size = 3 << 20
    assert client.ask(do("Length", "s", ("y" * size,))).body == (size,)
    assert client.ask(do("Long", "u", (size,))).body == ("x" * size,)


def test_calls_and_orders_without_reply_keep_their_order(
    private: PrivateBus, client: Client
) -> None:
    seen: list[int] = []

    def note(message: Message) -> Answer:
        seen.append(message.body[0])
        return "", ()

    service = private.service(NAME, note)
    done: list[Reply] = []
    for number in range(0, 600, 2):
        client.bus.call(do("Note", "u", (number,)), done.append)
        client.bus.tell(do("Note", "u", (number + 1,)))
    turn_until(client.watch, lambda: len(seen) == 600)
    service.close()
    assert seen == list(range(600))


def test_what_d_bus_cannot_carry_is_refused_and_the_connection_stays(
    client: Client, service: Service
) -> None:
    for body in (("a\0b",), ("\udcff",)):
        assert client.ask(do("Echo", "s", body)).error == UNSENDABLE
    assert client.ask(do("Echo", "u", (1 << 32,))).error == UNSENDABLE
    assert client.ask(do("Echo", "h", (99_999,))).error == UNSENDABLE
    assert client.ask(do("Echo", "s", ("fine",))).body == ("fine",)
    assert client.told == ["up"]


def test_a_call_without_reply_ends_after_its_time(
    private: PrivateBus, service: Service, watch: Watch
) -> None:
    client = Client(private.address, watch, call_s=0.3)
    turn_until(watch, lambda: client.bus.is_up)
    got: list[str] = []
    for _ in range(3):
        client.bus.call(do("BeSilent"), lambda reply: got.append(reply.error))
    turn_until(watch, lambda: len(got) == 3)
    assert got == [NO_REPLY] * 3
    assert client.ask(do("Echo", "s", ("alive",))).body == ("alive",)
    client.bus.close()


def test_a_lost_bus_is_told_to_all_who_wait_and_comes_back_with_its_rules(
    private: PrivateBus, client: Client
) -> None:
    heard: list[tuple[object, ...]] = []
    client.bus.listen(NEWS, heard.append)
    service = private.service(NAME, answer)
    ends: list[str] = []
    for _ in range(200):  # more than may be in flight
        client.bus.call(do("BeSilent"), lambda reply: ends.append(reply.error))
    private.kill()
    turn_until(client.watch, lambda: "down" in client.told)
    assert ends == [DISCONNECTED] * 200
    assert client.ask(DBus().GetId()).error == DISCONNECTED
    service.close()

    private.start()
    turn_until(client.watch, lambda: client.told == ["up", "down", "up"])
    service = private.service(NAME, answer)
    assert client.ask(do("Echo", "s", ("again",))).body == ("again",)
    service.emit(OBJECT, "News", ("s", ("still heard",)))
    turn_until(client.watch, lambda: heard)
    service.close()
    assert heard == [("still heard",)]


def test_only_the_owner_of_the_name_is_listened_to(private: PrivateBus, client: Client) -> None:
    heard: list[object] = []
    client.bus.listen(NEWS, heard.append)
    names = client.ask(DBus().ListNames()).body[0]
    stranger = private.service("test.Stranger", answer)
    for name in names:
        if name.startswith(":"):
            stranger.emit(OBJECT, "News", ("s", ("forged",)), to=name)
    stranger.emit(OBJECT, "News", ("s", ("forged",)))
    service = private.service(NAME, answer)
    service.emit(DBusAddress("/elsewhere", NAME, INTERFACE), "News", ("s", ("other path",)))
    service.emit(OBJECT, "Other", ("s", ("other member",)))
    service.emit(OBJECT, "News", ("s", ("true",)))
    turn_until(client.watch, lambda: heard)
    stranger.close()
    service.close()
    assert heard == [("true",)]


AGREE = b"OK 0123456789abcdef0123456789abcdef\r\n"


def chat(connection: socket.socket, *answers: bytes) -> None:
    for one in answers:
        connection.recv(65_536)
        connection.sendall(one)
    connection.recv(65_536)


BAD_LENGTH = b"l\2\0\1" + b"\xff" * 12
BAD_HEADER = b"l\2\0\1\0\0\0\0\1\0\0\0\x10\0\0\0" + b"\xee" * 16
ODD_REPLY = (  # a method return whose reply serial is a text
    b"l\2\0\1\0\0\0\0\1\0\0\0\x0c\0\0\0\5\1s\0\3\0\0\0abc\0\0\0\0\0"
)
LIARS: dict[str, Callable[[socket.socket], None]] = {
    "hangs up at once": lambda connection: None,
    "junk": lambda connection: connection.sendall(os.urandom(5_000)),
    "endless line": lambda connection: connection.sendall(b"x" * 20_000),
    "rejects": lambda connection: chat(connection, b"REJECTED EXTERNAL\r\n"),
    "hangs up in the greeting": lambda connection: chat(connection, AGREE),
    "no descriptors": lambda connection: chat(connection, AGREE, b"ERROR\r\n"),
    "absurd length": lambda connection: chat(connection, AGREE, b"AGREE_UNIX_FD\r\n", BAD_LENGTH),
    "broken header": lambda connection: chat(connection, AGREE, b"AGREE_UNIX_FD\r\n", BAD_HEADER),
    "odd reply": lambda connection: chat(connection, AGREE, b"AGREE_UNIX_FD\r\n", ODD_REPLY),
    "junk later": lambda connection: chat(connection, AGREE, b"AGREE_UNIX_FD\r\n", b"z" * 99),
    "silence": lambda connection: chat(connection, *(b"" for _ in range(9))),
}


@pytest.mark.parametrize("liar", LIARS)
def test_a_server_that_is_no_bus_is_tried_again_and_nothing_is_raised(
    liar: str, tmp_path: Path, watch: Watch
) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "socket"))
    listener.listen()
    taken: list[int] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            taken.append(1)
            with connection, contextlib.suppress(OSError):
                LIARS[liar](connection)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    before = open_fds()
    client = Client(f"unix:path={tmp_path}/socket", watch, call_s=0.2)
    turn_until(watch, lambda: len(taken) >= 3)
    assert client.told == []
    client.bus.close()
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)
    assert open_fds() <= before


def test_no_bus_at_all_is_tried_again_until_there_is_one(tmp_path: Path, watch: Watch) -> None:
    private = PrivateBus(tmp_path)
    client = Client(f"unix:path=/nonexistent;{private.address}", watch)
    assert client.ask(DBus().GetId()).error == DISCONNECTED
    private.start()
    turn_until(watch, lambda: client.bus.is_up)
    client.bus.close()
    private.kill()


def test_a_closed_bus_says_nothing_any_more(private: PrivateBus, watch: Watch) -> None:
    client = Client(private.address, watch)
    turn_until(watch, lambda: client.bus.is_up)
    got: list[Reply] = []
    client.bus.call(DBus().GetId(), got.append)
    client.bus.close()
    client.bus.close()
    passed: list[int] = []
    watch.after(0.3, lambda: passed.append(1))
    turn_until(watch, lambda: passed)
    assert (got, client.told) == ([], ["up"])


def test_addresses_are_lists_with_escapes() -> None:
    assert socket_names("unix:path=/run/a%20b,guid=00;tcp:host=x;unix:abstract=y%c3%a9") == [
        b"/run/a b",
        "\0yé".encode(),
    ]
    for nonsense in ("", ";", "unix", "unix:", "unix:path", "unix:path=", "autolaunch:"):
        assert socket_names(nonsense) == []


def test_the_buses_of_system_and_user_are_where_the_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/s")
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", "unix:path=/u")
    assert (bus_module.system_bus(), bus_module.user_bus()) == ("unix:path=/s", "unix:path=/u")
    monkeypatch.delenv("DBUS_SYSTEM_BUS_ADDRESS")
    monkeypatch.delenv("DBUS_SESSION_BUS_ADDRESS")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert bus_module.system_bus() == "unix:path=/run/dbus/system_bus_socket"
    assert bus_module.user_bus() == "unix:path=/run/user/7/bus"
