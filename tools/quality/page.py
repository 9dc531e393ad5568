"""The tables and the plot of docs/quality.md, from the finished rows of `tools.quality.table`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qformat.quality.evaluation.estimates import Estimate, estimate
from tools.quality import texts as quality_texts
from tools.quality.rows import BOTH, CALIBRATED, PLAIN, REFERENCE, TUNED

BEGIN, END = "<!-- quality_table: begin -->", "<!-- quality_table: end -->"
Lines = Mapping[str, Mapping[str, Any]]
Titles = Mapping[str, tuple[str, float | None]]


def tables(settings: Mapping[str, Any], lines: Lines, titles: Titles) -> str:
    """Return all measurements as Markdown.

    Args:
        settings: Settings of the measurement.
        lines: Finished rows by key.
        titles: Title and bits per weight of each row, in the order of the table.
    """
    parts = [_summary(settings, lines, titles), _about(settings), _figures(settings, lines, titles), _bars(lines)]
    parts += [_fine_tuning(lines), _samples(lines), _seconds(lines, titles)]
    return "\n\n".join(part for part in parts if part)


def update(page: Path, content: str) -> None:
    """Replace the text between the markers of a page."""
    text = page.read_text("utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{content}\n\n{END}{after}", "utf-8")


def draw(lines: Lines, titles: Titles, picture: Path) -> None:
    """Draw the KL divergence of each row and text with standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    keys = [key for key in titles if key in lines and key != REFERENCE]
    if not keys:
        return
    names = list(lines[keys[0]]["texts"])
    figure, axes = plt.subplots(figsize=(8, 0.26 * len(keys) + 1), layout="constrained")
    for offset, name in enumerate(names):
        found = [_over_windows(lines[key]["texts"][name]["kl"]) for key in keys]
        places = np.arange(len(keys)) + 0.12 * (offset - (len(names) - 1) / 2)
        errors = [kl.standard_error or 0 for kl in found]
        axes.errorbar([kl.mean for kl in found], places, xerr=errors, fmt="o", markersize=3.5, label=name)
    axes.set_yticks(range(len(keys)), [titles[key][0] for key in keys], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("KL divergence from the 16-bit model, nats per token")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    picture.parent.mkdir(exist_ok=True)
    figure.savefig(picture, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _summary(settings: Mapping[str, Any], lines: Lines, titles: Titles) -> str:
    """Return the table that opens the page: what calibration and tuning gain for the same bytes."""
    names = list(settings["texts"])
    rows = [["weights", "bits per weight", *(f"KL: {name}" for name in names), f"same top token: {names[0]}"]]
    rows.append(["---"] * len(rows[0]))
    for key in (REFERENCE, PLAIN, CALIBRATED, BOTH):
        if key in lines and key in titles:
            title, bits = titles[key]
            texts = lines[key]["texts"]
            if key == REFERENCE:
                figures = ["0"] * len(names) + ["100%"]
            else:
                figures = [f"{np.mean(texts[name]['kl']):.4f}" for name in names]
                figures.append(f"{100 * np.mean(texts[names[0]]['top1']):.1f}%")
            rows.append([title, "16" if bits is None else f"{bits:.3f}", *figures])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _about(settings: Mapping[str, Any]) -> str:
    digests = ", ".join(f"{name} `{digest[:12]}`" for name, digest in settings["texts"].items())
    windows = ", ".join(f"{name} {count}" for name, count in settings["windows"].items())
    return (
        f"{settings['model']}, windows of {settings['window_length']} tokens: {windows}. "
        f"SHA-256 of the texts: {digests}; calibration and tuning: `{settings['calibration'][:12]}`."
    )


def _figures(settings: Mapping[str, Any], lines: Lines, titles: Titles) -> str:
    names = list(settings["texts"])
    head = ["weights", "bits", *(f"{name}: perplexity, KL, top-1" for name in names)]
    rows = [head, ["---"] * len(head)]
    reference = lines.get(REFERENCE)
    for key, (title, bits) in titles.items():
        if key in lines:
            cells = [_cell(lines[key]["texts"][name], reference and reference["texts"][name], key) for name in names]
            rows.append([title, "16" if bits is None else f"{bits:.3f}", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(figures: Mapping[str, list[float]], reference: Mapping[str, list[float]] | None, key: str) -> str:
    loss = _over_windows(figures["loss"])
    if key == REFERENCE or reference is None:
        return f"{_shown(loss.exponential(), '.2f')}"
    factor = _over_windows(np.subtract(figures["loss"], reference["loss"])).exponential()
    kl, top1 = _over_windows(figures["kl"]), _over_windows(figures["top1"])
    return f"× {_shown(factor, '.3f')}, {_shown(kl, '.4f')}, {100 * top1.mean:.1f}%"


def _bars(lines: Lines) -> str:
    """Return the KL divergence of calibrated and tuned artifacts relative to plain NF4, paired by window."""
    if PLAIN not in lines:
        return ""
    rows = [["compared with plain NF4, block 64, nested", "text", "KL / plain KL", "KL difference", "top-1, points"]]
    rows.append(["---"] * 5)
    for key in (CALIBRATED, TUNED, BOTH):
        for name, figures in lines.get(key, {"texts": {}})["texts"].items():
            plain = lines[PLAIN]["texts"][name]
            difference = _over_windows(np.subtract(figures["kl"], plain["kl"]))
            points = _over_windows(100 * np.subtract(figures["top1"], plain["top1"]))
            kind = "same kind" if name in quality_texts.SAME_KIND else "another kind"
            kind = kind if name in (*quality_texts.SAME_KIND, *quality_texts.ANOTHER_KIND) else "similar"
            share = np.mean(figures["kl"]) / np.mean(plain["kl"])
            shown = [f"{share:.3f}", _shown(difference, "+.4f"), _shown(points, "+.1f")]
            rows.append([key, f"{name} ({kind})", *shown])
    sizes = {key: lines[key]["shard_nbytes"] for key in (PLAIN, CALIBRATED, TUNED, BOTH) if key in lines}
    same = "the same" if len(set(sizes.values())) == 1 else "NOT the same"
    note = f"Size of the shards in bytes, {same} for all: "
    note += ", ".join(f"{key} {size:,}" for key, size in sizes.items()) + "."
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n{note}" if len(rows) > 2 else note


def _fine_tuning(lines: Lines) -> str:
    rows = [["base of a LoRA fine-tuning on code", "held-out loss before", "after"], ["---"] * 3]
    for key, base in (("lora-plain", "plain NF4"), ("lora-both", "calibrated, then tuned")):
        if key in lines:
            before, after = (_over_windows(lines[key][figure]) for figure in ("loss_before", "loss_after"))
            rows.append([base, _shown(before, ".4f"), _shown(after, ".4f")])
    if {"lora-plain", "lora-both"} <= set(lines):
        for_both = [
            _shown(_over_windows(np.subtract(lines["lora-both"][figure], lines["lora-plain"][figure])), "+.4f")
            for figure in ("loss_before", "loss_after")
        ]
        rows.append(["difference, paired", *for_both])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) if len(rows) > 2 else ""


def _samples(lines: Lines) -> str:
    said = [f"- {key}: {line['says'].strip()!r}" for key, line in lines.items() if "says" in line]
    return "Greedy answers to the question of `make demo`:\n\n" + "\n".join(said) if said else ""


def _seconds(lines: Lines, titles: Titles) -> str:
    total = sum(line["seconds"] for line in lines.values())
    longest = sorted(lines.values(), key=lambda line: -line["seconds"])[:5]
    shown = ", ".join(f"{line['row']} {line['seconds']:.0f} s" for line in longest)
    return f"{len(lines)} rows in {total / 60:.1f} minutes; the longest: {shown}."


def _over_windows(means: Any) -> Estimate:
    return estimate(np.asarray(means, np.float64)[:, None])


def _shown(found: Estimate, spec: str) -> str:
    mean = format(found.mean, spec)
    return mean if found.standard_error is None else f"{mean} ± {format(found.standard_error, spec.lstrip('+'))}"
