"""`events` where the beginning of the log is retired: all that is kept, and no gap unseen."""

import json

import pytest

from tests.daemon_fixture import StartDaemon
from tests.raw_client import RawClient, RefusedError

CONFIG = f"[wal]\nsegment_bytes = {8 << 20}\nsnapshot_every_bytes = {1 << 20}\n"
SUBMITS_MAX = 100  # many times what fills two segments
NOT_FOUND = 4


def cut(client: RawClient) -> None:
    """Fill the log until its beginning is retired."""
    for number in range(SUBMITS_MAX):
        task = {"argv": ["true"], "cwd": "/", "env": {"BIG": f"{number:0>120000}"}, "hold": True}
        ids = client.ask("submit", {"tasks": [task] * 8})["ids"]
        client.ask("cancel", {"select": {"ids": ids}})
        client.ask("clean", {"select": {"ids": ids}})
        try:
            client.ask("events", {"since": 0})
        except RefusedError:
            return
    pytest.fail("nothing of the log was retired")


def test_events_begin_with_the_earliest_kept_where_nobody_named_an_lsn(
    start_daemon: StartDaemon,
) -> None:
    daemon = start_daemon(config=CONFIG)
    with RawClient(daemon.endpoint) as client:
        task = {"argv": ["true"], "cwd": "/", "hold": True}
        (kept,) = client.ask("submit", {"tasks": [task]})["ids"]
        cut(client)

    for words in (["--since", "0"], ["--since", "2h"]):
        lines = daemon.ctl("events", *words, "-o", "jsonl").stdout.splitlines()
        assert json.loads(lines[0])["lsn"] > 1
    daemon.ctl("events", "--task", str(kept))

    forgotten = daemon.ctl("events", "--task", str(kept + 1), check=False)
    told = "is not known any more" in forgotten.stderr
    assert (forgotten.returncode, told) == (NOT_FOUND, True)
    refused = daemon.ctl("events", "--since", "1", check=False)
    assert (refused.returncode, "is retired" in refused.stderr) == (NOT_FOUND, True)
