"""Where an installation goes: PREFIX, DESTDIR and the directories that systemd reads.

systemd (252 and 257 were looked at) reads units, sysusers.d, tmpfiles.d and the catalog below
/usr/lib and /usr/local/lib, nowhere else: whatever PREFIX is, they go to one of the two.
Below a user's own home nothing of the system is installed: `systemctl --user` runs the daemon.
"""

import os
from collections.abc import Mapping
from typing import NamedTuple


class Unfit(Exception):
    """This machine, or what was asked for, does not allow it; the text says what to do."""


class Places(NamedTuple):
    """Final paths, without DESTDIR; `staged` adds it."""

    destdir: str
    prefix: str
    sysconfdir: str
    unitdir: str
    userunitdir: str
    sysusersdir: str
    tmpfilesdir: str
    catalogdir: str
    mandir: str
    bashcompdir: str
    zshcompdir: str
    fishcompdir: str
    is_private: bool
    """One user's own, below the home directory."""

    @property
    def bindir(self) -> str:
        """Where the commands are."""
        return f"{self.prefix}/bin"

    @property
    def libdir(self) -> str:
        """What is ours alone: the trees, and the list of what was installed."""
        return f"{self.prefix}/lib/ckptd"

    @property
    def docdir(self) -> str:
        """Documents and examples."""
        return f"{self.prefix}/share/doc/ckptd"

    @property
    def confdir(self) -> str:
        """Where the configuration is read from."""
        return f"{self.sysconfdir}/ckptd"

    def staged(self, path: str) -> str:
        """Return where `path` is written: below DESTDIR, which packagers set."""
        return f"{self.destdir}{path}"


def places(env: Mapping[str, str], euid: int) -> Places:
    """Return the directories for the given variables; those not set have the usual values.

    Raises:
        Unfit: a path that is not absolute, or that cannot stand in a unit or a script's first line.
    """
    home = env.get("HOME", "").rstrip("/")
    prefix = _path(env, "PREFIX", "/usr/local")
    destdir = _path(env, "DESTDIR", "")
    is_private = euid != 0 and not destdir and bool(home) and f"{prefix}/".startswith(f"{home}/")
    if is_private:
        sysconfdir = env.get("XDG_CONFIG_HOME") or f"{home}/.config"
        user_units = f"{env.get('XDG_DATA_HOME') or f'{home}/.local/share'}/systemd/user"
        system = f"{prefix}/lib"  # unused
    else:
        sysconfdir = "/etc"
        system = "/usr/lib" if prefix == "/usr" else "/usr/local/lib"
        user_units = f"{system}/systemd/user"
    return Places(
        destdir=destdir,
        prefix=prefix,
        sysconfdir=_path(env, "SYSCONFDIR", sysconfdir),
        unitdir=_path(env, "UNITDIR", f"{system}/systemd/system"),
        userunitdir=_path(env, "USERUNITDIR", user_units),
        sysusersdir=_path(env, "SYSUSERSDIR", f"{system}/sysusers.d"),
        tmpfilesdir=_path(env, "TMPFILESDIR", f"{system}/tmpfiles.d"),  # noqa: S108
        catalogdir=_path(env, "CATALOGDIR", f"{system}/systemd/catalog"),
        mandir=_path(env, "MANDIR", f"{prefix}/share/man"),
        bashcompdir=_path(env, "BASHCOMPDIR", f"{prefix}/share/bash-completion/completions"),
        zshcompdir=_path(env, "ZSHCOMPDIR", f"{prefix}/share/zsh/site-functions"),
        fishcompdir=_path(env, "FISHCOMPDIR", f"{prefix}/share/fish/vendor_completions.d"),
        is_private=is_private,
    )


_SHEBANG_BYTES_MAX = 127  # of the first line of a script, before Linux 5.1
_AFTER_PREFIX = len("#!/lib/ckptd/venv-0.10.10-12345678.10/bin/ckptd-python -IS")


def _path(env: Mapping[str, str], name: str, usual: str) -> str:
    path = os.path.expanduser(env.get(name) or usual).rstrip("/")
    if path and not path.startswith("/"):
        raise Unfit(f"{name} must be an absolute path, not {path!r}")
    if name != "DESTDIR" and any(char.isspace() or char in "%$'\"\\" for char in path):
        raise Unfit(f"{name}={path!r} cannot stand in a unit: no spaces, quotes, % or $")
    if name == "PREFIX" and len(os.fsencode(path)) + _AFTER_PREFIX > _SHEBANG_BYTES_MAX:
        raise Unfit(f"PREFIX={path!r} is too long for the first line of a script")
    return path
