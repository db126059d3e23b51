"""Run inside a virtual machine by the daemon's Python: submit, and tell what was acknowledged.

    submits.py PREFIX COUNT      a line "ACK id name" goes to descriptor 3 when it is acknowledged

Names say what is wanted: PREFIX-short-N. Descriptor 3 is the serial line: what went there is known
outside even if the power is cut in the next instant. Bound: COUNT tasks.
"""

import os
import sys

from ckptd.client import Client, find_endpoint
from ckptd.protocol.messages import Submit, Submitted, TaskSpec

JOB = "/usr/local/bin/short-job"


def main(prefix: str, count: int) -> None:
    """Submit one after the other."""
    with Client(find_endpoint(), 60.0) as client:
        for number in range(count):
            name = f"{prefix}-short-{number}"
            asked = Submit((TaskSpec((JOB,), name=name),))
            task = client.call("submit", asked, Submitted).ids[0]
            os.write(3, f"ACK {task} {name}\n".encode())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
