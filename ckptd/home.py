"""Where the home of a user is: HOME, else what the user database says.

An empty HOME, as a unit or a container may set it, is none: taken at its word it puts a user's
files below `/`. Daemon, clients, batches and the SDK ask here, so that they agree; stdlib only.
"""

import contextlib
import os
import pwd
from collections.abc import Mapping


def home(environ: Mapping[str, str] = os.environ) -> str:
    """Return the home directory of who runs this; `/` where nobody names one."""
    if given := environ.get("HOME"):
        return given
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(os.getuid()).pw_dir
    return "/"
