"""The man pages and completions: nothing that the programs know is missing from them."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from ckptctl import cli
from ckptctl.table import VERBS
from ckptd.daemon.main import argument_parser
from ckptd.protocol.errors import BadConfig, Busy, Corrupt, DiskFull, Internal
from ckptd.sdk import ckpt
from install import manual

ROOT = Path(__file__).resolve().parents[2]
PAGES = manual.pages()


def readable(page: str) -> str:
    """A page without its roff."""
    text = re.sub(r"\\f[BIR]|\\&", "", PAGES[page])
    for escaped, char in (("\\-", "-"), ("\\(aq", "'"), ("\\(ga", "`"), ("\\(ti", "~")):
        text = text.replace(escaped, char)
    return text.replace("\\e", "\\")


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_and_option_of_ckptctl_is_in_its_page(name: str) -> None:
    page = readable("ckptctl.1")
    parser = cli.parser_of(VERBS[name])[0]
    section = page.partition(f'.SS "ckptctl {name} ')[2] or page.partition(f"ckptctl {name} ")[2]
    assert section
    missing = [flag for flag in parser._option_string_actions if flag not in page]
    assert missing == []


def test_every_key_of_the_configuration_is_in_its_page() -> None:
    page = readable("ckptd.toml.5")
    for table, keys in tomllib.loads((ROOT / "etc/ckptd.toml").read_text()).items():
        assert f"SECTION [{table}" in page
        for key, value in keys.items():
            names = value if isinstance(value, dict) else [key]
            assert [name for name in names if f"\n{name} = " not in page] == []


def test_every_verb_of_ckpt_is_in_its_page() -> None:
    page = readable("ckpt.1")
    verbs = re.findall(r"^  ([\w?-]+)", ckpt.HELP, re.MULTILINE)
    assert len(verbs) > 15
    assert [verb for verb in verbs if f"\nckpt {verb}" not in page] == []


def test_every_option_and_unit_of_the_daemon_is_in_its_page() -> None:
    page = readable("ckptd.8")
    assert [flag for flag in argument_parser()._option_string_actions if flag not in page] == []
    for word in ("ckptd.socket", "ckptd.slice", "ckptd-drain.service", "fork-runner.conf"):
        assert word in page


def test_every_end_of_the_daemon_is_in_its_page_and_known_to_its_unit() -> None:
    said = re.search(r"EXIT STATUS\n(.*?)\.SH", readable("ckptd.8"), re.DOTALL)
    assert said
    kinds = (Busy, DiskFull, Corrupt, Internal, BadConfig)
    codes = {0, 64} | {kind.exit_code for kind in kinds}
    named, final = said[1].split("systemd starts it again except after ")
    assert set(map(int, re.findall(r"\b(\d+) [a-z]", named))) == codes
    unit = (ROOT / "systemd/ckptd.service").read_text()
    (prevented,) = re.findall(r"^RestartPreventExitStatus=(.*)$", unit, re.MULTILINE)
    assert re.findall(r"\d+", final) == prevented.split()


@pytest.mark.skipif(not shutil.which("groff"), reason="needs groff")
@pytest.mark.parametrize("page", PAGES)
def test_roff_finds_nothing_to_warn_about(page: str) -> None:
    done = subprocess.run(
        ["groff", "-man", "-ww", "-z", "-Tutf8", "-rLL=120n"],
        input=PAGES[page],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
