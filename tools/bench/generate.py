"""Compares the time to the first token and one-token decoding with transformers + bitsandbytes.

Usage: python -m tools.bench.generate ARTIFACT... [--prompts 128 512] [--tokens 32] [--rounds 5] [--threads 2]
                                      [--only qformat exact]

Each side is a separate process that keeps its model loaded and computes on request. The sides take turns:
  qformat    load_model
  inference  transformers + bitsandbytes with its defaults: on CPUs with AVX512-BF16, its first forward pass without
             gradients repacks the weights for a special kernel and rounds the scales to bf16
  exact      the same without repacking, with the values of the artifact
All sides decode greedily with a cache, without gradients and without the overhead of `generate`. The time to the first
token is the time of the prompt; decoding starts after a prompt of 32 tokens. Ratios are medians over rounds of
qformat's value divided by the side's: below 1 is better for seconds, above 1 for tokens/s. Before the measurement, the
tool prints how many greedy tokens of each side equal those of qformat. Near-ties make them differ at some point, which
comes earlier for "inference".
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from tools.bench.timing.interleaved import median_ratio

SIDES = ("qformat", "inference", "exact")
DECODING_PROMPT = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", type=Path, metavar="ARTIFACT")
    parser.add_argument(
        "--prompts", nargs="+", type=int, default=[128, 512], help="prompt lengths for the time to the first token"
    )
    parser.add_argument("--tokens", type=int, default=32, help="number of tokens to decode")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.artifacts[0], options.threads)
        return
    for artifact in options.artifacts:
        print_artifact(artifact, options)


def print_artifact(artifact: Path, options: argparse.Namespace) -> None:
    sides = {name: Side(name, artifact, options.threads) for name in options.only}
    try:
        print(f"{artifact.name}, {options.threads} threads, medians of {options.rounds} rounds")
        print_agreement(sides, options.tokens)
        columns = [*sides, *(f"to {name}" for name in list(sides)[1:])]
        print(f"| figure | {' | '.join(columns)} |")
        print("|---|" + "---:|" * len(columns))
        for n_prompt in options.prompts:
            rounds = ask_in_turn(sides, {"prompt": n_prompt, "decode": 0}, options.rounds)
            print_figure(f"first token after a prompt of {n_prompt}, s", rounds)
        request = {"prompt": DECODING_PROMPT, "decode": options.tokens}
        seconds = ask_in_turn(sides, request, options.rounds)
        rates = {name: [options.tokens / each for each in taken] for name, taken in seconds.items()}
        print_figure("one-token decoding, tokens/s", rates)
    finally:
        for side in sides.values():
            side.close()


def print_agreement(sides: dict[str, Side], n_tokens: int) -> None:
    answers = {
        name: side.ask({"prompt": DECODING_PROMPT, "decode": n_tokens})["tokens"] for name, side in sides.items()
    }
    first = next(iter(answers))
    for name, tokens in answers.items():
        if name != first:
            print(f"{name}: the first {n_equal_first(tokens, answers[first])} of {n_tokens} greedy tokens are equal")


def n_equal_first(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Return the number of equal tokens before the first difference."""
    differing = (number for number, (a, b) in enumerate(zip(tokens, others, strict=True)) if a != b)
    return next(differing, len(tokens))


def ask_in_turn(sides: dict[str, Side], request: dict[str, int], n_rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(n_rounds + 1):
        for name, side in sides.items():
            taken = side.ask(request)["seconds"]
            if number:  # the first round warms the caches
                seconds[name].append(taken)
    return seconds


def print_figure(title: str, rounds: dict[str, list[float]]) -> None:
    first, *others = rounds.values()
    shown = "".join(f" {statistics.median(figures):.3f} |" for figures in rounds.values())
    ratios = "".join(f" {median_ratio(first, figures):.2f} |" for figures in others)
    print(f"| {title} |{shown}{ratios}", flush=True)


class Side:
    """A process that holds one side's model and answers one request per line."""

    def __init__(self, name: str, artifact: Path, n_threads: int) -> None:
        command = [
            sys.executable,
            "-m",
            "tools.bench.generate",
            str(artifact),
            "--serve",
            name,
            "--threads",
            str(n_threads),
        ]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        environment["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def ask(self, request: dict[str, int]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a side ended unexpectedly with exit status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve(side: str, artifact: Path, n_threads: int) -> None:
    import torch

    torch.set_num_threads(n_threads)
    model = load(side, artifact)
    with torch.no_grad():
        for line in sys.stdin:
            request = json.loads(line)
            print(json.dumps(answer(model, request["prompt"], request["decode"])), flush=True)


def load(side: str, artifact: Path) -> Any:
    if side == "qformat":
        from qformat.model.load import load_model

        return load_model(artifact, device="cpu")
    import bitsandbytes
    from transformers import AutoModelForCausalLM

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    model = AutoModelForCausalLM.from_pretrained(artifact)
    if side == "exact":
        for module in model.modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                module.support_avx512bf16_for_cpu = False  # the condition for repacking the weight
    return model


def answer(model: Any, n_prompt: int, n_decode: int) -> dict[str, Any]:
    """Return the greedy tokens, and the seconds of the prompt or, if tokens are decoded, of the decoding."""
    import torch

    ids = torch.arange(n_prompt)[None] * 37 % min(4000, model.config.vocab_size)
    started = perf_counter()
    output = model(ids, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    tokens = [int(token)]
    if n_decode:
        started = perf_counter()
    for _ in range(n_decode):
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
        tokens.append(int(token))
    return {"seconds": perf_counter() - started, "tokens": tokens[:-1] if n_decode else tokens}


if __name__ == "__main__":
    main()
