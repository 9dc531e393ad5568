"""Report of a verification: the contents of an artifact, its integrity, and its errors against the source."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

from qformat import strict_json
from qformat.artifact.verification_facts import (
    ComparisonFacts,
    FindingFacts,
    ManifestFacts,
    PackedFacts,
    VerificationFacts,
)
from qformat.report.document import document, glossary, tiles, write_document
from qformat.report.ideal_codes import expected_shares
from qformat.report.plots import Point, code_histogram, layer_panel, ticks
from qformat.report.tables import (
    ERROR_COLUMNS,
    Cell,
    Column,
    error_cells,
    name_cell,
    number,
    pairs,
    percent,
    shape_cell,
    table,
)
from qformat.sizes import format_nbytes

N_LARGEST = 20


def write_html(facts: VerificationFacts, path: Path) -> None:
    """Write the report of a verification atomically. The same facts give the same bytes.

    Args:
        facts: The object that `qformat verify --json` prints.
        path: File to write. An existing file is replaced.

    Raises:
        TargetError: The file cannot be written.
    """
    write_document(page(facts), path)


def page(facts: VerificationFacts) -> str:
    """Return the report of a verification as HTML."""
    manifest, comparison = facts["manifest"], facts["comparison"]
    sections = [_verdict(facts)]
    if comparison is not None:
        sections += [_summary(facts, comparison), _by_kind(comparison), _by_layer(comparison)]
        sections += [_codes(comparison), _largest(comparison)]
    if manifest is not None:
        sections.append(_provenance(facts, manifest))
    if comparison is not None:
        sections += [_packed(comparison), _kept(comparison)]
    return document(Path(facts["path"]).absolute().name, "verification report", sections)


def _verdict(facts: VerificationFacts) -> str:
    findings, integrity, comparison = facts["findings"], facts["integrity"], facts["comparison"]
    checked = "structure, all digests" + (", the SHA-256 of every file" if integrity["sha256_checked"] else "")
    size = f"{integrity['n_files']} files, {integrity['nbytes']:,} bytes"
    state = "intact" if integrity["passed"] else "damaged"
    checks = [_check(integrity["passed"], f"The artifact is {state}. Checked: {checked} ({size})")]
    if comparison is None:
        checks.append('<li class="open">Not compared with a source checkpoint</li>')
    else:
        checks += [
            _check(n_passed == n_all, f"{text}: {n_passed:,} of {n_all:,} tensors")
            for text, n_passed, n_all in _comparisons(comparison)
            if n_all
        ]
    title = "Passed" if facts["passed"] else f"Failed: {len(findings)} finding{'s' if len(findings) != 1 else ''}"
    state = "good" if facts["passed"] else "bad"
    verdict = f'<div class="verdict {state}"><strong>{title}</strong><ul>{"".join(checks)}</ul></div>'
    return verdict + _findings("Findings", findings) + _findings("Notices", facts["notices"])


def _comparisons(comparison: ComparisonFacts) -> list[tuple[str, int, int]]:
    """Return the checks against the source: what each checks, and how many of how many tensors passed."""
    n_tuned = comparison["n_tuned"]
    return [
        (
            "Codes and scales equal a new encoding of the source"
            if comparison["scale_change"] is None
            else "Codes equal a new encoding of the source; the tuned scales differ from it by at most "
            f"{comparison['scale_change']:.0%}",
            comparison["n_exact"],
            comparison["n_packed"] - comparison["n_chosen"],
        ),
        ("Calibrated codes and scales are close to the source", comparison["n_near"], comparison["n_chosen"]),
        (
            "Kept tensors are bit-identical to the source" + (f", except for {n_tuned:,} tuned" if n_tuned else ""),
            comparison["n_identical"] + n_tuned,
            comparison["n_kept"],
        ),
        (
            "Tensors of the source have the digests that the manifest records",
            comparison["n_source_named"],
            comparison["n_source_digests"],
        ),
    ]


def _check(passed: bool, text: str) -> str:
    return f'<li class="{"yes" if passed else "no"}">{text}</li>'


def _findings(title: str, findings: Sequence[FindingFacts]) -> str:
    if not findings:
        return ""
    shown = "".join(
        f'<div class="finding"><span class="reason">{escape(finding["reason"])}</span> '
        f"<code>{escape(finding['tensor'] or finding['file'])}</code><p>{escape(finding['message'])}</p></div>"
        for finding in findings
    )
    return f"<h2>{title}</h2>{shown}"


def _summary(facts: VerificationFacts, comparison: ComparisonFacts) -> str:
    before, after = comparison["source_nbytes"], facts["integrity"]["nbytes"]
    overall = comparison["overall"]
    shown = tiles(
        [
            (
                f"{format_nbytes(before)} → {format_nbytes(after)}",
                f"tensors of the source → files of the artifact ({number(_ratio(after, before), '.1%')})",
            ),
            (number(comparison["bits_per_weight"], ".3f"), "bits per packed weight, including scales and code tables"),
            (number(comparison["bits_per_parameter"], ".3f"), "bits per parameter of the whole model"),
            (f"{overall['n_weights']:,}", f"packed weights in {comparison['n_packed']:,} tensors"),
            (percent(overall["relative_rms"]), "relative RMS error"),
            (f"{number(overall['snr_db'], '.2f')} dB", "signal-to-noise ratio"),
            (number(overall["cosine"], ".5f"), "cosine similarity"),
            (number(overall["max_abs_error"], ".4g"), "maximum absolute error"),
        ]
    )
    return f"<h2>Summary</h2>{shown}{glossary(_TERMS)}"


_TERMS = (
    (
        "Errors",
        "Differences between the weights w of the source and the decoded weights q, as a model uses them: decoded in "
        "float32, then rounded to the dtype of the tensor. Sums are in float64. Kept tensors are not counted.",
    ),
    ("Relative RMS error", "√(Σ(w − q)² / Σw²). Lower is better; about 9% is usual for NF4 with blocks of 64."),
    ("Signal-to-noise ratio (SNR)", "10 log₁₀(Σw² / Σ(w − q)²), in decibels. Higher is better."),
    ("Cosine similarity", "Σwq / √(Σw² Σq²). 1 means that w and q have the same direction."),
    ("Maximum absolute error", "The largest |w − q|, in the unit of the weights."),
)


def _by_kind(comparison: ComparisonFacts) -> str:
    columns = [Column("module"), Column("tensors", number=True), *ERROR_COLUMNS]
    rows = [
        [
            Cell(escape(kind["kind"])),
            Cell(f"{kind['n_tensors']:,}", kind["n_tensors"]),
            *error_cells(kind["errors"]),
        ]
        for kind in comparison["by_kind"]
    ]
    return "<h2>Errors by module</h2>" + table(columns, rows, sortable=True)


def _by_layer(comparison: ComparisonFacts) -> str:
    points: dict[str, list[Point]] = {}
    for tensor in comparison["packed"]:
        value = tensor["errors"]["relative_rms"]
        if tensor["layer"] is not None and value is not None:
            point = Point(tensor["layer"], value, f"{tensor['name']}: {value:.3%}")
            points.setdefault(tensor["kind"], []).append(point)
    values = [point.value for group in points.values() for point in group]
    if not values:
        return ""
    marks = ticks(min(values), max(values), at_most=6)
    n_layers = 1 + max(point.x for group in points.values() for point in group)
    overall = {kind["kind"]: kind["errors"]["relative_rms"] for kind in comparison["by_kind"]}
    panels = "".join(
        f"<figure><figcaption><b>{escape(kind)}</b> {percent(overall[kind])} over all layers</figcaption>"
        f"{layer_panel(group, marks, n_layers, f'Relative RMS error of {kind} by layer')}</figure>"
        for kind, group in points.items()
    )
    return (
        '<h2>Errors by layer</h2><p class="muted">Each dot is one packed tensor. All panels have the same axes; the '
        "vertical axis does not start at zero.</p>"
        f'<div class="panels">{panels}</div>'
    )


def _codes(comparison: ComparisonFacts) -> str:
    counts = comparison["code_counts"]
    total = sum(counts)
    if not total:
        return ""
    by_block_size: Counter[int] = Counter()
    for tensor in comparison["packed"]:
        by_block_size[tensor["block_size"]] += sum(tensor["code_counts"])
    expected = expected_shares(by_block_size)
    plot = code_histogram([count / total for count in counts], expected.tolist())
    sizes = " or ".join(f"{size}" for size in sorted(by_block_size))
    return (
        f'<h2>Codes</h2><figure class="wide"><div class="scroll">{plot}</div><figcaption><span class="key"></span> '
        f'share of each code among {total:,} weights <span class="key ideal-key"></span> expected share'
        "</figcaption></figure>"
        '<p class="muted">The expected shares hold for independent, normally distributed weights in blocks of '
        f"{sizes}. The entropy of the codes is {number(_entropy_bits(counts), '.3f')} of 4 bits.</p>"
    )


def _largest(comparison: ComparisonFacts) -> str:
    ranked = sorted(comparison["packed"], key=lambda tensor: -(tensor["errors"]["relative_rms"] or 0.0))[:N_LARGEST]
    if not ranked:
        return ""
    title = (
        f"<h2>Largest errors</h2><p class='muted'>The {len(ranked)} tensors with the largest relative RMS error.</p>"
    )
    rows = [
        [name_cell(tensor["name"]), shape_cell(tensor["shape"]), *error_cells(tensor["errors"])] for tensor in ranked
    ]
    return title + table([Column("tensor"), Column("shape"), *ERROR_COLUMNS], rows, sortable=True)


def _packed(comparison: ComparisonFacts) -> str:
    if not comparison["packed"]:
        return ""
    columns = [Column("tensor"), Column("dtype"), Column("shape"), Column("block size", number=True), *ERROR_COLUMNS]
    rows = [
        [
            name_cell(tensor["name"]),
            Cell(escape(tensor["dtype"])),
            shape_cell(tensor["shape"]),
            Cell(f"{tensor['block_size']}{'' if tensor['double_quant'] else ', float32 absmax'}", tensor["block_size"]),
            *error_cells(tensor["errors"]),
            Cell(_mark(tensor)),
        ]
        for tensor in comparison["packed"]
    ]
    note = "<p class='muted'>Exact: codes and scales are byte-identical to a new encoding of the source.</p>"
    return "<h2>Packed weights</h2>" + note + table([*columns, Column("exact")], rows, sortable=True)


def _mark(tensor: PackedFacts) -> str:
    codes, scales = tensor["n_wrong_codes"], tensor["n_wrong_scales"]
    if tensor["n_far_scales"] is not None:
        return f"calibrated, {tensor['n_far_scales']:,} scales far from the source"
    if codes is None or scales is None:
        return '<span class="no">source has NaN or Inf</span>'
    wrong = f"{codes:,} codes, {scales:,} scales differ"
    return f'<span class="no">{wrong}</span>' if codes or scales else '<span class="yes"></span>'


def _kept(comparison: ComparisonFacts) -> str:
    if not comparison["kept"]:
        return ""
    columns = [
        Column("tensor"),
        Column("dtype"),
        Column("shape"),
        Column("bytes", number=True),
        Column("reason"),
    ]
    rows = [
        [
            name_cell(tensor["name"]),
            Cell(escape(tensor["dtype"])),
            shape_cell(tensor["shape"]),
            Cell(f"{tensor['nbytes']:,}", tensor["nbytes"]),
            Cell(escape(tensor["reason"].replace("_", " "))),
            Cell(
                "tuned"
                if tensor["tuned"]
                else f'<span class="no">{tensor["n_wrong_bytes"]:,} bytes differ</span>'
                if tensor["n_wrong_bytes"]
                else '<span class="yes"></span>'
            ),
        ]
        for tensor in comparison["kept"]
    ]
    return "<h2>Kept tensors</h2>" + table([*columns, Column("identical")], rows, sortable=True)


def _provenance(facts: VerificationFacts, manifest: ManifestFacts) -> str:
    source = manifest["source"]
    files = source.get("files")
    names = ", ".join(files) if isinstance(files, dict) else ""
    comparison = facts["comparison"]
    origin = [
        ("artifact", facts["path"]),
        ("format", f"qformat {manifest['format_version']}, written by {manifest['generator']}"),
        ("source", f"{source.get('kind', 'unknown')}: {names}"),
        ("compared with", comparison["source"] if comparison is not None else "nothing"),
        ("recipe", strict_json.dumps(manifest["recipe"])),
    ]
    rows = [
        [
            Cell(escape(name)),
            Cell(f"{record['nbytes']:,}", record["nbytes"]),
            Cell(f"<code>{escape(record['sha256'])}</code>"),
        ]
        for name, record in manifest["files"].items()
    ]
    checked = (
        "This verification checked them."
        if facts["integrity"]["sha256_checked"]
        else "For the shards, this verification checked the XXH3-128 digests instead."
    )
    return (
        f"<h2>Provenance</h2>{pairs(origin)}<h2>Files</h2>"
        f'<p class="muted">SHA-256 digests that the manifest records. {checked}</p>'
        + table([Column("file"), Column("bytes", number=True), Column("SHA-256")], rows)
    )


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _entropy_bits(counts: Sequence[int]) -> float:
    total = sum(counts)
    return -sum(count / total * math.log2(count / total) for count in counts if count)
