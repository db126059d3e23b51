"""A hundred thousand queued tasks are rows in a log: no process and no file each."""

import os

import pytest

from ckptd.protocol.limits import TASKS_PER_SUBMIT_MAX
from tests.daemon_fixture import LiveDaemon, processes_of
from tests.raw_client import RawClient

TASKS = 100_000
PROCESSES_MAX = 20  # the daemon, the warm parent, and supervisors that wait for work


def count_files(daemon: LiveDaemon) -> int:
    return sum(len(files) for _, _, files in os.walk(daemon.state))


@pytest.mark.timeout(120)
def test_a_hundred_thousand_queued_tasks_cost_no_process_and_no_file_each(
    daemon: LiveDaemon,
) -> None:
    with RawClient(daemon.endpoint) as client:
        client.ask("group_set", {"name": "default", "paused": True})
        ids: list[int] = []
        for _ in range(0, TASKS, TASKS_PER_SUBMIT_MAX):
            tasks = [{"argv": ["/bin/true"]}] * TASKS_PER_SUBMIT_MAX
            ids += client.ask("submit", {"tasks": tasks})["ids"]

        assert len(set(ids)) == TASKS
        assert len(list(processes_of(daemon.root))) < PROCESSES_MAX
        assert count_files(daemon) < 50
        daemon.restart()
        page = client.ask("status", {"select": {"all": True}, "limit": 1})
        assert page["totals"]["queued"] == TASKS
        assert count_files(daemon) < 50

        client.ask("group_set", {"name": "default", "paused": False, "parallel": 2})
        client.ask("wait", {"select": {"ids": ids[:1]}})
        assert client.ask("status", {"select": {"ids": ids[:1]}})["tasks"][0]["phase"] == (
            "succeeded"
        )
