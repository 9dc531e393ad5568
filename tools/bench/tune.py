"""Compares a tuning step with training the 16-bit model on its own predictions: time and peak memory.

Usage: python -m tools.bench.tune ART SRC [--shape 2x512] [--rounds 5] [--threads 2] [--checkpointing]

Each side is a separate process that takes a step on request. The sides take turns, and ratios are medians over rounds:
  16 bit        forward and backward pass of the 16-bit model with all gradients, and a forward pass as the teacher,
                with the same loss in the same chunks
  tune          a step of `qformat tune`: 16-bit teacher, 4-bit student, scales and norms, Adam
  tune, cached  the same, with the teacher's predictions read from a cache
Peak memory is that of the process, minus its memory before it loaded its models.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from tools.bench.timing.interleaved import median_ratio
from tools.bench.timing.stepping import peak_nbytes, serve_steps, start_side, step_in_turn

SIDES = ("16 bit", "tune", "tune, cached")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("source", type=Path)
    parser.add_argument("--shape", default="2x512", help="windows x tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true", help="use gradient checkpointing on every side")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": str(arguments.threads)}
    if arguments.side:
        serve(arguments)
        return
    processes = {side: start_side("tools.bench.tune", [*sys.argv[1:], "--side", side]) for side in arguments.sides}
    figures = step_in_turn(processes, rounds=arguments.rounds, warm_up=1)
    first = figures[arguments.sides[0]]
    print(f"{arguments.artifact.name}, {arguments.shape}, {arguments.threads} threads, {arguments.rounds} rounds")
    print(f"{'side':14s} {'s/step':>9s} {'ratio':>6s} {'range':>12s} {'peak MB':>8s} {'ratio':>6s}")
    for side, mine in figures.items():
        ratios = [a / b for a, b in zip(mine.seconds, first.seconds, strict=True)]
        print(
            f"{side:14s} {statistics.median(mine.seconds):9.2f} {median_ratio(mine.seconds, first.seconds):6.2f} "
            f"{min(ratios):6.2f}-{max(ratios):.2f} {mine.peak_nbytes / 1e6:8.0f} "
            f"{mine.peak_nbytes / first.peak_nbytes:6.2f}"
        )


def serve(arguments: argparse.Namespace) -> None:
    """Load a side's models and take steps on request."""
    import numpy as np
    import torch

    import qformat.quality.tuning.tune  # noqa: F401 - import before memory is measured

    torch.set_num_threads(arguments.threads)
    before = peak_nbytes()
    rows, tokens = (int(number) for number in arguments.shape.split("x"))
    ids = torch.randint(0, 1000, (rows, tokens), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        step = make_step(arguments, ids, np.arange(rows), Path(folder))
        serve_steps(step, nbytes_before=before)


def make_step(arguments: argparse.Namespace, ids: Any, numbers: Any, folder: Path) -> Any:
    """Return the function that takes a step of a side."""
    import torch

    from qformat.artifact.reading.reader import open_artifact
    from qformat.model.checkpoint import load_checkpoint
    from qformat.model.load import load_model
    from qformat.quality.output_head import split_head
    from qformat.quality.teacher import LiveTeacher, TeacherCache
    from qformat.quality.tuning.distillation import distil
    from qformat.quality.tuning.tunable import make_tunable, share_kept_tensors
    from qformat.quality.tuning.tune import checkpoint_gradients

    def load_teacher() -> LiveTeacher:
        return LiveTeacher(load_checkpoint(arguments.source, device="cpu", dtype=torch.bfloat16))

    if arguments.side == "16 bit":
        teacher = load_teacher()
        model = teacher.model.requires_grad_()
        if arguments.checkpointing:
            checkpoint_gradients(model)
        split = split_head(model)

        def of_16_bit() -> None:
            distil(split, ids, teacher.target(numbers, ids))
            model.zero_grad()

        return of_16_bit
    if arguments.side == "tune":
        source: Any = load_teacher()
    else:
        source = TeacherCache(folder, {}, length=ids.shape[1], k=64)
        source.begin()
        pid = os.fork()  # the memory of the 16-bit model must not count for this process
        if pid == 0:
            source.write(numbers, load_teacher().top_k(numbers, ids, 64))
            os._exit(0)
        os.waitpid(pid, 0)
    model = load_model(arguments.artifact, device="cpu", dtype=torch.bfloat16)
    with open_artifact(arguments.artifact) as artifact:
        tunable = make_tunable(model, artifact)
    if isinstance(source, LiveTeacher):
        share_kept_tensors(tunable, source.model)
    if arguments.checkpointing:
        checkpoint_gradients(model)
    student = split_head(model)
    optimizer = torch.optim.Adam(tunable.parameters().values(), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def of_tuning() -> None:
        distil(student, ids, source.target(numbers, ids))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tunable.limit()

    return of_tuning


if __name__ == "__main__":
    main()
