"""Where the files of a user are, however little the environment says."""

import os
import pwd
from collections.abc import Callable

import pytest

from ckptd import client
from ckptd.batch import place
from ckptd.host import paths
from ckptd.sdk import rate


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
    names = ("CKPTD_BATCH_DIR", "CKPTD_SCOPES_DIR", "XDG_DATA_HOME", "XDG_STATE_HOME",
             "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", "HOME")  # fmt: skip
    for name in names:
        monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv("HOME", given)

    assert place_of() == os.path.join(pwd.getpwuid(os.getuid()).pw_dir, below)
