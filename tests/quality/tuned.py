"""A small Llama that says something, its artifacts, a text, and tunings of it that take a second or two."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np

from qformat.converters.convert import ConversionOptions, convert
from qformat.quality.tune import TuningJob, TuningResult, tune
from qformat.quality.tuning_settings import TuningSettings
from tests.small_models import Tensor, llama_config, llama_tensors, tensor_of, write_checkpoint
from tests.training.runs import VOCABULARY, WORDS, small_tokenizer

SIZES: dict[str, Any] = {"hidden": 64, "intermediate": 128, "vocabulary": VOCABULARY, "n_layers": 2}

SHORT: dict[str, Any] = {
    "steps": 8,
    "batch_size": 4,
    "seq_len": 32,
    "held_out": 8,
    "save_every": 4,
    "learning_rate": 1e-2,
    "device": "cpu",
}


def outspoken_tensors(*, seed: int = 0, dtype: str = "BF16") -> dict[str, Tensor]:
    """Return a Llama whose logits differ by several nats, so that rounding its weights can be seen; norms about 1."""
    generator = np.random.default_rng(seed)
    found = {}
    for name, tensor in llama_tensors(**SIZES).items():
        if len(tensor.shape) == 1:
            values = 1 + 0.1 * generator.standard_normal(tensor.shape)
        else:
            width = 1.0 if "embed" in name else 1.5 / np.sqrt(tensor.shape[1])
            values = width * generator.standard_normal(tensor.shape)
        found[name] = tensor_of(values.astype(np.float32), dtype)
    return found


def write_source(folder: Path, *, seed: int = 0, dtype: str = "BF16") -> Path:
    """Write the Llama with a tokenizer."""
    source = write_checkpoint(folder, outspoken_tensors(seed=seed, dtype=dtype), config=llama_config(**SIZES))
    small_tokenizer().save_pretrained(source)
    return source


def make_artifact(source: Path, out: Path, **options: Any) -> Path:
    """Convert it."""
    convert(source, out, ConversionOptions(**options))
    return out


def write_text(path: Path, n_lines: int = 200, *, seed: int = 0) -> Path:
    """Write lines of words."""
    chosen = random.Random(seed)
    path.write_text("\n".join(" ".join(chosen.choices(WORDS, k=12)) for _ in range(n_lines)))
    return path


def run(
    artifact: Path, source: Path, data: Path, out: Path, *, teacher_cache: Path | None = None, **changed: Any
) -> TuningResult | None:
    """Tune with SHORT settings, some of them changed; what `tune` itself takes goes there."""
    names = ("force", "restart", "accept_worse", "use_best", "trust_source", "disk", "say", "on_step")
    direct = {name: changed.pop(name) for name in names if name in changed}
    job = TuningJob(artifact, source, [str(data)], out, teacher_cache)
    return tune(job, TuningSettings(**{**SHORT, **changed}), **direct)
