"""What waits over upgrades starts: it names the link of the installation, not one tree of it."""

import json
import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

from tests.daemon_fixture import ROOT, LiveDaemon

WORK = """
import os, sys

def main(ctx):
    with open("/proc/self/cmdline", "rb") as file:
        runner = file.read().decode().split("\\0")[1]
    return [runner, sys.modules["ckptd"].__file__]

def item(word):
    with open(f"/proc/{os.getppid()}/cmdline", "rb") as file:
        return [file.read().decode().split("\\0")[0], sys.modules["ckptd"].__file__]
"""
PACKAGES = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"


def install(libdir: Path, name: str) -> Path:
    """Make a tree like one of `make install`, with our own code in it, and switch to it."""
    tree, base = libdir / name, os.path.realpath(sys.executable)
    (tree / PACKAGES).mkdir(parents=True)
    for package in ("ckptd", "ckptctl"):
        (tree / PACKAGES / package).symlink_to(ROOT / package)
    (tree / PACKAGES / "needed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    (tree / "bin").mkdir()
    (tree / "bin/ckptd-python").symlink_to(base)
    (tree / "pyvenv.cfg").write_text(f"home = {os.path.dirname(base)}\n")
    (libdir / "venv").unlink(missing_ok=True)
    (libdir / "venv").symlink_to(name)
    return tree


def submitted(daemon: LiveDaemon, tree: Path, *words: str) -> int:
    """Submit with the ckptctl of a tree, to a group that starts nothing; return the task's id."""
    env = {name: value for name, value in daemon.env.items() if name != "PYTHONPATH"}
    command = [str(tree / "bin/ckptd-python"), "-P", "-m", "ckptctl", *words]
    done = subprocess.run(
        command, env=env, cwd=daemon.work, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_what_waits_over_upgrades_runs_by_the_tree_of_then_and_keeps_to_it(
    daemon: LiveDaemon,
) -> None:
    libdir = daemon.root / "lib/ckptd"
    (daemon.work / "work.py").write_text(WORK)
    daemon.ctl("group", "add", "later", "--parallel", "2")
    daemon.ctl("group", "pause", "later")
    old = install(libdir, "venv-1-old")
    options = ("-q", "-g", "later", "--interpreter", sys.executable, "--python")
    function = submitted(daemon, old, "submit", *options, "work:main")
    batch = submitted(daemon, old, "batch", "submit", "-n", "b", *options, "work:item", ":::", "a")
    new = install(libdir, "venv-2-new")
    shutil.rmtree(old)  # as the install after the next one does

    daemon.ctl("group", "resume", "later")
    for known in (function, batch):
        assert daemon.wait_phase(known, "succeeded", "failed")["phase"] == "succeeded"

    ckptd = f"{new}/{PACKAGES}/ckptd"
    (task,) = daemon.json("show", str(function))["tasks"]
    assert task["result"] == [f"{ckptd}/sdk/run.py", f"{ckptd}/__init__.py"]
    item = json.loads(daemon.ctl("batch", "export", "b", "-o", "jsonl").stdout)
    assert item["result"] == [f"{new}/bin/ckptd-python", f"{ckptd}/__init__.py"]
