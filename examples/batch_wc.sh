#!/bin/sh
# The lines of every file of a directory, four at a time, as easily as with xargs:
#
#   find DIRECTORY -name '*.py' -print0 | xargs -0 -n 1 -P 4 wc -l
#
# but each result is kept: killed at any moment, the same line runs what has no result yet, and
# tomorrow what is new. `batch submit` instead of `batch run` leaves it to the daemon.
#
#   examples/batch_wc.sh [DIRECTORY]            by itself Python's standard library
set -eu
directory=${1:-$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')}

find "$directory" -name '*.py' -print0 |
    ckptctl batch run --name wc --items - --format null -j 4 -- wc -l {} >/dev/null

ckptctl batch export wc -o jsonl |
    python3 -c '
import json, sys
lines = [int(json.loads(row)["result"].split()[0]) for row in sys.stdin]
print(f"{len(lines)} files, {sum(lines)} lines")'
