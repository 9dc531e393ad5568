"""Where a model differs from its 16-bit model: sums, shares and names computed independently."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qformat.quality.evaluation.details import KL_BOUNDS, details
from qformat.quality.evaluation.evaluate import TextScores
from qformat.quality.evaluation.scores import Scores
from qformat.quality.windows import TokenWindows, read_windows

LENGTH = 41


@pytest.fixture(scope="module")
def tokenizer(source: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    return loaded


@pytest.fixture(scope="module")
def windows(text: Path, tokenizer: PreTrainedTokenizerBase) -> TokenWindows:
    return read_windows(text, tokenizer, length=LENGTH).spread(3)


@pytest.fixture(scope="module")
def scored(windows: TokenWindows) -> TextScores:
    rng = np.random.default_rng(0)
    shape = (3, LENGTH - 1)
    source = Scores(rng.exponential(size=shape), rng.integers(300, size=shape), None)
    model = Scores(rng.exponential(size=shape), rng.integers(300, size=shape), rng.exponential(size=shape) * 0.1)
    assert model.kl is not None
    model.kl[1, 17] = 9.0
    return TextScores(windows, source, [model])


def test_the_worst_token_comes_first_with_what_stands_before_it(
    scored: TextScores, windows: TokenWindows, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = scored.models[0]
    worst = details(scored, model, tokenizer)["worst"][0]  # type: ignore[index, call-overload]
    assert (worst["kl"], worst["window"], worst["position"]) == (9.0, windows.numbers[1], 18)
    assert worst["context"] == tokenizer.decode(windows.ids[1, :18])
    assert worst["token"] == tokenizer.decode([windows.ids[1, 18]])
    assert worst["top1"] == tokenizer.decode([int(model.top1[1, 17])])
    assert scored.source is not None
    assert worst["source_top1"] == tokenizer.decode([int(scored.source.top1[1, 17])])


def test_means_by_position_add_up_to_the_mean(scored: TextScores, tokenizer: PreTrainedTokenizerBase) -> None:
    model = scored.models[0]
    assert scored.source is not None
    points = details(scored, model, tokenizer)["by_position"]
    positions = [point["position"] for point in points]  # type: ignore[index, call-overload, union-attr]
    assert positions == sorted(set(positions))
    assert 1 <= positions[0] <= positions[-1] < LENGTH
    bounds = np.linspace(0, LENGTH - 1, len(positions) + 1).astype(int)
    means = [point["loss_increase"]["mean"] for point in points]  # type: ignore[index, call-overload, union-attr]
    expected = (model.loss - scored.source.loss).mean()
    assert np.average(means, weights=np.diff(bounds)) == pytest.approx(expected, abs=1e-5)


def test_shares_of_the_histogram_are_those_of_numpy(scored: TextScores, tokenizer: PreTrainedTokenizerBase) -> None:
    kl = scored.models[0].kl
    assert kl is not None
    shares = details(scored, scored.models[0], tokenizer)["kl_histogram"]
    counts, _ = np.histogram(kl, [0, *KL_BOUNDS, np.inf])
    assert shares == pytest.approx(counts / kl.size, abs=1e-6)


def test_a_tokens_sum_is_over_all_places_where_it_comes_next(
    scored: TextScores, windows: TokenWindows, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert scored.source is not None
    increase = scored.models[0].loss - scored.source.loss
    sums: dict[int, list[float]] = {}
    for token, value in zip(windows.ids[:, 1:].reshape(-1).tolist(), increase.reshape(-1).tolist(), strict=True):
        sums.setdefault(token, []).append(value)
    frequent = {tokenizer.decode([token]): values for token, values in sums.items() if len(values) >= 3}
    got = details(scored, scored.models[0], tokenizer)["by_token"]
    assert len(got) == 15  # type: ignore[arg-type]
    for entry in got:  # type: ignore[union-attr]
        values = frequent[entry["token"]]  # type: ignore[index, call-overload]
        assert entry["count"] == len(values)  # type: ignore[index, call-overload]
        assert entry["total"] == pytest.approx(sum(values), rel=1e-4, abs=1e-5)  # type: ignore[index, call-overload]
    totals = [abs(entry["total"]) for entry in got]  # type: ignore[index, call-overload, union-attr]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] == pytest.approx(max(abs(sum(values)) for values in frequent.values()), rel=1e-4)
