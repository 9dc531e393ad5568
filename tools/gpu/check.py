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
