"""The host's way to Python packages, lent to a tree while something is installed in it.

Environment variables and files of pip's configuration are passed on, files read-only and only while
the installation runs: nothing of them stays in the tree.
"""

import configparser
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
PROXIES = {"http_proxy", "https_proxy", "no_proxy", "all_proxy"}


@contextmanager
def binds() -> Iterator[list[str]]:
    """Yield the options of systemd-nspawn that let pip inside work as it does outside."""
    with tempfile.NamedTemporaryFile("w", prefix="ckb-", suffix=".conf") as merged:
        _configuration().write(merged)
        merged.flush()
        options = [
            f"--bind-ro={merged.name}:/run/pip.conf",
            "--setenv=PIP_CONFIG_FILE=/run/pip.conf",
        ]
        if os.path.exists(CERTIFICATES):
            options.append(f"--bind-ro={CERTIFICATES}")
        for name, value in os.environ.items():
            if name.lower() in PROXIES or (name.startswith("PIP_") and name != "PIP_CONFIG_FILE"):
                options += _passed(name, value)
        yield options


def _passed(name: str, value: str) -> list[str]:
    """Pass a variable on; where it names a file or directory, lend that too."""
    options = []
    if value.startswith("/") and os.path.exists(value) and value != CERTIFICATES:
        inside = f"/run/pip-access/{name.lower()}"
        options.append(f"--bind-ro={value}:{inside}")
        value = inside
    return [*options, f"--setenv={name}={value}"]


def _configuration() -> configparser.RawConfigParser:
    """Return the host's configuration files as one, the user's own over the system's."""
    home = Path(os.path.expanduser("~"))
    files = [Path("/etc/pip.conf"), home / ".pip/pip.conf", home / ".config/pip/pip.conf"]
    merged = configparser.RawConfigParser()
    merged.read([*files, Path(os.environ.get("PIP_CONFIG_FILE", os.devnull))])
    return merged
