"""The catalog and docs/JOURNAL.md say what the daemon tells, no more and no less."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ckptd.host.journal import Kind
from tests.unit.daemon.kinds import CATALOG, DOCUMENT, catalog, regenerated, sent_with


def test_every_kind_is_explained_and_no_explanation_is_of_an_unknown_one() -> None:
    assert set(catalog()) == {kind.value for kind in Kind}


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)
def test_an_explanation_fills_in_only_what_is_sent_with_its_kind(kind: Kind) -> None:
    headers, text = catalog()[kind.value]
    used = set(re.findall(r"@(\w+)@", headers["Subject"] + text))
    assert used <= {f"CKPTD_{name.upper()}" for name in sent_with()[kind]}


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)
def test_an_explanation_has_all_its_parts(kind: Kind) -> None:
    headers, text = catalog()[kind.value]
    assert {"Subject", "Defined-By", "Documentation"} <= set(headers)
    assert headers["Documentation"].startswith("man:")
    assert text.strip()
    assert max(map(len, text.splitlines())) <= 100


def test_every_kind_is_told_somewhere() -> None:
    silent = [kind.name for kind, fields in sent_with().items() if not fields]
    sources = "\n".join(path.read_text() for path in (DOCUMENT.parents[1] / "ckptd").rglob("*.py"))
    assert not [name for name in silent if f"Kind.{name}" not in sources]


def test_the_table_of_the_document_is_the_one_of_the_code() -> None:
    text = DOCUMENT.read_text()
    assert text == regenerated(text), "run: python -m tests.unit.daemon.kinds"


@pytest.mark.skipif(not shutil.which("journalctl"), reason="no journalctl here")
def test_journalctl_takes_the_catalog(tmp_path: Path) -> None:
    installed = tmp_path / "usr/lib/systemd/catalog"
    installed.mkdir(parents=True)
    (tmp_path / "var/lib/systemd/catalog").mkdir(parents=True)
    shutil.copy(CATALOG, installed)
    for action in ("--update-catalog", "--list-catalog"):
        done = subprocess.run(
            ["journalctl", f"--root={tmp_path}", action], capture_output=True, text=True, check=True
        )
        assert not done.stderr
    assert len(done.stdout.splitlines()) == len(Kind)
