"""The private environment: a directory per version, made aside, and one symlink to the current one.

    PREFIX/lib/ckptd/venv-0.1.0-5f3a9c01/     all of one version, never changed again
    PREFIX/lib/ckptd/venv -> venv-0.1.0-5f3a9c01
    PREFIX/bin/ckptctl -> ../lib/ckptd/venv/bin/ckptctl

Scripts name the interpreter by the directory of their version, so that a running process keeps to
the version that it began with, in whatever it imports later, and nobody sees half an installation.
A directory that was replaced is removed by a later install, once no process names it. Tasks that
wait name the link instead (`lasting` in `ckptctl/files.py`), and go over to a tree as they start.
"""

import contextlib
import glob
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from install.places import Places, Unfit

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "ckptd": "ckptd.daemon.main",
    "ckptctl": "ckptctl.__main__",
    "ckpt": "ckptd.sdk.ckpt",
}
INTERPRETER = "ckptd-python"  # tasks have this directory in PATH: no `python` of ours for them
LINK = "venv"

# -I: nobody's PYTHONPATH, working directory or user site; -S: no search for .pth files, 10 ms less.
_SCRIPT = """\
#!{tree}/bin/{interpreter} -IS
import sys

sys.path.append("{packages}")
from {module} import main

sys.exit(main())
"""


def build(places: Places) -> str:
    """Make the tree of this checkout's version and return its name; it is not yet in use.

    Raises:
        Unfit: Python has no venv, or pip could not install.
    """
    libdir = places.staged(places.libdir)
    os.makedirs(libdir, exist_ok=True)
    for stale in glob.glob(f"{glob.escape(libdir)}/.new-*"):  # of an install that was killed
        shutil.rmtree(stale)
    name = _free_name(libdir)
    stage = f"{libdir}/.new-{name}"
    try:
        _make_venv(stage)
        _install_into(stage)
        _strip(stage)
        _write_scripts(stage, f"{places.libdir}/{name}")
        _compile(stage, f"{places.libdir}/{name}")
        os.rename(stage, f"{libdir}/{name}")
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return name


def python_of(places: Places, name: str) -> str:
    """Return the interpreter of a tree."""
    return places.staged(f"{places.libdir}/{name}/bin/{INTERPRETER}")


def switch(places: Places, name: str) -> str:
    """Make a tree the current one, at once; returns the name of the one before, or ""."""
    link = places.staged(f"{places.libdir}/{LINK}")
    before = ""
    with contextlib.suppress(OSError):
        before = os.readlink(link)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{link}.new")
    os.symlink(name, f"{link}.new")
    os.rename(f"{link}.new", link)
    return before


def prune(places: Places, *, keep: set[str]) -> list[str]:
    """Remove the trees that nobody uses and that are not to be kept; returns those in use."""
    in_use = []
    for path in glob.glob(f"{glob.escape(places.staged(places.libdir))}/venv-*"):
        name = os.path.basename(path)
        if name in keep:
            continue
        if is_named_by_a_process(f"{places.libdir}/{name}/"):
            in_use.append(name)
        else:
            shutil.rmtree(path)
    return in_use


def is_named_by_a_process(path: str) -> bool:
    """Tell whether a process has `path` in its command line, its environment or its memory map."""
    wanted = os.fsencode(path)
    return any(wanted in text for text in _process_texts())


def _process_texts() -> Iterator[bytes]:
    own = str(os.getpid())
    for pid in os.listdir("/proc"):
        if not pid.isdigit() or pid == own:
            continue
        for name in ("cmdline", "environ", "maps"):
            # gone meanwhile, or somebody else's: then it cannot be told, and root can always tell
            with contextlib.suppress(OSError), open(f"/proc/{pid}/{name}", "rb") as file:
                yield file.read()


# --- the steps of a build ---------------------------------------------------------------------


def _free_name(libdir: str) -> str:
    first = f"venv-{_version()}-{_digest()}"
    names = (f"{first}.{number}" if number else first for number in range(1_000_000))
    return next(name for name in names if not os.path.lexists(f"{libdir}/{name}"))


def _version() -> str:
    text = (ROOT / "ckptd/protocol/version.py").read_text()
    found = re.search(r'^VERSION.*"(.+)"', text, re.MULTILINE)
    assert found is not None
    return found[1]


def _sources() -> list[Path]:
    code = [path for top in ("ckptd", "ckptctl") for path in (ROOT / top).rglob("*.py")]
    return sorted([*code, ROOT / "ckptd/py.typed", ROOT / "pyproject.toml", ROOT / "README.md"])


def _digest() -> str:
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def _make_venv(stage: str) -> None:
    try:
        import ensurepip  # noqa: F401, PLC0415  (Debian has it in a package of its own)
    except ImportError as missing:
        package = "python3-venv"
        text = f"{sys.executable} cannot make virtual environments; install {package} first"
        raise Unfit(f"{text} (Debian, Ubuntu: apt install {package})") from missing
    # The file with the version in its name: an upgrade of the machine's Python must not slip
    # under packages that were made for another one.
    base = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    _run([base, "-I", "-m", "venv", "--symlinks", stage], "no virtual environment could be made")


def _install_into(stage: str) -> None:
    pip = [f"{stage}/bin/python", "-I", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as copies:  # a build in the checkout would litter it
        for path in _sources():
            copy = Path(copies) / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        _run(
            [*pip, "install", "--use-pep517", "--no-compile", "--root-user-action=ignore", copies],
            "pip could not install ckptd and what it needs (see above; no network?)",
        )
    # Nobody installs anything more here. Which of them `venv` brought depends on Python's version.
    tools = [name for name in ("setuptools", "pip") if os.path.isdir(f"{_packages(stage)}/{name}")]
    _run([*pip, "uninstall", "--yes", "--root-user-action=ignore", *tools], "pip does not go away")


def _strip(stage: str) -> None:
    """Leave one interpreter in bin/, and no path of the place where it was made."""
    base = os.path.realpath(f"{stage}/bin/python")
    for path in glob.glob(f"{glob.escape(stage)}/bin/*"):
        os.unlink(path) if not os.path.isdir(path) else shutil.rmtree(path)
    os.symlink(base, f"{stage}/bin/{INTERPRETER}")
    shutil.rmtree(f"{stage}/include", ignore_errors=True)
    config = Path(stage, "pyvenv.cfg")
    lines = config.read_text().splitlines(keepends=True)
    config.write_text("".join(line for line in lines if not line.startswith("command")))
    for path in glob.glob(f"{glob.escape(_packages(stage))}/ckptd-*.dist-info/*"):
        if os.path.basename(path) in ("direct_url.json", "RECORD"):
            os.unlink(path)
    # A few wheels come with modes of their making: all is for everybody to read.
    for directory, _, names in os.walk(stage):
        os.chmod(directory, 0o755)  # noqa: S103
        for name in names:
            path = f"{directory}/{name}"
            if not os.path.islink(path):
                os.chmod(path, 0o755 if os.stat(path).st_mode & 0o100 else 0o644)


def _write_scripts(stage: str, final: str) -> None:
    inside = os.path.relpath(_packages(stage), stage)
    for command, module in COMMANDS.items():
        path = f"{stage}/bin/{command}"
        values = {"interpreter": INTERPRETER, "packages": f"{final}/{inside}", "module": module}
        Path(path).write_text(_SCRIPT.format(tree=final, **values))
        os.chmod(path, 0o755)  # noqa: S103


def _compile(stage: str, final: str) -> None:
    command = [f"{stage}/bin/{INTERPRETER}", "-I", "-m", "compileall", "-q"]
    _run([*command, "-s", stage, "-p", final, f"{stage}/lib"], "the code could not be compiled")


def _packages(stage: str) -> str:
    (found,) = glob.glob(f"{glob.escape(stage)}/lib/python3*/site-packages")
    return found


def _run(command: list[str], failure: str) -> None:
    if subprocess.run(command, check=False).returncode != 0:
        raise Unfit(failure)
