"""Run inside a booted machine, by the daemon's own Python: clients that submit without a pause.

    load.py CLIENTS SECONDS   submit held tasks, each under a name of its own; then compare what was
                              acknowledged with what is stored, and print a line of JSON

Every third client connects anew now and then. A client resends until it is answered.
"""

import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from multiprocessing.queues import SimpleQueue

from ckptd.client import Client, find_endpoint
from ckptd.protocol.errors import CkptdError
from ckptd.protocol.messages import Status, Submit, Submitted, TaskPage, TaskSpec

PATIENCE_S = 60.0
Told = tuple[dict[str, int], list[str]]


def submit(prefix: str, number: int, seconds: float, out: "SimpleQueue[Told]") -> None:
    """Submit until the time is over; tell what was acknowledged, and what was not."""
    acknowledged: dict[str, int] = {}
    refused: list[str] = []
    end = time.monotonic() + seconds
    client = Client(find_endpoint(), PATIENCE_S)
    count = 0
    while time.monotonic() < end:
        count += 1
        if number % 3 == 0 and count % 20 == 0:
            client.close()
            client = Client(find_endpoint(), PATIENCE_S)
        name = f"{prefix}-{number}-{count}"
        task = TaskSpec(("true",), name=name, hold=True)
        try:
            acknowledged[name] = client.call("submit", Submit((task,)), Submitted).ids[0]
        except CkptdError as error:
            refused.append(f"{name}: {error.message}")
    client.close()
    out.put((acknowledged, refused))


def stored(prefix: str) -> list[tuple[str, int]]:
    """Return name and id of every task of the load."""
    found, cursor = [], 0
    with Client(find_endpoint(), PATIENCE_S) as client:
        while True:  # Bound: pages end
            page = client.call("status", Status(limit=1_000, cursor=cursor), TaskPage)
            found += [(row.name, row.id) for row in page.tasks if row.name.startswith(prefix)]
            cursor = page.next
            if not cursor:
                return found


def main(clients: int, seconds: float) -> None:
    """Make the load and print what became of it."""
    out: SimpleQueue[Told] = multiprocessing.SimpleQueue()
    prefix = f"load-{os.urandom(4).hex()}"
    working = [
        multiprocessing.Process(target=submit, args=(prefix, number, seconds, out))
        for number in range(clients)
    ]
    for process in working:
        process.start()
    told = [out.get() for _ in working]
    for process in working:
        process.join()
    acknowledged = {name: task for each, _ in told for name, task in each.items()}
    rows = stored(prefix)
    there, times = set(rows), Counter(name for name, _ in rows)
    result = {
        "acknowledged": len(acknowledged),
        "refused": [line for _, lines in told for line in lines],
        "lost": [name for name, task in acknowledged.items() if (name, task) not in there],
        "doubled": [name for name, count in times.items() if count > 1],
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
