"""The listening socket: made by us, kept for us by the service manager, or made by ckptd.socket.

libzmq gets it ready-made on every path (ZMQ_USE_FD), so it neither binds nor removes anything.

| made by        | its name    | survives restart and kill -9 | its path is removed by     |
| -------------- | ----------- | ---------------------------- | -------------------------- |
| ckptd.socket   | `ctl`       | yes, and starts the daemon   | systemd, when it stops     |
| a daemon, kept | `ctl.INODE` | yes, until `systemctl stop`  | who binds there next       |
| a daemon alone | none        | no: bound anew               | that daemon at its end     |

The last one binds again where its path goes while it runs: nothing else holds the old socket.
INODE is that of the path: a socket whose path was replaced meanwhile hears nobody any more.
Requests that come while no daemon runs wait in the socket's queue. Invariant: what others own is
never unlinked. Source: sd_listen_fds(3), sd_pid_notify_with_fds(3). Read next: `server.py`.
"""

import contextlib
import grp
import os
import socket
import stat
from collections.abc import MutableMapping, Sequence
from typing import Final, NamedTuple

from ckptd.host import paths
from ckptd.host.config import Ipc
from ckptd.host.journal import WARNING, Journal, Kind
from ckptd.protocol.errors import Busy, Internal

FIRST_FD: Final = 3  # SD_LISTEN_FDS_START
BACKLOG: Final = 1_024  # connections that wait while no daemon runs
GIVEN: Final = "ctl"  # FileDescriptorName= of ckptd.socket
UNNAMED: Final = frozenset({"", "unknown", "ckptd.socket"})  # what a unit that says nothing gets
VARIABLES: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")


class Handed(NamedTuple):
    """A descriptor that the service manager handed over, and its name."""

    name: str
    fd: int


def take_descriptors(env: MutableMapping[str, str]) -> list[Handed]:
    """Return what the service manager handed over, closed to children from now on.

    Removes the variables, so that no child believes they are meant for it. Call it before
    anything opens a descriptor or makes a process.
    """
    pid, count, names, _ = (env.pop(name, "") for name in VARIABLES)
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    named = names.split(":") if names else []
    named += [""] * (int(count) - len(named))
    handed = [Handed(named[index], FIRST_FD + index) for index in range(int(count))]
    for each in handed:
        os.set_inheritable(each.fd, False)
    return handed


class Listening:
    """One listening socket; `stale` names kept sockets that are of no use any more."""

    def __init__(self, path: str, listening: socket.socket, *, is_ours: bool) -> None:
        self.path, self.is_ours = path, is_ours
        self.is_kept = False
        self.stale: list[str] = []
        self._socket = listening
        self._inode = _inode(path)
        listening.setblocking(False)

    @property
    def name(self) -> str:
        """Return the name that it is kept under."""
        return _kept_name(self._inode)

    def fileno(self) -> int:
        """Return the descriptor; it stays ours."""
        return self._socket.fileno()

    def copy(self) -> int:
        """Return another descriptor of the same socket, for libzmq to close."""
        return os.dup(self._socket.fileno())

    @property
    def is_lost(self) -> bool:
        """Tell whether nobody can find our socket any more: its path was removed or replaced.

        One that the service manager keeps or gave is never lost: it would hold the wrong one.
        """
        return self.is_ours and not self.is_kept and _inode(self.path) != self._inode

    def renew(self, ipc: Ipc, journal: Journal) -> None:
        """Bind anew. Raises what `listen` raises, and the socket stays as it was."""
        new = _bind(self.path, ipc, journal)
        new.setblocking(False)
        self._socket.close()
        self._socket, self._inode = new, _inode(self.path)

    def close(self) -> None:
        """Let go. The path goes with it only where nobody else has the socket."""
        self._socket.close()
        if self.is_ours and not self.is_kept and _inode(self.path) == self._inode:
            with contextlib.suppress(OSError):
                os.unlink(self.path)


def another(fd: int) -> socket.socket:
    """Return another descriptor of a socket. Raises OSError: there is none of that number."""
    copy = os.dup(fd)
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)  # left open, it would keep a lock that the file's owner lets go by closing
        raise


def listen(path: str, ipc: Ipc, handed: Sequence[Handed], journal: Journal) -> Listening:
    """Return the socket to serve: the one that was handed over, or a new one.

    Raises Busy where another process answers at `path`, Internal where it cannot be used.
    The caller holds the store's lock, so that no other daemon clears the same path.
    """
    given = [each for each in handed if each.name == GIVEN or each.name in UNNAMED]
    kept = [each for each in handed if each.name.startswith(f"{GIVEN}.")]
    mine = _kept_name(_inode(path))
    found = _given(given, path) or next((each for each in kept if each.name == mine), None)
    if found is None:
        listening = Listening(path, _bind(path, ipc, journal), is_ours=True)
    else:
        listening = Listening(path, another(found.fd), is_ours=found in kept)
        listening.is_kept = found in kept
        if listening.is_kept:
            _let_in(path, ipc, journal)  # the configuration may say otherwise by now
    listening.stale = [each.name for each in kept if each is not found]
    for each in handed:
        if each not in given and each not in kept:
            journal.note(f"dropped a descriptor called {each.name!r} that nobody asked for")
        os.close(each.fd)
    return listening


def group_of(ipc: Ipc) -> str:
    """Return the group that may connect; a user's daemon serves that user alone."""
    return ipc.group if os.geteuid() == 0 else ""


def clear_path(path: str) -> None:
    """Make room for the socket: create its directory, remove what a dead daemon left behind.

    Raises Busy where somebody answers, Internal where the path cannot be used.
    """
    size = len(os.fsencode(path))
    if size > paths.SOCKET_PATH_BYTES_MAX:
        raise Internal(
            f"socket path of {size} bytes is over {paths.SOCKET_PATH_BYTES_MAX}: {path}",
            "set a shorter daemon.run_dir",
        )
    paths.make_run(os.path.dirname(path))
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise Internal(f"{path} is in the way and no socket; it was left alone", "move it")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)  # one whose queue is full would keep us waiting
            probe.connect(path)
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        os.unlink(path)
        return
    except BlockingIOError:
        pass  # somebody listens, and has no time
    except OSError as error:
        raise Internal(f"cannot use {path}: {error.strerror}", "remove it") from error
    raise Busy(f"another process answers at {path}", "stop it, or set another daemon.run_dir")


def _bind(path: str, ipc: Ipc, journal: Journal) -> socket.socket:
    """Return a new socket at `path`; nobody can connect before its rights are right."""
    clear_path(path)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        made.bind(path)
    except OSError as error:
        made.close()
        raise Internal(f"cannot bind {path}: {error.strerror}") from error
    finally:
        os.umask(before)
    _let_in(path, ipc, journal)
    made.listen(BACKLOG)
    return made


def _let_in(path: str, ipc: Ipc, journal: Journal) -> None:
    """Set mode and group of the path."""
    mode = int(ipc.mode, 8)
    if os.geteuid() != 0:
        os.chmod(path, mode & 0o700)
        return
    if group := group_of(ipc):
        try:
            os.chown(path, -1, grp.getgrnam(group).gr_gid)
        except KeyError:
            text = f"there is no group {group!r}: only root may use {path}"
            journal.event(Kind.NOTE, text, WARNING)
    os.chmod(path, mode)


def _given(given: Sequence[Handed], path: str) -> Handed | None:
    """Return the socket of ckptd.socket. Raises Internal where it listens elsewhere."""
    where: list[object] = []
    for each in given:
        with contextlib.suppress(OSError), another(each.fd) as handed_over:
            name = handed_over.getsockname()
            if name == path and handed_over.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return each
            where.append(name)
    if not where:
        return None
    raise Internal(
        f"systemd handed over a socket at {where[0]!r}, but this daemon's is {path}",
        "let ListenStream= and daemon.run_dir name the same place",
    )


def _kept_name(inode: int) -> str:
    return f"{GIVEN}.{inode}"


def _inode(path: str) -> int:
    """Return the inode of the path, 0 where there is none."""
    try:
        return os.lstat(path).st_ino
    except OSError:
        return 0
