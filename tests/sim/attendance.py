"""When a daemon was there to see that a timeout is over, and whether its clock was right."""

TOLD_LATE_NS = 2 * 10**9  # a start or an end is told by then
ADOPTED_NS = 30 * 10**9  # so long who is taken over may go on: it may have asked for more


class Attendance:
    """One daemon after the other, on one clock. Moments are of time that really passed."""

    def __init__(self) -> None:
        self.reigns = 0
        self.jumps_ns: list[int] = []
        self._disturbed_ns = 0  # when the last thing was over that holds a daemon up
        self._serves = self._stands_still = False

    def begins(self) -> None:
        """A daemon starts."""
        self.reigns += 1

    def serves(self, now_ns: int) -> None:
        """It has come up."""
        self._disturbed_ns, self._serves = now_ns, True

    def is_gone(self) -> None:
        """It ended, or died."""
        self._serves = False

    def stands_still(self, *, is_so: bool, now_ns: int) -> None:
        """It waits for its disk, and no more."""
        self._disturbed_ns, self._stands_still = now_ns, is_so

    def jumped(self, now_ns: int) -> None:
        """The wall clock is set."""
        self._disturbed_ns = now_ns
        self.jumps_ns.append(now_ns)

    def was_set_unseen(self, began_ns: int, *, is_adopted: bool) -> bool:
        """Tell whether the clock may be wrong about an attempt: nothing is promised then.

        It was set between the start and the news of it, which carries the clock of before, or at
        any time while the attempt ran, if an earlier daemon was the one that started it.
        """
        until_ns = 1 << 62 if is_adopted else began_ns + TOLD_LATE_NS
        return any(began_ns <= at_ns <= until_ns for at_ns in self.jumps_ns)

    def must_have_stopped(self, timeout_s: float, began_ns: int, reign: int, now_ns: int) -> bool:
        """Tell whether an attempt of that reign has run for so long that it was told to stop."""
        is_adopted = reign != self.reigns
        is_awake = self._serves and not self._stands_still
        if not is_awake or self.was_set_unseen(began_ns, is_adopted=is_adopted):
            return False
        given_ns = ADOPTED_NS if is_adopted else 0
        due_ns = max(began_ns + int(timeout_s * 1e9), self._disturbed_ns + given_ns)
        return now_ns > due_ns + TOLD_LATE_NS
