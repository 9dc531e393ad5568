"""The 16-bit model's predictions from disk, instead of the model in memory."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from qformat.errors import TargetError, UsageError
from qformat.quality.tuning import tune as module
from qformat.quality.tuning.tune import TuningResult
from tests.quality.tuning.tuned import run
from tests.rounding import sum_error
from tests.small_models import contents


class TestCachedTeacher:
    """The 16-bit model's predictions from disk."""

    def test_it_tunes_nearly_as_well_without_the_model_in_memory(
        self, result: TuningResult, artifact: Path, source: Path, text: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        cache = tmp_path / "cache"
        first = run(artifact, source, text, tmp_path / "first", teacher_cache=cache)
        assert first is not None
        assert first.after.mean("kl") < first.before.mean("kl")
        assert first.before.mean("kl") <= result.before.mean("kl")  # of fewer outcomes
        monkeypatch.setattr(module, "load_checkpoint", lambda *_, **__: pytest.fail("the model was loaded"))
        run(artifact, source, text, tmp_path / "second", teacher_cache=cache)
        assert contents(tmp_path / "second") == contents(tmp_path / "first")

    def test_with_all_tokens_it_equals_the_live_teacher(
        self, result: TuningResult, artifact: Path, source: Path, text: Path, tmp_path: Path
    ) -> None:
        vocabulary = tuned_vocabulary(source)
        found = run(artifact, source, text, tmp_path / "out", teacher_cache=tmp_path / "c", top_k=vocabulary)
        assert found is not None
        # The probabilities p and q are the same. The two sums of p (log p - log q) run in another order, and the
        # magnitudes of what they add are at most KL + sqrt(2 KL) (Pinsker). The probability of "all other tokens" is 0
        # but for a sum's error, and counts as 1e-9 at least.
        rounding = sum_error(vocabulary + 4)
        off = 2 * rounding * (result.before.kl + (2 * result.before.kl).sqrt()) + rounding * math.log(rounding / 1e-9)
        assert ((found.before.kl - result.before.kl).abs() <= off).all()
        # Rounding alone leads the two trainings apart: by less than either of them gains.
        assert (found.after.kl - result.after.kl).abs().mean() < result.before.mean("kl") - result.after.mean("kl")

    def test_a_damaged_window_is_reported_and_computed_again_once_deleted(
        self, artifact: Path, source: Path, text: Path, tmp_path: Path
    ) -> None:
        cache = tmp_path / "cache"
        run(artifact, source, text, tmp_path / "first", teacher_cache=cache)
        (folder,) = cache.iterdir()
        window = sorted(folder.glob("window-*"))[3]
        data = bytearray(window.read_bytes())
        data[100] ^= 1
        window.write_bytes(bytes(data))
        with pytest.raises(TargetError, match=rf"{window.name}: is damaged\. Delete it"):
            run(artifact, source, text, tmp_path / "second", teacher_cache=cache)
        window.unlink()
        run(artifact, source, text, tmp_path / "second", teacher_cache=cache)
        assert contents(tmp_path / "second") == contents(tmp_path / "first")

    def test_other_settings_have_their_own_directory(
        self, artifact: Path, source: Path, text: Path, tmp_path: Path
    ) -> None:
        cache = tmp_path / "cache"
        for k in (8, 16):
            run(artifact, source, text, tmp_path / f"out{k}", teacher_cache=cache, top_k=k, steps=2)
        assert len(list(cache.iterdir())) == 2
        with pytest.raises(UsageError, match="top_k: 10000, but the vocabulary of the 16-bit model has"):
            run(artifact, source, text, tmp_path / "out", teacher_cache=cache, top_k=10_000)


def tuned_vocabulary(source: Path) -> int:
    return int(json.loads((source / "config.json").read_text())["vocab_size"])
