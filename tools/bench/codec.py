"""Compares encoding and decoding with bitsandbytes, in one run with the same tensors and the same number of threads.

Usage: python -m tools.bench.codec [--threads 2] [--runs 9] [--formats BF16] [--shapes 1024x1024 4096x4096 4096x11008]

Rows, all with block size 64:
  encode                    weights to packed codes and absmax           peer: its quantize_4bit op (allocates)
  encode, double quantized  the same plus the second level               peer: F.quantize_4bit(compress_statistics)
  decode                    from float32 scales, into a reused buffer    peer: its C kernel, into a reused buffer
  decode, double quantized  from 8-bit scales, into a reused buffer      peer: F.dequantize_4bit (allocates)
All decoders that this CPU supports are measured. Figures are medians in million weights per second (M w/s); a ratio
above 1 means that qformat is faster. Codes and decoded weights are compared bit for bit before the measurement.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import bitsandbytes
import bitsandbytes.functional as F
import numba
import numpy as np
import torch
from bitsandbytes.cextension import lib

from qformat.codec.cpu import blocks, lanes
from qformat.codec.cpu.blocks import Instructions
from qformat.codec.floats import FloatFormat, Raw
from qformat.codec.nested import NESTED_BLOCK_SIZE

BLOCK_SIZE = 64
TORCH_DTYPES = {FloatFormat.BF16: torch.bfloat16, FloatFormat.F16: torch.float16, FloatFormat.F32: torch.float32}
C_KERNEL_NAMES = {FloatFormat.BF16: "bf16", FloatFormat.F16: "fp16", FloatFormat.F32: "fp32"}


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table: medians in million weights per second."""

    job: str
    ours: float
    peer: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=9, help="number of timed runs per job")
    parser.add_argument("--formats", nargs="+", choices=[each.value for each in FloatFormat], default=["BF16"])
    parser.add_argument("--shapes", nargs="+", default=["1024x1024", "4096x4096", "4096x11008"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print_machine(arguments.threads)
    print("| format | shape | job | qformat M w/s | bitsandbytes M w/s | ratio |")
    print("|---|---|---|---:|---:|---:|")
    with ThreadPoolExecutor(arguments.threads) as pool:
        for float_format in map(FloatFormat, arguments.formats):
            for shape in arguments.shapes:
                rows, columns = map(int, shape.split("x"))
                bench = Bench(float_format, rows, columns, pool, arguments.threads, arguments.runs)
                for row in bench.rows():
                    ratio = f"{row.ours / row.peer:.2f}"
                    print(
                        f"| {float_format.value} | {shape} | {row.job} | {row.ours:,.0f} | {row.peer:,.0f} | {ratio} |",
                        flush=True,
                    )


def print_machine(threads: int) -> None:
    wanted = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512bf16", "avx512vbmi", "neon")
    present = [name for name in wanted if name in lanes.cpu_features()]
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    print(f"CPU: {cpu_model()}, {os.cpu_count()} cores, load {load}; {threads} threads used by each side")
    print(f"features: {' '.join(present) or 'none'}; decoder: {blocks.decoder_name()}")
    print(
        f"numba {numba.__version__}, torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}), "
        f"bitsandbytes {bitsandbytes.__version__}\n"
    )


def cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


class Bench:
    """One tensor, its buffers, and the encoders and decoders of both sides."""

    def __init__(
        self, float_format: FloatFormat, rows: int, columns: int, pool: ThreadPoolExecutor, threads: int, runs: int
    ) -> None:
        self._format, self._pool, self._threads, self._runs = float_format, pool, threads, runs
        self._shape = (rows, columns)
        self._n = rows * columns
        generator = torch.Generator().manual_seed(0)
        self._weight = (torch.randn(rows, columns, generator=generator) * 0.02).to(TORCH_DTYPES[float_format])
        self._raw = raw_view(self._weight, float_format)
        self._their_codes, self._state = F.quantize_4bit(
            self._weight, blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4"
        )
        nested_offset = self._state.offset
        self._their_absmax = F.dequantize_blockwise(self._state.absmax, self._state.state2) + nested_offset
        self._offset = np.float32(nested_offset.item())
        n_blocks = -(-self._n // BLOCK_SIZE)
        self._packed = np.empty(-(-self._n // 2), np.uint8)
        self._absmax = np.empty(n_blocks, np.float32)
        self._codes = np.empty(n_blocks, np.uint8)
        self._nested = np.empty(-(-n_blocks // NESTED_BLOCK_SIZE), np.float32)
        self._out = torch.empty(rows, columns, dtype=self._weight.dtype)
        self._out_raw = raw_view(self._out, float_format)

    def rows(self) -> list[Row]:
        """Check that both sides give the same bits, then measure them."""
        self._encode()
        assert np.array_equal(self._packed, self._their_codes.numpy().reshape(-1))
        rows = [
            self._row("encode", self._encode, self._their_encode),
            self._row("encode, double quantized", self._encode_twice, self._their_encode_twice),
        ]
        their_scales = self._their_absmax.numpy()
        for decoder in self._decoders():
            self._check(lambda decoder=decoder: self._decode(decoder, their_scales))
            rows.append(
                self._row(
                    f"decode ({decoder})",
                    lambda decoder=decoder: self._decode(decoder, their_scales),
                    self._their_kernel,
                )
            )
        self._check(self._decode_nested)
        rows.append(self._row("decode, double quantized", self._decode_nested, self._their_decode))
        return rows

    def _check(self, decode: Callable[[], object]) -> None:
        self._their_kernel()
        expected = self._out.clone()
        self._out.zero_()
        decode()
        assert torch.equal(self._out, expected)

    def _row(self, job: str, ours: Callable[[], object], peer: Callable[[], object]) -> Row:
        """Measure both sides in turn, so that other load on the machine affects both."""
        sides = (ours, peer)
        repeats = [max(1, min(200, int(0.02 / seconds_of(side)))) for side in sides]  # a turn takes 20 ms or one call
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(self._runs):
            for side, n_repeats, taken in zip(sides, repeats, seconds, strict=True):
                side()  # untimed: warms caches and threads for this side
                taken.extend(seconds_of(side) for _ in range(n_repeats))
        return Row(job, *(self._n / statistics.median(taken) / 1e6 for taken in seconds))

    @staticmethod
    def _decoders() -> list[Instructions]:
        present: list[Instructions] = [
            name for name, needed in lanes.NEEDED_FEATURES.items() if needed <= lanes.cpu_features()
        ]
        return [*present, "plain"]

    def _encode(self) -> None:
        n_blocks = self._absmax.size
        bounds = [n_blocks * share // self._threads for share in range(self._threads + 1)]

        def encode_blocks(share: int) -> bool:
            first, last = bounds[share], bounds[share + 1]
            weights = slice(first * BLOCK_SIZE, min(last * BLOCK_SIZE, self._n))
            return blocks.encode_into(
                self._raw[weights],
                self._format,
                block_size=BLOCK_SIZE,
                packed=self._packed[weights.start // 2 : -(-weights.stop // 2)],
                absmax=self._absmax[first:last],
            )

        assert all(self._pool.map(encode_blocks, range(self._threads)))

    def _encode_twice(self) -> None:
        self._encode()
        offset = np.float32(blocks.add_in_order(self._absmax, 0.0) / self._absmax.size)
        blocks.encode_absmax_into(self._absmax, offset, codes=self._codes, nested_absmax=self._nested)

    def _decode(self, decoder: Instructions, scales: np.ndarray) -> None:
        blocks.decode_into(
            self._packed,
            scales,
            n_elements=self._n,
            block_size=BLOCK_SIZE,
            float_format=self._format,
            out=self._out_raw,
            decoder=decoder,
            workers=self._threads,
        )

    def _decode_nested(self) -> None:
        second = self._state.state2
        blocks.decode_nested_into(
            self._packed,
            self._state.absmax.numpy(),
            second.absmax.numpy(),
            self._offset,
            n_elements=self._n,
            block_size=BLOCK_SIZE,
            float_format=self._format,
            out=self._out_raw,
            nested_quant_map=second.code.numpy(),
            workers=self._threads,
        )

    def _their_encode(self) -> None:
        torch.ops.bitsandbytes.quantize_4bit.default(self._weight, BLOCK_SIZE, "nf4", torch.uint8)

    def _their_encode_twice(self) -> None:
        F.quantize_4bit(self._weight, blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4")

    def _their_kernel(self) -> None:
        kernel = getattr(lib, f"cdequantize_blockwise_cpu_nf4_{C_KERNEL_NAMES[self._format]}")
        sizes = (ctypes.c_longlong(size) for size in (BLOCK_SIZE, *self._shape))
        kernel(F.get_ptr(self._their_codes), F.get_ptr(self._their_absmax), F.get_ptr(self._out), *sizes)

    def _their_decode(self) -> None:
        F.dequantize_4bit(self._their_codes, self._state)


def seconds_of(job: Callable[[], object]) -> float:
    started = perf_counter()
    job()
    return perf_counter() - started


def raw_view(tensor: torch.Tensor, float_format: FloatFormat) -> Raw:
    """Return a flat view of a tensor's raw elements."""
    flat = tensor.view(-1)
    return flat.numpy() if float_format is FloatFormat.F32 else flat.view(torch.int16).numpy().view(np.uint16)


if __name__ == "__main__":
    main()
