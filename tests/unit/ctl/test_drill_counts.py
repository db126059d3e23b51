"""Whether a drilled task went on from what its checkpoint says, by what it counts itself."""

import pytest
from msgspec.structs import replace

from ckptctl import drill_checks, drill_counts
from ckptctl.drill_watch import Before, Story
from ckptd.protocol.messages import Progress
from tests.unit.ctl.test_drill import (
    GONE,
    HIT_NS,
    INTENT,
    SAVED,
    SECOND,
    STARTED,
    ended,
    marked,
    task_row,
)

TOTAL = 400
SAVED_NS = HIT_NS - 3 * SECOND
HANDED = "it was handed checkpoint 5, the newest was 5"


def count(done: float, at_s: float = 0, total: float = TOTAL) -> Progress:
    return Progress(done, total, at_ns=HIT_NS + int(at_s * SECOND))


BASE = replace(count(50), at_ns=SAVED_NS)


def story(
    *tells: Progress,
    base: Progress | None = BASE,
    before: Progress | None = None,
    lost_s: float = 4.0,
) -> Story:
    """Return one of a task that was at 53, was killed, and told these when it ran again."""
    row = replace(task_row(), progress=before or count(53, -1))
    found = Story(Before(row, 11, GONE), HIT_NS)
    found.hear([ended(lost_s=lost_s), INTENT, STARTED])
    found.note([replace(SAVED, progress=base)])
    for one in tells:
        found.look(replace(row, attempt=3, progress=one), 0)
    return found


def saves(found: Story, said: Progress) -> None:
    """Have the new attempt save this first."""
    found.note([replace(SAVED, seq=6, attempt=3, progress=said)])


def checkpoint(found: Story) -> tuple[bool | None, str]:
    checks = drill_checks.checks_of_task("kill9", found, [SAVED])
    return next((check.holds, check.text) for check in checks if check.name == "checkpoint")


def test_a_task_that_gets_on_below_its_checkpoint_has_not_gone_on_from_it() -> None:
    found = story(count(10, 2), count(20, 3), count(60, 9))
    holds, text = checkpoint(found)
    assert holds is False
    assert text == (
        "it was at 10/400 again, though checkpoint 5 says 50/400; resumed from 5, the newest was 5"
    )
    assert drill_counts.items_lost(found) == 43, "from 10 to 53, not from 50"
    assert drill_counts.lost_text(found) == "at least 4.0s, at least 43 by its own count"


def test_a_first_checkpoint_that_says_less_than_the_one_before_is_proof_alone() -> None:
    found = story(count(60, 9))
    saves(found, count(30, 2))
    assert checkpoint(found)[0] is False
    assert drill_counts.items_lost(found) == 23
    for done, holds in (50, True), (0, None):  # a 0 may be saved before it restores
        again = story()
        saves(again, count(done, 2))
        assert checkpoint(again)[0] is holds


@pytest.mark.parametrize(
    ("cause", "lost_s", "text"),
    [
        ("drill", 4.0, "4.0s, 3 by its own count"),
        ("lost", 13.0, "at most 13s, 3 by its own count"),
        ("reboot", 13.0, "at most 13s, 3 by its own count"),
    ],
)
def test_the_work_lost_is_at_most_what_came_before_its_end_was_found(
    cause: str, lost_s: float, text: str
) -> None:
    found = story(count(50, 2))
    found.death = ended(cause=cause, lost_s=lost_s)
    assert drill_counts.lost_text(found) == text
    found = story(count(50, 2), before=count(50, -1), lost_s=0.0)
    assert drill_counts.lost_text(found) == "none"


def test_a_checkpoint_without_a_total_is_compared_with_what_counts_without_one() -> None:
    base = replace(BASE, total=0.0)
    found = story(count(0, 1, 0), count(10, 2, 0), count(20, 3, 0), base=base)
    assert "it was at 10 again, though checkpoint 5 says 50" in checkpoint(found)[1]


@pytest.mark.parametrize(
    "tells",
    [
        (count(50, 1), count(51, 2)),
        (count(0, 1), count(50, 2), count(51, 3)),
        (count(17, 1), count(52, 2)),
        (count(0, 1), count(17, 2), count(52, 3)),
        (count(57, 1), count(1, 2), count(2, 3)),
        (count(0, 1, 0), count(50, 2)),
    ],
    ids=[
        "as-restored", "zero-before-it-restores", "once-below", "zero-and-once", "another-part",
        "status-alone",
    ],
)  # fmt: skip
def test_a_task_that_tells_as_much_as_its_checkpoint_says_has_gone_on_from_it(
    tells: tuple[Progress, ...],
) -> None:
    found = story(*tells)
    assert checkpoint(found) == (True, "resumed from 5, the newest was 5")
    assert drill_counts.lost_text(found) == "4.0s, 3 by its own count"


@pytest.mark.parametrize(
    "tells",
    [
        (),
        (count(0, 1), count(0, 2)),
        (count(10, 1, 0), count(20, 2, 0)),
        (count(10, 1, 100), count(20, 2, 100)),
        (count(1, 1, 7), count(10, 2), count(20, 3)),
    ],
    ids=["silent", "zero-only", "no-total", "another-total", "after-another-total"],
)
def test_what_may_count_something_else_or_says_no_more_than_0_passes_no_drill_and_fails_none(
    tells: tuple[Progress, ...],
) -> None:
    found = story(*tells)
    said = "that says 50/400; its own count was not seen to go on from there"
    assert checkpoint(found) == (None, f"{HANDED}; {said}")
    assert drill_counts.lost_text(found) == "at least 4.0s, at least 3 by its own count"


def test_a_checkpoint_that_says_nothing_or_was_deleted_unread_proves_no_restore() -> None:
    mute, unread = story(count(51, 2), count(53, 3), base=None), story(count(51, 2), count(53, 3))
    unread.noted.clear()
    for found, said in (
        (mute, "whether it went on from there, nothing says"),
        (unread, "that was deleted before it was read; whether it went on, nobody saw"),
    ):
        assert checkpoint(found) == (None, f"{HANDED}; {said}")
        assert drill_counts.lost_text(found) == "at least 4.0s"
        found.death = ended(lost_s=0.0)
        assert drill_counts.lost_text(found) == "not known"


def test_a_checkpoint_that_was_noted_is_known_when_newer_ones_took_its_place() -> None:
    found = story(count(1, 1), count(2, 2))
    found.note([replace(SAVED, seq=seq, attempt=3, progress=count(seq, 3)) for seq in (6, 7)])
    found.note([replace(SAVED, sealed=False, valid=False, progress=None)])
    assert "at 1/400 again, though checkpoint 5 says 50/400" in checkpoint(found)[1]


def test_a_task_whose_count_tells_nothing_yet_is_waited_for_until_it_saves() -> None:
    found = story(count(10, 1, 7), count(20, 2, 7))
    assert not drill_counts.is_settled(found)
    saves(found, count(51, 3))
    assert drill_counts.is_settled(found)
    assert checkpoint(found)[0]
    assert drill_counts.is_settled(story(base=None)), "no count will ever be compared"


def test_what_was_redone_from_below_is_no_restore_where_it_may_not_be_held_against_it() -> None:
    found = story(count(10, 2), count(20, 3), count(60, 9), lost_s=0.5)
    assert checkpoint(found)[0] is None, "a journal kept more than the checkpoint"


def test_a_part_that_was_counted_to_its_end_or_anew_before_the_blow_is_held_to_nothing() -> None:
    below = (count(1, 2), count(2, 3))
    for last in (TOTAL, TOTAL - 1):  # counted from 1, and from 0
        assert checkpoint(story(*below, base=replace(BASE, done=last)))[0] is None, "the next part"
    base, before = replace(BASE, done=TOTAL - 2), count(TOTAL - 1, -1)
    assert checkpoint(story(*below, base=base, before=before))[0] is False
    share = story(count(0.1, 2, 1), count(0.2, 3, 1), base=replace(BASE, done=0.5, total=1.0))
    assert checkpoint(share)[0] is False, "a share of one is not at its last"
    anew = story(*below, before=count(5, -1))
    assert checkpoint(anew)[0] is None, "told after the save, and less"
    assert drill_counts.items_lost(anew) is None
    late = replace(count(49), at_ns=SAVED_NS - 1)
    assert checkpoint(story(*below, before=late))[0] is False, "told before the save"


def test_what_is_saved_in_a_later_part_is_not_held_against_the_first() -> None:
    found = story(count(60, 1), count(3, 2))
    saves(found, count(3, 2))
    assert checkpoint(found)[0]


def test_a_task_whose_journal_kept_more_than_its_checkpoint_is_not_held_to_that() -> None:
    found = story(count(10, 2), count(20, 3), lost_s=0.5)
    assert checkpoint(found)[0] is None
    assert drill_counts.items_lost(found) is None


def test_only_the_attempt_that_followed_the_blow_is_held_to_its_checkpoint() -> None:
    found = story(count(51, 1))
    later = replace(found.before.row, attempt=4)
    for one in count(10, 2), count(20, 3):
        found.look(replace(later, progress=one), 0)
    found.hear([marked(20, 4, 3, checkpoint=6)])
    assert (checkpoint(found)[0], found.has_saved) == (True, False)
    found.hear([marked(21, 3, 3, checkpoint=5)])
    assert not found.has_saved, "its journal grew"
    found.hear([marked(22, 3, 3, checkpoint=6)])
    assert found.has_saved


def test_a_task_without_a_checkpoint_that_says_how_far_it_is_is_held_to_none() -> None:
    found = story(count(1, 1), count(2, 2), base=None)
    assert checkpoint(found)[0] is None
    assert drill_counts.items_lost(found) is None
