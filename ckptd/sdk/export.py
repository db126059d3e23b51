"""`python -m ckptd.sdk.export TASK_DIR SEQ INTO`: copy one checkpoint out, every digest compared.

What `ckptctl checkpoint export` executes, so that the command line needs to know no file format.
Exit codes: 0 copied, 4 no such checkpoint, 65 it does not check, 77 not readable. Stdlib only.
"""

import os
import sys

from ckptd.storage.copy import copy_out
from ckptd.storage.untrusted import Damaged, NotTrusted


def main(argv: list[str]) -> int:
    """Copy; all or nothing."""
    task_dir, seq, into = argv
    try:
        copy_out(task_dir, os.stat(task_dir).st_uid, int(seq), into)
    except FileNotFoundError as gone:
        return _refuse(4, f"checkpoint {seq} is gone: {gone}")
    except (Damaged, NotTrusted) as bad:
        return _refuse(65, f"checkpoint {seq} does not check: {bad}")
    except OSError as denied:
        return _refuse(77, f"cannot copy checkpoint {seq}: {denied}")
    return 0


def _refuse(code: int, text: str) -> int:
    print(text, file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
