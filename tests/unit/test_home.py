"""Where the files of a user are, however little the environment says."""

import os
import pwd
from collections.abc import Callable

import pytest

from ckptd import client
from ckptd.batch import place
from ckptd.home import home
from ckptd.host import paths
from ckptd.sdk import rate

NAMES = ("CKPTD_BATCH_DIR", "CKPTD_SCOPES_DIR", "XDG_DATA_HOME", "XDG_STATE_HOME",
         "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", "CONFIGURATION_DIRECTORY", "STATE_DIRECTORY",
         "HOME")  # fmt: skip


@pytest.mark.parametrize("given", ["", None], ids=["empty", "unset"])
@pytest.mark.parametrize(
    ("place_of", "below"),
    [
        (lambda: place.root(os.environ), ".local/share/ckptd/batches"),
        (lambda: rate.scopes_dir(os.environ), ".local/state/ckptd/scopes"),
        (lambda: paths.resolve(1000, os.environ).state, ".local/state/ckptd"),
        (client.user_socket, ".local/state/ckptd/run/ctl.sock"),
    ],
)
def test_an_empty_home_is_none_and_the_user_database_names_it(
    monkeypatch: pytest.MonkeyPatch, place_of: Callable[[], str], below: str, given: str | None
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv("HOME", given)

    assert place_of() == os.path.join(pwd.getpwuid(os.getuid()).pw_dir, below)


@pytest.mark.parametrize(
    ("name", "place_of", "below"),
    [
        ("XDG_DATA_HOME", lambda: place.root(os.environ), "ckptd/batches"),
        ("XDG_STATE_HOME", lambda: rate.scopes_dir(os.environ), "ckptd/scopes"),
        ("XDG_STATE_HOME", lambda: paths.resolve(1000, os.environ).state, "ckptd"),
        ("XDG_STATE_HOME", client.user_socket, "ckptd/run/ctl.sock"),
        ("XDG_CONFIG_HOME", lambda: paths.default_config(1000, os.environ), "ckptd/ckptd.toml"),
    ],
)
def test_what_a_user_says_of_each_kind_of_files_goes_before_the_home(
    monkeypatch: pytest.MonkeyPatch, name: str, place_of: Callable[[], str], below: str
) -> None:
    for other in NAMES:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.setenv(name, "/elsewhere")
    assert place_of() == f"/elsewhere/{below}"


def test_a_uid_that_nobody_entered_has_the_root_of_all_files_for_a_home(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a container started with `--user 12345` has it."""
    taken = {each.pw_uid for each in pwd.getpwall()}
    free = next(uid for uid in range(60_000, 99_999) if uid not in taken)
    monkeypatch.setattr(os, "getuid", lambda: free)
    assert home({}) == "/"
    assert home({"HOME": "/h"}) == "/h"
