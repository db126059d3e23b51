"""Root trees of Debian with systemd 252 and 257, and layers on top with ckptd installed.

`layers(suite)` is what a machine boots: the tree as debootstrap made it, and above it one directory
with all that `make install` wrote inside that tree (an overlay's upper directory). The tree is made
again when the list of packages changes, the layer when the sources do. Read next: machine.py.
"""

import os
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from tests.booted import pip_access
from tests.booted.cache import (
    Missing,
    build_step,
    cache_dir,
    cached,
    digest_of,
    new_log,
    prune,
    require,
)

ROOT = Path(__file__).resolve().parent.parent.parent
SUITES = {"252": "bookworm", "257": "trixie"}  # systemd's version -> Debian's suite
USERS = ("alice", "bob", "mallory")  # uids 1000, 1001, 1002; the first two are in group ckptd
MEMBERS = USERS[:2]
PACKAGES = (
    "systemd,systemd-sysv,dbus,dbus-user-session,libpam-systemd,procps,make,ca-certificates,"
    "python3,python3-venv,man-db,bash-completion,sudo,polkitd"
)
# Left out of the tree: what only developers need, so that a changed test is no reason to reinstall.
NOT_INSTALLED = ("tests/", ".ci/", "bench/")

PREPARE = f"""
set -e
for user in {" ".join(USERS)}; do useradd --create-home --shell /bin/bash $user; done
rm -rf /var/cache/apt/archives/*.deb /var/lib/apt/lists/* /usr/share/doc/* /usr/share/locale/*
echo booted >/etc/hostname
systemd-machine-id-setup
"""
INSTALL = f"""
set -e
make -C /usr/src/ckptd install
systemd-sysusers
for user in {" ".join(MEMBERS)}; do usermod --append --groups ckptd $user; done
"""
# Mounts live in a namespace of their own: when the last process in it ends, they are gone.
IN_OVERLAY = """
set -e
mount -t tmpfs -o mode=0755 tmpfs "$WORK"
mkdir "$WORK/upper" "$WORK/work" "$WORK/tree"
mount -t overlay -o "lowerdir=$LOWER,upperdir=$WORK/upper,workdir=$WORK/work" overlay "$WORK/tree"
mkdir -p "$WORK/tree/usr/src"
cp -a "$SOURCES" "$WORK/tree/usr/src/ckptd"
systemd-nspawn --quiet --directory="$WORK/tree" --register=no --keep-unit --as-pid2 --pipe \
  --resolv-conf=bind-host --machine="ckptd-install-$$" "$@"
umount "$WORK/tree"
cp -a "$WORK/upper" "$OUT"
"""


def tree(suite: str) -> Path:
    """Return the root tree of a Debian suite; about a minute and 350 MB the first time.

    Raises:
        Missing: No root, no debootstrap, or no way to Debian's mirror.
    """
    _require_root()
    require("debootstrap", package="debootstrap")
    digest = digest_of([PACKAGES.encode(), PREPARE.encode()])
    return cached(suite, digest, lambda out: _bootstrap(suite, out))


def _bootstrap(suite: str, out: Path) -> None:
    log = new_log(out.stem)
    what = f"debootstrap of {suite} (is Debian's mirror reachable?)"
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", suite, str(out)]
    build_step(command, log, what)
    build_step(["chroot", str(out), "sh", "-c", PREPARE], log, f"preparing {suite}")


@cache
def layers(suite: str) -> list[Path]:
    """Return the directories of a system with ckptd installed, the uppermost first.

    One run of the tests stays with the sources that it began with.

    Raises:
        Missing: See `tree`; also no systemd-nspawn, or `make install` failed (pip's network?).
    """
    below = tree(suite)
    require("systemd-nspawn", package="systemd-container")
    sources = checkout()
    files = [part for name, (mode, data) in sources.items() for part in (name.encode(), mode, data)]
    digest = digest_of([below.name.encode(), INSTALL.encode(), *files])
    above = cached(f"ckptd-{suite}", digest, lambda out: _install(below, sources, out))
    prune(f"ckptd-{suite}")
    return [above, below]


def _install(below: Path, sources: dict[str, tuple[bytes, bytes]], out: Path) -> None:
    log = new_log(out.stem)
    downloads = cache_dir() / "pip"
    downloads.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ckb-") as scratch, pip_access.binds() as binds:
        work, copy = Path(scratch) / "w", Path(scratch) / "src"
        work.mkdir()
        _write(sources, copy)
        command = [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "--",
            "sh",
            "-c",
            IN_OVERLAY,
            "-",
        ]
        command += [
            *binds,
            f"--bind={downloads}:/run/pip-cache",
            "--setenv=PIP_CACHE_DIR=/run/pip-cache",
        ]
        command += ["--setenv=PIP_ROOT_USER_ACTION=ignore", "/bin/sh", "-c", INSTALL]
        env = {"WORK": str(work), "LOWER": str(below), "OUT": str(out), "SOURCES": str(copy)}
        build_step(command, log, "make install inside the tree", env={**os.environ, **env})


def checkout() -> dict[str, tuple[bytes, bytes]]:
    """Return the checkout's files, tracked or new but not ignored: name -> (x or -, content)."""
    listed = subprocess.run(
        [
            "git",
            "-c",
            "safe.directory=*",
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        raise Missing(f"git ls-files in the checkout: {listed.stderr.decode().strip()}")
    found = {}
    for name in sorted(set(listed.stdout.decode().split("\0"))):
        path = ROOT / name
        if name and path.is_file() and not name.startswith(NOT_INSTALLED):
            mode = b"x" if path.stat().st_mode & stat.S_IXUSR else b"-"
            found[name] = (mode, path.read_bytes())
    return found


def _write(sources: dict[str, tuple[bytes, bytes]], directory: Path) -> None:
    for name, (mode, data) in sources.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o755 if mode == b"x" else 0o644)
    directory.chmod(0o755)


def _require_root() -> None:
    if os.geteuid() != 0:
        raise Missing(
            "booted systems need root (mounts, namespaces): sudo make test-systemd test-vm"
        )
