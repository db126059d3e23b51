"""A mutant: one seeded mistake in production code, the promise it breaks, and who must notice.

The catalog is data, `catalog/*.toml`, a file for each room of the code:

    [[mutant]]
    id = "wal-no-data-sync"
    file = "ckptd/storage/wal.py"
    old = '''...'''        exact text, found once in the file, else the mutant is mended first
    new = '''...'''
    breaks = "acknowledged is durable"
    killers = ["tests/unit/storage/test_wal.py::test_..."]

A killer fails within SECONDS_MAX because of what the code does: a mutant that only breaks an
import, or hangs its killer, is a mistake of the catalog. So is one that reaches processes which are
not its killer's: it may be made on a machine whose tasks matter (a search of process trees by the
attempt's number alone killed the tasks of a soak beside it).
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CATALOG = Path(__file__).resolve().parent / "catalog"


class Stale(Exception):
    """The mutant does not apply any more: the code it spoils has changed."""


@dataclass(frozen=True)
class Mutant:
    """One mistake. Without `old`, `new` comes before all that is in the file."""

    id: str
    file: str
    new: str
    breaks: str
    killers: tuple[str, ...]
    old: str = ""

    def applied(self, text: str) -> str:
        """Return the file with the mistake in it.

        Raises:
            Stale: `old` is not there exactly once, or what comes out is no Python.
        """
        if not self.old:
            return self.new + text
        count = text.count(self.old)
        if count != 1:
            why = f"its old text stands {count} times in {self.file}"
            raise Stale(f"mutant {self.id} no longer applies, mend it: {why}")
        spoilt = text.replace(self.old, self.new)
        try:
            compile(spoilt, self.file, "exec")
        except SyntaxError as bad:
            raise Stale(f"mutant {self.id} makes no Python of {self.file}: {bad}") from bad
        return spoilt

    def apply(self, tree: Path) -> None:
        """Make the mistake in a copy of the project."""
        path = tree / self.file
        path.write_text(self.applied(path.read_text()))


def catalog() -> list[Mutant]:
    """Return all mutants, in the order of their files."""
    found = [mutant for path in sorted(CATALOG.glob("*.toml")) for mutant in read(path)]
    ids = [mutant.id for mutant in found]
    twice = {one for one in ids if ids.count(one) > 1}
    assert not twice, f"two mutants have one id: {twice}"
    return found


def read(path: Path) -> list[Mutant]:
    """Return the mutants of one file of the catalog."""
    entries = tomllib.loads(path.read_text())["mutant"]
    return [Mutant(**{**entry, "killers": tuple(entry["killers"])}) for entry in entries]
