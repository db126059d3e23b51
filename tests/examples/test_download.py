"""examples/download.py against real web servers: killed, its file changed, its server failing."""

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.examples import servers
from tests.examples.killing import Example, checkpoints, seeded
from tests.waiting import until

SIZE_BYTES = 8_000_000  # two seconds at the speed of the servers
OLD = random.Random(1).randbytes(SIZE_BYTES)
NEW = random.Random(2).randbytes(SIZE_BYTES + 1_000)


@pytest.fixture(params=["nginx", "small server"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[servers.Site]:
    if request.param == "nginx" and not servers.NGINX:
        pytest.skip("nginx is not installed: apt-get install nginx-light")
    serve = servers.nginx if request.param == "nginx" else servers.small_server
    folder = tmp_path / "server"
    folder.mkdir()
    with serve(folder) as found:
        found.publish("big.bin", OLD)
        yield found


class Download:
    """The example, fetching big.bin into a directory."""

    def __init__(self, site: servers.Site, folder: Path, sha256: str = "") -> None:
        self.to = folder / "big.bin"
        self.task = folder / "big.bin.task"
        self.example = Example("download.py", f"{site.url}/big.bin", self.to, sha256)

    def saves(self) -> int:
        return checkpoints(self.task)

    def saved_bytes(self) -> int:
        manifest = self.task / "ckpt" / f"{self.saves():08d}" / "MANIFEST.json"
        return int(json.loads(manifest.read_text())["state"]["bytes"])


def test_it_is_killed_three_times_and_fetches_nothing_twice_that_was_saved(
    site: servers.Site, tmp_path: Path
) -> None:
    chance, download = seeded(), Download(site, tmp_path, hashlib.sha256(OLD).hexdigest())
    went_on_at = [
        download.saved_bytes() - 1
        for _ in range(3)
        if download.example.kill_in_the_middle(chance, download.saves, most=1)
    ]

    said = download.example.run()

    assert download.to.read_bytes() == OLD
    assert hashlib.sha256(OLD).hexdigest() in said
    assert not Path(f"{download.to}.part").exists()
    until(lambda: len(site.asked()) == 1 + len(went_on_at))
    assert sorted(one.start for one in site.asked()) == sorted([0, *went_on_at])
    assert went_on_at[-1] > 0


def test_a_file_that_changes_underneath_is_started_over_and_never_mixed(
    site: servers.Site, tmp_path: Path
) -> None:
    download = Download(site, tmp_path)
    assert download.example.kill_in_the_middle(seeded(), download.saves, most=1)
    went_on_at = download.saved_bytes() - 1

    site.publish("big.bin", NEW)
    download.example.run()

    assert download.to.read_bytes() == NEW
    until(lambda: len(site.asked()) == 2)
    last = site.asked()[-1]
    assert (last.start, last.status) == (went_on_at, 200)  # asked for a part, got the whole


def test_a_server_that_ignores_if_range_cannot_mix_two_versions_either(tmp_path: Path) -> None:
    folder = tmp_path / "server"
    folder.mkdir()
    with servers.small_server(folder, honours_if_range=False) as site:
        site.publish("big.bin", OLD)
        download = Download(site, tmp_path)
        assert download.example.kill_in_the_middle(seeded(), download.saves, most=1)

        site.publish("big.bin", NEW)
        said = download.example.run(code=1)  # a daemon would try again by itself
        assert "TransientError" in said
        assert "ignores If-Range" in said
        download.example.run()

        assert download.to.read_bytes() == NEW


def test_another_digest_than_was_asked_for_is_refused(site: servers.Site, tmp_path: Path) -> None:
    site.publish("big.bin", b"small")
    download = Download(site, tmp_path, "0" * 64)

    said = download.example.run(code=1)

    assert f"has the digest {hashlib.sha256(b'small').hexdigest()}, not 000" in said
    assert not download.to.exists()


def test_what_is_not_there_is_a_permanent_error(site: servers.Site, tmp_path: Path) -> None:
    said = Example("download.py", f"{site.url}/none", tmp_path / "none").run(code=1)
    assert "PermanentError" in said
    assert "404" in said
