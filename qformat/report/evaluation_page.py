"""Report of an evaluation: the figures of every text and model, and where a model differs from the 16-bit model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from qformat.report.document import document, figure, glossary, write_document
from qformat.report.plots import bar_list, column_panel, curve_panel
from qformat.report.tables import Cell, Column, table

Facts = Mapping[str, Any]


def write_evaluation_page(
    facts: Facts, details: Sequence[Sequence[Facts]], bounds: Sequence[float], path: Path
) -> None:
    """Write the report of an evaluation atomically. The same facts give the same bytes.

    Args:
        facts: The object that `qformat eval --json` prints.
        details: Details per text and model. Empty without a 16-bit model.
        bounds: Boundaries between the columns of the KL histogram, in nats.
        path: File to write. An existing file is replaced.

    Raises:
        TargetError: The file cannot be written.
    """
    write_document(evaluation_page(facts, details, bounds), path)


def evaluation_page(facts: Facts, details: Sequence[Sequence[Facts]], bounds: Sequence[float]) -> str:
    """Return the report of an evaluation as HTML.

    Args:
        facts: The object that `qformat eval --json` prints.
        details: Details per text and model. Empty without a 16-bit model.
        bounds: Boundaries between the columns of the KL histogram, in nats.
    """
    names = [Path(name).name for name in facts["models"]]
    sections = [_about(facts), _figures(facts, names)]
    for text, of_models in zip(facts["texts"], details, strict=False):
        for name, found in zip(names, of_models, strict=True):
            sections.append(_details(f"{escape(name)} on {escape(text['name'])}", found, bounds))
    return document(names[0], "evaluation report", sections)


def _about(facts: Facts) -> str:
    compared = "No 16-bit model was given, so the report shows only the loss and the perplexity."
    if facts["source"] is not None:
        known = (
            "the manifest records it as the source checkpoint"
            if facts["source_checked"]
            else "it was not verified to be the source checkpoint"
        )
        compared = f"Compared with the 16-bit model {escape(str(facts['source']))}: {known}."
    return f"<p>{compared} Computed in {escape(facts['dtype'])} on windows of {facts['window_length']:,} tokens.</p>"


_FIGURES = (
    ("loss", "loss", ".4f"),
    ("perplexity", "perplexity", ".3f"),
    ("loss − 16-bit", "loss_increase", "+.4f"),
    ("KL", "kl", ".4f"),
    ("same top token", "top1_agreement", ".2%"),
)
"""Title, field and format of the figures of a model. Without a 16-bit model only the first two exist."""

_TERMS = (
    ("loss", "Mean negative log-likelihood of the next token, in nats per token. Lower is better."),
    ("perplexity", "e to the power of the loss."),
    ("loss − 16-bit", "Loss of the model minus the loss of the 16-bit model on the same tokens."),
    ("KL", "Kullback–Leibler divergence KL(16-bit ‖ model) of the predicted next token, in nats per token. 0 means "
           "that both predict the same probabilities."),
    ("same top token", "Share of positions at which both models consider the same token most likely."),
    ("±", "Standard error of the mean over windows. Differences are paired token by token."),
)  # fmt: skip


def _figures(facts: Facts, names: Sequence[str]) -> str:
    shown = _FIGURES if facts["source"] is not None else _FIGURES[:2]
    columns = [Column("text"), Column("model"), *(Column(title, number=True) for title, _, _ in shown)]
    rows = []
    for text in facts["texts"]:
        n_windows = "1 window" if text["windows"] == 1 else f"{text['windows']:,} windows"
        label = Cell(f"{escape(text['name'])} <span class='muted'>{n_windows}</span>")

        def add(model: str, figures: Facts, sign: str = "", label: Cell = label) -> None:
            cells = [_cell(figures.get(field), sign + spec.lstrip(sign)) for _, field, spec in shown]
            rows.append([label, Cell(model), *cells])

        if text["source"] is not None:
            add("16-bit", text["source"])
        for name, figures in zip(names, text["models"], strict=True):
            add(escape(name), figures)
            more = figures.get("more_than_first")
            if more is not None:
                add(f"<span class='muted'>{escape(name)} − {escape(names[0])}</span>", more, "+")
    used = {title for title, _, _ in shown} | {"±"}
    terms = glossary([(term, meaning) for term, meaning in _TERMS if term in used])
    return f"<h2>Figures</h2>{table(columns, rows)}{terms}<h2>Texts</h2>{_digests(facts)}"


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
    place = "position in the window, in tokens"
    increase = [(point["position"], point["loss_increase"]["mean"]) for point in points]
    kl = [(point["position"], point["kl"]["mean"]) for point in points]
    figures = [
        figure(
            curve_panel(increase, "Loss increase by position", x_label=place, y_label="nats per token"),
            "<b>Loss − 16-bit</b> by position in the window",
        ),
        figure(
            curve_panel(kl, "KL by position", x_label=place, y_label="nats per token"),
            "<b>KL</b> from the 16-bit model by position in the window",
        ),
        figure(
            column_panel(
                _labels(bounds),
                found["kl_histogram"],
                "Histogram of KL",
                x_label="KL up to, in nats",
                y_label="share of the tokens",
            ),
            "<b>Distribution of KL</b> over the tokens",
        ),
    ]
    if found["by_token"]:
        bars = [
            (_visible(entry["token"]), entry["total"], f"{entry['count']} times, {entry['mean']:+.4f} on average")
            for entry in found["by_token"]
        ]
        figures.append(
            figure(
                bar_list(bars, "Loss increase by token", x_label="nats, sum over all occurrences"),
                "<b>Loss − 16-bit</b> by token: the tokens with the largest sums",
            )
        )
    return f'<h2>{title}</h2><div class="panels large">{"".join(figures)}</div>{_worst(found["worst"])}'


def _labels(bounds: Sequence[float]) -> list[str]:
    return [*(f"{bound:g}" for bound in bounds), "more"]


def _worst(entries: Sequence[Mapping[str, Any]]) -> str:
    columns = [Column("context"), Column("next token"), Column("16-bit predicts"), Column("model predicts")]
    columns += [
        Column("KL", number=True),
        Column("loss − 16-bit", number=True),
        Column("window"),
        Column("position", number=True),
    ]
    rows = [
        [
            Cell(f"<code>{escape(entry['context'])}</code>"),
            *(Cell(f"<b>{escape(_visible(entry[name]))}</b>") for name in ("token", "source_top1", "top1")),
            Cell(f"{entry['kl']:.3f}", entry["kl"]),
            Cell(f"{entry['loss_increase']:+.3f}", entry["loss_increase"]),
            Cell(f"{entry['window']}"),
            Cell(f"{entry['position']:,}", entry["position"]),
        ]
        for entry in entries
    ]
    note = "<p class='muted'>The tokens with the largest KL, with the text that comes before them.</p>"
    return f"<h3>Worst tokens</h3>{note}{table(columns, rows, sortable=True)}"


def _visible(token: str) -> str:
    """Return a token with its white space made visible."""
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
