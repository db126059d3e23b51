"""What a page of events carries: never more than a reply can, and never less than one event."""

import msgspec

from ckptd.core.events import EVENT_BYTES_MAX
from ckptd.protocol import codec
from ckptd.protocol import messages as m
from ckptd.protocol.limits import REPLY_BYTES_MAX, REQUEST_BYTES_MAX
from tests.unit.daemon.test_requests import Desk


def followed(desk: Desk, limit: int = 1_000) -> list[m.Event]:
    """Return all events as a follower gets them, page by page."""
    found: list[m.Event] = []
    since = 0
    while since < desk.engine.wal.durable_lsn:  # Bound: `since` grows
        reply = desk.reply("e", "events", m.Events(since, limit))
        assert reply.error is None, reply.error
        page = msgspec.json.decode(reply.result, type=m.EventPage)
        assert len(reply.result) < REPLY_BYTES_MAX
        assert page.next > since
        found += page.events
        since = page.next
    return found


def largest_submit(**spec: object) -> m.Submit:
    """Return a submit that is just taken."""
    asked = m.Submit((m.TaskSpec(("true",), hold=True, **spec),))  # type: ignore[arg-type]
    room = REQUEST_BYTES_MAX - len(codec.encode_request("a", "submit", asked))
    task = msgspec.structs.replace(asked.tasks[0], labels={"l": "x" * (room - 100)})
    return m.Submit((task,))


def test_the_largest_submit_stops_no_follower() -> None:
    desk = Desk()
    desk.ask("a", "submit", largest_submit())
    desk.ask("b", "submit", m.Submit((m.TaskSpec(("after",), hold=True),)))
    for limit in (1, 1_000):
        large, after = followed(desk, limit)
        assert large.fields["shortened"] is True
        assert large.fields["spec"]["argv"] == ["true"]
        assert large.fields["spec"]["labels"]["l"] == "x" * 256 + "..."
        assert "shortened" not in after.fields


def test_many_large_submits_in_a_row_are_told_whole_in_several_pages() -> None:
    desk = Desk()
    for number in range(6):
        one = m.TaskSpec(("true",), labels={"l": "x" * (EVENT_BYTES_MAX - 1_000)}, hold=True)
        desk.ask(f"{number}", "submit", m.Submit((one,)))
    found = followed(desk)
    assert [event.task for event in found] == [1, 2, 3, 4, 5, 6]
    assert not any("shortened" in event.fields for event in found)


def test_an_event_made_of_very_many_small_parts_is_shortened_too() -> None:
    desk = Desk()
    argv = ("\x01" * 20,) * 32_000  # six bytes each on the wire
    desk.ask("a", "submit", m.Submit((m.TaskSpec(argv, hold=True),)))
    (found,) = followed(desk)
    assert found.fields["shortened"] is True
    assert len(found.fields["spec"]["argv"]) == 100
