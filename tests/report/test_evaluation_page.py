"""The report of an evaluation shows every figure, runs nothing that a text contains, and is self-contained."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from qformat.report.evaluation_page import evaluation_page, write_evaluation_page

HOSTILE = "<script>alert(1)</script>&\"'"
BOUNDS = (0.1, 1.0)


def figure(mean: float, error: float | None = 0.01) -> dict[str, float | None]:
    return {"mean": mean, "standard_error": error}


def facts(*, source: bool = True) -> dict[str, Any]:
    model = {"model": "a/plain", "loss": figure(2.5), "perplexity": figure(12.182)}
    beside = {"loss_increase": figure(0.25), "kl": figure(0.2345, 0.0123), "top1_agreement": figure(0.7321)}
    more = {"loss": figure(-0.1), "kl": figure(-0.15, 0.002), "top1_agreement": figure(0.1)}
    other = {**model, **beside, "model": "b/tuned", "more_than_first": more}
    text = {
        "name": HOSTILE,
        "sha256": "ab" * 32,
        "windows": 4,
        "predicted_tokens": 2044,
        "source": {"loss": figure(2.25), "perplexity": figure(9.488)} if source else None,
        "models": [{**model, **beside}, other] if source else [model],
    }
    return {
        "models": ["a/plain", "b/tuned"] if source else ["a/plain"],
        "source": HOSTILE if source else None,
        "source_checked": True,
        "window_length": 512,
        "dtype": "bfloat16",
        "texts": [text],
    }


def found() -> dict[str, Any]:
    worst = {
        "window": 3, "position": 17, "context": HOSTILE, "token": "\n", "source_top1": " the", "top1": HOSTILE,
        "kl": 4.5, "loss_increase": -1.25,
    }  # fmt: skip
    return {
        "by_position": [{"position": n, "loss_increase": figure(n / 9), "kl": figure(n / 7)} for n in (1, 5, 9)],
        "by_token": [
            {"token": HOSTILE, "count": 5, "mean": 0.5, "total": 2.5},
            {"token": " a", "count": 3, "mean": -1.0, "total": -3.0},
        ],
        "kl_histogram": [0.5, 0.3, 0.2],
        "worst": [worst],
    }  # fmt: skip


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "href"}]


def parsed(page: str) -> _Tags:
    tags = _Tags()
    tags.feed(page)
    return tags


def test_figures_of_all_models_and_their_differences_are_shown() -> None:
    page = evaluation_page(facts(), [[found(), found()]], BOUNDS)
    for shown in ("0.2345 ± 0.0123", "73.21% ± 1.00%", "12.182", "9.488", "-0.1500 ± 0.0020", "+10.00%", "ab" * 32):
        assert shown in page, shown
    assert page.count("<svg") == 8


def test_markup_in_a_text_is_shown_and_never_runs() -> None:
    page = evaluation_page(facts(), [[found(), found()]], BOUNDS)
    tags = parsed(page)
    assert tags.names.count("script") == 1
    assert tags.links == []
    assert "default-src 'none'" in page
    assert "alert(1)&lt;/script&gt;" in page


def test_pictures_are_well_formed() -> None:
    page = evaluation_page(facts(), [[found(), found()]], BOUNDS)
    for part in page.split("<svg")[1:]:
        ET.fromstring("<svg" + part.split("</svg>")[0] + "</svg>")


def test_a_page_without_a_source_shows_only_losses_and_perplexities(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_evaluation_page(facts(source=False), [], BOUNDS, path)
    page = path.read_text()
    assert "No 16-bit model was given" in page
    assert "KL" not in page
    assert "2.5000 ± 0.0100" in page
    assert "<svg" not in page


def test_same_facts_same_bytes() -> None:
    assert evaluation_page(facts(), [[found(), found()]], BOUNDS) == evaluation_page(
        facts(), [[found(), found()]], BOUNDS
    )


def test_a_page_says_whether_the_16_bit_model_is_the_source() -> None:
    assert "the manifest records it as the source checkpoint" in evaluation_page(facts(), [], BOUNDS)
    unchecked = evaluation_page(facts() | {"source_checked": False}, [], BOUNDS)
    assert "it was not verified to be the source checkpoint" in unchecked
