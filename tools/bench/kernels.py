"""Compares decoding and products of NF4 weights with bitsandbytes, in one run with the same weights and threads.

Usage: python -m tools.bench.kernels [--threads 2] [--rounds 7] [--shapes 576x576 ...] [--dtypes bf16 fp16 fp32]
                                     [--rows 1 2 4 ...] [--crossover]

Weights are double-quantized with block size 64. The dtype in a row is that of the activations. Columns:
  qformat      dequantize_nf4, dequantize_nf4_into; the product of the layer without gradients
  exact        bitsandbytes on the bytes of the artifact: dequantize_4bit, or its C kernel if the output is reused;
               matmul_4bit
  repacked     matmul_4bit on a repacked weight with scales rounded to bf16, which bitsandbytes uses for inference on
               CPUs with AVX512-BF16
Ratios are medians over rounds of qformat's time divided by the peer's: below 1, qformat is faster. Before the
measurement, decoded weights are compared bit for bit, and products within the rounding error of bf16.

`--crossover` compares two implementations of qformat for M = 1 to 16: the product from the codes, and decoding followed
by torch's product. A weight that fits in the last-level cache stays there between calls, on every side.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import bitsandbytes
import bitsandbytes.functional as F
import torch
from bitsandbytes.cextension import lib
from torch import Tensor

from qformat.kernels.cpu_features import compute_dtype
from qformat.kernels.held_weight import HeldWeight
from qformat.kernels.implementations import implementation
from qformat.kernels.ops import dequantize_nf4, dequantize_nf4_into, linear
from qformat.kernels.packed_weight import PackedWeight
from tools.bench import codec as bench_codec
from tools.bench.timing.interleaved import Call, median_ratio, time_in_turn

BLOCK_SIZE = 64
SHAPES = ("576x576", "1536x576", "2048x2048", "5632x2048", "4096x4096", "14336x4096")
"""Linear layers of SmolLM2-135M, TinyLlama-1.1B and Llama-3-8B, as N x K."""

ROWS = (1, 2, 4, 8, 9, 16, 32, 64, 256)
CROSSOVER_ROWS = range(1, 17)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
C_KERNEL_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Sides:
    """One weight in the form of each side. `repacked` is None if bitsandbytes does not repack it."""

    ours: PackedWeight
    packed: Tensor
    state: F.QuantState
    repacked: tuple[Tensor, F.QuantState] | None


def main() -> None:
    options = parser().parse_args()
    torch.set_num_threads(options.threads)
    bench_codec.print_machine(options.threads)
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    with torch.no_grad():
        if options.crossover:
            print_crossovers(shapes, options)
        else:
            print_rows(shapes, options)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--shapes", nargs="+", default=SHAPES)
    made.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=["bf16"], help="dtypes of the activations in products"
    )
    made.add_argument("--rows", nargs="+", type=int, default=ROWS, help="numbers of rows M of x")
    made.add_argument("--crossover", action="store_true")
    return made


def print_rows(shapes: list[tuple[int, int]], options: argparse.Namespace) -> None:
    print("| shape | operation | qformat us | exact us | ratio | repacked us | ratio |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for shape in shapes:
        sides = make_sides(shape)
        for operation, calls in operations(sides, options):
            times = time_in_turn(calls, rounds=options.rounds)
            print(f"| {shape[0]}x{shape[1]} | {operation} | {microseconds(times['qformat'])} |", end="")
            for peer in ("exact", "repacked"):
                print(f" {against(times, peer)} |", end="")
            print(flush=True)


def operations(sides: Sides, options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Call]]]:
    for name, dtype in DTYPES.items():
        yield f"dequantize {name}, fresh output", fresh_decodes(sides, dtype)
        yield f"dequantize {name}, reused output", decodes_into(sides, dtype)
    for name in options.dtypes:
        for m in options.rows:
            yield f"linear {name}, M = {m}", products(sides, m, DTYPES[name])


def print_crossovers(shapes: list[tuple[int, int]], options: argparse.Namespace) -> None:
    """Print the time of the product from the codes divided by that of decoding first. The threshold is the last M below
    1.
    """
    print("| shape | dtype |" + "".join(f" M = {m} |" for m in CROSSOVER_ROWS) + " faster up to M = |")
    print("|---|---|" + "---:|" * (len(CROSSOVER_ROWS) + 1))
    for shape in shapes:
        weight = make_sides(shape).ours
        for name in options.dtypes:
            ratios = crossover(weight, DTYPES[name], options.rounds)
            shown = "".join(f" {ratio:.2f} |" for ratio in ratios)
            print(f"| {shape[0]}x{shape[1]} | {name} |{shown} {last_faster(ratios)} |", flush=True)


def crossover(weight: PackedWeight, dtype: torch.dtype, rounds: int) -> list[float]:
    backend = implementation(CPU)
    reason = backend.product_unsupported(1, weight, dtype)
    if reason is not None:
        raise SystemExit(f"this backend has no product from the codes: {reason}")
    held, ratios = HeldWeight(weight), []
    for m in CROSSOVER_ROWS:
        x = torch.randn(m, weight.shape[1]).to(dtype)
        calls: dict[str, Call] = {
            "from the codes": lambda x=x: backend.product(x, held, x.new_empty((x.shape[0], weight.shape[0]))),
            "by decoding": lambda x=x: backend.linear(x.to(compute_dtype(dtype)), weight, None).to(dtype),
        }
        ratios.append(median_ratio(*time_in_turn(calls, rounds=rounds).values()))
    return ratios


def last_faster(ratios: list[float]) -> int:
    """Return the number of leading ratios below 1, which is the M up to which the first side is always faster."""
    return next((number for number, ratio in enumerate(ratios) if ratio >= 1), len(ratios))


def make_sides(shape: tuple[int, int]) -> Sides:
    """Quantize a random weight with bitsandbytes and give its components to both sides."""
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    packed, state = F.quantize_4bit(weight, blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4")
    ours = PackedWeight(
        packed, state.absmax, state.state2.absmax, state.state2.code, float(state.offset), BLOCK_SIZE, shape
    )
    return Sides(ours, packed, state, repack(packed, state, shape))


def repack(packed: Tensor, state: F.QuantState, shape: tuple[int, int]) -> tuple[Tensor, F.QuantState] | None:
    if not F.has_avx512bf16() or shape[0] % 32:
        return None
    again = F.QuantState.from_dict(state.as_dict(packed=True), device=CPU)
    return F._convert_weight_packed_for_cpu(packed.clone(), again)


def fresh_decodes(sides: Sides, dtype: torch.dtype) -> dict[str, Call]:
    weight, state = sides.ours, with_dtype(sides.state, dtype)
    calls: dict[str, Call] = {
        "qformat": lambda: dequantize_nf4(*components(weight), *weight.shape, dtype),
        "exact": lambda: F.dequantize_4bit(sides.packed, state),
    }
    assert torch.equal(calls["qformat"](), calls["exact"]())
    return calls


def decodes_into(sides: Sides, dtype: torch.dtype) -> dict[str, Call]:
    weight, state = sides.ours, with_dtype(sides.state, dtype)
    ours, theirs = torch.zeros(weight.shape, dtype=dtype), torch.ones(weight.shape, dtype=dtype)
    calls: dict[str, Call] = {
        "qformat": lambda: dequantize_nf4_into(*components(weight), ours),
        "exact": lambda: their_decode_into(sides.packed, state, theirs),
    }
    for call in calls.values():
        call()
    assert torch.equal(ours, theirs)
    return calls


def their_decode_into(packed: Tensor, state: F.QuantState, out: Tensor) -> None:
    """Decode with bitsandbytes' C kernel, because its Python functions do not accept an output on CPUs."""
    scales = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    kernel = getattr(lib, f"cdequantize_blockwise_cpu_nf4_{C_KERNEL_NAMES[out.dtype]}")
    sizes = (ctypes.c_longlong(size) for size in (BLOCK_SIZE, *state.shape))
    kernel(F.get_ptr(packed), F.get_ptr(scales), F.get_ptr(out), *sizes)


def products(sides: Sides, m: int, dtype: torch.dtype) -> dict[str, Call]:
    x = torch.randn(m, sides.ours.shape[1], generator=torch.Generator().manual_seed(m)).to(dtype)
    held, state = HeldWeight(sides.ours), with_dtype(sides.state, dtype)
    calls: dict[str, Call] = {
        "qformat": lambda: linear(x, held),
        "exact": lambda: bitsandbytes.matmul_4bit(x, sides.packed, state),
    }
    if sides.repacked is not None:
        repacked, their_state = sides.repacked
        calls["repacked"] = lambda: bitsandbytes.matmul_4bit(x, repacked, their_state)
    expected = calls["exact"]().float()
    for name, call in calls.items():
        error = (call().float() - expected).norm() / expected.norm()
        assert error < 2.0**-6, f"{name}, M = {m}: relative error {error}"
    return calls


def components(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, float, int]:
    return (
        weight.packed,
        weight.absmax,
        weight.nested_absmax,
        weight.nested_quant_map,
        weight.nested_offset,
        weight.block_size,
    )


def with_dtype(state: F.QuantState, dtype: torch.dtype) -> F.QuantState:
    """Return a copy of the state with another output dtype."""
    again = F.QuantState.from_dict(state.as_dict(packed=True), device=CPU)
    again.dtype = dtype
    return again


def microseconds(times: list[float]) -> str:
    return f"{statistics.median(times) * 1e6:,.0f}"


def against(times: dict[str, list[float]], peer: str) -> str:
    if peer not in times:
        return "- | -"
    return f"{microseconds(times[peer])} | {median_ratio(times['qformat'], times[peer]):.2f}"


if __name__ == "__main__":
    main()
