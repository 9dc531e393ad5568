"""Measure the table of docs/quality.md for a model.

Usage: python -m tools.quality.table SOURCE WORK [--windows 8] [--only PATTERN]… [--update docs/quality.md]

Makes the texts, the artifacts and the fine-tunings in WORK, measures every row against the 16-bit model, and prints the
tables. WORK/results.jsonl has a line for each finished row, so that an interrupted run resumes. --update writes the
tables between the markers of a page, and the plot to images/ in the page's directory.

The model must be a decoder that `qformat train` can fine-tune. The last line of the page shows how long SmolLM2-135M
takes on two idle cores with AVX512-BF16.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from qformat.model.load import load_model, load_tokenizer, open_shards
from qformat.model.text.generation import Sampling, generate
from qformat.quality.evaluation.scores import Scores, score_window
from qformat.quality.windows import TokenWindows, read_windows
from qformat.training.adapter.attach import load_adapter
from qformat.training.adapter.base_record import BaseRecord
from tools.quality import page as quality_page
from tools.quality import rows as quality_rows
from tools.quality import texts as quality_texts
from tools.quality.rows import BOTH, PLAIN, REFERENCE, Options, Row

QUESTION = "What are the three primary colours? Answer in one sentence."
FINE_TUNED = {"lora-plain": PLAIN, "lora-both": BOTH}
TEXT_OF_FINE_TUNING = "code"


def main() -> None:
    options = arguments()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    options.work.mkdir(parents=True, exist_ok=True)
    files = quality_texts.write_texts(options.work / "texts")
    tokenizer = load_tokenizer(options.source)
    texts = {
        name: read_windows(path, tokenizer, length=options.window_length).spread(options.windows)
        for name, path in files.items()
        if name != quality_texts.CALIBRATION
    }
    made_with = Options(
        source=options.source,
        work=options.work,
        data=files[quality_texts.CALIBRATION],
        calibration_tokens=options.calibration_tokens,
        steps=options.steps,
        steps_of_plain=options.steps_of_plain,
    )
    results = Results(options.work / "results.jsonl", settings(options, texts, files[quality_texts.CALIBRATION]))
    teacher = Teacher(options.source, texts)
    for row in quality_rows.rows(made_with):
        if wanted(row.key, options.only):
            results.do(row.key, partial(measured, row, teacher, texts, tokenizer))
    for key, base in FINE_TUNED.items():
        if wanted(key, options.only):
            results.do(key, partial(fine_tuned, key, base, texts[TEXT_OF_FINE_TUNING], options))
    titles = {row.key: (row.title, row.bits) for row in quality_rows.rows(made_with)}
    page = quality_page.tables(results.settings, results.lines, titles)
    print(page)
    if options.update is not None:
        quality_page.update(options.update, page)
        quality_page.draw(results.lines, titles, options.update.parent / "images" / "quality.png")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    number = partial(parser.add_argument, type=int)
    parser.add_argument("source", type=Path, help="directory of the source checkpoint")
    parser.add_argument("work", type=Path, help="directory for texts, artifacts and results")
    number("--windows", default=8, help="number of windows per text [%(default)s]")
    number("--window-length", default=512, help="tokens per window [%(default)s]")
    number("--calibration-tokens", default=16_384, help="tokens for calibration [%(default)s, as in convert]")
    number("--steps", default=160, help="steps to tune the calibrated artifact [%(default)s, as in tune]")
    number("--steps-of-plain", default=80, help="steps to tune the plain artifact [%(default)s]")
    number("--lora-steps", default=40, help="steps of each fine-tuning [%(default)s]")
    parser.add_argument(
        "--only", action="append", default=[], metavar="PATTERN", help="measure only rows whose key matches; repeatable"
    )
    parser.add_argument("--update", type=Path, metavar="PAGE.md", help="page to write the tables to")
    return parser.parse_args()


def wanted(key: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def settings(options: argparse.Namespace, texts: dict[str, TokenWindows], calibration: Path) -> dict[str, Any]:
    """Return the settings that all rows must have in common."""
    return {
        "model": options.source.resolve().name,
        "windows": {name: len(text) for name, text in texts.items()},
        "window_length": options.window_length,
        "calibration_tokens": options.calibration_tokens,
        "steps": [options.steps, options.steps_of_plain, options.lora_steps],
        "texts": {name: text.sha256 for name, text in texts.items()},
        "calibration": hashlib.sha256(calibration.read_bytes()).hexdigest(),
    }


class Results:
    """Finished rows, one line each. The first line of the file has the settings, which must be the same."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        self.settings = settings
        self.lines: dict[str, dict[str, Any]] = {}
        if not path.exists():
            self._append({"settings": settings})
        complete = [line for line in path.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]
        first, *others = map(json.loads, complete)
        if first["settings"] != settings:
            raise SystemExit(
                f"{path}: was written with other texts or options. Use the same ones, or choose another WORK"
            )
        path.write_text("".join(complete), "utf-8")
        self.lines = {line["row"]: line for line in others}

    def do(self, key: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure a row and write its line, unless it is finished."""
        if key in self.lines:
            return
        started = time.monotonic()
        line = {"row": key, **measure(), "seconds": round(time.monotonic() - started, 1)}
        self._append(line)
        self.lines[key] = line
        print(f"{key}: {line['seconds']:.0f} s", flush=True)
        gc.collect()

    def _append(self, line: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@dataclass
class Teacher:
    """Logits of the 16-bit model for every window (50 MB each), computed once, when the first row needs them."""

    source: Path
    texts: dict[str, TokenWindows]
    logits: dict[str, list[torch.Tensor]] | None = None

    def of(self, name: str) -> list[torch.Tensor]:
        if self.logits is None:
            model = quality_rows.load_checkpoint(self.source, device="cpu")
            self.logits = {text: list(forward(model, windows)) for text, windows in self.texts.items()}
        return self.logits[name]


def forward(model: PreTrainedModel, windows: TokenWindows) -> Iterator[torch.Tensor]:
    """Yield the logits of each window, [L, vocabulary]."""
    for ids in torch.from_numpy(windows.ids).long():
        with torch.inference_mode():
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
        yield logits


def measured(row: Row, teacher: Teacher, texts: dict[str, TokenWindows], tokenizer: Any) -> dict[str, Any]:
    """Return the means of each window and text, which paired differences need. For some rows, also generate text."""
    model = row.load()
    found: dict[str, Any] = {"texts": {}}
    for name, windows in texts.items():
        references = teacher.of(name)
        scores = [
            window_means(score_window(logits, ids, reference=reference), reference)
            for logits, ids, reference in zip(
                forward(model, windows), torch.from_numpy(windows.ids).long(), references, strict=True
            )
        ]
        found["texts"][name] = {figure: [means[figure] for means in scores] for figure in scores[0]}
    if row.folder is not None:
        found["shard_nbytes"] = sum(path.stat().st_size for path in row.folder.glob("*.safetensors"))
    if row.key in {REFERENCE, PLAIN, BOTH}:
        found["says"] = generate(model, tokenizer, QUESTION, chat=True, sampling=Sampling(max_new_tokens=64)).text
    return found


def window_means(scores: Scores, reference: torch.Tensor) -> dict[str, float]:
    expected = reference[: len(scores.top1)].argmax(-1).numpy()
    assert scores.kl is not None
    return {
        "loss": float(scores.loss.mean()),
        "kl": float(scores.kl.mean()),
        "top1": float(np.mean(scores.top1 == expected)),
    }


def fine_tuned(key: str, base: str, windows: TokenWindows, options: argparse.Namespace) -> dict[str, Any]:
    """Train an adapter on a base. Return the loss on each held-out window before and after."""
    artifact, adapter = options.work / base, options.work / key
    if not artifact.exists():
        raise SystemExit(f"{artifact}: does not exist. Measure the row {base} first")
    examples = quality_texts.write_code_examples(options.work / "texts" / "code.jsonl")
    before = losses(load_model(artifact, device="cpu"), windows)
    if not (adapter / "adapter_model.safetensors").exists():
        quality_rows.run_qformat(
            [
                *("train", str(artifact), str(adapter), "--data", str(examples), "--device", "cpu"),
                *("--max-steps", str(options.lora_steps), "--batch-size", "2", "--grad-accum", "1", "--seq-len", "256"),
                *("--learning-rate", "5e-4", "--rank", "8", "--seed", "0", "--no-gradient-checkpointing"),
            ]
        )
    shards = open_shards(artifact)
    model = load_adapter(load_model(artifact, device="cpu"), adapter, BaseRecord.of(shards.layout))
    model.eval()
    return {"loss_before": before, "loss_after": losses(model, windows)}


def losses(model: Any, windows: TokenWindows) -> list[float]:
    ids = torch.from_numpy(windows.ids).long()
    return [
        float(score_window(logits, window).loss.mean())
        for logits, window in zip(forward(model, windows), ids, strict=True)
    ]


if __name__ == "__main__":
    main()
