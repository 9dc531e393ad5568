"""Report of a training run: the curves of metrics.jsonl, the settings, and statistics of the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from qformat.report.document import document, figure, tiles, write_document
from qformat.report.plots import Point, curve_panel
from qformat.report.tables import pairs
from qformat.sizes import format_nbytes
from qformat.strict_json import Json

Line = Mapping[str, Json]


@dataclass(frozen=True, slots=True)
class _Curve:
    """A curve over steps: a field of the metrics, the scale and the format of its values, and its axis label."""

    title: str
    field: str
    unit: str
    say: Callable[[float], str] = "{:g}".format
    scale: float = 1.0


_LOSS = _Curve("Loss", "loss", "nats per token")

_CURVES = (
    _LOSS,
    _Curve("Learning rate", "learning_rate", "learning rate", "{:.1e}".format),
    _Curve("Gradient norm before clipping", "grad_norm", "L2 norm"),
    _Curve("Throughput", "tokens_per_s", "tokens per second", "{:,.0f}".format),
    _Curve("Peak memory", "memory_nbytes", "GB", scale=1e-9),
)

_PAGING = (
    _Curve("Pages of optimizer states in device memory", "resident", "pages"),
    _Curve("Optimizer states moved to the device, total", "nbytes_to_device", "GB", scale=1e-9),
    _Curve("Updates that had to wait for a page, total", "stalls", "updates"),
)

_PAGE_MOVES = ("nbytes_to_device", "nbytes_to_host", "evictions", "stalls")

_COUNTS = {
    "rows": "rows read",
    "examples": "examples used",
    "tokens": "tokens",
    "trained_tokens": "tokens with a loss",
    "longest": "longest example, in tokens",
    "truncated": "truncated examples",
    "dropped": "dropped rows",
    "bad": "unusable rows",
}


def write_training_page(name: str, lines: Sequence[Line], facts: Mapping[str, Json], path: Path) -> None:
    """Write the report of a training run atomically. The same metrics and facts give the same bytes.

    Args:
        name: Name of the adapter.
        lines: Lines of metrics.jsonl.
        facts: Settings, statistics of the data, and the base model.
        path: File to write. An existing file is replaced.

    Raises:
        TargetError: The file cannot be written.
    """
    write_document(training_page(name, lines, facts), path)


def training_page(name: str, lines: Sequence[Line], facts: Mapping[str, Json]) -> str:
    """Return the report of a training run as HTML.

    Args:
        name: Name of the adapter.
        lines: Lines of metrics.jsonl.
        facts: Settings, statistics of the data, and the base model.
    """
    sections = [_base(facts), _summary(lines)]
    sections.append(_panels("Curves", [_figure(curve, lines) for curve in _CURVES]))
    sections += [_paging(lines), _settings(facts.get("settings")), _data(facts.get("statistics"))]
    return document(name, "training report", sections)


def _base(facts: Mapping[str, Json]) -> str:
    base = facts.get("base")
    if not isinstance(base, dict):
        return ""
    return (
        f"<p>LoRA adapter for <b>{escape(str(base['name']))}</b></p>"
        f'<p class="muted">Digest of the base tensors: <code>{escape(str(base["digest"]))}</code></p>'
    )


def _summary(lines: Sequence[Line]) -> str:
    steps = [line for line in lines if "loss" in line]
    losses = [_number(line["eval_loss"]) for line in lines if _is_finite(line, "eval_loss")]
    shown = []
    if steps:
        shown.append((f"{_number(steps[-1]['step']):g}", "optimizer steps"))
        shown.append((f"{_number(steps[-1]['loss']):.4f}", "loss on the training data at the last logged step"))
    if losses:
        perplexities = [math.exp(min(loss, 700)) for loss in losses]
        shown.append((_first_and_last([f"{loss:.4f}" for loss in losses]), "loss on the held-out data, nats per token"))
        shown.append((_first_and_last([f"{value:.3f}" for value in perplexities]), "perplexity on the held-out data"))
    return tiles(shown) if shown else ""


def _first_and_last(values: Sequence[str]) -> str:
    return values[0] if len(values) == 1 else f"{values[0]} → {values[-1]}"


def _figure(curve: _Curve, lines: Sequence[Line]) -> str:
    points = [
        (_number(line["step"]), _number(line[curve.field]) * curve.scale)
        for line in lines
        if _is_finite(line, curve.field)
    ]
    if not points:
        return ""
    dots = []
    if curve is _LOSS:
        dots = [
            Point(int(_number(line["step"])), _number(line["eval_loss"]), f"held-out: {_number(line['eval_loss']):.4f}")
            for line in lines
            if _is_finite(line, "eval_loss")
        ]
    caption = f"<b>{curve.title}</b>"
    if dots:
        caption += ' <span class="key"></span> training data <span class="key dot-key"></span> held-out data'
    panel = curve_panel(points, curve.title, x_label="step", y_label=curve.unit, dots=dots, say=curve.say)
    return figure(panel, caption)


def _panels(title: str, figures: Sequence[str]) -> str:
    shown = "".join(figures)
    return f'<h2>{title}</h2><div class="panels large">{shown}</div>' if shown else ""


def _paging(lines: Sequence[Line]) -> str:
    """Return the curves of paging, or one sentence if no optimizer state ever moved."""
    paging = [{"step": line["step"], **entry} for line in lines if isinstance(entry := line.get("paging"), dict)]
    if not paging:
        return ""
    last = paging[-1]
    if any(_is_finite(last, field) and last[field] for field in _PAGE_MOVES):
        return _panels("Paging of the optimizer states", [_figure(curve, paging) for curve in _PAGING])
    nbytes = format_nbytes(int(_number(last["pages"]) * _number(last["page_nbytes"])))
    return (
        f"<h2>Paging of the optimizer states</h2><p>Nothing was paged: all optimizer states ({nbytes}) stayed in "
        "device memory.</p>"
    )


def _settings(values: Json) -> str:
    if not isinstance(values, dict):
        return ""
    shown = {name: _plain(value) for name, value in values.items()}
    if values.get("alpha") is None and isinstance(rank := values.get("rank"), int):
        shown["alpha"] = f"{2 * rank} (default: twice the rank)"
    if "device" in values and values["device"] is None:
        shown["device"] = "chosen automatically"
    if isinstance(values.get("max_steps"), int):
        shown["epochs"] = "not used, because max_steps is set"
    elif "max_steps" in values:
        shown["max_steps"] = "not set, epochs apply"
    return f"<h2>Settings</h2>{pairs(shown.items())}"


def _data(values: Json) -> str:
    if not isinstance(values, dict):
        return ""
    return f"<h2>Data</h2>{pairs((_COUNTS.get(name, name), _plain(value)) for name, value in values.items())}"


def _plain(value: Json) -> str:
    """Return a value in words rather than in Python's or JSON's notation."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_plain(entry)}" for name, entry in value.items()) or "none"
    return value


def _number(value: Json) -> float:
    assert isinstance(value, (int, float))
    return value


def _is_finite(line: Line, field: str) -> bool:
    value = line.get(field)
    return isinstance(value, (int, float)) and math.isfinite(value)
