"""Tunings of the tiny Llama that take one or two seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qformat.quality.tuning.settings import TuningSettings
from qformat.quality.tuning.tune import TuningJob, TuningResult, tune

SHORT: dict[str, Any] = {
    "steps": 8,
    "batch_size": 4,
    "seq_len": 32,
    "held_out": 8,
    "save_every": 4,
    "learning_rate": 1e-2,
    "device": "cpu",
}


def run(
    artifact: Path, source: Path, data: Path, out: Path, *, teacher_cache: Path | None = None, **changed: Any
) -> TuningResult | None:
    """Tune with SHORT settings, some of them changed; what `tune` itself takes goes there."""
    names = ("force", "restart", "accept_worse", "use_best", "trust_source", "disk", "say", "on_step")
    direct = {name: changed.pop(name) for name in names if name in changed}
    job = TuningJob(artifact, source, [str(data)], out, teacher_cache)
    return tune(job, TuningSettings(**{**SHORT, **changed}), **direct)
