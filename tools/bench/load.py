"""Compares loading and running an artifact with transformers + bitsandbytes, in one run.

Usage: python -m tools.bench.load [ARTIFACT] [--folder DIR] [--layers 22] [--runs 3] [--tokens 32]

Without ARTIFACT, a random bf16 Llama is written and converted (22 layers: 1.1 billion parameters). Each side runs in a
separate process, with a warm page cache and all modules imported. Measures the time to open the artifact, the time to
load the model, its private memory, a forward pass of 256 tokens without gradients, and one-token decoding. Prints
medians and ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

FIGURES = {
    "open_s": "open the artifact, s",
    "load_s": "load the model, s",
    "private_mb": "private memory added, MB",
    "forward_s": "forward of 256 tokens, s",
    "tokens_s": "one-token decoding, tokens/s",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", nargs="?", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--side", choices=["qformat", "bitsandbytes"])
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options.artifact, options.runs, options.tokens)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        artifact = options.artifact or make_artifact(Path(folder), options.layers)
        sides = {side: run_side(side, artifact, options) for side in ("qformat", "bitsandbytes")}
    print(f"{artifact.name}, {len(os.sched_getaffinity(0))} cores, medians of {options.runs}")
    print(f"{'':30} {'qformat':>10} {'bitsandbytes':>13} {'ratio':>7}")
    for figure, title in FIGURES.items():
        ours, theirs = sides["qformat"].get(figure), sides["bitsandbytes"].get(figure)
        shown = [f"{value:.3f}" if value is not None else "-" for value in (ours, theirs)]
        ratio = f"{ours / theirs:.2f}" if ours is not None and theirs else "-"
        print(f"{title:30} {shown[0]:>10} {shown[1]:>13} {ratio:>7}")


def make_artifact(folder: Path, n_layers: int) -> Path:
    import qformat
    from tools.bench import convert as bench_convert

    bench_convert.write_checkpoint(folder / "source", bench_convert.llama(n_layers), n_layers)
    qformat.convert(folder / "source", folder / "artifact")
    return folder / "artifact"


def run_side(side: str, artifact: Path, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "tools.bench.load", str(artifact), "--side", side, "--runs", str(options.runs)]
    command += ["--tokens", str(options.tokens)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(side: str, artifact: Path, runs: int, n_tokens: int) -> dict[str, float]:
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    load = loader(side, artifact)
    load()  # imports, compiled kernels, the page cache
    figures = {}
    if side == "qformat":
        import qformat

        figures["open_s"] = median(lambda: qformat.open(artifact).close(), runs)
    before = private_mb()
    model = load()
    figures["private_mb"] = private_mb() - before
    figures["load_s"] = median(load, runs)
    ids = torch.arange(256)[None] % 1000
    with torch.no_grad():
        model(ids)
        figures["forward_s"] = median(lambda: model(ids), runs)
        figures["tokens_s"] = 1 / median(decoder(model, ids[:, :32], n_tokens), runs) * n_tokens
    return figures


def loader(side: str, artifact: Path) -> Callable[[], Any]:
    if side == "qformat":
        from qformat.model.load import load_model

        return lambda: load_model(artifact, device="cpu")
    from transformers import AutoModelForCausalLM

    return lambda: AutoModelForCausalLM.from_pretrained(artifact)


def decoder(model: Any, prompt: Any, n_tokens: int) -> Callable[[], None]:
    """Return a function that decodes token by token with a cache, like `generate` but without its overhead."""

    def run() -> None:
        output = model(prompt, use_cache=True)
        cache, started = output.past_key_values, output.logits[:, -1:].argmax(-1)
        for _ in range(n_tokens):
            output = model(started, past_key_values=cache, use_cache=True)
            started = output.logits[:, -1:].argmax(-1)

    run()
    return run


def median(call: Callable[[], Any], runs: int) -> float:
    seconds = []
    for _ in range(runs):
        started = perf_counter()
        call()
        seconds.append(perf_counter() - started)
    return statistics.median(seconds)


def private_mb() -> float:
    """Return the private memory of this process in MB, without mapped files."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    fields = {line.split(":")[0]: line.split()[1] for line in lines[1:]}
    return (int(fields["Private_Dirty"]) + int(fields.get("Swap", 0))) / 1000


if __name__ == "__main__":
    main()
