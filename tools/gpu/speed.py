"""Measure the kernels' speed on this GPU against a plain copy, the 16-bit product and bitsandbytes."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from qformat.kernels.packed_weight import PackedWeight
from qformat.kernels.scaled_linear import linear_nf4_scale_gradient
from qformat.kernels.triton import launch as triton_launch
from qformat.kernels.triton.dequantize import dequantize
from qformat.kernels.triton.product import LaunchPlan, plan, product, product_as_planned
from tools.gpu.bitsandbytes_peer import bitsandbytes_dequantize, bitsandbytes_product
from tools.gpu.results import Result, Settings
from tools.gpu.weights import random_weight

ROTATION_NBYTES = 256 * 2**20
"""Bytes of weights that a timed graph reads: more than twice any L2 cache (H100 50 MB, B200 126 MB)."""


def check_copy(settings: Settings) -> Iterator[Result]:
    """Measure the bandwidth of a plain copy of 1 GiB, the upper limit."""
    yield Result("copy", "1 GiB", "bandwidth", copy_bandwidth(settings) / 1e9, "GB/s")


def check_dequantize_speed(settings: Settings) -> Iterator[Result]:
    """Time dequantization to bf16 against a copy and against bitsandbytes."""
    roof = copy_bandwidth(settings)
    for shape in settings.shapes:
        weights = rotation(shape, settings)
        outs = [torch.empty(shape, dtype=torch.bfloat16, device=settings.device) for _ in weights]
        nbytes = weight_nbytes(weights[0]) + outs[0].nbytes
        seconds = graph_seconds([partial(dequantize, w, o) for w, o in zip(weights, outs, strict=True)], settings)
        case = f"bf16 {shape[0]}x{shape[1]}"
        yield from speed("dequantize_speed", case, seconds, nbytes, roof)
        peer = bitsandbytes_dequantize(weights, outs)
        if peer is not None:
            yield against("dequantize_speed", case, "bitsandbytes", graph_seconds(peer, settings), seconds)


def check_product_speed(settings: Settings) -> Iterator[Result]:
    """Time the product against a copy, the 16-bit product and (for one row) bitsandbytes."""
    roof = copy_bandwidth(settings)
    for n, k in settings.shapes:
        weights = rotation((n, k), settings)
        wide = [torch.randn(n, k, device=settings.device).to(torch.bfloat16) for _ in weights[: len(weights) // 4 + 1]]
        for m in (1, 4, 8, 16):
            x = torch.randn(m, k, device=settings.device).to(torch.bfloat16)
            out = torch.empty((m, n), dtype=torch.bfloat16, device=settings.device)
            seconds = graph_seconds([partial(product, x, w, out) for w in weights], settings)
            case = f"m{m} {n}x{k}"
            yield from speed("product_speed", case, seconds, weight_nbytes(weights[0]), roof)
            dense = graph_seconds([partial(torch.matmul, x, w.T, out=out) for w in wide], settings)
            yield against("product_speed", case, "16-bit matmul", dense, seconds)
            peer = bitsandbytes_product(x, weights) if m == 1 else None
            if peer is not None:
                yield against("product_speed", case, "bitsandbytes", graph_seconds(peer, settings), seconds)


def check_scale_gradient_speed(settings: Settings) -> Iterator[Result]:
    """Time the gradient of the scales for 2048 tokens against the matrix product that it contains."""
    for n, k in settings.shapes:
        weight = random_weight((n, k), double_quant=False, device=str(settings.device))
        x = torch.randn(2048, k, device=settings.device).to(torch.bfloat16)
        grad = torch.randn(2048, n, device=settings.device).to(torch.bfloat16)
        arguments = (grad, x, weight.packed, weight.absmax, weight.block_size, n, k)
        seconds = graph_seconds([partial(linear_nf4_scale_gradient, *arguments)], settings)
        out = torch.empty((n, k), dtype=torch.bfloat16, device=settings.device)
        product_seconds = graph_seconds([partial(torch.mm, grad.t(), x, out=out)], settings)
        yield Result("scale_gradient_speed", f"{n}x{k}", "time", seconds * 1e6, "us")
        yield against("scale_gradient_speed", f"{n}x{k}", "its matrix product", product_seconds, seconds)


def check_product_plans(settings: Settings) -> Iterator[Result]:
    """Time other launches of `product` relative to the chosen one; below 1 is faster."""
    multiprocessors = triton_launch.multiprocessors(settings.device)
    for n, k in settings.shapes:
        weights = rotation((n, k), settings)
        for m in (1, 8, 16):
            x = torch.randn(m, k, device=settings.device).to(torch.bfloat16)
            out = torch.empty((m, n), dtype=torch.bfloat16, device=settings.device)
            chosen = plan(m, (n, k), n_multiprocessors=multiprocessors)
            timed = {
                candidate: graph_seconds([partial(product_as_planned, x, w, out, candidate) for w in weights], settings)
                for candidate in plans_beside(chosen, k)
            }
            for candidate, seconds in timed.items():
                name = f"rows {candidate.rows} stages {candidate.n_stages} splits {candidate.splits}"
                marked = f"{name} (chosen)" if candidate == chosen else name
                yield Result("product_plans", f"m{m} {n}x{k}", marked, seconds / timed[chosen], "x chosen")


def plans_beside(chosen: LaunchPlan, k: int) -> list[LaunchPlan]:
    """Return the chosen launch and its neighbours with other rows, stages and splits."""
    splits = {1, max(1, chosen.splits // 2), chosen.splits, min(chosen.splits * 2, max(1, k // 256))}
    return [
        dataclasses.replace(chosen, rows=rows, n_stages=stages, splits=count)
        for rows in (32, 64)
        for stages in (2, 3, 4)
        for count in sorted(splits)
    ]


def speed(check: str, case: str, seconds: float, nbytes: int, roof: float) -> Iterator[Result]:
    """Yield time, bandwidth and the share of a copy's bandwidth, `roof`, of a launch that moves `nbytes`."""
    yield Result(check, case, "time", seconds * 1e6, "us")
    yield Result(check, case, "bandwidth", nbytes / seconds / 1e9, "GB/s")
    yield Result(check, case, "share of copy", nbytes / seconds / roof, "")


def against(check: str, case: str, peer: str, peer_seconds: float, seconds: float) -> Result:
    """Return how many times as fast as a peer a launch is."""
    return Result(check, case, f"times as fast as {peer}", peer_seconds / seconds, "x")


def weight_nbytes(weight: PackedWeight) -> int:
    parts = (weight.packed, weight.absmax, weight.nested_absmax)
    return sum(part.nbytes for part in parts if part is not None)


def rotation(shape: tuple[int, int], settings: Settings) -> list[PackedWeight]:
    """Return weights of one shape that together exceed the L2 cache: at most 256, so small shapes fit into it."""
    first = random_weight(shape, device=str(settings.device))
    count = min(256, max(2, ROTATION_NBYTES // max(1, weight_nbytes(first))))
    return [
        first,
        *(
            dataclasses.replace(first, packed=first.packed.clone(), absmax=first.absmax.clone())
            for _ in range(count - 1)
        ),
    ]


def copy_bandwidth(settings: Settings) -> float:
    """Return the bytes per second that a copy on the device reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device=settings.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / graph_seconds([lambda: target.copy_(source)], settings)


def graph_seconds(launches: Sequence[Callable[[], object]], settings: Settings) -> float:
    """Return the median time per launch in seconds, with the launches replayed in order from a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for launch in launches[:2]:  # compiles, and fills caches before the capture
            launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for launch in launches:
            launch()
    times = []
    for _ in range(settings.repeats + 2):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / len(launches))
    return statistics.median(times[2:])
