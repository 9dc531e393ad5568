"""Compares `qformat eval` with the plain forward passes of its two models, on the same windows.

Usage: python -m tools.bench.evaluate ARTIFACT SOURCE --data FILE [--windows 4] [--window-length 512] [--rounds 5]

In each round, `evaluate` scores the windows, and then both models run over them without any scoring. The time to map
the models is not counted. Figures are medians over rounds, and the ratio compares values of the same round. The goal
is 0.9 times the tokens per second of the plain passes. Peak memory includes mapped files.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from time import perf_counter

import torch

from qformat.model.checkpoint import load_any
from qformat.model.load import load_tokenizer
from qformat.model.memory import peak_nbytes
from qformat.quality.evaluation.evaluate import evaluate
from qformat.quality.windows import read_windows
from tools.bench.timing import interleaved

BAR = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("source", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    windows = read_windows(options.data, load_tokenizer(options.artifact), length=options.window_length)
    windows = windows.spread(options.windows)
    ids = torch.from_numpy(windows.ids).long()
    models = [load_any(options.source), load_any(options.artifact)]

    def bare_tokens_per_s() -> float:
        started = perf_counter()
        with torch.inference_mode():
            for window in ids:
                for model in models:
                    model(input_ids=window[None].to(model.device), use_cache=False)
        return len(models) * ids.numel() / (perf_counter() - started)

    def our_tokens_per_s() -> float:
        return evaluate(
            options.artifact,
            [options.data],
            source=options.source,
            n_windows=options.windows,
            window_length=options.window_length,
        ).tokens_per_s

    bare_tokens_per_s()
    rounds = [(our_tokens_per_s(), bare_tokens_per_s()) for _ in range(options.rounds)]
    ours, bare = zip(*rounds, strict=True)
    ratio = interleaved.median_ratio(ours, bare)
    print(f"{options.artifact.name}: {len(windows)} windows of {windows.length} tokens, {options.rounds} rounds")
    print(f"plain forward passes  {statistics.median(bare):8,.0f} tokens/s")
    print(f"qformat eval          {statistics.median(ours):8,.0f} tokens/s")
    verdict = "met" if ratio >= BAR else "MISSED"
    print(f"ratio {ratio:.3f}, goal of {BAR} {verdict}; peak memory {peak_nbytes(models[0].device) / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
