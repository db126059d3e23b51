"""Twenty clients at once: nobody gets a conflict that is not one; the history stays linear."""

import threading
from typing import Any

from tests.daemon_fixture import LiveDaemon
from tests.raw_client import RawClient

CLIENTS = 20
TURNS = 5


def select(task: int) -> dict[str, Any]:
    return {"select": {"ids": [task]}}


def change(client: RawClient, verb: str, task: int) -> None:
    """Change one task; fail where the daemon refuses it."""
    (changed,) = client.ask(verb, select(task))["tasks"]
    assert changed.get("error") is None, f"{verb} {task}: {changed}"


def wait_done(client: RawClient, task: int) -> dict[str, Any]:
    """Return the row of a task once it has ended."""
    for _ in range(10):  # Bound: each waits up to 5 s at the daemon
        waited = client.ask("wait", {**select(task), "hold_s": 5.0})
        if waited["met"]:
            row: dict[str, Any] = waited["tasks"][0]
            return row
    raise TimeoutError(f"task {task} has no end")


def one_client(endpoint: str, failures: list[str], tasks: list[int]) -> None:
    """Submit, cancel and retry, as a person in a hurry would."""
    with RawClient(endpoint) as client:
        try:
            for _ in range(TURNS):
                sleeping = {"argv": ["/bin/sleep", "300"], "name": "sleeping"}
                quick = {"argv": ["/bin/true"], "name": "quick"}
                long, short = client.ask("submit", {"tasks": [sleeping, quick]})["ids"]
                tasks += [long, short]
                change(client, "cancel", long)
                assert wait_done(client, long)["phase"] == "cancelled"
                change(client, "retry", long)
                change(client, "cancel", long)
                assert wait_done(client, long)["phase"] == "cancelled"
                assert wait_done(client, short)["phase"] == "succeeded"
                change(client, "retry", short)
                assert wait_done(client, short)["phase"] == "succeeded"
        except Exception as failed:  # noqa: BLE001  (told by the main thread)
            failures.append(repr(failed))


def check_linear(events: list[dict[str, Any]], tasks: list[int]) -> None:
    """Every task: submitted once; attempts follow one another, each started after the last end."""
    lsns = [event["lsn"] for event in events]
    assert lsns == sorted(set(lsns))
    for task in tasks:
        story = [event for event in events if event["task"] == task]
        assert [event["type"] for event in story].count("submitted") == 1
        assert story[0]["type"] == "submitted"
        is_running, attempt = False, 0
        for event in story:
            if event["type"] == "start_intent":
                assert not is_running, f"task {task}: two at once in {story}"
                assert event["attempt"] == attempt + 1
                is_running, attempt = True, event["attempt"]
            elif event["type"] == "ended":
                assert is_running, f"task {task} ended twice in {story}"
                is_running = False
        assert not is_running


def test_twenty_clients_change_tasks_at_once_without_a_wrong_conflict(daemon: LiveDaemon) -> None:
    failures: list[str] = []
    tasks: list[int] = []
    with RawClient(daemon.endpoint) as client:
        client.ask("group_set", {"name": "default", "parallel": CLIENTS})
    threads = [
        threading.Thread(target=one_client, args=(daemon.endpoint, failures, tasks))
        for _ in range(CLIENTS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not failures
    assert len(set(tasks)) == CLIENTS * TURNS * 2
    with RawClient(daemon.endpoint) as client:
        check_linear(client.events(), tasks)
    daemon.restart()
    with RawClient(daemon.endpoint) as client:
        phases = {row["id"]: row["phase"] for row in client.rows()}
    assert set(phases) == set(tasks)
    assert set(phases.values()) == {"cancelled", "succeeded"}
