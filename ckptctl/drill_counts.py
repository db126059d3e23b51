"""What a drill makes of a task's own count: where it began again, and what was lost of it.

A checkpoint may say how far it is, and so may the attempt that goes on from it: when it tells, and
when it first saves. Less than its checkpoint says is work that was not gone on from.

Nothing is concluded where the two may count different things: another total; a count that the
checkpoint has at its end, or that had begun anew by itself before the blow; a journal that kept
more than the checkpoint. Nor from a 0, which programs say before they restore, or from one telling
below, of one that runs past what is done: it has to get on from there, below.
That it went on is concluded from its count alone, too: what says nothing has not been seen.
Read next: `drill_checks.py` (what must hold).
"""

import itertools

from ckptctl import words
from ckptctl.drill_watch import Story
from ckptctl.saving import short_text
from ckptctl.units import number_text
from ckptd.protocol.messages import Progress


def items_lost(story: Story) -> float | None:
    """Return what was done and is done again, in the task's own units; None: not known.

    Of a task that was not seen to go on from its checkpoint it is the least that it can be.
    """
    base, before = story.base, story.before.row.progress
    if base is None or before is None or before.total != base.total:
        return None
    if not _is_held_to(story, base):
        return None
    began = fallen_back(story)
    return max(0.0, story.reached - (base.done if began is None else began))


def lost_text(story: Story) -> str:
    """Return the work lost: the log knows only what came after the newest checkpoint."""
    fields = story.death.fields if story.death is not None else {}
    lost_s, items = fields.get("lost_s", 0.0), items_lost(story)
    is_least = bool(story.handed_seq) and not went_on(story)
    least = "at least " if is_least else ""
    counted = f", {least}{number_text(items)} by its own count" if items else ""
    bound = words.at_most("", fields.get("cause", "")) or least
    if lost_s or counted:
        return f"{bound}{short_text(lost_s)}{counted}"
    return "not known" if is_least else "none"


def went_on(story: Story) -> bool | None:
    """Tell whether the new attempt was seen at what its checkpoint says, or beyond; None: not seen.

    What is above it only after two tellings below may have been done again by then.
    """
    base = story.base
    if base is None:
        return None
    if fallen_back(story) is not None:
        return False
    below, beyond = _told_below(story, base)
    seen = [one for one in (beyond, story.first_saved) if one is not None]
    is_there = any(one.total == base.total and one.done >= base.done for one in seen)
    return True if is_there and len(below) <= 1 else None


def is_settled(story: Story) -> bool:
    """Tell whether nothing more is to come that could tell where it went on."""
    if not story.is_hit or story.base is None or story.end is not None:
        return True
    return went_on(story) is not None or story.first_saved is not None


def fallen_back(story: Story) -> float | None:
    """Return where the new attempt was again, if that is less than its checkpoint says."""
    base = story.base
    if base is None or not _is_held_to(story, base) or _is_at_its_end(base):
        return None
    below, beyond = _told_below(story, base)
    saved = story.first_saved
    is_later = saved is not None and beyond is not None and beyond.at_ns < saved.at_ns  # anew?
    is_same = saved is not None and not is_later and saved.total == base.total
    if saved is not None and is_same and 0 < saved.done < base.done:
        return min([saved.done, *below])
    gets_on = any(one < following for one, following in itertools.pairwise(below))
    return min(below) if gets_on else None


def _is_at_its_end(base: Progress) -> bool:
    """Tell so of the last of a count from 0, too: 4 of 5."""
    left = base.total - base.done
    return base.total > 0 and (left <= 0 or (left <= 1 < base.total))


def _told_below(story: Story, base: Progress) -> tuple[list[float], Progress | None]:
    """Return what was told first and is less than the checkpoint, and what was told after it."""
    below: list[float] = []
    for one in story.tells:
        if not one.done:
            continue  # before it restores, or with a line of status alone
        if one.total != base.total or one.done >= base.done:
            return below, one
        below.append(one.done)
    return below, None


def _is_held_to(story: Story, base: Progress) -> bool:
    """Tell whether its count can be compared with that of the checkpoint at all."""
    before = story.before.row.progress
    has_begun_anew = False
    if before is not None and before.total == base.total and before.at_ns > base.at_ns:
        has_begun_anew = before.done < base.done
    return not has_begun_anew and not story.kept_since(base.at_ns)
