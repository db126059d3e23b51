"""Promise 1, acknowledged means durable; promise 8, ids are for ever; promise 3, once only."""

import random
from collections import Counter
from typing import Any

import pytest

from tests.daemon_fixture import LiveDaemon
from tests.raw_client import RawClient
from tests.waiting import let_pass, until

AFTER_ANSWER_S_MAX = (0.008, 0.05)  # half of the rounds strike while tasks are being started
ANSWER_S = 10.0


def submit_args(daemon: LiveDaemon, name: str, *, hold: bool) -> dict[str, Any]:
    """Return a task that leaves one line in a file of its name each time it runs."""
    argv = ["/bin/sh", "-c", f"echo x >> {daemon.work}/{name}"]
    return {"tasks": [{"argv": argv, "name": name, "hold": hold}]}


def one_round(
    daemon: LiveDaemon, chance: random.Random, number: int
) -> tuple[dict[str, int], dict[str, bool]]:
    """Submit a few, kill the daemon a moment later; return answered ids and what was asked."""
    with RawClient(daemon.endpoint) as client:
        asked = {f"t{number}-{i}": chance.random() < 0.3 for i in range(chance.randint(1, 4))}
        requests = {
            name: client.send("submit", submit_args(daemon, name, hold=hold))
            for name, hold in asked.items()
        }
        answered = {}
        waited_for = chance.randint(1, len(asked))  # the others may be cut off in the middle
        for name in list(requests)[:waited_for]:
            reply = client.receive(requests[name], ANSWER_S)
            assert reply is not None, f"no answer: {daemon.log.read_text()[-3000:]}"
            assert reply["ok"], reply
            answered[name] = reply["result"]["ids"][0]
        let_pass(chance.uniform(0, chance.choice(AFTER_ANSWER_S_MAX)))
        daemon.kill9()
        daemon.start()
        for name, request in requests.items():  # a resend is safe whether it was answered or not
            client.send("submit", submit_args(daemon, name, hold=asked[name]), request)
            client.replies.pop(request, None)
            reply = client.receive(request, ANSWER_S)
            assert reply is not None
            assert reply["ok"], reply
            found = reply["result"]["ids"][0]
            assert answered.setdefault(name, found) == found, f"{name} got a second id"
        return answered, asked


@pytest.mark.timeout(1800)
def test_every_answered_submit_survives_kill9_under_its_id_and_runs_once(
    daemon: LiveDaemon, rounds: int
) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    ids: dict[str, int] = {}
    holds: dict[str, bool] = {}
    for number in range(rounds):
        answered, asked = one_round(daemon, chance, number)
        assert not set(answered.values()) & set(ids.values()), "an id was given twice"
        ids |= answered
        holds |= asked

    with RawClient(daemon.endpoint) as client:
        rows = client.rows()
        assert Counter(row["name"] for row in rows) == Counter(ids.keys())
        assert {row["name"]: row["id"] for row in rows} == ids

        def all_ended() -> bool:
            rows = client.rows()
            return all(row["phase"] in ("succeeded", "held") for row in rows)

        try:
            until(all_ended, 60.0, every_s=0.2)
        except TimeoutError:
            stuck = [row for row in client.rows() if row["phase"] not in ("succeeded", "held")]
            pytest.fail(f"not ended: {stuck}")

    for name, hold in holds.items():
        path = daemon.work / name
        times = path.read_text().count("x") if path.exists() else 0
        assert times == (0 if hold else 1), f"{name} ran {times} times"


def test_a_resend_in_another_daemons_reign_gets_the_first_answer(daemon: LiveDaemon) -> None:
    args = submit_args(daemon, "once", hold=True)
    with RawClient(daemon.endpoint) as client:
        request = client.send("submit", args)
        first = client.receive(request, ANSWER_S)
        daemon.restart()
        client.send("submit", args, request)

        assert client.receive(request, ANSWER_S) == first
        assert len(client.rows()) == 1
