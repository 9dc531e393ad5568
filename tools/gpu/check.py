"""Everything that needs a GPU, in one command: are the kernels right on this card, and how fast are they?

Usage: python -m tools.gpu.check [--only NAME ...] [--quick] [--artifact DIR] [--json PATH] [--table PATH]
                                 [--compare OLD.json] [--list]

Writes gpu_check.json (every figure, with the device and the versions) and gpu_check.txt (the same as a table), and
prints the table. --compare adds the ratio of each figure to that of an earlier run. Exit code: 0 all checks passed, 1
one failed, 2 there is no GPU or the arguments make no sense.

The checks of models run on the artifact DIR, or on a random Llama of 1.1 billion parameters (with --quick: 0.2) that is
made and converted for them.

Speed is given as the share of what a plain copy reaches on the same card in the same run: the roof of a kernel that is
bound by memory is 1. Weights rotate through more memory than the L2 cache holds, launches are replayed from a CUDA
graph (so they are also shown to be capturable), times are medians.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qformat.codec.nf4 import BLOCK_SIZES
from qformat.kernels.packed_weight import PackedWeight
from qformat.kernels.scaled_linear import linear_nf4_scale_gradient
from qformat.kernels.triton import launch as triton_launch
from qformat.kernels.triton.block_dots import TILE as BLOCK_DOTS_TILE
from qformat.kernels.triton.block_dots import block_dots
from qformat.kernels.triton.dequantize import TILE, dequantize
from qformat.kernels.triton.product import LaunchPlan, plan, product, product_as_planned
from tools.bench import load as bench_load
from tools.gpu.model_checks import MODEL_CHECKS
from tools.gpu.results import Result, Settings
from tools.gpu.weights import bits, exact_block_dots, random_codes, random_weight, reference_bits

NO_GPU = 2
SCHEMA = 1

ROTATION_NBYTES = 256 * 2**20
"""Weights that a timed graph goes through: more than twice any L2 cache (H100 50 MB, B200 126 MB)."""


# --- exactness


def check_dequantize_exact(settings: Settings) -> Iterator[Result]:
    """Every bit of the decoded weight, for all block sizes, levels, dtypes and tails."""
    shapes = [(64, TILE // 64), (103, 241), (1, 1), (1, TILE + 1), *([] if settings.quick else [(4096, 4096)])]
    for shape in shapes:
        for block_size in BLOCK_SIZES:
            for double_quant in (True, False):
                weight = random_weight(
                    shape, block_size=block_size, double_quant=double_quant, device=str(settings.device)
                )
                for dtype in (torch.bfloat16, torch.float16, torch.float32):
                    out = torch.full(shape, 77.0, dtype=dtype, device=settings.device)
                    dequantize(weight, out)
                    wrong = int((bits(out) != reference_bits(weight, dtype)).sum())
                    yield mismatches("dequantize_exact", weight, dtype, wrong)


def check_product_exact(settings: Settings) -> Iterator[Result]:
    """Every weight that the product uses, read out with unit vectors: compared as values, since -0 comes back as 0."""
    shapes = [(100, 448)] if settings.quick else [(100, 448), (576, 576), (896, 1152)]
    for shape in shapes:
        for block_size in BLOCK_SIZES:
            for double_quant in (True, False):
                weight = random_weight(
                    shape, block_size=block_size, double_quant=double_quant, device=str(settings.device)
                )
                for dtype in (torch.bfloat16, torch.float16):
                    yield mismatches("product_exact", weight, dtype, wrong_weights(weight, dtype))


def check_block_dots_close(settings: Settings) -> Iterator[Result]:
    """Sums over blocks, of which the gradient of the scales is made, as a share of the bound of their float32 sums."""
    sizes = [1, 65, BLOCK_DOTS_TILE, 3 * BLOCK_DOTS_TILE + 517, *([] if settings.quick else [1 << 24])]
    for n in sizes:
        packed = random_codes(n).to(settings.device)
        for block_size in BLOCK_SIZES:
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                values = torch.randn(n, device=settings.device).to(dtype)
                out = torch.empty(-(-n // block_size), device=settings.device)
                block_dots(values, packed, block_size, out)
                exact, magnitude = exact_block_dots(values, packed, block_size)
                share = float(((out.double().cpu() - exact).abs() / (magnitude * block_size * 2.0**-24)).max())
                case = f"{str(dtype).removeprefix('torch.')} {n} block {block_size}"
                yield Result("block_dots_close", case, "error / bound", share, "", share <= 1)


def wrong_weights(weight: PackedWeight, dtype: torch.dtype) -> int:
    n, k = weight.shape
    wanted = torch.empty((n, k), dtype=dtype)
    wanted.view(torch.int16).copy_(torch.from_numpy(reference_bits(weight, dtype).view("int16")))
    unit = torch.eye(k, dtype=dtype, device=weight.device)
    wrong = 0
    for rows in (8, 16):  # one plan for few rows of x and one for many
        for first in range(0, k, rows):
            out = torch.full((min(rows, k - first), n), 77.0, dtype=dtype, device=weight.device)
            product(unit[first : first + rows], weight, out)
            wrong += int((wanted[:, first : first + rows] != out.cpu().T).sum())
    return wrong


def check_product_close(settings: Settings) -> Iterator[Result]:
    """The product of random rows against float64, as a share of the bound of its float32 sums."""
    for n, k in settings.shapes:
        weight = random_weight((n, k), device=str(settings.device))
        for m in (1, 7, 16):
            x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(torch.bfloat16).to(settings.device)
            out = torch.empty((m, n), dtype=torch.float32, device=settings.device)
            product(x, weight, out)
            again = torch.empty_like(out)
            product(x, weight, again)
            w = torch.empty((n, k), dtype=torch.bfloat16, device=settings.device)
            dequantize(weight, w)
            exact = x.double() @ w.double().T
            bound = x.double().abs() @ w.double().abs().T * k * 2.0**-24
            share = float(((out.double() - exact).abs() / bound).max())
            yield Result("product_close", f"m{m} {n}x{k}", "error / bound", share, "", share <= 1)
            repeatable = torch.equal(out, again)
            yield Result("product_close", f"m{m} {n}x{k}", "same bits twice", float(repeatable), "", repeatable)


def mismatches(check: str, weight: PackedWeight, dtype: torch.dtype, wrong: int) -> Result:
    levels = "two levels" if weight.double_quant else "one level"
    shape = f"{weight.shape[0]}x{weight.shape[1]}"
    case = f"{str(dtype).removeprefix('torch.')} {shape} block {weight.block_size} {levels}"
    return Result(check, case, "wrong weights", wrong, "", wrong == 0)


# --- speed


def check_copy(settings: Settings) -> Iterator[Result]:
    """The roof: a plain copy of 1 GiB."""
    yield Result("copy", "1 GiB", "bandwidth", copy_bandwidth(settings) / 1e9, "GB/s")


def check_dequantize_speed(settings: Settings) -> Iterator[Result]:
    """Dequantization to bf16 against a copy and against bitsandbytes."""
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
    """The product against a copy, the 16-bit product and bitsandbytes' (one row only)."""
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
    """The gradient of the scales against the matrix product that it needs, for 2048 tokens."""
    for n, k in settings.shapes:
        weight = random_weight((n, k), double_quant=False, device=str(settings.device))
        x = torch.randn(2048, k, device=settings.device).to(torch.bfloat16)
        grad = torch.randn(2048, n, device=settings.device).to(torch.bfloat16)
        arguments = (grad, x, weight.packed, weight.absmax, weight.block_size, n, k)
        seconds = graph_seconds([partial(linear_nf4_scale_gradient, *arguments)], settings)
        out = torch.empty((n, k), dtype=torch.bfloat16, device=settings.device)
        product_seconds = graph_seconds([partial(torch.mm, grad.t(), x, out=out)], settings)
        yield Result("scale_gradient_speed", f"{n}x{k}", "time", seconds * 1e6, "us")
        yield against("scale_gradient_speed", f"{n}x{k}", "its product", product_seconds, seconds)


def check_product_plans(settings: Settings) -> Iterator[Result]:
    """Every launch that `triton_product` could have chosen, relative to the one it did: below 1 is faster."""
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
                yield Result("product_plans", f"m{m} {n}x{k}", marked, seconds / timed[chosen], "of chosen")


def plans_beside(chosen: LaunchPlan, k: int) -> list[LaunchPlan]:
    """Return the chosen launch and its neighbours: other rows, stages and splits."""
    splits = {1, max(1, chosen.splits // 2), chosen.splits, min(chosen.splits * 2, max(1, k // 256))}
    return [
        dataclasses.replace(chosen, rows=rows, n_stages=stages, splits=count)
        for rows in (32, 64)
        for stages in (2, 3, 4)
        for count in sorted(splits)
    ]


def speed(check: str, case: str, seconds: float, nbytes: int, roof: float) -> Iterator[Result]:
    yield Result(check, case, "time", seconds * 1e6, "us")
    yield Result(check, case, "bandwidth", nbytes / seconds / 1e9, "GB/s")
    yield Result(check, case, "share of copy", nbytes / seconds / roof, "")


def against(check: str, case: str, peer: str, peer_seconds: float, seconds: float) -> Result:
    return Result(check, case, f"times as fast as {peer}", peer_seconds / seconds, "x")


def weight_nbytes(weight: PackedWeight) -> int:
    parts = (weight.packed, weight.absmax, weight.nested_absmax)
    return sum(part.nbytes for part in parts if part is not None)


def rotation(shape: tuple[int, int], settings: Settings) -> list[PackedWeight]:
    """Return equal-shaped weights that together exceed the L2 cache, at most 256 (small shapes stay in it)."""
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
    """Return bytes read and written a second by a device copy."""
    source = torch.empty(2**30, dtype=torch.uint8, device=settings.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / graph_seconds([lambda: target.copy_(source)], settings)


def graph_seconds(launches: Sequence[Callable[[], object]], settings: Settings) -> float:
    """Return the median time of one of these launches, run one after another from a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for launch in launches[:2]:  # compiles, and fills caches that a capture must not
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


# --- the peer


def bitsandbytes_state(weight: PackedWeight) -> Any:
    """Return a weight as bitsandbytes' QuantState, or None without bitsandbytes."""
    try:
        from bitsandbytes.functional import QuantState
    except ImportError:
        return None
    nested = QuantState(absmax=weight.nested_absmax, code=weight.nested_quant_map, blocksize=256, dtype=torch.float32)
    return QuantState(
        absmax=weight.absmax, shape=torch.Size(weight.shape), code=triton_launch.codebook(weight.device),
        blocksize=weight.block_size, quant_type="nf4", dtype=torch.bfloat16,
        offset=torch.tensor(weight.nested_offset, device=weight.device), state2=nested,
    )  # fmt: skip


def bitsandbytes_dequantize(weights: list[PackedWeight], outs: list[torch.Tensor]) -> list[Callable[[], object]] | None:
    if bitsandbytes_state(weights[0]) is None:
        return None
    from bitsandbytes.functional import dequantize_4bit

    states = [bitsandbytes_state(weight) for weight in weights]
    return [
        partial(dequantize_4bit, w.packed.view(-1, 1), s, out=o) for w, s, o in zip(weights, states, outs, strict=True)
    ]


def bitsandbytes_product(x: torch.Tensor, weights: list[PackedWeight]) -> list[Callable[[], object]] | None:
    if bitsandbytes_state(weights[0]) is None:
        return None
    from bitsandbytes.functional import gemv_4bit

    states = [bitsandbytes_state(weight) for weight in weights]
    return [partial(gemv_4bit, x, w.packed.view(-1, 1).t(), state=s) for w, s in zip(weights, states, strict=True)]


# --- the report

CHECKS: dict[str, Callable[[Settings], Iterator[Result]]] = {
    "dequantize_exact": check_dequantize_exact,
    "product_exact": check_product_exact,
    "product_close": check_product_close,
    "block_dots_close": check_block_dots_close,
    "copy": check_copy,
    "dequantize_speed": check_dequantize_speed,
    "product_speed": check_product_speed,
    "scale_gradient_speed": check_scale_gradient_speed,
    "product_plans": check_product_plans,
    **MODEL_CHECKS,
}
"""In the order in which they run: first what is right, then what is fast. A new check is a line here."""


def run_checks(names: Sequence[str], settings: Settings, *, checks: Any = None) -> list[Result]:
    """Run checks by name. A check that raises is a failed result and the others go on."""
    results = []
    for name in names:
        try:
            results += list((checks or CHECKS)[name](settings))
        except Exception as error:  # noqa: BLE001 - an unknown card must not cost the rest of the report
            results.append(Result(name, f"{type(error).__name__}: {error}"[:200], "raised", 1, "", False))
    return results


def device_facts(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_nbytes": properties.total_memory,
    }


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in ("qformat", "torch", "triton", "bitsandbytes"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def report(results: Sequence[Result], *, device: dict[str, Any]) -> dict[str, Any]:
    """Return the whole run as one JSON object."""
    return {
        "schema": SCHEMA,
        "device": device,
        "versions": versions(),
        "passed": all(result.passed is not False for result in results),
        "results": [dataclasses.asdict(result) for result in results],
    }


def table(run: dict[str, Any], *, earlier: dict[str, Any] | None = None) -> str:
    """Return a report as text: one line a figure, or one for all cases of a check with the same verdict."""
    device, found = run["device"], run["versions"]
    lines = [
        f"{device['name']} (sm_{device['compute_capability'].replace('.', '')}, {device['multiprocessors']} SMs)",
        ", ".join(f"{name} {version or 'absent'}" for name, version in found.items()),
        "",
    ]
    before = {key(row): row["value"] for row in earlier["results"]} if earlier else {}
    rows = run["results"]
    for check in dict.fromkeys(row["check"] for row in rows):
        mine = [row for row in rows if row["check"] == check]
        judged = [row for row in mine if row["passed"] is not None]
        good = [row for row in judged if row["passed"]]
        if judged:
            lines.append(f"{check}: {len(good)} of {len(judged)} passed")
        for row in mine:
            if row["passed"] is True:
                continue
            ratio = f"   {row['value'] / before[key(row)]:.3f} x earlier" if before.get(key(row)) else ""
            mark = "FAILED " if row["passed"] is False else ""
            lines.append(
                f"  {mark}{row['case']:32s} {row['metric']:40s} {row['value']:12.3f} {row['unit']}{ratio}".rstrip()
            )
    lines += ["", "all checks passed" if run["passed"] else "SOME CHECKS FAILED"]
    return "\n".join(lines) + "\n"


def key(row: dict[str, Any]) -> tuple[str, str, str]:
    """Return what identifies a figure over runs."""
    return row["check"], row["case"], row["metric"]


def read_report(path: Path) -> dict[str, Any]:
    """Read an earlier run. ValueError if it is none, or of another schema."""
    run = json.loads(path.read_text())
    if not isinstance(run, dict) or run.get("schema") != SCHEMA:
        raise ValueError(f"{path}: not a report of this tool (schema {SCHEMA})")
    return run


@contextmanager
def artifact_for(names: Sequence[str], given: Path | None, *, quick: bool) -> Iterator[Path | None]:
    """Yield the artifact that checks of models run on, made for them where none was given."""
    if given is not None or MODEL_CHECKS.keys().isdisjoint(names):
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        yield bench_load.make_artifact(Path(folder), 4 if quick else 22)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(CHECKS), default=list(CHECKS))
    parser.add_argument("--quick", action="store_true", help="few shapes and repeats")
    parser.add_argument("--artifact", type=Path, metavar="DIR", help="for checks of models; a random Llama otherwise")
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--table", type=Path, default=Path("gpu_check.txt"))
    parser.add_argument("--compare", type=Path, metavar="OLD.json")
    parser.add_argument("--list", action="store_true", help="print the checks and stop")
    options = parser.parse_args(arguments)
    if options.list:
        for name, check in CHECKS.items():
            print(f"{name:20s} {(check.__doc__ or '').splitlines()[0]}")
        return 0
    try:
        earlier = read_report(options.compare) if options.compare else None
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA device here; run it on a machine with a GPU", file=sys.stderr)
        return NO_GPU
    unavailable = triton_launch.triton_unavailable()
    if unavailable is not None:
        print(f"gpu_check: {unavailable}", file=sys.stderr)
        return NO_GPU
    device = torch.device("cuda", torch.cuda.current_device())
    with artifact_for(options.only, options.artifact, quick=options.quick) as artifact:
        results = run_checks(options.only, Settings(device, quick=options.quick, artifact=artifact))
    run = report(results, device=device_facts(device))
    options.json.write_text(json.dumps(run, indent=2) + "\n")
    text = table(run, earlier=earlier)
    options.table.write_text(text)
    print(text, end="")
    return 0 if run["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
