"""Compares steps of PagedAdamW with torch's AdamW, interleaved in one process.

Each row compares an optimizer with the torch optimizer that gives the same bits, step by step in turn. 8-bit states are
compared with torch's fused implementation. The ratio is the median over pairs of steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import click
import torch
from torch import Tensor

from qformat.training.optimizer.paged_adamw import PagedAdamW
from tools.bench.timing.interleaved import median_ratio

Factory = Callable[[list[Tensor]], torch.optim.Optimizer]

SIZES = {"10M parameters, 99 tensors": (10_000_000, 99), "200M parameters, 26 tensors": (200_000_000, 26)}

FUSED: Factory = partial(torch.optim.AdamW, lr=1e-4, fused=True)
SINGLE: Factory = partial(torch.optim.AdamW, lr=1e-4, foreach=False)


@dataclass(frozen=True)
class Contest:
    title: str
    ours: Factory
    peer: Factory


def contests(n_parameters: int) -> list[Contest]:
    paged: Callable[..., Any] = partial(partial, PagedAdamW, lr=1e-4)
    tenth = n_parameters * 8 // 10
    return [
        Contest("fused, resident", paged(update="fused"), FUSED),
        Contest("single, resident", paged(update="single"), SINGLE),
        Contest("fused, a tenth resident", paged(update="fused", page_budget=tenth), FUSED),
        Contest("single, a tenth resident", paged(update="single", page_budget=tenth), SINGLE),
        Contest("8-bit, resident", paged(state_bits=8), FUSED),
    ]


@click.command(help=__doc__)
@click.option("--repeats", default=7, show_default=True, help="Number of timed steps per side.")
@click.option("--threads", default=2, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--size", type=click.Choice(list(SIZES)), multiple=True, help="Size to measure. Default: all.")
@click.option("--only", default="", help="Measure only rows with this text in their title.")
def main(repeats: int, threads: int, device: str, size: tuple[str, ...], only: str) -> None:
    torch.set_num_threads(threads)
    print(f"torch {torch.__version__}, {device}, {threads} threads, medians of {repeats} interleaved steps")
    print(f"{'':28} {'':26} {'ours, ms':>10} {'torch, ms':>10} {'ratio':>7}")
    for title in size or SIZES:
        n_parameters, n_tensors = SIZES[title]
        for contest in contests(n_parameters):
            if only not in contest.title:
                continue
            ours, peer = compete(contest, n_parameters // n_tensors, n_tensors, repeats, device)
            medians = f"{statistics.median(ours):10.1f} {statistics.median(peer):10.1f}"
            print(f"{title:28} {contest.title:26} {medians} {median_ratio(ours, peer):7.2f}", flush=True)


def compete(contest: Contest, size: int, n_tensors: int, repeats: int, device: str) -> tuple[list[float], list[float]]:
    """Return the milliseconds of each step of both sides."""
    sides = [factory(parameters(size, n_tensors, device)) for factory in (contest.ours, contest.peer)]
    for optimizer in sides:
        step(optimizer)
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats):
        for side in ((0, 1), (1, 0))[turn % 2]:
            times[side].append(step(sides[side]))
    return times


def parameters(size: int, n_tensors: int, device: str) -> list[Tensor]:
    params = [torch.nn.Parameter(torch.randn(size, device=device)) for _ in range(n_tensors)]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def step(optimizer: torch.optim.Optimizer) -> float:
    """Take a step and return its time in milliseconds."""
    synchronize()
    start = perf_counter()
    optimizer.step()
    synchronize()
    return (perf_counter() - start) * 1e3


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
