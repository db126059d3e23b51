"""`python3 -m install [install|uninstall]`, what `make install` and `make uninstall` run.

The places come from the environment (PREFIX, DESTDIR, SYSCONFDIR, UNITDIR ...); see `places.py`.
Only the standard library: this runs before anything is installed.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from install import tree
from install.payload import CONFIG, Item, links, payload
from install.places import Places, Unfit, places
from install.tree import ROOT

BOOTED = "/run/systemd/system"  # Source: sd_booted(3)
LIST = "installed"  # in libdir: what to remove, one path a line, directories with a slash


def main(argv: list[str]) -> int:
    """Do it; returns the exit code."""
    os.umask(0o022)  # whatever root's is: everybody runs these programs
    verb = argv[0] if argv else "install"
    try:
        where = places(os.environ, os.geteuid())
        with _alone(where):
            install(where) if verb == "install" else uninstall(where)
    except PermissionError as denied:
        print(f"ckptd: {denied.filename}: permission denied; try sudo, or a PREFIX of your own",
              file=sys.stderr)  # fmt: skip
        return 77
    except Unfit as unfit:
        print(f"ckptd: {unfit}", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def _alone(where: Places) -> Iterator[None]:
    """Let one install or uninstall at a time work here."""
    above = where.staged(where.prefix)
    while not os.path.isdir(above):
        above = os.path.dirname(above)
    fd = os.open(above, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


# --- install ----------------------------------------------------------------------------------


def install(where: Places) -> None:
    """Install this checkout over whatever version is there."""
    listing = _read_list(where)
    print(f"ckptd: making {where.libdir}, a minute ...")
    made: set[str] = set()
    _make_directory(where, where.libdir, made)
    name = tree.build(where)
    items = payload(where, tree.python_of(where, name))
    before = tree.switch(where, name)
    made |= {path for path in listing if path.endswith("/")}
    fresh = put(where, items, listing, made)
    _write_config(where)
    for path in listing - fresh - made:
        _remove(where.staged(path))
    _write_list(where, fresh | made)
    if not where.destdir:
        for used in tree.prune(where, keep={name, before}):
            print(f"ckptd: {used} stays until its last process has ended")
        _tell_the_system(where)
        say_what_is_next(where)


def put(where: Places, items: Iterable[Item], listing: set[str], made: set[str]) -> set[str]:
    """Write every file and link; return their paths. `made`: directories, grows by new ones.

    Where it breaks off, what is there by then is in the list, for `uninstall`.
    """
    files, commands = list(items), links(where)
    fresh = {item.path for item in files} | set(commands)
    try:
        for item in files:
            _write(where, item, made)
        for path, target in commands.items():
            _link(where, path, target, made)
    finally:
        _write_list(where, listing | fresh | made)
    return fresh


def _write(where: Places, item: Item, made: set[str]) -> None:
    """Replace a file in one step: who reads it sees the old or the new one. Follows no link."""
    _make_directory(where, os.path.dirname(item.path), made)
    path = where.staged(item.path)
    _remove(f"{path}.new")
    with open(f"{path}.new", "x") as file:
        file.write(item.text)
    os.chmod(f"{path}.new", 0o644)
    os.rename(f"{path}.new", path)


def _link(where: Places, path: str, target: str, made: set[str]) -> None:
    _make_directory(where, os.path.dirname(path), made)
    staged = where.staged(path)
    _remove(f"{staged}.new")
    os.symlink(target, f"{staged}.new")
    os.rename(f"{staged}.new", staged)


def _make_directory(where: Places, path: str, made: set[str]) -> None:
    if path == "/":
        os.makedirs(where.destdir or path, exist_ok=True)
    elif not os.path.isdir(where.staged(path)):
        _make_directory(where, os.path.dirname(path), made)
        os.mkdir(where.staged(path), 0o755)
        made.add(f"{path}/")


def _write_config(where: Places) -> None:
    """Invariant: a configuration that is there is never touched."""
    path = where.staged(f"{where.confdir}/{CONFIG}")
    default = (ROOT / "etc" / CONFIG).read_text()
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        with open(path, "x") as file:
            file.write(default)
    except FileExistsError:
        if Path(path).read_text(errors="replace") != default:
            print(f"ckptd: {where.confdir}/{CONFIG} stays as it is; the new defaults are in"
                  f" {where.docdir}/{CONFIG}")  # fmt: skip


def _tell_the_system(where: Places) -> None:
    """Make the group and the directories, and have systemd and the journal look again."""
    if where.is_private:
        if os.path.isdir(BOOTED):
            _try(["systemctl", "--user", "daemon-reload"])
    elif os.geteuid() == 0:
        _try(["systemd-sysusers", f"{where.sysusersdir}/ckptd.conf"])
        _try(["systemd-tmpfiles", "--create", f"{where.tmpfilesdir}/ckptd.conf"])
        _look_again()


def _look_again() -> None:
    _try(["journalctl", "--update-catalog"])
    if os.path.isdir(BOOTED):
        _try(["systemctl", "daemon-reload"])


def _try(command: list[str]) -> bool:
    if not shutil.which(command[0]):
        return False
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        print(f"ckptd: {' '.join(command)}: {done.stderr.strip()}", file=sys.stderr)
    return done.returncode == 0


def say_what_is_next(where: Places, booted: str = BOOTED) -> None:
    """Say how the daemon is started here."""
    user = " --user" if where.is_private else ""
    asked = ["systemctl", *user.split(), "is-active", "--quiet", "ckptd.service"]
    is_booted = os.path.isdir(booted)
    runs = is_booted and subprocess.run(asked, check=False, capture_output=True).returncode == 0
    if not is_booted:
        print(f"ckptd: installed; no systemd runs here, so start `{where.bindir}/ckptd` yourself")
    elif runs:
        print(f"ckptd: installed; now `systemctl{user} restart ckptd` (tasks run on)")
    else:
        print(f"ckptd: installed; now `systemctl{user} enable --now ckptd`")
    if where.is_private:
        if is_booted:
            print("ckptd: `loginctl enable-linger` lets tasks run on when you log out")
        if where.bindir not in os.environ.get("PATH", "").split(":"):
            print(f"ckptd: {where.bindir} is not in your PATH")
    elif not runs:
        print("ckptd: who shall submit tasks joins the group: `usermod -aG ckptd USER`")


# --- uninstall --------------------------------------------------------------------------------


def uninstall(where: Places) -> None:
    """Remove all that `install` made, stop the daemon, leave tasks and data alone."""
    listing = _read_list(where)
    if not listing:
        raise Unfit(f"nothing is installed: there is no {where.staged(where.libdir)}/{LIST}")
    is_live = not where.destdir and (where.is_private or os.geteuid() == 0)
    scope = ["--user"] if where.is_private else []
    is_booted = os.path.isdir(BOOTED)
    if is_live and is_booted:
        _try(["systemctl", *scope, "disable", "--now", "ckptd.socket", "ckptd.service"])
    in_use = take_away(where, listing)
    if is_live and not where.is_private:
        _look_again()
    elif is_live and is_booted:
        _try(["systemctl", "--user", "daemon-reload"])
    kept = f"{where.confdir}, ~/.local/state/ckptd"
    if not where.is_private:
        kept = f"{where.confdir}, /var/lib/ckptd and the group ckptd"
    print(f"ckptd: removed; {kept} are kept, and tasks that run are left alone")
    for name in in_use:
        print(f"ckptd: {where.libdir}/{name} stays for them; uninstall again after their end")


def take_away(where: Places, listing: set[str]) -> list[str]:
    """Remove what is in the list and all of libdir but the trees in use; return those.

    What a task runs by (`ckpt`, modules that it imports later) stays, and the list of the
    directories with it: so an uninstall after its end removes the rest.
    """
    directories = {path for path in listing if path.endswith("/")}
    for path in sorted(listing - directories):
        _remove(where.staged(path))
    in_use = [] if where.destdir else tree.prune(where, keep=set())
    if in_use:
        _write_list(where, directories)
    else:
        shutil.rmtree(where.staged(where.libdir))
    for path in sorted(directories, reverse=True):
        with contextlib.suppress(OSError):  # gone with libdir, or something is in it
            os.rmdir(where.staged(path))
    return in_use


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _read_list(where: Places) -> set[str]:
    try:
        return set(Path(where.staged(f"{where.libdir}/{LIST}")).read_text().splitlines())
    except FileNotFoundError:
        return set()


def _write_list(where: Places, listing: set[str]) -> None:
    _write(where, Item(f"{where.libdir}/{LIST}", "\n".join(sorted(listing)) + "\n"), set())


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
