"""Count the machine instructions, registers, spills and shared memory of the Triton kernels; needs no GPU or driver.

Usage: python -m tools.gpu.sass_budget [CASE ...] [--sm 80,90,100,120] [--ops] [--dump] [--json] [--check] [--write]

A case is a kernel with the compile-time arguments of a launch. It is compiled ahead of time for each architecture,
disassembled with the cuobjdump that Triton ships, and counted: a straight-line kernel along its longest path, a product
along one step of its K loop. "insts/w" is the number of instructions that a thread executes per weight, "mio/w" the
memory and shuffle instructions among them, and "bytes/w" the calculated memory traffic per weight.

--check compares the figures with the ceilings in qformat/kernels/triton/sass_budget.json, as
tests/tools/gpu/test_sass_budget.py does, and exits with 1 if one is exceeded. --write replaces that file with ceilings
5 % above the current figures; never use it only to make a test pass.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qformat.kernels.triton import dequantize as triton_dequantize
from tools.gpu.kernel_cases import CASES, Case
from tools.gpu.sass import longest_loop, longest_path, opcode, parse

ARCHITECTURES = (80, 90, 100, 120)
BUDGET = Path(triton_dequantize.__file__).with_name("sass_budget.json")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
HEADROOM = 1.05
MIO = {"SHFL", "LDS", "STS", "LDG", "STG", "LDSM", "STSM", "LDGSTS", "ATOM", "RED", "LDC"}


@dataclass(frozen=True, slots=True)
class Measured:
    """Figures of one compilation. `opcodes` counts the same path as `instructions`."""

    case: str
    sm: int
    instructions: int
    instructions_per_weight: float
    mio_per_weight: float
    registers: int
    spill_nbytes: int
    shared_nbytes: int
    bytes_per_weight: float
    opcodes: Counter[str]


def measure(case: Case, sm: int) -> tuple[Measured, str]:
    """Compile a case for one architecture. Return its figures and its disassembly."""
    cubin, shared_nbytes = compile_case(case, sm)
    sass, usage = _cuobjdump(cubin)
    instructions = parse(sass)
    path = longest_loop(instructions) if case.in_loop else longest_path(instructions)
    opcodes = Counter(opcode(text) for _, text in path)
    every = Counter(opcode(text) for _, text in instructions)
    return Measured(
        case=case.name,
        sm=sm,
        instructions=len(path),
        instructions_per_weight=round(len(path) / case.weights_per_thread, 2),
        mio_per_weight=round(sum(opcodes[name] for name in MIO) / case.weights_per_thread, 2),
        registers=usage["REG"],
        spill_nbytes=usage["LOCAL"] + 4 * (every["LDL"] + every["STL"]),
        shared_nbytes=shared_nbytes,
        bytes_per_weight=round(case.bytes_per_weight, 3),
        opcodes=opcodes,
    ), sass


def compile_case(case: Case, sm: int) -> tuple[bytes, int]:
    """Return the cubin and its dynamic shared memory in bytes. Pointers are 16-byte aligned, as the launch checks."""
    assert not triton.knobs.runtime.interpret, "unset TRITON_INTERPRET: the interpreter does not compile"
    names = case.kernel.arg_names
    nothing = {name: None for name, kind in case.signature.items() if kind == "constexpr"}
    signature = case.signature | dict.fromkeys(case.constants, "constexpr")
    pointers = [name for name, kind in signature.items() if kind.startswith("*")]
    source = ASTSource(
        case.kernel, signature, constexprs=case.constants | nothing,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )  # fmt: skip
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=case.options)
    return compiled.asm["cubin"], compiled.metadata.shared


def _cuobjdump(cubin: bytes) -> tuple[str, dict[str, int]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(option: str) -> str:
            return subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout

        usage = dict(re.findall(r"\b(REG|LOCAL):(\d+)", run("--dump-resource-usage")))
        return run("-sass"), {name: int(value) for name, value in usage.items()}


def ceilings() -> dict[str, Any]:
    """Return the contents of the budget file."""
    return json.loads(BUDGET.read_text())


def excesses(measured: Measured, budget: dict[str, Any]) -> list[str]:
    """Return a line for each figure of a compilation that exceeds its ceiling."""
    ceiling = budget["cases"][measured.case][str(measured.sm)] | {"spill_nbytes": 0}
    return [
        f"{measured.case} sm_{measured.sm}: {name} {getattr(measured, name)}, at most {limit}"
        for name, limit in ceiling.items()
        if getattr(measured, name) > limit
    ]


def budget_of(table: list[Measured]) -> dict[str, Any]:
    """Return ceilings slightly above the given figures, as in the budget file. Spills must be 0 and are not listed."""
    cases: dict[str, dict[str, Any]] = {}
    for row in table:
        cases.setdefault(row.case, {})[str(row.sm)] = {
            "instructions_per_weight": round(math.ceil(row.instructions_per_weight * HEADROOM * 10) / 10, 1),
            "registers": min(255, -(-row.registers // 8) * 8 + 8),
            "shared_nbytes": row.shared_nbytes,
        }
    return {"triton": triton.__version__, "cases": cases}


HEADING = "case                               sm  insts/w   mio/w  regs spills  shared  bytes/w"


def line(row: Measured) -> str:
    """Return a row of the table as text."""
    return (
        f"{row.case:32s} {row.sm:4d} {row.instructions_per_weight:8.2f} {row.mio_per_weight:7.2f} {row.registers:5d} "
        f"{row.spill_nbytes:6d} {row.shared_nbytes:7d} {row.bytes_per_weight:8.3f}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"cases to measure: {', '.join(CASES)} [all]")
    parser.add_argument("--sm", default=",".join(map(str, ARCHITECTURES)), help="architectures [%(default)s]")
    parser.add_argument("--ops", action="store_true", help="print the opcodes of the counted path")
    parser.add_argument("--dump", action="store_true", help="print the disassembly")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a figure exceeds the budget file")
    parser.add_argument("--write", action="store_true", help="replace the budget file")
    options = parser.parse_args(arguments)
    unknown = set(options.cases) - set(CASES)
    if unknown:
        parser.error(f"unknown cases: {', '.join(sorted(unknown))}")
    rows = []
    if not options.json:
        print(HEADING)
    for name in options.cases or CASES:
        for sm in map(int, options.sm.split(",")):
            row, sass = measure(CASES[name], sm)
            rows.append(row)
            if not options.json:
                print(line(row), flush=True)
            if options.ops:
                print("    " + " ".join(f"{name}:{count}" for name, count in row.opcodes.most_common()))
            if options.dump:
                print(sass)
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
    if options.write:
        BUDGET.write_text(json.dumps(budget_of(rows), indent=2) + "\n")
    above = [text for row in rows for text in excesses(row, ceilings())] if options.check else []
    for text in above:
        print(text, file=sys.stderr)
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
