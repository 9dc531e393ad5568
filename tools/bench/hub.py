"""Compares converting a Hub repository as a stream with downloading it alone, from a stand-in on loopback.

Usage: python -m tools.bench.hub [--folder DIR] [--layers 22] [--runs 3] [--source FOLDER]

The model is that of tools/bench/convert.py (22 layers: 1.1 billion parameters in five shards, 2.2 GB), or a folder. Two
complete processes take turns: `snapshot_download` of huggingface_hub, and `qformat convert owner/model OUT`. The
stand-in is a separate process that shares the same cores. Figures are medians of the runs, and of the ratios within
each turn. Disk usage is the size of OUT.partial, OUT and the Hub cache, sampled every 20 ms.
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
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from qformat.artifact.writing.disk import allocated_nbytes
from tools.bench import convert as bench_convert

ROOT = Path(__file__).resolve().parents[2]
NAME = "owner/model"
DOWNLOAD = f"from huggingface_hub import snapshot_download; snapshot_download({NAME!r})"


@dataclass(frozen=True, slots=True)
class Measured:
    """Figures of one process: wall-clock time, largest resident set, and peak disk usage of its folders."""

    seconds: float
    rss_mb: float
    disk_nbytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="working directory [default: a temporary directory]")
    parser.add_argument("--source", type=Path, help="checkpoint to serve instead of the random model")
    parser.add_argument("--layers", type=int, default=22, help="number of layers; 22 have 1.1 billion parameters")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qformat-bench-", dir=arguments.folder) as name:
        folder, source = Path(name), arguments.source
        if source is None:
            source = folder / "source"
            tensors = bench_convert.llama(arguments.layers)
            # Write in a separate process: otherwise its memory would count in the peak of every command started here.
            writer = multiprocessing.Process(
                target=bench_convert.write_checkpoint, args=(source, tensors, arguments.layers)
            )
            writer.start()
            writer.join()
        with serving(source) as endpoint:
            measure_all(folder, source, endpoint, runs=arguments.runs)


def measure_all(folder: Path, source: Path, endpoint: str, *, runs: int) -> None:
    home, out = folder / "home", folder / "out"
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    convert = [sys.executable, "-c", "from qformat.cli.main import main; main()", "convert", NAME, str(out)]
    download = [sys.executable, "-c", DOWNLOAD]
    measure([*convert, "--dry-run"], [], environment)  # compiles nothing but imports every module once
    downloads, conversions = [], []
    for turn in range(runs + 1):
        for path in (home, out):
            shutil.rmtree(path, ignore_errors=True)
        downloaded = measure(download, [home], environment)
        shutil.rmtree(home)
        converted = measure(convert, [home, out, out.with_name("out.partial")], environment)
        if turn:  # the first turn warms the page cache and compiles the kernels
            downloads.append(downloaded)
            conversions.append(converted)
    before = sum(path.stat().st_size for path in source.iterdir())
    after = sum(path.stat().st_size for path in out.iterdir())
    print(f"{before:,} bytes -> {after:,} bytes, {len(os.sched_getaffinity(0))} cores, medians of {runs}")
    print(f"{'':32}  {'seconds':>8}  {'MB/s':>6}  {'peak RSS':>9}  {'peak disk':>10}")
    for label, all_runs in (("snapshot_download", downloads), ("qformat convert owner/model", conversions)):
        seconds = statistics.median(run.seconds for run in all_runs)
        rss, disk = max(run.rss_mb for run in all_runs), max(run.disk_nbytes for run in all_runs)
        print(f"{label:32}  {seconds:8.2f}  {before / seconds / 1e6:6.0f}  {rss:6.0f} MB  {disk / 1e6:7.0f} MB")
    ratios = [download.seconds / convert.seconds for download, convert in zip(downloads, conversions, strict=True)]
    print(f"rate of the conversion / rate of the download: {statistics.median(ratios):.2f} {sorted(ratios)}")
    print(f"peak disk of the conversion / artifact: {max(run.disk_nbytes for run in conversions) / after:.3f}")


def measure(command: list[str], folders: list[Path], environment: Mapping[str, str]) -> Measured:
    """Run a command once and return its figures."""
    largest, finished = 0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not finished.wait(0.02):
            largest = max(largest, sum(allocated_nbytes(folder) for folder in folders))

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = monotonic()
    process = subprocess.Popen(command, env=dict(environment), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    finished.set()
    watcher.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}\n{error.decode()}")
    return Measured(seconds, usage.ru_maxrss / 1024, largest)


@contextmanager
def serving(source: Path) -> Iterator[str]:
    """Serve a folder as a repository in another process. Yields the endpoint."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.hub_stand_in", f"{NAME}={source}"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
