"""The plots of a page as inline SVG. Colours are CSS variables of the page, so that both themes work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from qformat.codec.codebooks import NF4_CODEBOOK


@dataclass(frozen=True, slots=True)
class Point:
    """A mark of a panel: its layer, its value and what to say about it."""

    layer: int
    value: float
    label: str


@dataclass(frozen=True, slots=True)
class _Axis:
    """A linear axis: values from `low` to `high` lie between two positions in the picture."""

    low: float
    high: float
    start: float
    stop: float

    def place(self, value: float) -> float:
        return self.start + (self.stop - self.start) * (value - self.low) / (self.high - self.low)


def ticks(low: float, high: float, *, at_most: int = 5) -> list[float]:
    """Return round values that cover low to high, the first at or below low and the last at or above high."""
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
    """Return bars of the share of each of the 16 codes, each with a mark where independent normal weights would be."""
    width, height, left, bottom = 720, 280, 44, 44
    marks = ticks(0, max(*shares, *expected))
    y = _Axis(0, marks[-1], height - bottom, 10)
    slot = (width - left) / 16
    parts = [_grid(y, marks, left, width)]
    for code, (share, ideal) in enumerate(zip(shares, expected, strict=True)):
        x = left + code * slot
        top, mark = y.place(share), y.place(ideal)
        says = f"code {code} ({NF4_CODEBOOK[code]:.3f}): {share:.2%}, expected {ideal:.2%}"
        parts.append(
            f'<g><title>{says}</title><rect class="bar" x="{x + 6:.1f}" y="{top:.1f}" width="{slot - 12:.1f}" '
            f'height="{y.start - top:.1f}" rx="2"/>'
            f'<line class="ideal" x1="{x + 2:.1f}" x2="{x + slot - 2:.1f}" y1="{mark:.1f}" y2="{mark:.1f}"/></g>'
            f'<text class="tick strong" x="{x + slot / 2:.1f}" y="{height - 26}" text-anchor="middle">{code}</text>'
            f'<text class="tick" x="{x + slot / 2:.1f}" y="{height - 10}" text-anchor="middle">'
            f"{NF4_CODEBOOK[code]:.2f}</text>"
        )
    return _svg(width, height, "Share of each code", parts)


def layer_panel(points: Sequence[Point], marks: Sequence[float], n_layers: int, title: str) -> str:
    """Return one panel of small multiples: values by layer on axes that all panels share."""
    width, height, left, bottom = 260, 150, 44, 22
    x = _Axis(0, max(n_layers - 1, 1), left + 8, width - 8)
    y = _Axis(marks[0], marks[-1], height - bottom, 8)
    parts = [_grid(y, marks, left, width)]
    for layer in sorted({0, (n_layers - 1) // 2, n_layers - 1}):
        parts.append(
            f'<text class="tick" x="{x.place(layer):.1f}" y="{height - 6}" text-anchor="middle">{layer}</text>'
        )
    by_layer: dict[int, list[float]] = {}
    for point in points:
        by_layer.setdefault(point.layer, []).append(point.value)
    line = " ".join(
        f"{x.place(layer):.1f},{y.place(sum(values) / len(values)):.1f}" for layer, values in sorted(by_layer.items())
    )
    parts.append(f'<polyline class="line" points="{line}"/>')
    parts += [
        f'<circle class="dot" cx="{x.place(point.layer):.1f}" cy="{y.place(point.value):.1f}" r="2.6">'
        f"<title>{escape(point.label)}</title></circle>"
        for point in points
    ]
    return _svg(width, height, title, parts)


def curve_panel(
    points: Sequence[tuple[float, float]],
    title: str,
    *,
    dots: Sequence[Point] = (),
    say: Callable[[float], str] = "{:g}".format,
) -> str:
    """Return a line over steps, (step, value), and single marks beside it, whose `layer` is their step."""
    width, height, left, bottom = 520, 220, 64, 26
    values = [value for _, value in points] + [dot.value for dot in dots]
    steps = [step for step, _ in points] + [dot.layer for dot in dots]
    marks = ticks(min(values), max(values))
    x = _Axis(min(steps), max(*steps, min(steps) + 1), left + 8, width - 12)
    y = _Axis(marks[0], marks[-1], height - bottom, 8)
    parts = [
        f'<line class="grid" x1="{left}" x2="{width}" y1="{y.place(mark):.1f}" y2="{y.place(mark):.1f}"/>'
        f'<text class="tick" x="{left - 6}" y="{y.place(mark) + 3.5:.1f}" text-anchor="end">{escape(say(mark))}</text>'
        for mark in marks
    ]
    for step in sorted({x.low, (x.low + x.high) // 2, x.high}):
        parts.append(
            f'<text class="tick" x="{x.place(step):.1f}" y="{height - 6}" text-anchor="middle">{step:g}</text>'
        )
    line = " ".join(f"{x.place(step):.1f},{y.place(value):.1f}" for step, value in points)
    parts.append(f'<polyline class="line" points="{line}"/>')
    parts += [
        f'<circle class="mark" cx="{x.place(dot.layer):.1f}" cy="{y.place(dot.value):.1f}" r="4">'
        f"<title>{escape(dot.label)}</title></circle>"
        for dot in dots
    ]
    return _svg(width, height, title, parts)


def column_panel(labels: Sequence[str], shares: Sequence[float], title: str) -> str:
    """Return columns of shares that add up to one, such as a histogram; labels: escaped already."""
    width, height, left, bottom = 520, 220, 44, 26
    marks = ticks(0, max(*shares, 0.01))
    y = _Axis(0, marks[-1], height - bottom, 8)
    slot = (width - left) / len(shares)
    parts = [_grid(y, marks, left, width)]
    for index, (label, share) in enumerate(zip(labels, shares, strict=True)):
        x, top = left + index * slot, y.place(share)
        parts.append(
            f'<g><title>{label}: {share:.2%}</title><rect class="bar" x="{x + 2:.1f}" y="{top:.1f}" '
            f'width="{slot - 4:.1f}" height="{y.start - top:.1f}"/></g>'
            f'<text class="tick" x="{x + slot / 2:.1f}" y="{height - 8}" text-anchor="middle">{label}</text>'
        )
    return _svg(width, height, title, parts)


def bar_list(bars: Sequence[tuple[str, float, str]], title: str) -> str:
    """Return bars under one another, from zero to either side: (label, value, what to say about it), not escaped."""
    width, row, left = 520, 20, 150
    values = [value for _, value, _ in bars]
    marks = ticks(min(*values, 0.0, 0.0), max(*values, 0.0, 0.0))
    x = _Axis(marks[0], marks[-1], left + 8, width - 12)
    height = row * len(bars) + 26
    parts = [
        f'<line class="grid" x1="{x.place(mark):.1f}" x2="{x.place(mark):.1f}" y1="0" y2="{height - 22}"/>'
        f'<text class="tick" x="{x.place(mark):.1f}" y="{height - 6}" text-anchor="middle">{mark:g}</text>'
        for mark in marks
    ]
    for index, (label, value, says) in enumerate(bars):
        start, stop = sorted((x.place(0), x.place(value)))
        parts.append(
            f'<g><title>{escape(says)}</title><rect class="bar" x="{start:.1f}" y="{index * row + 3}" '
            f'width="{stop - start:.1f}" height="{row - 6}"/></g>'
            f'<text class="tick strong" x="{left}" y="{index * row + 14}" text-anchor="end">{escape(label)}</text>'
        )
    return _svg(width, height, title, parts)


def _grid(y: _Axis, marks: Sequence[float], left: float, right: float) -> str:
    decimals = next((n for n in range(4) if all(abs(mark - round(mark, n + 2)) < 1e-9 for mark in marks)), 4)
    return "".join(
        f'<line class="grid" x1="{left}" x2="{right}" y1="{y.place(mark):.1f}" y2="{y.place(mark):.1f}"/>'
        f'<text class="tick" x="{left - 6}" y="{y.place(mark) + 3.5:.1f}" text-anchor="end">{mark:.{decimals}%}</text>'
        for mark in marks
    )


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{body}</svg>'
