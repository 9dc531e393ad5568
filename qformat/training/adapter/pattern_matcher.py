"""Matches regular expressions in a process of its own, which ends when it has used its time or memory.

Run as a file, with Python's own library only: input and output are JSON. Nothing else can stop Python's matcher, for
which a pattern such as `(a|a)*b` takes twice as many steps for each further character.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import sys

CPU_S = 1.0
"""Processor time of the process in seconds. The patterns of real adapters take milliseconds."""

MEMORY_NBYTES = 2**29
"""Address space of the process in bytes."""


def main() -> None:
    """Read `patterns` and `names`. Write which names each pattern matches as a whole, or a `problem`."""
    signal.setitimer(signal.ITIMER_PROF, CPU_S)  # its signal ends the process
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_NBYTES, MEMORY_NBYTES))
    request = json.load(sys.stdin)  # noqa: TID251  written by qformat
    matches = []
    for pattern in request["patterns"]:
        try:
            compiled = re.compile(pattern)
        except (re.error, RecursionError, OverflowError, ValueError) as problem:
            json.dump({"problem": str(problem)}, sys.stdout)
            return
        matches.append([number for number, name in enumerate(request["names"]) if compiled.fullmatch(name)])
    json.dump({"matches": matches}, sys.stdout)


if __name__ == "__main__":
    main()
