"""The report of a training run shows its curves, effective settings, and paging only if there was any."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from qformat.report.training_page import training_page
from qformat.training.settings import TrainingSettings

BASE = {"name": "Small-nf4", "digest": "tensors-xxh3:ab"}


def line(step: int, *, nbytes_moved: int = 0, loss: float = 2.0) -> dict[str, Any]:
    paging = {
        "pages": 10,
        "page_nbytes": 4_000_000,
        "resident": 10,
        "hits": 10 * step,
        "misses": 0,
        "nbytes_to_device": nbytes_moved,
        "nbytes_to_host": nbytes_moved,
        "stalls": 0,
        "evictions": 0,
    }
    return {"step": step, "loss": loss / step, "learning_rate": 1e-4, "grad_norm": 0.5, "tokens_per_s": 1234.5,
            "memory_nbytes": 10**9, "paging": paging}  # fmt: skip


def evaluation(step: int, loss: float) -> dict[str, Any]:
    return {"step": step, "eval_loss": loss}


def page(*lines: dict[str, Any], **settings: Any) -> str:
    facts = {
        "base": BASE,
        "settings": TrainingSettings(**settings).to_json(),
        "statistics": {"rows": 1200, "dropped": {"too_long": 3}, "bad": {}},
    }
    return training_page("adapter", lines, facts)  # type: ignore[arg-type]


def setting(html: str, name: str) -> str:
    return html.partition(f"<code>{name}</code></td><td>")[2].partition("<")[0]


def test_nothing_paged_is_one_sentence_and_no_chart() -> None:
    html = page(line(1), line(2))
    assert "Nothing was paged: all optimizer states (40 MB) stayed in device memory." in html
    assert html.count("<svg") == 5


def test_paging_has_its_charts() -> None:
    html = page(line(1), line(2, nbytes_moved=5))
    assert "Nothing was paged" not in html
    assert html.count("<svg") == 8


def test_a_run_with_an_unpaged_optimizer_has_no_section_about_paging() -> None:
    plain = {name: value for name, value in line(1).items() if name != "paging"}
    assert "Paging" not in page(plain)


@pytest.mark.parametrize(
    ("settings", "shown"),
    [({"rank": 24}, "48 (default: twice the rank)"), ({"rank": 24, "alpha": 12.5}, "12.5")],
)
def test_the_effective_alpha_is_shown(settings: dict[str, Any], shown: str) -> None:
    assert setting(page(line(1), **settings), "alpha") == shown


def test_settings_and_counts_are_in_words() -> None:
    html = page(line(1), max_steps=6)
    assert "None" not in html
    assert setting(html, "epochs") == "not used, because max_steps is set"
    assert setting(html, "device") == "chosen automatically"
    assert setting(html, "dora") == "no"
    assert setting(html, "target_modules") == "all-linear"
    assert setting(html, "modules_to_save") == "none"
    assert setting(html, "rows read") == "1,200"
    assert setting(html, "dropped rows") == "too_long: 3"
    assert setting(page(line(1)), "max_steps") == "not set, epochs apply"


def test_held_out_losses_are_shown_before_and_after() -> None:
    html = page(evaluation(0, 3.0), line(1), evaluation(1, 2.5), line(2), evaluation(2, 2.0))
    assert "3.0000 → 2.0000" in html
    assert "20.086 → 7.389" in html
    assert html.count('class="mark"') == 3
    assert "held-out data" in html


def test_values_that_are_not_finite_are_left_out_of_the_curves() -> None:
    html = page(line(1), line(2, loss=float("nan")), evaluation(2, float("inf")))
    assert "nan," not in html
    assert "held-out" not in html


def test_pictures_are_well_formed_and_names_are_escaped() -> None:
    facts: dict[str, Any] = {"base": {"name": "<b>", "digest": "&"}, "settings": {"alpha": "<i>"}}
    html = training_page("<script>", [line(1), line(2, nbytes_moved=1)], facts)
    assert html.count("<script>") == 1
    assert "<i>" not in html
    for part in html.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + part.split("</svg>")[0] + "</svg>")
