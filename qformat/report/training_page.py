"""One page about a training: the curves of metrics.jsonl, what it was trained on, and every setting."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from qformat.report.document import document, write_document
from qformat.report.plots import Point, curve_panel
from qformat.strict_json import Json

Line = Mapping[str, Json]


@dataclass(frozen=True, slots=True)
class _Curve:
    """A field of the lines of metrics, scaled, and how its axis speaks."""

    title: str
    field: str
    say: Callable[[float], str] = "{:g}".format
    scale: float = 1.0


_CURVES = (
    _Curve("Loss on the training data (nats a token)", "loss"),
    _Curve("Learning rate", "learning_rate", "{:.1e}".format),
    _Curve("Norm of the gradient", "grad_norm"),
    _Curve("Tokens a second", "tokens_per_s", "{:,.0f}".format),
    _Curve("Peak memory (GB)", "memory_nbytes", scale=1e-9),
)

_PAGING = (
    _Curve("Pages of optimizer states on the device", "resident"),
    _Curve("Moved to the device so far (GB)", "nbytes_to_device", scale=1e-9),
    _Curve("Updates that waited for a page so far", "stalls"),
)


def write_training_page(name: str, lines: Sequence[Line], facts: Mapping[str, Json], path: Path) -> None:
    """Write the page of a training. lines: those of metrics.jsonl. facts: settings, statistics of the data, base.

    Raises: TargetError if the file cannot be written.
    """
    write_document(training_page(name, lines, facts), path)


def training_page(name: str, lines: Sequence[Line], facts: Mapping[str, Json]) -> str:
    """Return the page as HTML."""
    paging = [{"step": line["step"], **entry} for line in lines if isinstance(entry := line.get("paging"), dict)]
    sections = [f"<h1>{escape(name)}</h1>", _summary(lines, facts)]
    sections.append(_panels("Curves", [_figure(curve, lines) for curve in _CURVES]))
    sections.append(_panels("Paging", [_figure(curve, paging) for curve in _PAGING]))
    sections += [_table("Settings", facts.get("settings")), _table("Data", facts.get("statistics"))]
    return document(f"{escape(name)}: qformat training", sections)


def _summary(lines: Sequence[Line], facts: Mapping[str, Json]) -> str:
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    tiles = [("steps", f"{_number(steps[-1]['step']):g}")] if steps else []
    tiles += [(f"held-out loss, step {line['step']}", f"{_number(line['eval_loss']):.4f}") for line in evaluations]
    tiles += [
        (f"perplexity, step {line['step']}", f"{math.exp(min(_number(line['eval_loss']), 700)):.3f}")
        for line in evaluations
    ]
    base = facts.get("base")
    on = (
        f"<p>On {escape(str(base['name']))} <code>{escape(str(base['digest']))}</code></p>"
        if isinstance(base, dict)
        else ""
    )
    shown = "".join(f'<div class="tile"><b>{value}</b><span>{escape(says)}</span></div>' for says, value in tiles)
    return f'{on}<div class="tiles">{shown}</div>'


def _figure(curve: _Curve, lines: Sequence[Line]) -> str:
    points = [
        (_number(line["step"]), _number(line[curve.field]) * curve.scale)
        for line in lines
        if _is_finite(line, curve.field)
    ]
    if not points:
        return ""
    dots = []
    if curve.field == "loss":
        dots = [
            Point(int(_number(line["step"])), _number(line["eval_loss"]), f"held-out: {_number(line['eval_loss']):.4f}")
            for line in lines
            if _is_finite(line, "eval_loss")
        ]
    title = f"{curve.title}; dots: held-out data" if dots else curve.title
    panel = curve_panel(points, curve.title, dots=dots, say=curve.say)
    return f"<figure>{panel}<figcaption>{escape(title)}</figcaption></figure>"


def _panels(title: str, figures: Sequence[str]) -> str:
    shown = "".join(figures)
    return f'<h2>{title}</h2><div class="panels large">{shown}</div>' if shown else ""


def _table(title: str, values: Json) -> str:
    if not isinstance(values, dict):
        return ""
    rows = "".join(
        f"<tr><td><code>{escape(key)}</code></td><td>{escape(str(value))}</td></tr>" for key, value in values.items()
    )
    return f'<h2>{title}</h2><div class="scroll"><table>{rows}</table></div>'


def _number(value: Json) -> float:
    assert isinstance(value, (int, float))
    return value


def _is_finite(line: Line, field: str) -> bool:
    value = line.get(field)
    return isinstance(value, (int, float)) and math.isfinite(value)
