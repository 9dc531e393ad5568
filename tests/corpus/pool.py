"""Runs the commands on damaged copies, a few copies in each process that is forked from one with all imports.

    pytest ─► python -m tests.corpus.pool ─► workers ─► processes with limits, for a few copies each
              imports, originals, undamaged runs

Every process uses one thread, so that a fork finds no locks of others. A verdict does not depend on time: the limit of
CPU time only ends what hangs, and memory is measured against the same commands on the undamaged copy.
"""

from __future__ import annotations

import gc
import json
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any

import torch

from tests.corpus import originals
from tests.corpus.commands import COMMANDS, REFUSALS, Command, Place
from tests.corpus.damage.edits import Damage
from tests.corpus.damage.table import BY_NAME, Copy, copies
from tests.corpus.judge import Outcome, Verdict, Wrong, judge

MAX_CPU_S = 30
"""Limit of CPU time for all commands on one copy, which take 0.5 s."""

MAX_GROWTH_NBYTES = 300 * 10**6
MAX_ADDRESS_SPACE_NBYTES = 4 * 2**30
"""Address space beyond that of the process that is forked."""

BATCH = 8
"""Number of copies per process: a fork of all imports takes 35 ms."""


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
        assert torch.get_num_threads() == 1, "start this process with the environment of one_thread_each()"
        self._folder = folder
        self._originals = folder / "originals"
        self._originals.mkdir()
        originals.make(self._originals)
        originals.make_trainings(self._originals)
        self._undamaged: dict[tuple[str, str], str | None] = {}
        self._growth = 0
        for original in COMMANDS:
            self._run_undamaged(original)
        gc.collect()
        gc.freeze()  # a collection in a child would copy every page that has an object
        self._growth = self._growth_undamaged()

    def verdicts(self, copies: Sequence[Copy]) -> Iterator[Verdict]:
        """Make copies, run their commands in other processes, and judge what they did."""
        rest = [*copies]
        while rest:
            n_done = yield from self._batch(rest[:BATCH])
            rest = rest[n_done:]

    def _batch(self, batch: Sequence[Copy]) -> Generator[Verdict, None, int]:
        """Judge copies in one process until one of them ends it. Return how many were judged."""
        lines, status = self._forked(lambda write: self._judge_all(batch, write))
        n_done, damage, running = 0, "", ""
        for line in lines:
            if "verdict" in line:
                yield read_verdict(line)
                continue
            n_done, damage, running = line["n_done"], line["damage"], line["running"]
        if status == 0:
            return len(batch)
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        end = Wrong.HANG if number in {signal.SIGXCPU, signal.SIGKILL} else Wrong.CRASH
        text = signal.Signals(number).name if number else f"status {status}"
        yield Verdict(batch[n_done], damage, Outcome(running, end.name.lower(), text), end)
        return n_done + 1

    def _judge_all(self, batch: Sequence[Copy], write: Callable[[dict[str, Any]], None]) -> None:
        """Judge copies in this process. Before each command, write what runs, and then the verdict."""
        for n_done, copy in enumerate(batch):
            kind, before = BY_NAME[copy.kind], _peak_nbytes()
            _limit_cpu()
            with tempfile.TemporaryDirectory(dir=self._folder) as name:
                folder = Path(name)
                damage = self._damaged(copy, folder / kind.original)
                random = Random(str(copy))
                for command in COMMANDS[kind.original]:
                    if random.randrange(command.one_in):
                        continue
                    write({"n_done": n_done, "damage": damage.what, "running": command.name})
                    outcome = self._outcome(command, folder, damage)
                    if _peak_nbytes() - before > MAX_GROWTH_NBYTES + self._growth:
                        outcome, before = replace(outcome, end="heavy"), _peak_nbytes()
                    undamaged = self._undamaged[kind.original, command.name]
                    compares = command.compares_weights
                    verdict = judge(copy, kind, damage, outcome, compares_weights=compares, undamaged=undamaged)
                    write(asdict(verdict))

    def _damaged(self, copy: Copy, target: Path) -> Damage:
        kind = BY_NAME[copy.kind]
        shutil.copytree(self._originals / kind.original, target)
        damage = kind.generate(Random(f"{copy.kind} {copy.seed}"), target)
        if copy.resealed and kind.reseal is not None:
            kind.reseal(target)
        return damage

    def _run_undamaged(self, original: str) -> None:
        """Run every command on an undamaged copy, and keep the results."""
        with tempfile.TemporaryDirectory(dir=self._folder) as name:
            shutil.copytree(self._originals / original, Path(name) / original)
            for command in COMMANDS[original]:
                outcome = self._outcome(command, Path(name), Damage(("",), "none"))
                assert outcome.end == "completed", outcome
                self._undamaged[original, command.name] = outcome.result

    def _growth_undamaged(self) -> int:
        """Return how much memory a process takes for all commands on undamaged copies."""

        def measure(write: Callable[[dict[str, Any]], None]) -> None:
            before = _peak_nbytes()
            for original in COMMANDS:
                self._run_undamaged(original)
            write({"growth": _peak_nbytes() - before})

        lines, status = self._forked(measure)
        assert status == 0
        return int(lines[0]["growth"])

    def _outcome(self, command: Command, folder: Path, damage: Damage) -> Outcome:
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        out = folder / command.name.replace(" ", "-")
        try:
            result = command.run(Place(self._originals, folder, out, damage.files[0]))
        except REFUSALS as refusal:
            return Outcome(command.name, "refused", str(refusal))
        except MemoryError:
            return Outcome(command.name, "heavy", traceback.format_exc())
        except BaseException:  # noqa: BLE001
            return Outcome(command.name, "traceback", traceback.format_exc())
        return Outcome(command.name, "completed", result=None if result is None else result.hex()[:64])

    def _forked(self, act: Callable[[Callable[[dict[str, Any]], None]], None]) -> tuple[list[dict[str, Any]], int]:
        """Run a function in another process with limits. Return the objects that it wrote, and its status."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            with _last_words(), os.fdopen(writer, "w") as pipe:
                nowhere = os.open(os.devnull, os.O_RDWR)
                os.dup2(nowhere, 0)
                os.dup2(nowhere, 1)
                space = _address_space_nbytes() + MAX_ADDRESS_SPACE_NBYTES
                resource.setrlimit(resource.RLIMIT_AS, (space, space))
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                act(lambda record: print(json.dumps(record), file=pipe, flush=True))
        os.close(writer)
        with os.fdopen(reader) as pipe:
            lines = [json.loads(line) for line in pipe]
        _, status = os.waitpid(child, 0)
        return lines, status


def read_verdict(record: dict[str, Any]) -> Verdict:
    """Return a verdict from the object that a process wrote."""
    return Verdict(Copy(**record["copy"]), record["damage"], Outcome(**record["outcome"]), record["verdict"])


def _limit_cpu() -> None:
    """Limit the CPU time of this process to what it has used and that of one copy."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime) + MAX_CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


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
                for verdict in pool.verdicts(mixed[number::n_workers]):
                    file.write(json.dumps(asdict(verdict)) + "\n")
        workers[child] = verdicts
    for child, verdicts in workers.items():
        _, status = os.waitpid(child, 0)
        assert status == 0, "a worker of the corpus ended with an error, which it printed"
        yield from (read_verdict(json.loads(line)) for line in verdicts.read_text().splitlines())


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
