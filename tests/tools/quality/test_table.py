"""The tool that measures docs/quality.md: its codebooks, texts, resumption and tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import numpy as np
import pytest
import torch

import qformat
from qformat.artifact.reading.reader import PackedTensor
from qformat.converters.convert import ConversionOptions, convert
from tests.quality import models
from tests.small_models import llama_config, llama_tensors, write_checkpoint
from tools.quality import codebooks as quality_codebooks
from tools.quality import page as quality_page
from tools.quality import rows as quality_rows
from tools.quality import table as quality_table
from tools.quality import texts as quality_texts

SETTINGS: dict[str, Any] = {
    "model": "small",
    "windows": {"reference": 3, "code": 3},
    "window_length": 8,
    "texts": {"reference": "a" * 64, "code": "b" * 64},
    "calibration": "c" * 64,
}
FIGURES = {"loss": [1.0, 2.0, 3.0], "kl": [0.2, 0.3, 0.4], "top1": [0.5, 0.75, 1.0]}


def line(key: str, *, factor: float = 1.0) -> dict[str, Any]:
    figures = {name: [value * factor for value in values] for name, values in FIGURES.items()}
    return {"row": key, "texts": {"reference": figures, "code": figures}, "shard_nbytes": 1000, "seconds": 2.0}


@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("nested", [False, True])
def test_nf4_in_memory_is_bit_identical_to_an_artifact(block_size: int, nested: bool, tmp_path: Path) -> None:
    sizes = {"hidden": 64, "intermediate": 128, "vocabulary": 40}
    source = write_checkpoint(tmp_path / "source", llama_tensors(**sizes), config=llama_config(**sizes))
    convert(source, tmp_path / "nf4", ConversionOptions(block_size=block_size, double_quant=nested))
    model = quality_rows.load_checkpoint(source, device="cpu")
    with qformat.open(tmp_path / "nf4") as artifact:
        packed = {name: tensor for name, tensor in artifact.items() if isinstance(tensor, PackedTensor)}
        quality_codebooks.quantize_in_place(model, packed, "NF4", block_size, nested=nested)
        for name, tensor in packed.items():
            got = model.get_parameter(name).detach().view(torch.int16).numpy().view(np.uint16)
            assert np.array_equal(got, tensor.decode()), name


def test_fp4_equals_that_of_bitsandbytes() -> None:
    theirs = bitsandbytes.functional.get_4bit_type("fp4", device="cpu").unique()
    assert quality_codebooks.CODEBOOKS["FP4"].tolist() == pytest.approx(theirs.tolist())


def test_bits_per_weight_count_codes_and_scales() -> None:
    assert quality_codebooks.bits_per_weight(64, nested=False) == 4.5
    assert quality_codebooks.bits_per_weight(64, nested=True) == pytest.approx(4.127, abs=5e-4)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    files = quality_texts.write_texts(tmp_path_factory.mktemp("texts"))
    return {name: path.read_text("utf-8") for name, path in files.items()}


def test_no_text_is_part_of_the_calibration(texts: dict[str, str]) -> None:
    assert set(texts) >= {"calibration", "reference", "docstrings", "code", "licences"}
    assert all(len(text) > 50_000 for text in texts.values())
    calibration = texts["calibration"]
    for name in set(texts) - {"calibration"}:
        for start in range(0, len(texts[name]) - 200, 10_000):
            assert texts[name][start : start + 200] not in calibration, name


def test_fine_tuning_and_measurement_use_different_modules(texts: dict[str, str], tmp_path: Path) -> None:
    examples = quality_texts.write_code_examples(tmp_path / "code.jsonl").read_text("utf-8").splitlines()
    assert len(examples) > 50
    assert not [
        row for row in map(json.loads, examples) if len(row["text"]) > 200 and row["text"][:200] in texts["code"]
    ]


def test_a_finished_row_is_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    results = quality_table.Results(path, SETTINGS)
    results.do("one", lambda: {"kl": 1})
    with pytest.raises(ZeroDivisionError):
        results.do("two", lambda: {"kl": 1 // 0})
    with path.open("a") as file:
        file.write('{"row": "torn", "k')
    again = quality_table.Results(path, SETTINGS)
    again.do("one", lambda: pytest.fail("this row was finished"))
    again.do("two", lambda: {"kl": 2})
    lines = quality_table.Results(path, SETTINGS).lines
    assert {key: entry["kl"] for key, entry in lines.items()} == {"one": 1, "two": 2}
    with pytest.raises(SystemExit, match="other texts or options"):
        quality_table.Results(path, {**SETTINGS, "window_length": 9})


def test_tables_show_means_with_errors_and_paired_differences(tmp_path: Path) -> None:
    lines = {
        quality_rows.REFERENCE: line(quality_rows.REFERENCE),
        quality_rows.PLAIN: {**line(quality_rows.PLAIN), "says": "Red.\n"},
        quality_rows.BOTH: line(quality_rows.BOTH, factor=0.5),
        "lora-plain": {"row": "lora-plain", "loss_before": [2.0, 3.0], "loss_after": [1.0, 2.0], "seconds": 1.0},
        "lora-both": {"row": "lora-both", "loss_before": [1.5, 2.5], "loss_after": [1.0, 1.5], "seconds": 1.0},
    }
    titles = {
        quality_rows.REFERENCE: ("16-bit", None),
        quality_rows.PLAIN: ("plain", 4.127),
        quality_rows.BOTH: ("both", 4.127),
    }
    shown = quality_page.tables(SETTINGS, lines, titles)
    assert shown.splitlines()[2:5] == [
        "| 16-bit | 16 | 0 | 0 | 100% |",
        "| plain | 4.127 | 0.3000 | 0.3000 | 75.0% |",
        "| both | 4.127 | 0.1500 | 0.1500 | 37.5% |",
    ]
    assert "| plain | 4.127 | × 1.000 ± 0.000, 0.3000 ± 0.0577, 75.0% |" in shown
    assert "| both | code (another kind) | 0.500 | -0.1500 ± 0.0289 | -37.5 ± 7.2 |" in shown
    assert "| difference, paired | -0.5000 ± 0.0000 | -0.2500 ± 0.2500 |" in shown
    assert "the same for all" in shown
    assert "'Red.'" in shown
    page = tmp_path / "quality.md"
    page.write_text(f"before\n{quality_page.BEGIN}\nold\n{quality_page.END}\nafter\n")
    quality_page.update(page, shown)
    quality_page.update(page, shown)
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")
    assert page.read_text().count(shown) == 1
    assert "old" not in page.read_text()
    quality_page.draw(lines, titles, tmp_path / "images" / "quality.png")
    assert (tmp_path / "images" / "quality.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_tool_measures_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = models.write_source(tmp_path / "small")
    page = tmp_path / "quality.md"
    page.write_text(f"{quality_page.BEGIN}\n{quality_page.END}\n")
    chosen = [quality_rows.REFERENCE, "Int4-64-nested", quality_rows.PLAIN, "lora-plain"]
    only = [part for key in chosen for part in ("--only", key)]
    sizes = ["--windows", "2", "--window-length", "64", "--lora-steps", "3", "--update", str(page)]
    monkeypatch.setattr("sys.argv", ["quality_table", str(source), str(tmp_path / "work"), *sizes, *only])
    quality_table.main()
    shown = capsys.readouterr().out
    assert all(f"{key}: " in shown for key in chosen)
    lines = (tmp_path / "work" / "results.jsonl").read_text().splitlines()
    measured = {line["row"]: line for line in map(json.loads, lines[1:])}
    assert measured[quality_rows.REFERENCE]["texts"]["code"]["kl"] == [0.0, 0.0]
    assert min(measured[quality_rows.PLAIN]["texts"]["code"]["kl"]) > 0
    assert measured["lora-plain"]["loss_after"] != measured["lora-plain"]["loss_before"]
    assert "| NF4, block 64, nested scales | 4.127 |" in page.read_text()
    assert (tmp_path / "images" / "quality.png").exists()
