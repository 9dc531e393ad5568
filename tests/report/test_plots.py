"""Plots are well-formed, complete and labelled, and stay inside their picture for all values."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from qformat.report.plots import Point, bar_list, code_histogram, column_panel, curve_panel, layer_panel, ticks


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (0.0918, 0.1013), (0.0931, 0.0932), (0, 0.0973), (1e-9, 3e-9), (0.25, 0.25), (0, 0), (0.5, 47.0)],
)
@pytest.mark.parametrize("at_most", [4, 5, 6])
def test_ticks_cover_the_values_and_are_few(low: float, high: float, at_most: int) -> None:
    marks = ticks(low, high, at_most=at_most)
    assert 2 <= len(marks) <= at_most
    assert marks[0] <= low + 1e-12
    assert marks[-1] >= high - 1e-12
    assert marks == sorted(set(marks))


def numbers(svg: str, attribute: str) -> list[float]:
    return [float(value) for value in re.findall(rf'\b{attribute}="(-?[\d.]+)"', svg)]


def test_a_histogram_has_a_bar_and_a_mark_for_each_code() -> None:
    svg = code_histogram([1 / 16] * 16, [index / 120 for index in range(16)])
    root = ElementTree.fromstring(svg)
    assert len(root.findall(".//rect")) == 16
    assert len([line for line in root.findall(".//line") if line.get("class") == "ideal"]) == 16
    heights = numbers(svg, "height")
    assert heights == pytest.approx([heights[0]] * 16)


def test_a_histogram_of_one_code_stays_inside_its_picture() -> None:
    svg = code_histogram([1.0] + [0.0] * 15, [1 / 16] * 16)
    assert min(numbers(svg, "y") + numbers(svg, "y1")) >= 0
    assert max(numbers(svg, "y") + numbers(svg, "y1")) <= 312


def test_a_panel_has_a_dot_for_each_tensor_and_a_line_through_the_layers() -> None:
    points = [Point(0, 0.1, "a"), Point(0, 0.2, "b"), Point(5, 0.15, "c")]
    svg = layer_panel(points, [0.1, 0.2], 6, "errors")
    root = ElementTree.fromstring(svg)
    assert len(root.findall(".//circle")) == 3
    line = root.find(".//polyline")
    assert line is not None
    assert len((line.get("points") or "").split()) == 2


@pytest.mark.parametrize("n_layers", [1, 2, 3, 1000000])
def test_a_panel_holds_any_number_of_layers(n_layers: int) -> None:
    svg = layer_panel([Point(n_layers - 1, 0.1, "last")], ticks(0.1, 0.1), n_layers, "errors")
    assert all(0 <= x <= 260 for x in numbers(svg, "cx"))
    assert all(0 <= y <= 180 for y in numbers(svg, "cy"))


def test_labels_and_titles_are_escaped() -> None:
    svg = layer_panel([Point(0, 0.1, "</title><script>&")], [0, 1], 1, 'a"<b>')
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label") == 'a"<b>'
    title = root.find(".//circle/title")
    assert title is not None
    assert title.text == "</title><script>&"


@pytest.mark.parametrize(
    ("svg", "labels"),
    [
        (code_histogram([1 / 16] * 16, [1 / 16] * 16), ("share of the weights", "absmax")),
        (layer_panel([Point(0, 0.1, "a")], [0.1, 0.2], 1, "errors"), ("relative RMS error", "layer")),
        (curve_panel([(1, 2.0), (2, 3.0)], "loss", x_label="step", y_label="nats"), ("step", "nats")),
        (column_panel(["1", "more"], [0.5, 0.5], "KL", x_label="nats", y_label="share"), ("nats", "share")),
        (bar_list([("a", 1.0, "a")], "loss", x_label="nats"), ("nats",)),
    ],
)  # fmt: skip
def test_every_axis_has_a_label(svg: str, labels: tuple[str, ...]) -> None:
    texts = [element.text or "" for element in ElementTree.fromstring(svg).findall(".//text")]
    for label in labels:
        assert any(label in text for text in texts), label


def test_long_labels_of_bars_are_cut_and_complete_in_the_tooltip() -> None:
    svg = bar_list([("a" * 40, 1.0, "a" * 40)], "loss", x_label="nats")
    root = ElementTree.fromstring(svg)
    assert "a" * 17 + "…" in [element.text for element in root.findall(".//text")]
    assert [element.text for element in root.findall(".//title")] == ["a" * 40]


def test_only_short_curves_mark_their_points() -> None:
    def n_dots(n_points: int) -> int:
        svg = curve_panel([(n, n / 7) for n in range(n_points)], "loss", x_label="step", y_label="nats")
        return len(ElementTree.fromstring(svg).findall(".//circle"))

    assert (n_dots(40), n_dots(41)) == (40, 0)
