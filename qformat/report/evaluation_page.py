"""One page about an evaluation: the figures of every text and model, and where a model differs from the 16-bit one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from qformat.report.document import document, write_document
from qformat.report.plots import bar_list, column_panel, curve_panel
from qformat.report.tables import Cell, Column, table

Facts = Mapping[str, Any]


def write_evaluation_page(
    facts: Facts, details: Sequence[Sequence[Facts]], bounds: Sequence[float], path: Path
) -> None:
    """Write the page. facts: what `qformat eval --json` prints. details: by text and model, empty without a source.

    bounds: between the columns of the histograms. Raises TargetError if the file cannot be written.
    """
    write_document(evaluation_page(facts, details, bounds), path)


def evaluation_page(facts: Facts, details: Sequence[Sequence[Facts]], bounds: Sequence[float]) -> str:
    """Return the page as HTML."""
    names = [Path(name).name for name in facts["models"]]
    title = escape(names[0])
    sections = [f"<h1>{title}</h1>", _about(facts), _figures(facts, names)]
    for text, of_models in zip(facts["texts"], details, strict=False):
        for name, found in zip(names, of_models, strict=True):
            sections.append(_details(f"{escape(name)} on {escape(text['name'])}", found, bounds))
    return document(f"{title}: qformat evaluation", sections)


def _about(facts: Facts) -> str:
    beside = "without a 16-bit model"
    if facts["source"] is not None:
        checked = "made from it" if facts["source_checked"] else "not checked to be made from it"
        beside = f"beside {escape(str(facts['source']))} ({checked})"
    return (
        f"<p>Measured {beside}, in {escape(facts['dtype'])}, windows of {facts['window_length']} tokens. "
        "Losses and KL in nats a token; ± is one standard error over windows; differences are paired by token.</p>"
    )


def _figures(facts: Facts, names: Sequence[str]) -> str:
    columns = [Column("text"), Column("model")]
    columns += [Column(name, number=True) for name in ("loss", "perplexity", "loss − 16-bit", "KL", "top-1 as 16-bit")]
    rows = []
    for text in facts["texts"]:
        label = Cell(f"{escape(text['name'])} <span class='muted'>{text['windows']} windows</span>")
        if text["source"] is not None:
            rows.append([label, Cell("16-bit"), *_cells(text["source"])])
        for name, figures in zip(names, text["models"], strict=True):
            rows.append([label, Cell(escape(name)), *_cells(figures)])
            more = figures.get("more_than_first")
            if more is not None:
                difference = Cell(f"<span class='muted'>{escape(name)} − {escape(names[0])}</span>")
                rows.append([label, difference, *_cells(more, spec="+.4f")])
    return f"<h2>Figures</h2>{table(columns, rows)}{_digests(facts)}"


def _cells(figures: Facts, *, spec: str = ".4f") -> list[Cell]:
    formats = {"loss": spec, "perplexity": ".3f", "loss_increase": "+.4f", "kl": spec}
    cells = [_cell(figures.get(name), form) for name, form in formats.items()]
    return [*cells, _cell(figures.get("top1_agreement"), "+.2%" if spec[0] == "+" else ".2%")]


def _cell(figure: Mapping[str, float | None] | None, spec: str) -> Cell:
    if figure is None or figure["mean"] is None:
        return Cell("–")
    shown = format(figure["mean"], spec)
    error = figure["standard_error"]
    return Cell(shown if error is None else f"{shown} ± {format(error, spec.lstrip('+'))}", figure["mean"])


def _digests(facts: Facts) -> str:
    rows = [
        [Cell(escape(text["name"])), Cell(f"{text['predicted_tokens']:,}", text["predicted_tokens"]),
         Cell(f"<code>{escape(text['sha256'])}</code>")]
        for text in facts["texts"]
    ]  # fmt: skip
    return table([Column("text"), Column("predicted tokens", number=True), Column("SHA-256")], rows)


def _details(title: str, found: Facts, bounds: Sequence[float]) -> str:
    points = found["by_position"]
    figures = [
        _figure(
            curve_panel([(p["position"], p["loss_increase"]["mean"]) for p in points], "Loss increase by position"),
            "Loss above the 16-bit model's, by position in the window (nats)",
        ),
        _figure(
            curve_panel([(p["position"], p["kl"]["mean"]) for p in points], "KL by position"),
            "KL from the 16-bit model, by position in the window (nats)",
        ),
        _figure(
            column_panel(_labels(bounds), found["kl_histogram"], "Histogram of KL"),
            "Share of tokens by KL (nats; each column up to its label)",
        ),
    ]
    if found["by_token"]:
        bars = [
            (_visible(entry["token"]), entry["total"], f"{entry['count']} times, {entry['mean']:+.4f} on average")
            for entry in found["by_token"]
        ]
        figures.append(
            _figure(bar_list(bars, "Loss increase by token"), "Loss above the 16-bit model's, summed by token (nats)")
        )
    return f'<h2>{title}</h2><div class="panels large">{"".join(figures)}</div>{_worst(found["worst"])}'


def _figure(picture: str, caption: str) -> str:
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _labels(bounds: Sequence[float]) -> list[str]:
    return [*(f"{bound:g}" for bound in bounds), "more"]


def _worst(entries: Sequence[Mapping[str, Any]]) -> str:
    columns = [Column("context"), Column("next token"), Column("16-bit expects"), Column("model expects")]
    columns += [Column("KL", number=True), Column("loss − 16-bit", number=True), Column("window, token")]
    rows = [
        [
            Cell(f"<code>{escape(entry['context'])}</code>"),
            *(Cell(f"<b>{escape(_visible(entry[name]))}</b>") for name in ("token", "source_top1", "top1")),
            Cell(f"{entry['kl']:.3f}", entry["kl"]),
            Cell(f"{entry['loss_increase']:+.3f}", entry["loss_increase"]),
            Cell(f"{entry['window']}, {entry['position']}"),
        ]
        for entry in entries
    ]
    return f"<h3>Worst tokens</h3>{table(columns, rows, sortable=True)}"


def _visible(token: str) -> str:
    """Show what a token is made of where that is white space."""
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
