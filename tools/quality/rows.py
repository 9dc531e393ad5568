"""The rows of the quality table, with the commands that make each row's model."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from qformat.artifact.manifest import PackedRecord
from qformat.artifact.reading.structure import read_manifest
from qformat.model.checkpoint import load_checkpoint
from qformat.model.load import load_model
from tools.quality import codebooks as quality_codebooks

MEASURED_BLOCK_SIZES = (32, 64, 128)
REFERENCE, PLAIN, CALIBRATED, TUNED, BOTH = "16-bit", "NF4-64-nested", "calibrated", "tuned", "both"


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table.

    Attributes:
        key: Name of the row in results and for `--only`.
        title: Title in the table.
        bits: Bits per weight, or None for 16 bit.
        folder: Directory of the artifact, or None if the row has none.
        load: Loads the model, after it has made the artifact if necessary.
    """

    key: str
    title: str
    bits: float | None
    folder: Path | None
    load: Callable[[], PreTrainedModel]


@dataclass(frozen=True, slots=True)
class Options:
    """Settings of the rows.

    Attributes:
        source: Directory of the source checkpoint.
        work: Directory for the artifacts.
        data: Text for calibration and tuning.
        calibration_tokens: Number of tokens for calibration.
        steps: Number of steps to tune the calibrated artifact.
        steps_of_plain: Number of steps to tune the plain artifact.
    """

    source: Path
    work: Path
    data: Path
    calibration_tokens: int
    steps: int
    steps_of_plain: int


def rows(options: Options) -> list[Row]:
    """Return all rows in the order of the table. An artifact is made when the row's model is loaded."""
    found = [Row(REFERENCE, "16-bit (bf16)", None, None, lambda: load_checkpoint(options.source, device="cpu"))]
    for codebook in ("FP4", "Int4", "NF4"):
        for block_size in MEASURED_BLOCK_SIZES:
            found += [_plain(options, codebook, block_size, nested=nested) for nested in (False, True)]
    calibration = ["--calibrate", str(options.data), "--calibration-tokens", str(options.calibration_tokens)]
    source, plain, calibrated = options.source, options.work / PLAIN, options.work / CALIBRATED
    titles = {
        CALIBRATED: f"NF4, block 64, nested; calibrated, {options.calibration_tokens:,} tokens",
        TUNED: f"NF4, block 64, nested; tuned, {options.steps_of_plain} steps",
        BOTH: f"NF4, block 64, nested; calibrated, then tuned, {options.steps} steps",
    }
    found.append(_made(options, CALIBRATED, titles, lambda: ["convert", str(source), str(calibrated), *calibration]))
    for key, base, steps in ((TUNED, plain, options.steps_of_plain), (BOTH, calibrated, options.steps)):
        found.append(_made(options, key, titles, _tuning(options, key, base, steps)))
    return found


def run_qformat(arguments: list[str]) -> float:
    """Run a qformat command, show its output, and return its duration in seconds."""
    print("$ qformat", *arguments, flush=True)
    started = time.monotonic()
    subprocess.run([str(Path(sys.executable).with_name("qformat")), *arguments], check=True)
    return time.monotonic() - started


def _plain(options: Options, codebook: str, block_size: int, *, nested: bool) -> Row:
    key = f"{codebook}-{block_size}-{'nested' if nested else 'float32'}"
    title = f"{codebook}, block {block_size}, {'nested' if nested else 'float32'} scales"
    bits = quality_codebooks.bits_per_weight(block_size, nested=nested)
    if codebook == "NF4":
        arguments = ["convert", str(options.source), str(options.work / key), "--block-size", str(block_size)]
        arguments += [] if nested else ["--no-double-quant"]
        return Row(key, title, bits, options.work / key, _loader(options.work / key, lambda: arguments))

    def load() -> PreTrainedModel:
        model = load_checkpoint(options.source, device="cpu")
        quality_codebooks.quantize_in_place(model, _packed_names(options), codebook, block_size, nested=nested)
        return model

    return Row(key, title, bits, None, load)


def _packed_names(options: Options) -> list[str]:
    """Return the names of the weights that a conversion packs. Make the plain artifact first if it does not exist."""
    folder = options.work / PLAIN
    if not folder.exists():
        run_qformat(["convert", str(options.source), str(folder)])
    records = read_manifest(folder).tensors
    return [name for name, record in records.items() if isinstance(record, PackedRecord)]


def _made(options: Options, key: str, titles: dict[str, str], arguments: Callable[[], list[str]]) -> Row:
    bits = quality_codebooks.bits_per_weight(64, nested=True)
    return Row(key, titles[key], bits, options.work / key, _loader(options.work / key, arguments))


def _tuning(options: Options, key: str, base: Path, steps: int) -> Callable[[], list[str]]:
    return lambda: [
        "tune", str(base), str(options.work / key), "--source", str(options.source),
        "--data", str(options.data), "--steps", str(steps), "--device", "cpu",
    ]  # fmt: skip


def _loader(folder: Path, arguments: Callable[[], list[str]]) -> Callable[[], PreTrainedModel]:
    def load() -> PreTrainedModel:
        if not folder.exists():  # an existing artifact is complete; an interrupted command resumes
            run_qformat(arguments())
        return load_model(folder, device="cpu")

    return load
