"""One page about an artifact: what it holds, whether it is whole, how far it is from its source."""

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
from qformat.report.document import document, write_document
from qformat.report.ideal_codes import expected_shares
from qformat.report.plots import Point, code_histogram, layer_panel, ticks
from qformat.report.tables import (
    ERROR_COLUMNS,
    Cell,
    Column,
    error_cells,
    name_cell,
    number,
    percent,
    shape_cell,
    table,
)
from qformat.sizes import format_nbytes

N_LARGEST = 20


def write_html(facts: VerificationFacts, path: Path) -> None:
    """Write the page, in one step once it is complete. Same facts, same bytes.

    Raises: TargetError if the file cannot be written.
    """
    write_document(page(facts), path)


def page(facts: VerificationFacts) -> str:
    """Return the page as HTML."""
    name = escape(Path(facts["path"]).absolute().name)
    sections = [f"<h1>{name}</h1>", _verdict(facts)]
    manifest, comparison = facts["manifest"], facts["comparison"]
    if comparison is not None:
        sections += [_summary(facts, comparison), _by_kind(comparison), _by_layer(comparison)]
        sections += [_codes(comparison), _largest(comparison), _packed(comparison), _kept(comparison)]
    if manifest is not None:
        sections.append(_provenance(facts, manifest))
    return document(f"{name}: qformat verification", sections)


def _verdict(facts: VerificationFacts) -> str:
    findings, integrity, comparison = facts["findings"], facts["integrity"], facts["comparison"]
    covered = "every digest" + (" and the SHA-256 of every file" if integrity["sha256_checked"] else "")
    size = f"{integrity['n_files']} files, {integrity['nbytes']:,} bytes"
    state = "intact" if integrity["passed"] else "damaged"
    checks = [_check(integrity["passed"], f"The artifact is {state}: structure and {covered} checked ({size})")]
    if comparison is None:
        checks.append('<li class="open">Not compared with a source</li>')
    else:
        n_encoded, n_kept = comparison["n_packed"] - comparison["n_chosen"], comparison["n_kept"]
        for text, n_good, n_all in (
            (
                "Codes and scales are what the recipe gives"
                if comparison["scale_change"] is None
                else f"Codes are what the recipe gives, tuned scales within {comparison['scale_change']:.0%} of it",
                comparison["n_exact"],
                n_encoded,
            ),
            (
                "Codes and scales were chosen on a text, and are near the source",
                comparison["n_near"],
                comparison["n_chosen"],
            ),
            (
                "Kept tensors are the source's, bit for bit"
                if not comparison["n_tuned"]
                else f"Kept tensors are the source's, bit for bit, or tuned ({comparison['n_tuned']:,})",
                comparison["n_identical"] + comparison["n_tuned"],
                n_kept,
            ),
            (
                "The source is the one that the manifest names",
                comparison["n_source_named"],
                comparison["n_source_digests"],
            ),
        ):
            if n_all:
                checks.append(_check(n_good == n_all, f"{text}: {n_good:,} of {n_all:,} tensors"))
    title = "Passed" if facts["passed"] else f"{len(findings)} finding{'s' if len(findings) != 1 else ''}"
    state = "good" if facts["passed"] else "bad"
    return f'<div class="verdict {state}"><strong>{title}</strong><ul>{"".join(checks)}</ul></div>' + _findings(
        findings
    )


def _check(good: bool, text: str) -> str:
    return f'<li class="{"yes" if good else "no"}">{text}</li>'


def _findings(findings: Sequence[FindingFacts]) -> str:
    if not findings:
        return ""
    rows = [
        [
            Cell(f'<span class="reason">{escape(finding["reason"])}</span>'),
            name_cell(finding["tensor"] or finding["file"]),
            Cell(escape(finding["message"])),
        ]
        for finding in findings
    ]
    return "<h2>Findings</h2>" + table([Column("reason"), Column("where"), Column("what")], rows)


def _summary(facts: VerificationFacts, comparison: ComparisonFacts) -> str:
    before, after = comparison["source_nbytes"], facts["integrity"]["nbytes"]
    overall = comparison["overall"]
    bits = comparison["bits_per_weight"]
    tiles = [
        (
            f"{format_nbytes(before)} → {format_nbytes(after)}",
            f"tensors before, artifact after ({number(_ratio(after, before), '.1%')})",
        ),
        (number(bits, ".3f"), "bits a packed weight, scales and maps included"),
        (number(comparison["bits_per_parameter"], ".3f"), "bits a parameter of the whole model"),
        (f"{overall['n_weights']:,}", f"packed weights in {comparison['n_packed']:,} tensors"),
        (percent(overall["relative_rms"]), "relative RMS error"),
        (f"{number(overall['snr_db'], '.2f')} dB", "signal to noise"),
        (number(overall["cosine"], ".5f"), "cosine"),
        (number(overall["max_abs_error"], ".4g"), "largest error of a weight"),
    ]
    shown = "".join(f'<div class="tile"><b>{value}</b><span>{meaning}</span></div>' for value, meaning in tiles)
    return (
        f'<h2>Summary</h2><div class="tiles">{shown}</div>'
        '<p class="muted">Errors are those of the values that a reader computes with: decoded in float32, then rounded '
        "to the dtype of the weight. w are the source's weights, q the decoded values; the relative RMS error is the "
        "root of Σ(w−q)² / Σw², summed in float64. Kept tensors have none and are not counted.</p>"
    )


def _by_kind(comparison: ComparisonFacts) -> str:
    columns = [Column("kind of module"), Column("tensors", number=True), *ERROR_COLUMNS]
    rows = [
        [
            Cell(escape(kind["kind"])),
            Cell(f"{kind['n_tensors']:,}", kind["n_tensors"]),
            *error_cells(kind["errors"]),
        ]
        for kind in comparison["by_kind"]
    ]
    return "<h2>Errors by kind of module</h2>" + table(columns, rows, sortable=True)


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
    n_layers = 1 + max(point.layer for group in points.values() for point in group)
    overall = {kind["kind"]: kind["errors"]["relative_rms"] for kind in comparison["by_kind"]}
    panels = "".join(
        f"<figure><figcaption><b>{escape(kind)}</b> {percent(overall[kind])}</figcaption>"
        f"{layer_panel(group, marks, n_layers, f'Relative RMS error of {kind} by layer')}</figure>"
        for kind, group in points.items()
    )
    return (
        '<h2>Errors by layer</h2><p class="muted">Relative RMS error of each packed tensor over its layer, one panel '
        "for each kind of module; all panels share their axes, and the error axis does not begin at zero.</p>"
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
    sizes = ", ".join(f"{size}" for size in sorted(by_block_size))
    entropy = number(_entropy_bits(counts), ".3f")
    return (
        f'<h2>Codes</h2><figure class="wide">{plot}<figcaption><span class="key"></span> share of each code among '
        f"{total:,} weights (code above, its value below) "
        '<span class="key ideal-key"></span> expected share</figcaption></figure>'
        '<p class="muted">Expected: what independent, normally distributed weights give when each block of '
        f"{sizes} is divided by its largest magnitude, by numerical integration over the distribution of that "
        f"magnitude. The codes carry {entropy} of 4 bits.</p>"
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
    columns = [Column("tensor"), Column("dtype"), Column("shape"), Column("block", number=True), *ERROR_COLUMNS]
    rows = [
        [
            name_cell(tensor["name"]),
            Cell(escape(tensor["dtype"])),
            shape_cell(tensor["shape"]),
            Cell(f"{tensor['block_size']}{'' if tensor['double_quant'] else ' f32'}", tensor["block_size"]),
            *error_cells(tensor["errors"]),
            Cell(_mark(tensor)),
        ]
        for tensor in comparison["packed"]
    ]
    note = "<p class='muted'>Exact: codes and scales are, byte for byte, what encoding the source gives.</p>"
    return "<h2>Packed weights</h2>" + note + table([*columns, Column("exact")], rows, sortable=True)


def _mark(tensor: PackedFacts) -> str:
    codes, scales = tensor["n_wrong_codes"], tensor["n_wrong_scales"]
    if tensor["n_far_scales"] is not None:
        return f"chosen on a text, {tensor['n_far_scales']:,} scales far"
    if codes is None or scales is None:
        return '<span class="no">source not finite</span>'
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
        Column("why it is kept"),
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
    lines = [
        ("artifact", facts["path"]),
        ("format", f"qformat {manifest['format_version']}, written by {manifest['generator']}"),
        ("source", f"{source.get('kind', 'unknown')}: {names}"),
        ("compared with", comparison["source"] if comparison is not None else "no source"),
        ("recipe", strict_json.dumps(manifest["recipe"])),
    ]
    facts_table = "".join(f"<tr><th>{key}</th><td><code>{escape(value)}</code></td></tr>" for key, value in lines)
    rows = [
        [
            Cell(escape(name)),
            Cell(f"{record['nbytes']:,}", record["nbytes"]),
            Cell(f"<code>{escape(record['sha256'])}</code>"),
        ]
        for name, record in manifest["files"].items()
    ]
    checked = (
        "checked"
        if facts["integrity"]["sha256_checked"]
        else "those of the shards were not taken again, their XXH3-128 were"
    )
    return (
        f"<h2>Provenance</h2><table>{facts_table}</table><h2>Files</h2>"
        f'<p class="muted">SHA-256 as the manifest has them ({checked}).</p>'
        + table([Column("file"), Column("bytes", number=True), Column("SHA-256")], rows)
    )


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _entropy_bits(counts: Sequence[int]) -> float:
    total = sum(counts)
    return -sum(count / total * math.log2(count / total) for count in counts if count)
