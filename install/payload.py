"""Every file outside the private environment: units, man pages, completions, documents.

One list serves install, uninstall and the test of both. Texts name places as @bindir@.
"""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from install import tree
from install.places import Places
from install.tree import ROOT

DOCUMENTS = ("README.md", "ARCHITECTURE.md", "PROTOCOL.md", "FORMAT.md", "CHANGELOG.md")
UNITS = ("ckptd.service", "ckptd.socket", "ckptd.slice", "ckptd-drain.service")
COMPLETIONS = {"bash": "ckptctl", "zsh": "_ckptctl", "fish": "ckptctl.fish"}
CONFIG = "ckptd.toml"


class Item(NamedTuple):
    """One file: its final path and what is in it."""

    path: str
    text: str


def payload(places: Places, python: str) -> list[Item]:
    """Return all files; `python` is an interpreter that has ckptctl, for what is generated."""
    items = [*_units(places), *_documents(places), *_generated(places, python)]
    return items if places.is_private else [*items, *_system(places)]


def links(places: Places) -> dict[str, str]:
    """Return the commands: final path -> what the symlink says."""
    current = f"{places.libdir}/{tree.LINK}/bin"
    return {
        f"{places.bindir}/{name}": os.path.relpath(f"{current}/{name}", places.bindir)
        for name in tree.COMMANDS
    }


def render(text: str, places: Places, *, is_user: bool = False) -> str:
    """Return a unit's text with its places filled in."""
    is_usual = is_user or places.sysconfdir == "/etc"
    option = "" if is_usual else f" --config {places.confdir}/{CONFIG}"
    for name, value in (
        ("bindir", places.bindir),
        ("docdir", places.docdir),
        ("config_option", option),
        ("scope", "--user" if is_user else "--system"),
    ):
        text = text.replace(f"@{name}@", value)
    return text


def _units(places: Places) -> Iterator[Item]:
    for name in UNITS:
        user = (ROOT / "systemd/user" / name).read_text()
        yield Item(f"{places.userunitdir}/{name}", render(user, places, is_user=True))
        if not places.is_private:
            system = (ROOT / "systemd" / name).read_text()
            yield Item(f"{places.unitdir}/{name}", render(system, places))


def _system(places: Places) -> Iterator[Item]:
    for path, name in (
        (f"{places.sysusersdir}/ckptd.conf", "sysusers.conf"),
        (f"{places.tmpfilesdir}/ckptd.conf", "tmpfiles.conf"),
        (f"{places.catalogdir}/ckptd.catalog", "ckptd.catalog"),
        (f"{places.docdir}/fork-runner.conf", "fork-runner.conf"),
    ):
        yield Item(path, (ROOT / "systemd" / name).read_text())


def _documents(places: Places) -> Iterator[Item]:
    yield Item(f"{places.docdir}/{CONFIG}", (ROOT / "etc" / CONFIG).read_text())
    drop_in = (ROOT / "systemd/user/fork-runner.conf").read_text()
    yield Item(f"{places.docdir}/fork-runner-user.conf", drop_in)
    pages = [ROOT / name for name in DOCUMENTS] + sorted((ROOT / "docs").glob("*.md"))
    for page in pages:
        yield Item(f"{places.docdir}/{page.name}", page.read_text())


def _generated(places: Places, python: str) -> Iterator[Item]:
    """Man pages and completions, made from the same tables that the commands read."""
    with tempfile.TemporaryDirectory() as made:
        manual = str(ROOT / "install/manual.py")
        subprocess.run([python, "-P", "-B", manual, made], check=True)
        for page in sorted(os.listdir(made)):
            section = page.rpartition(".")[2]
            text = Path(made, page).read_text()
            yield Item(f"{places.mandir}/man{section}/{page}", render(text, places))
    directories = (places.bashcompdir, places.zshcompdir, places.fishcompdir)
    for (shell, name), directory in zip(COMPLETIONS.items(), directories, strict=True):
        command = [python, "-P", "-B", "-m", "ckptctl", "completion", shell]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        yield Item(
            f"{directory}/{name}", _autoloaded(done.stdout) if shell == "zsh" else done.stdout
        )


def _autoloaded(script: str) -> str:
    """Turn the zsh script that is sourced into one that zsh loads at the first completion."""
    return f"#compdef ckptctl\n{script}_bash_complete -o default -F _ckptctl\n"
