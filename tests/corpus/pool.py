"""Runs the commands on damaged copies, each copy in a process of its own that is forked from one with all imports.

    pytest ─► python -m tests.corpus.pool ─► workers ─► one process per copy, with limits
              imports, originals, undamaged runs

Every process uses one thread, so that a fork finds no locks of others. A verdict does not depend on time: the limit of
CPU time only ends what hangs, and memory is measured against the same commands on the undamaged copy.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

from tests.corpus import originals
from tests.corpus.commands import COMMANDS, REFUSALS, Command, Place
from tests.corpus.damage.edits import Damage, Where
from tests.corpus.damage.table import BY_NAME, Copy, copies
from tests.corpus.judge import Outcome, Verdict, judge

MAX_CPU_S = 30
"""Limit of CPU time for all commands on one copy, which take 0.5 s."""

MAX_GROWTH_NBYTES = 300 * 10**6
MAX_ADDRESS_SPACE_NBYTES = 4 * 2**30
"""Address space beyond that of the process that is forked."""


def one_thread_each() -> dict[str, str]:
    """Return the environment of a pool: one thread for every library, no network."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, "1"), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


class Pool:
    """The process with all imports and the undamaged files.

    Args:
        folder: Folder for the originals and the copies.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._originals = folder / "originals"
        self._originals.mkdir()
        originals.make(self._originals)
        originals.make_trainings(self._originals)
        self._undamaged: dict[tuple[str, str], str | None] = {}
        self._growth: dict[str, int] = {}
        self._run_undamaged()
        gc.collect()
        gc.freeze()  # a collection in a child would copy every page that has an object

    def verdicts(self, copy: Copy) -> list[Verdict]:
        """Make a copy, run all commands on it in another process, and judge what they did."""
        kind = BY_NAME[copy.kind]
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        try:
            damage = self._damaged(copy, folder)
            outcomes, _ = self._forked(kind.original, folder, damage, Random(str(copy)))
        finally:
            shutil.rmtree(folder)
        return [
            judge(
                copy, kind, damage, outcome, compares_weights=compares, undamaged=self._undamaged[kind.original, name]
            )
            for outcome in outcomes
            for name, compares in [(outcome.command, self._compares_weights(kind.original, outcome.command))]
        ]

    def _damaged(self, copy: Copy, folder: Path) -> Damage:
        kind = BY_NAME[copy.kind]
        target = folder / kind.original
        shutil.copytree(self._originals / kind.original, target)
        damage = kind.generate(Random(f"{copy.kind} {copy.seed}"), target)
        if copy.resealed and kind.reseal is not None:
            kind.reseal(target)
        return damage

    def _run_undamaged(self) -> None:
        """Run every command on undamaged copies, here and in a process of its own, whose memory is the baseline."""
        for original, commands in COMMANDS.items():
            for forked in (False, True):
                folder = Path(tempfile.mkdtemp(dir=self._folder))
                shutil.copytree(self._originals / original, folder / original)
                damage = Damage(("",), "none", Where.ACCOMPANYING)
                if forked:
                    outcomes, self._growth[original] = self._forked(original, folder, damage, None)
                else:
                    outcomes = [self._outcome(command, folder, damage) for command in commands]
                shutil.rmtree(folder)
                assert len(outcomes) == len(commands)
                for outcome in outcomes:
                    assert outcome.end == "completed", outcome
                    self._undamaged[original, outcome.command] = outcome.result

    def _due(self, original: str, chosen: Random | None) -> list[Command]:
        """Return the commands to run: each with its chance, or all of them."""
        return [command for command in COMMANDS[original] if chosen is None or not chosen.randrange(command.one_in)]

    def _outcome(self, command: Command, folder: Path, damage: Damage) -> Outcome:
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        out = folder / command.name.replace(" ", "-")
        try:
            result = command.run(Place(self._originals, folder, out, damage.files[0]))
        except REFUSALS as refusal:
            return Outcome(command.name, "refused", str(refusal))
        except MemoryError as problem:
            return Outcome(command.name, "heavy", repr(problem))
        except BaseException:  # noqa: BLE001
            return Outcome(command.name, "traceback", traceback.format_exc())
        return Outcome(command.name, "completed", result=None if result is None else result.hex()[:64])

    def _forked(self, original: str, folder: Path, damage: Damage, chosen: Random | None) -> tuple[list[Outcome], int]:
        """Run the commands in another process with limits. Return what they did and how much memory they took."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            with _last_words(), os.fdopen(writer, "w") as pipe:
                self._child(original, folder, damage, chosen, pipe)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            lines = [json.loads(line) for line in pipe]
        _, status = os.waitpid(child, 0)
        return self._collected(lines, status, original)

    def _child(self, original: str, folder: Path, damage: Damage, chosen: Random | None, pipe: Any) -> None:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nowhere, descriptor)
        _limit(resource.RLIMIT_AS, _address_space_nbytes() + MAX_ADDRESS_SPACE_NBYTES)
        _limit(resource.RLIMIT_CPU, MAX_CPU_S)
        _limit(resource.RLIMIT_CORE, 0)
        before = _peak_nbytes()
        for command in self._due(original, chosen):
            print(json.dumps(command.name), file=pipe, flush=True)
            outcome = self._outcome(command, folder, damage)
            print(json.dumps(asdict(outcome) | {"growth": _peak_nbytes() - before}), file=pipe, flush=True)

    def _collected(self, lines: Sequence[Any], status: int, original: str) -> tuple[list[Outcome], int]:
        """Return the outcomes from the lines that a process wrote, and the growth of its memory.

        It writes the name of each command before it runs, and then what the command did.
        """
        allowed = self._growth.get(original)
        outcomes, growth = [], 0
        for line in lines:
            if isinstance(line, str):
                continue
            grown = line.pop("growth")
            outcome = Outcome(**line)
            if allowed is not None and grown - allowed > MAX_GROWTH_NBYTES > growth - allowed:
                outcome = Outcome(outcome.command, "heavy", f"{grown / 1e6:.0f} MB, then: {outcome.text}")
            outcomes.append(outcome)
            growth = grown
        if status:
            number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            end = "hang" if number in {signal.SIGXCPU, signal.SIGKILL} else "crash"
            outcomes.append(Outcome(lines[-1], end, signal.Signals(number).name if number else "ended by itself"))
        return outcomes, growth


def _limit(which: int, value: int) -> None:
    resource.setrlimit(which, (value, value))


def _address_space_nbytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _peak_nbytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(pool: Pool, folder: Path, copies: Sequence[Copy], n_workers: int) -> Iterator[Verdict]:
    """Judge all copies in several workers, which are forks of this process and write their verdicts to files."""
    workers = {}
    mixed = Random(0).sample(copies, len(copies))
    for number in range(n_workers):
        verdicts = folder / f"verdicts-{number}"
        child = os.fork()
        if child == 0:
            with _last_words(), verdicts.open("w") as file:
                for copy in mixed[number::n_workers]:
                    for verdict in pool.verdicts(copy):
                        file.write(json.dumps(asdict(verdict)) + "\n")
        workers[child] = verdicts
    for child, verdicts in workers.items():
        _, status = os.waitpid(child, 0)
        assert status == 0, "a worker of the corpus ended with an error, which it printed"
        for line in verdicts.read_text().splitlines():
            found = json.loads(line)
            yield Verdict(Copy(**found["copy"]), found["damage"], Outcome(**found["outcome"]), found["verdict"])


@contextmanager
def _last_words() -> Iterator[None]:
    """End this forked process with the block, whatever happens in it."""
    code = 1
    try:
        yield
        code = 0
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main(n_copies: int, n_workers: int, first: int = 0) -> None:
    """Judge copies and print one verdict as JSON per line."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=base) as folder:
        output = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        pool = Pool(Path(folder))
        for verdict in work(pool, Path(folder), copies(first + n_copies)[first:], n_workers):
            print(json.dumps(asdict(verdict)), file=output, flush=True)
        output.close()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
