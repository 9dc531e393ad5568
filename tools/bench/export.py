"""Compares `qformat export` with `cp -r` of its result, as complete processes in one run.

Usage: python -m tools.bench.export [--folder DIR] [--layers 22] [--runs 5] [--to bf16]

The artifact is converted from the random bf16 Llama of tools/bench/convert.py; 22 layers have 1.1 billion parameters.
The peer copies the exported checkpoint: it reads three times as many bytes, but decodes and hashes none. `cp` leaves
its copy in the page cache, while export waits until the data are on disk (fsync). A third row therefore measures
`cp -r` followed by `sync -f`. Export and its peers take turns, because the speed of a disk varies over time. The page
cache is warm, and figures are medians. The goal is half of the rate of `cp -r`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic

from tools.bench.convert import Measured, llama, write_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="working directory [default: a temporary directory]")
    parser.add_argument("--layers", type=int, default=22, help="number of layers; 22 have 1.1 billion parameters")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--to", choices=["bf16", "fp16", "fp32"], default="bf16")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qformat-bench-", dir=arguments.folder) as name:
        folder = Path(name)
        source = folder / "source"
        # Write in a separate process: otherwise its memory would count in the peak of every command started here.
        writer = multiprocessing.Process(
            target=write_checkpoint, args=(source, llama(arguments.layers), arguments.layers)
        )
        writer.start()
        writer.join()
        qformat = str(Path(sys.executable).with_name("qformat"))
        subprocess.run([qformat, "convert", source, folder / "artifact"], check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(source)
        measure_all(folder, qformat, runs=arguments.runs, to=arguments.to)


def measure_all(folder: Path, qformat: str, *, runs: int, to: str) -> None:
    artifact, out, copy = (str(folder / name) for name in ("artifact", "out", "copy"))
    commands = {
        "qformat export": [qformat, "export", artifact, copy, "--to", to],
        "cp -r OUT": ["cp", "-r", out, copy],
        "cp -r OUT; sync -f": ["sh", "-c", f"cp -r {out} {copy} && sync -f {copy}"],
    }
    subprocess.run([qformat, "export", artifact, out, "--to", to], check=True, stdout=subprocess.DEVNULL)
    measured: dict[str, list[Measured]] = {label: [] for label in commands}
    for _ in range(runs):
        for label, command in commands.items():
            os.sync()  # unwritten data of one command must not slow down the next one
            measured[label].append(once(command))
            shutil.rmtree(copy)
    before, after = (sum(path.stat().st_size for path in Path(name).iterdir()) for name in (artifact, out))
    print(f"{before:,} bytes -> {after:,} bytes ({to}), {len(os.sched_getaffinity(0))} cores, medians of {runs}")
    print(f"{'command':20}  {'seconds':>8}  {'peak RSS':>9}  {'rate':>11}")
    seconds = {label: statistics.median(one.seconds for one in times) for label, times in measured.items()}
    for label, times in measured.items():
        rate = after / seconds[label] / 1e6
        ratio = seconds[label] / seconds["qformat export"]
        remark = "" if label == "qformat export" else f"  export reaches {ratio:.2f} of this rate"
        print(
            f"{label:20}  {seconds[label]:8.2f}  {max(one.rss_mb for one in times):6.0f} MB  {rate:6,.0f} MB/s{remark}"
        )


def once(command: list[str]) -> Measured:
    """Run a command once and return its wall-clock time and largest resident set."""
    started = monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}")
    return Measured(monotonic() - started, usage.ru_maxrss / 1024)


if __name__ == "__main__":
    main()
