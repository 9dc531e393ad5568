"""Makes one copy of the corpus again and prints what every command did with it.

python -m tests.corpus KIND SEED raw|resealed
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from tests.corpus.damage.table import Copy
from tests.corpus.pool import Pool, one_thread_each


def main(kind: str, seed: str, form: str) -> None:
    if os.environ.get("OMP_NUM_THREADS") != "1":
        os.execve(sys.executable, [sys.executable, "-m", "tests.corpus", kind, seed, form], one_thread_each())
    with tempfile.TemporaryDirectory() as folder:
        for verdict in Pool(Path(folder)).verdicts([Copy(kind, int(seed), form == "resealed")]):
            print(f"{verdict.outcome.command}: {verdict.verdict}\n{verdict.outcome.text}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
