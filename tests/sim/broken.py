"""What ends a life: a promise that is broken, or a crash of whatever code it was in."""

import traceback

from tests.sim.asked import Violation
from tests.sim.crash_states import Broken
from tests.sim.faults import Blow

ENDS = (Exception, Blow)
"""Whatever leaves a life is a violation of its seed. A Blow should have been caught inside."""
LINES_MAX = 12  # of a traceback


def words(error: BaseException) -> str:
    """Return what was broken; of a crash, where it was."""
    if isinstance(error, (Violation, Broken)):
        return str(error)
    lines = "".join(traceback.format_exception(error)).splitlines()
    return "\n".join(["it crashed:", *lines[-LINES_MAX:]])
