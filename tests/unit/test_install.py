"""`make install`: what it writes, over what it writes, and that `make uninstall` takes it back."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from install import payload, tree
from install.__main__ import LIST, put, say_what_is_next, take_away, uninstall
from install.payload import Item
from install.places import Places, Unfit, places
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[2]
INSTALLING = pytest.mark.timeout(300)  # pip gets packages, perhaps from the network
OLD_CONFIG = '[daemon]\nlog_level = "debug"\n'

SYSTEM = {
    "etc/ckptd/ckptd.toml",
    "usr/bin/ckpt",
    "usr/bin/ckptctl",
    "usr/bin/ckptd",
    "usr/lib/ckptd/installed",
    "usr/lib/ckptd/venv",
    *(
        f"usr/lib/systemd/{scope}/{unit}"
        for scope in ("system", "user")
        for unit in ("ckptd.service", "ckptd.socket", "ckptd.slice", "ckptd-drain.service")
    ),
    "usr/lib/systemd/catalog/ckptd.catalog",
    "usr/lib/sysusers.d/ckptd.conf",
    "usr/lib/tmpfiles.d/ckptd.conf",
    "usr/share/bash-completion/completions/ckptctl",
    "usr/share/fish/vendor_completions.d/ckptctl.fish",
    "usr/share/zsh/site-functions/_ckptctl",
    "usr/share/man/man1/ckpt.1",
    "usr/share/man/man1/ckptctl.1",
    "usr/share/man/man5/ckptd.toml.5",
    "usr/share/man/man8/ckptd.8",
    "usr/share/doc/ckptd/ckptd.toml",
    "usr/share/doc/ckptd/fork-runner.conf",
    "usr/share/doc/ckptd/fork-runner-user.conf",
}


def make(verb: str, destdir: Path, umask: int = 0o022) -> str:
    done = subprocess.run(
        ["make", "--no-print-directory", verb, f"PYTHON={sys.executable}"],
        cwd=ROOT,
        env={**os.environ, "DESTDIR": str(destdir), "PREFIX": "/usr"},
        umask=umask,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files(destdir: Path) -> Iterator[str]:
    """Every file outside the trees of Python code."""
    for path in destdir.rglob("*"):
        name = path.relative_to(destdir).as_posix()
        if "/venv-" not in name and (path.is_symlink() or not path.is_dir()):
            yield name


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    destdir = tmp_path_factory.mktemp("dest")
    make("install", destdir, umask=0o077)
    return destdir


@INSTALLING
def test_the_installed_files_are_exactly_these(installed: Path) -> None:
    documents = {f"usr/share/doc/ckptd/{name}" for name in payload.DOCUMENTS}
    documents |= {f"usr/share/doc/ckptd/{page.name}" for page in (ROOT / "docs").glob("*.md")}
    assert set(files(installed)) == SYSTEM | documents


@INSTALLING
def test_everybody_may_run_it_whatever_the_umask_of_who_installed_it(installed: Path) -> None:
    for path in [installed / "usr", *(installed / "usr").rglob("*")]:
        mode = stat.S_IMODE(path.lstat().st_mode)
        if path.is_symlink():
            continue
        assert mode == 0o755 if path.is_dir() else mode in (0o644, 0o755), path


@INSTALLING
def test_nothing_names_the_place_where_it_was_made(installed: Path) -> None:
    made_in = os.fsencode(installed)
    (code,) = (installed / "usr/lib/ckptd").glob("venv-*")
    for path in installed.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert made_in not in path.read_bytes(), path
    script = (code / "bin/ckptctl").read_text()
    assert script.startswith(f"#!/usr/lib/ckptd/{code.name}/bin/ckptd-python -IS\n")
    assert f"/usr/lib/ckptd/{code.name}/lib/python3" in script


@INSTALLING
def test_the_environment_is_whole_compiled_and_without_tools(installed: Path) -> None:
    home = installed / "usr/lib/ckptd/venv"
    names = {path.name for path in (home / "bin").iterdir()}
    assert names == {"ckpt", "ckptctl", "ckptd", "ckptd-python"}
    python = home / "bin/ckptd-python"
    code = "import ckptd.daemon.main as m, ckptctl.cli; print(m.__cached__)"
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert os.path.exists(done.stdout.strip())
    assert subprocess.run([python, "-I", "-c", "import pip"], check=False, stderr=-3).returncode


@INSTALLING
def test_a_second_install_replaces_the_first_and_uninstall_leaves_only_the_admins(
    installed: Path, tmp_path: Path
) -> None:
    destdir = tmp_path / "dest"
    shutil.copytree(installed, destdir, symlinks=True)
    config = destdir / "etc/ckptd/ckptd.toml"
    config.write_text(OLD_CONFIG)
    listing = destdir / "usr/lib/ckptd/installed"
    gone = destdir / "usr/share/man/man1/ckptold.1"  # a page that only the old version had
    gone.write_text("old")
    listing.write_text(f"{listing.read_text()}/usr/share/man/man1/ckptold.1\n")
    before = os.readlink(destdir / "usr/lib/ckptd/venv")

    assert "stays as it is" in make("install", destdir)

    assert os.readlink(destdir / "usr/lib/ckptd/venv") != before
    assert (destdir / "usr/lib/ckptd" / before / "bin/ckptd").exists()  # it may be running
    assert config.read_text() == OLD_CONFIG
    assert not gone.exists()

    make("uninstall", destdir)

    assert list(files(destdir)) == ["etc/ckptd/ckptd.toml"]
    assert not (destdir / "usr").exists()


def test_a_tree_that_a_process_still_uses_is_not_removed(tmp_path: Path) -> None:
    where = places({"DESTDIR": str(tmp_path)}, 0)
    for name in ("venv-1-old", "venv-2-idle", "venv-3-now"):
        os.makedirs(where.staged(f"{where.libdir}/{name}"))
    used = f"{where.libdir}/venv-1-old/bin/ckptd-python"
    process = subprocess.Popen(["sh", "-c", "echo; read _", used], stdin=-1, stdout=-1)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()  # it executes what it says

    assert tree.prune(where, keep={"venv-3-now"}) == ["venv-1-old"]
    assert sorted(os.listdir(where.staged(where.libdir))) == ["venv-1-old", "venv-3-now"]

    process.communicate(b"\n")
    until(lambda: tree.prune(where, keep={"venv-3-now"}) == [])
    assert os.listdir(where.staged(where.libdir)) == ["venv-3-now"]


def test_there_is_a_current_tree_at_every_moment(tmp_path: Path) -> None:
    where = places({"DESTDIR": str(tmp_path)}, 0)
    os.makedirs(where.staged(where.libdir))
    assert [tree.switch(where, name) for name in ("venv-1", "venv-2", "venv-2")] == [
        "",
        "venv-1",
        "venv-2",
    ]
    assert os.readlink(where.staged(f"{where.libdir}/venv")) == "venv-2"


@pytest.mark.parametrize(
    ("prefix", "units"),
    [("/usr", "/usr/lib/systemd/system"), ("/opt/ckptd", "/usr/local/lib/systemd/system")],
)
def test_units_go_where_systemd_reads_them(prefix: str, units: str) -> None:
    assert places({"PREFIX": prefix}, 0).unitdir == units


def test_a_users_own_prefix_touches_nothing_of_the_system() -> None:
    where = places({"PREFIX": "/home/u/.local", "HOME": "/home/u"}, 1000)
    assert where.is_private
    assert where.userunitdir == "/home/u/.local/share/systemd/user"
    assert where.confdir == "/home/u/.config/ckptd"
    made = [item.path for item in payload.payload(where, sys.executable)]
    assert [path for path in made if not path.startswith("/home/u/")] == []


def test_without_systemd_the_daemon_is_to_be_started_by_hand(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    say_what_is_next(
        places({"PREFIX": "/home/u/.local", "HOME": "/home/u"}, 1000), str(tmp_path / "no")
    )
    said = capfd.readouterr()
    assert "start `/home/u/.local/bin/ckptd` yourself" in said.out
    assert "systemctl" not in said.out + said.err


@pytest.mark.parametrize("prefix", ["relative", "/has space", "/per%cent", "/" + 100 * "x"])
def test_a_prefix_that_cannot_work_is_refused(prefix: str) -> None:
    with pytest.raises(Unfit, match="PREFIX"):
        places({"PREFIX": prefix}, 0)


def test_without_python3_venv_the_package_to_install_is_named(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['ensurepip'] = None\n"
        "from install.__main__ import main; sys.exit(main(['install']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"DESTDIR": str(tmp_path), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "apt install python3-venv" in done.stderr
    assert "Traceback" not in done.stderr


def test_uninstalling_what_is_not_there_is_told(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "install", "uninstall"],
        cwd=ROOT,
        env={"DESTDIR": str(tmp_path), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, "nothing is installed" in done.stderr) == (1, True)


def test_links_lead_from_the_commands_to_the_current_tree() -> None:
    where: Places = places({"PREFIX": "/usr"}, 0)
    assert payload.links(where)["/usr/bin/ckpt"] == "../lib/ckptd/venv/bin/ckpt"


def test_an_install_that_breaks_off_is_taken_back_by_uninstall(tmp_path: Path) -> None:
    where = places({"DESTDIR": str(tmp_path), "PREFIX": "/usr"}, 0)
    made: set[str] = set()
    items = [Item("/usr/share/a/b", "text"), Item("/usr/share/a/b/c", "b is a file")]
    with pytest.raises(OSError, match="b"):
        put(where, items, {"/usr/share/man/old"}, made)
    assert (tmp_path / "usr/share/a/b").read_text() == "text"
    uninstall(where)
    assert not (tmp_path / "usr/share").exists()
    assert not (tmp_path / "usr/lib/ckptd").exists()


def test_a_link_that_lies_in_the_way_is_not_followed(tmp_path: Path) -> None:
    where = places({"DESTDIR": str(tmp_path / "dest"), "PREFIX": "/usr"}, 0)
    prey = tmp_path / "prey"
    prey.write_text("not ours")
    (tmp_path / "dest/usr/share").mkdir(parents=True)
    (tmp_path / "dest/usr/share/page.new").symlink_to(prey)
    put(where, [Item("/usr/share/page", "text")], set(), set())
    assert prey.read_text() == "not ours"
    assert (tmp_path / "dest/usr/share/page").read_text() == "text"


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose name leaves room for a script's first line."""
    with tempfile.TemporaryDirectory(prefix="ck-") as path:
        yield Path(path)


def test_an_uninstall_leaves_what_running_tasks_run_by_and_a_later_one_removes_it(
    short_path: Path,
) -> None:
    where = places({"PREFIX": str(short_path / "usr")}, 1000)
    made: set[str] = set()
    items = [Item(f"{where.mandir}/man1/ckpt.1", "text"), Item(f"{where.libdir}/file", "text")]
    listing = put(where, items, set(), made) | made
    for name in ("venv-1-used", "venv-2-idle"):
        os.makedirs(f"{where.libdir}/{name}/bin")
    path = f"{os.environ['PATH']}:{where.libdir}/venv-1-used/bin"  # as every task has it
    process = subprocess.Popen(
        ["sh", "-c", "echo; read _"], env={"PATH": path}, stdin=-1, stdout=-1
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()  # it executes what it says

    assert take_away(where, listing) == ["venv-1-used"]
    left = {file for file in (short_path / "usr").rglob("*") if not file.is_dir()}
    assert left == {Path(where.libdir, LIST)}
    assert os.path.isdir(f"{where.libdir}/venv-1-used/bin")

    process.communicate(b"\n")
    assert take_away(where, set(Path(where.libdir, LIST).read_text().split())) == []
    assert os.listdir(short_path) == []
