"""The machine code of the Triton kernels for sm_80 to sm_120: its budget, and a calculated number of each opcode.

The numbers of opcodes (the census) tell more than the totals: they show that every weight is looked up, scaled and
rounded as intended. They revealed inline assembly that Triton had silently compiled to something else.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

import pytest
import triton

from tools.gpu import sass_budget
from tools.gpu.kernel_cases import CASES, Case
from tools.gpu.sass_budget import ARCHITECTURES, Measured

PROMISED = {"dequantize": 7.3, "product": 5.3, "block": 9.3}
"""Largest number of instructions per weight that the project promises for 16-bit weights. The budget is stricter."""


FAST = ("dequantize_bf16", "product_m8_bf16", "block_dots_bf16")
"""One case of each kernel. The others compile in the slow tests."""


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=() if name in FAST else pytest.mark.slow) for name, case in CASES.items()],
)
def test_the_machine_code_keeps_its_budget_and_census(case: Case) -> None:
    """There is one test per case because compiling takes most of the time."""
    assert triton.__version__ == sass_budget.ceilings()["triton"], (
        "the budget was measured with another version of Triton: see tools/gpu/sass_budget.py"
    )
    for sm in ARCHITECTURES:
        measured, sass = sass_budget.measure(case, sm)
        assert sass_budget.excesses(measured, sass_budget.ceilings()) == []
        assert measured.spill_nbytes == 0
        if "fp32" not in case.name:
            assert measured.instructions_per_weight <= PROMISED[case.name.split("_")[0]]
        assert re.findall(r"\b(?:FMUL|FADD|F2FP)\S*\.FTZ", sass) == []  # subnormal numbers count
        measured.opcodes["FMUL"] += 2 * measured.opcodes["FMUL2"]  # two multiplications in one on sm_100
        measured.opcodes["FFMA"] += 2 * measured.opcodes["FFMA2"]
        expected = CENSUS[case.name.split("_")[0]](case)
        assert {name: measured.opcodes[name] for name in expected} == expected, f"sm_{sm}"


def census_of_dequantize(case: Case) -> dict[str, int]:
    """A thread decodes one word of 8 weights per round, with a shuffle, a multiplication and half a conversion each."""
    weights = int(case.weights_per_thread)
    rounds = case.constants["ROUNDS"]
    scales = rounds if case.constants["NESTED"] else 0
    expected = {
        "SHFL": weights,
        "FMUL": weights + scales,
        "FADD": scales,
        "FFMA": 0,  # product and sum are rounded separately
        "PRMT": 0,
    }
    if case.signature["out_ptr"] != "*fp32":
        expected |= {"F2FP": weights // 2, "STG": rounds, "LDS": 0, "STS": 0, "BAR": 0}
    return expected


def census_of_product(case: Case) -> dict[str, int]:
    """A thread decodes segments of 64 weights: one table per scale, 8 permutes per 4 weights."""
    segments = int(case.weights_per_thread) // 64
    tables = segments * (2 if case.constants["BLOCK_SIZE"] == 32 else 1)
    decoded_scales = tables if case.constants["NESTED"] else 0
    fragments = segments * 64 // 8  # 16 x 16 weights per warp, 8 per thread
    return {
        "PRMT": 8 * tables + 2 * 64 * segments + decoded_scales,  # decoded_scales: one each to widen an 8-bit code
        "FMUL": 13 * tables + decoded_scales,  # all codes except -1, 0 and 1
        "FADD": tables + decoded_scales,  # the negation for code 0
        "FFMA": 0,
        "F2FP": 8 * tables,
        "HMMA": fragments * case.constants["BATCH"] // 8,
        "SHFL": 0,  # decoded weights stay in their lane
        "STS": 0,  # and do not pass through memory
        "STSM": 0,
        "LDL": 0,
        "STL": 0,
    }


def census_of_block_dots(case: Case) -> dict[str, int]:
    """Per weight a shuffle and a multiplication or fused multiply-add; the lanes of a block add up in a tree."""
    weights, rounds = int(case.weights_per_thread), case.constants["ROUNDS"]
    expected = {"FMUL": weights // 2, "FFMA": weights // 2, "STG": rounds}
    if case.signature["values_ptr"] != "*fp32":  # float32 values move between lanes, which takes more shuffles
        steps = (case.constants["BLOCK_SIZE"] // 8).bit_length() - 1
        expected["SHFL"] = weights + rounds * steps
    return expected


CENSUS = {"dequantize": census_of_dequantize, "product": census_of_product, "block": census_of_block_dots}


def test_the_traffic_to_memory_is_as_promised() -> None:
    assert CASES["dequantize_bf16"].bytes_per_weight <= 2.53
    assert CASES["product_m8_bf16"].bytes_per_weight <= 0.52


def test_the_budget_lists_every_case_and_architecture() -> None:
    cases = sass_budget.ceilings()["cases"]
    assert set(cases) == set(CASES)
    assert all(set(ceilings) == {str(sm) for sm in ARCHITECTURES} for ceilings in cases.values())


def test_an_exceeded_ceiling_is_reported() -> None:
    row = Measured("product_m8_bf16", 90, 0, 9.99, 0.0, 80, 4, 18432, 0.516, Counter())
    found = sass_budget.excesses(row, sass_budget.ceilings())
    assert [text.split(",")[0] for text in found] == [
        "product_m8_bf16 sm_90: instructions_per_weight 9.99",
        "product_m8_bf16 sm_90: spill_nbytes 4",
    ]
    assert (
        sass_budget.excesses(
            dataclasses.replace(row, instructions_per_weight=4.0, spill_nbytes=0), sass_budget.ceilings()
        )
        == []
    )


def test_the_tool_prints_a_table_and_rejects_unknown_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert sass_budget.main(["dequantize_bf16", "--sm", "80", "--check"]) == 0
    assert "dequantize_bf16                    80" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        sass_budget.main(["no_such_case"])
    assert stopped.value.code == 2
