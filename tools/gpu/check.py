"""Check the kernels' results and measure their speed on this GPU.

Usage: python -m tools.gpu.check [--only NAME ...] [--quick] [--artifact DIR] [--json PATH] [--table PATH]
                                 [--compare OLD.json] [--list]

Writes gpu_check.json (every figure, with the device and the versions) and gpu_check.txt (the same as a table), and
prints the table. --compare adds the ratio of each figure to the figure of an earlier run. Exit codes: 0 if all checks
passed, 1 if one failed, 2 if there is no GPU or the arguments are invalid.

Checks of models use the artifact DIR, or a random Llama with 1.1 billion parameters (0.2 billion with --quick) that is
made and converted for them.

Speed is relative to the bandwidth of a plain copy on the same GPU in the same run: a kernel that is bound by memory
reaches at most 1. Weights rotate through more memory than the L2 cache holds. Launches are replayed from a CUDA graph,
which also shows that they can be captured. Times are medians.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qformat.kernels.triton import launch as triton_launch
from tools.bench import load as bench_load
from tools.gpu.exactness import (
    check_block_dots_close,
    check_dequantize_exact,
    check_product_close,
    check_product_exact,
)
from tools.gpu.model_checks import MODEL_CHECKS
from tools.gpu.report import device_facts, read_report, report, table
from tools.gpu.results import Result, Settings
from tools.gpu.speed import (
    check_copy,
    check_dequantize_speed,
    check_product_plans,
    check_product_speed,
    check_scale_gradient_speed,
)

NO_GPU = 2
"""Exit code if there is no GPU."""

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
"""Checks by name, in the order in which they run: first correctness, then speed."""


def run_checks(names: Sequence[str], settings: Settings, *, checks: Any = None) -> list[Result]:
    """Run checks by name. A check that raises an error gives a failed result, and the other checks still run."""
    results = []
    for name in names:
        try:
            results += list((checks or CHECKS)[name](settings))
        except Exception as error:  # noqa: BLE001 - the rest of the report is useful even on an unknown GPU
            results.append(Result(name, f"{type(error).__name__}: {error}"[:200], "raised", 1, "", False))
    return results


@contextmanager
def artifact_for(names: Sequence[str], given: Path | None, *, quick: bool) -> Iterator[Path | None]:
    """Yield the artifact for checks of models. If none is given, make one."""
    if given is not None or MODEL_CHECKS.keys().isdisjoint(names):
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        yield bench_load.make_artifact(Path(folder), 4 if quick else 22)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=list(CHECKS), default=list(CHECKS), help="checks to run [all]"
    )
    parser.add_argument("--quick", action="store_true", help="use few shapes and repeats")
    parser.add_argument("--artifact", type=Path, metavar="DIR", help="artifact for checks of models [a random Llama]")
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), help="report as JSON [%(default)s]")
    parser.add_argument("--table", type=Path, default=Path("gpu_check.txt"), help="report as a table [%(default)s]")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="report of an earlier run to compare with")
    parser.add_argument("--list", action="store_true", help="list the checks and exit")
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
        print("gpu_check: torch found no CUDA device. Run this on a machine with a GPU", file=sys.stderr)
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
