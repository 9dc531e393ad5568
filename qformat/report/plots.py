"""Plots of a page as inline SVG. All colours are CSS variables of the page, so light and dark themes both work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from qformat.codec.codebooks import NF4_CODEBOOK

_CHARACTER_WIDTH: Final = 8
"""Upper bound for the mean width of a character of a label, in units of the picture."""

_TOP: Final = 28
"""Space above the plot for the label of the vertical axis."""

_MAX_MARKED: Final = 40
"""Longest curve whose points are marked with dots."""

_MAX_LABEL: Final = 18
"""Longest label of a horizontal bar in characters."""


@dataclass(frozen=True, slots=True)
class Point:
    """Point of a plot.

    Attributes:
        x: Position on the horizontal axis: a layer or a step.
        value: Position on the vertical axis.
        label: Tooltip, unescaped.
    """

    x: int
    value: float
    label: str


@dataclass(frozen=True, slots=True)
class _Axis:
    """A linear axis that maps values from `low` to `high` to coordinates from `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float

    def place(self, value: float) -> float:
        return self.start + (self.stop - self.start) * (value - self.low) / (self.high - self.low)


def ticks(low: float, high: float, *, at_most: int = 5) -> list[float]:
    """Return evenly spaced round values, the first at or below `low` and the last at or above `high`.

    Args:
        low: Smallest value that the axis must show.
        high: Largest value that the axis must show.
        at_most: Largest number of ticks.
    """
    if high <= low:
        low, high = (low * 0.95, low * 1.05) if low > 0 else (low, low + 1)
    rough = (high - low) / max(at_most - 1, 1)
    scale = 10.0 ** math.floor(math.log10(rough))
    for multiple in (1, 2, 2.5, 5, 10, 20):
        step = multiple * scale
        first, last = math.floor(low / step), math.ceil(high / step)
        if last - first < at_most:
            break
    return [index * step for index in range(first, last + 1)]


def code_histogram(shares: Sequence[float], expected: Sequence[float]) -> str:
    """Return a histogram of the 16 codes, with a mark at each code's expected share.

    Args:
        shares: Share of each code among the weights, 16 values.
        expected: Share of each code if the weights were independent and normally distributed, 16 values.
    """
    width, height, left, bottom = 720, 312, 54, 60
    marks = ticks(0, max(*shares, *expected))
    y = _Axis(0, marks[-1], height - bottom, _TOP)
    slot = (width - left) / 16
    parts = [_y_label("share of the weights"), _grid(y, marks, _percentages(marks), left, width)]
    for code, (share, ideal) in enumerate(zip(shares, expected, strict=True)):
        x = left + code * slot
        top, mark = y.place(share), y.place(ideal)
        says = f"code {code} ({NF4_CODEBOOK[code]:.3f}): {share:.2%}, expected {ideal:.2%}"
        parts.append(
            f'<g><title>{says}</title><rect class="bar" x="{x + 6:.1f}" y="{top:.1f}" width="{slot - 12:.1f}" '
            f'height="{y.start - top:.1f}" rx="2"/>'
            f'<line class="ideal" x1="{x + 2:.1f}" x2="{x + slot - 2:.1f}" y1="{mark:.1f}" y2="{mark:.1f}"/></g>'
            f'<text class="tick strong" x="{x + slot / 2:.1f}" y="{height - 42}" text-anchor="middle">{code}</text>'
            f'<text class="tick" x="{x + slot / 2:.1f}" y="{height - 26}" text-anchor="middle">'
            f"{NF4_CODEBOOK[code]:.2f}</text>"
        )
    parts.append(
        _x_label("code, and below it the value it stands for in units of the block's absmax", left, width, height)
    )
    return _svg(width, height, "Share of each code", parts)


def layer_panel(points: Sequence[Point], marks: Sequence[float], n_layers: int, title: str) -> str:
    """Return one panel of small multiples: relative errors by layer, on axes that all panels share.

    Args:
        points: Tensors with their layer as `x` and their relative error as `value`.
        marks: Ticks of the vertical axis.
        n_layers: Number of layers of the model.
        title: Accessible name of the plot, unescaped.
    """
    labels = _percentages(marks)
    width, height, left, bottom = 260, 180, _left(labels), 38
    x = _Axis(0, max(n_layers - 1, 1), left + 8, width - 8)
    y = _Axis(marks[0], marks[-1], height - bottom, _TOP)
    parts = [_y_label("relative RMS error"), _grid(y, marks, labels, left, width)]
    for layer in sorted({0, (n_layers - 1) // 2, n_layers - 1}):
        parts.append(_x_tick(x.place(layer), height, f"{layer}"))
    parts.append(_x_label("layer", left, width, height))
    by_layer: dict[int, list[float]] = {}
    for point in points:
        by_layer.setdefault(point.x, []).append(point.value)
    parts.append(
        _line([(x.place(layer), y.place(sum(group) / len(group))) for layer, group in sorted(by_layer.items())])
    )
    parts += [_dot("dot", x.place(point.x), y.place(point.value), 2.6, point.label) for point in points]
    return _svg(width, height, title, parts)


def curve_panel(
    points: Sequence[tuple[float, float]],
    title: str,
    *,
    x_label: str,
    y_label: str,
    dots: Sequence[Point] = (),
    say: Callable[[float], str] = "{:g}".format,
) -> str:
    """Return a curve, with separate marks beside it.

    Args:
        points: The curve as (x, y); x are whole numbers.
        title: Accessible name of the plot, unescaped.
        x_label: Name of the horizontal axis.
        y_label: Name and unit of the vertical axis.
        dots: Marks that are not on the curve.
        say: Formats a value of the vertical axis.
    """
    values = [value for _, value in points] + [dot.value for dot in dots]
    steps = [step for step, _ in points] + [dot.x for dot in dots]
    marks = ticks(min(values), max(values))
    labels = [say(mark) for mark in marks]
    width, height, left, bottom = 460, 230, _left(labels), 38
    x = _Axis(min(steps), max(*steps, min(steps) + 1), left + 8, width - 12)
    y = _Axis(marks[0], marks[-1], height - bottom, _TOP)
    parts = [_y_label(y_label), _grid(y, marks, labels, left, width)]
    for step in sorted({x.low, (x.low + x.high) // 2, x.high}):
        parts.append(_x_tick(x.place(step), height, f"{step:g}"))
    parts.append(_x_label(x_label, left, width, height))
    parts.append(_line([(x.place(step), y.place(value)) for step, value in points]))
    if len(points) <= _MAX_MARKED:
        parts += [
            _dot("dot", x.place(step), y.place(value), 2.6, f"{x_label} {step:g}: {say(value)}")
            for step, value in points
        ]
    parts += [_dot("mark", x.place(dot.x), y.place(dot.value), 4.5, dot.label) for dot in dots]
    return _svg(width, height, title, parts)


def column_panel(labels: Sequence[str], shares: Sequence[float], title: str, *, x_label: str, y_label: str) -> str:
    """Return a histogram as columns.

    Args:
        labels: Name of each column, escaped.
        shares: Height of each column; they add up to one.
        title: Accessible name of the plot, unescaped.
        x_label: Name of the horizontal axis.
        y_label: Name of the vertical axis.
    """
    marks = ticks(0, max(*shares, 0.01))
    names = _percentages(marks)
    width, height, left, bottom = 460, 230, _left(names), 38
    y = _Axis(0, marks[-1], height - bottom, _TOP)
    slot = (width - left) / len(shares)
    parts = [_y_label(y_label), _grid(y, marks, names, left, width)]
    for index, (label, share) in enumerate(zip(labels, shares, strict=True)):
        x, top = left + index * slot, y.place(share)
        parts.append(
            f'<g><title>{label}: {share:.2%}</title><rect class="bar" x="{x + 2:.1f}" y="{top:.1f}" '
            f'width="{slot - 4:.1f}" height="{y.start - top:.1f}"/></g>' + _x_tick(x + slot / 2, height, label)
        )
    parts.append(_x_label(x_label, left, width, height))
    return _svg(width, height, title, parts)


def bar_list(bars: Sequence[tuple[str, float, str]], title: str, *, x_label: str) -> str:
    """Return horizontal bars below one another, to the left or right of zero.

    Args:
        bars: Label, value and tooltip of each bar, unescaped.
        title: Accessible name of the plot, unescaped.
        x_label: Name and unit of the horizontal axis.
    """
    names = [label if len(label) <= _MAX_LABEL else label[: _MAX_LABEL - 1] + "…" for label, _, _ in bars]
    width, row, left = 460, 20, _left(names)
    values = [value for _, value, _ in bars]
    marks = ticks(min(*values, 0.0, 0.0), max(*values, 0.0, 0.0))
    x = _Axis(marks[0], marks[-1], left + 8, width - 16)
    height = row * len(bars) + 40
    parts = [
        f'<line class="grid" x1="{x.place(mark):.1f}" x2="{x.place(mark):.1f}" y1="0" y2="{height - 36}"/>'
        + _x_tick(x.place(mark), height, f"{mark:g}")
        for mark in marks
    ]
    for index, (name, (_, value, says)) in enumerate(zip(names, bars, strict=True)):
        start, stop = sorted((x.place(0), x.place(value)))
        parts.append(
            f'<g><title>{escape(says)}</title><rect class="bar" x="{start:.1f}" y="{index * row + 3}" '
            f'width="{stop - start:.1f}" height="{row - 6}"/></g>'
            f'<text class="tick strong" x="{left}" y="{index * row + 14}" text-anchor="end">{escape(name)}</text>'
        )
    parts.append(_x_label(x_label, left, width, height))
    return _svg(width, height, title, parts)


def _left(labels: Sequence[str]) -> int:
    """Return the space that the labels of the vertical axis need."""
    return 10 + _CHARACTER_WIDTH * max(map(len, labels), default=0)


def _percentages(marks: Sequence[float]) -> list[str]:
    """Return ticks as percentages with as few decimals as tell them apart."""
    decimals = next((n for n in range(4) if all(abs(mark - round(mark, n + 2)) < 1e-9 for mark in marks)), 4)
    return [f"{mark:.{decimals}%}" for mark in marks]


def _grid(y: _Axis, marks: Sequence[float], labels: Sequence[str], left: float, right: float) -> str:
    return "".join(
        f'<line class="grid" x1="{left}" x2="{right}" y1="{y.place(mark):.1f}" y2="{y.place(mark):.1f}"/>'
        f'<text class="tick" x="{left - 6}" y="{y.place(mark) + 4:.1f}" text-anchor="end">{escape(label)}</text>'
        for mark, label in zip(marks, labels, strict=True)
    )


def _y_label(text: str) -> str:
    return f'<text class="tick" x="0" y="11">{escape(text)}</text>'


def _x_label(text: str, left: float, width: float, height: float) -> str:
    return (
        f'<text class="tick" x="{(left + width) / 2:.1f}" y="{height - 5}" text-anchor="middle">{escape(text)}</text>'
    )


def _x_tick(x: float, height: float, label: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{height - 22}" text-anchor="middle">{label}</text>'


def _line(places: Sequence[tuple[float, float]]) -> str:
    return f'<polyline class="line" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>'


def _dot(kind: str, x: float, y: float, radius: float, label: str) -> str:
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{escape(label)}</title></circle>'


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{body}</svg>'
