"""make bench-systemd: boot a machine of each systemd version and measure starts in it."""

import sys
from pathlib import Path

from tests.booted import roots
from tests.booted.cache import Missing
from tests.booted.conftest import START
from tests.booted.nspawn import Nspawn

BENCH = Path(__file__).resolve().parents[2] / "bench"


def main() -> int:
    """Print a table for each version; what cannot be booted here is said."""
    for version, suite in roots.SUITES.items():
        print(f"systemd {version}")
        try:
            with Nspawn(suite) as machine:
                machine.boot()
                machine.sh(START)
                for path in BENCH.glob("*.py"):
                    machine.put(f"/srv/bench/{path.name}", path.read_text())
                packages = "$(echo /usr/local/lib/ckptd/venv/lib/python3*/site-packages)"
                bench = f"PYTHONPATH={packages} python3 -m bench units --out bench.json"
                print(machine.sh(f"cd /srv && {bench}"))
        except Missing as missing:
            print(f"  skipped: {missing}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
