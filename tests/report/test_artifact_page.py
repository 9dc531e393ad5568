"""The report of a verification is self-contained, well-formed, complete, and safe for all names in a file."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qformat.artifact.verification_facts import ComparisonFacts, ErrorFacts, KeptFacts, PackedFacts, VerificationFacts
from qformat.report.artifact_page import N_LARGEST, page, write_html

VOID = {"meta"}
EVIL = "model.layers.0.<script>alert(1)</script>.\"onload='x'&amp;.weight"


def errors(relative_rms: float | None) -> ErrorFacts:
    return {
        "n_weights": 4096,
        "relative_rms": relative_rms,
        "snr_db": None if relative_rms is None else 20.5,
        "max_abs_error": None if relative_rms is None else 0.125,
        "cosine": None if relative_rms is None else 0.9956,
    }


def packed(name: str, *, kind: str = "q_proj", layer: int | None = 0, rms: float | None = 0.09) -> PackedFacts:
    return {
        "name": name,
        "kind": kind,
        "layer": layer,
        "dtype": "BF16",
        "shape": [64, 64],
        "block_size": 64,
        "double_quant": True,
        "source_nbytes": 8192,
        "nbytes": 2304,
        "errors": errors(rms),
        "code_counts": [256] * 16,
        "n_wrong_codes": 0,
        "n_wrong_scales": 0,
        "n_far_scales": None,
        "source_named": True,
    }


def kept(name: str, *, n_wrong_bytes: int = 0) -> KeptFacts:
    return {
        "name": name,
        "dtype": "BF16",
        "shape": [64],
        "reason": "not_a_matrix",
        "nbytes": 128,
        "n_wrong_bytes": n_wrong_bytes,
        "source_named": True,
        "tuned": False,
    }


def compared(weights: list[PackedFacts], others: list[KeptFacts]) -> ComparisonFacts:
    kinds = dict.fromkeys(tensor["kind"] for tensor in weights)
    return {
        "source": "/models/Source",
        "source_nbytes": 8192 * len(weights) + 128 * len(others),
        "bits_per_weight": 4.5 if weights else None,
        "bits_per_parameter": 4.6,
        "overall": errors(0.093 if weights else None),
        "code_counts": [256 * len(weights)] * 16,
        "n_packed": len(weights),
        "n_exact": len(weights),
        "n_chosen": 0,
        "n_near": 0,
        "n_kept": len(others),
        "n_identical": len(others),
        "n_tuned": 0,
        "scale_change": None,
        "n_source_digests": len(weights) + len(others),
        "n_source_named": len(weights) + len(others),
        "by_kind": [
            {
                "kind": kind,
                "n_tensors": sum(tensor["kind"] == kind for tensor in weights),
                "errors": errors(0.091),
            }
            for kind in kinds
        ],
        "packed": weights,
        "kept": others,
    }


def facts_of(comparison: ComparisonFacts | None, *, path: str = "/models/Small-nf4") -> VerificationFacts:
    return {
        "path": path,
        "passed": True,
        "findings": [],
        "notices": [],
        "integrity": {
            "passed": True,
            "n_files": 3,
            "nbytes": 12345,
            "sha256_checked": True,
            "signature_checked": False,
        },
        "manifest": {
            "format_version": "1.0",
            "generator": "qformat 0.1.0",
            "source": {"kind": "safetensors", "files": {"model.safetensors": {"nbytes": 9000}}},
            "recipe": {"defaults": {"block_size": 64, "double_quant": True}, "rules": []},
            "files": {"model.safetensors": {"nbytes": 9000, "sha256": "ab" * 32}},
        },
        "comparison": comparison,
        "seconds": {"integrity": 0.5, "comparison": 0.0 if comparison is None else 1.5},
    }


@pytest.fixture
def facts() -> VerificationFacts:
    weights = [
        packed(f"model.layers.{layer}.{kind}.weight", kind=kind, layer=layer, rms=0.09 + 0.001 * layer)
        for layer in range(12)
        for kind in ("q_proj", "up_proj")
    ]
    return facts_of(compared(weights, [kept("model.norm.weight")]))


class Reader(HTMLParser):
    """Collects elements and text, and insists that every element is closed in its place."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in {"line", "rect", "circle", "polyline"}
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in {"script", "style"}:
            self.text.append(data)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def count(reader: Reader, tag: str) -> int:
    return sum(name == tag for name, _ in reader.elements)


def test_the_page_is_well_formed_and_complete(facts: VerificationFacts) -> None:
    reader = read(page(facts))
    headings = " ".join(reader.text)
    for expected in ("Passed", "Summary", "Errors by layer", "Codes", "Largest errors", "Kept tensors", "Provenance"):
        assert expected in headings
    assert count(reader, "svg") == 3  # two kinds and the histogram
    names = [text for text in reader.text if text.startswith("model.layers.") and text.endswith(".weight")]
    assert len(names) == 24 + N_LARGEST
    assert names[0] == "model.layers.11.q_proj.weight"  # the largest error leads


def test_the_page_fetches_nothing(facts: VerificationFacts) -> None:
    html = page(facts)
    assert "://" not in html
    assert "@import" not in html
    assert "url(" not in html
    for tag, attributes in read(html).elements:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "form", "a"}
        assert not {"src", "href", "xlink:href", "srcset", "action", "style"} & attributes.keys()


def test_only_the_page_s_own_script_and_style_may_run(facts: VerificationFacts) -> None:
    html = page(facts)
    for kind, directive in (("script", "script-src"), ("style", "style-src")):
        (text,) = re.findall(rf"<{kind}>(.*?)</{kind}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in html
    assert "default-src 'none'" in html


def test_names_from_files_are_escaped(facts: VerificationFacts) -> None:
    evil = facts_of(compared([packed(EVIL, kind=EVIL)], [kept(EVIL, n_wrong_bytes=1)]), path=f"/tmp/{EVIL[:20]}")
    evil["passed"] = False
    evil["findings"] = [{"reason": "codes_mismatch", "file": EVIL, "tensor": EVIL, "component": None, "message": EVIL}]
    assert evil["manifest"] is not None
    evil["manifest"] |= {"generator": EVIL, "recipe": {EVIL: EVIL}, "files": {EVIL: {"nbytes": 1, "sha256": EVIL}}}
    evil["manifest"]["source"] = {"kind": EVIL, "files": {EVIL: {}}}
    html = page(evil)
    assert "<script>alert" not in html
    reader = read(html)
    assert count(reader, "script") == 1
    assert all(not attribute.startswith("on") for _, attributes in reader.elements for attribute in attributes)
    assert EVIL in reader.text


def test_findings_lead_the_page(facts: VerificationFacts) -> None:
    facts["passed"] = False
    facts["integrity"]["passed"] = False
    facts["findings"] = [
        {"reason": "component_digest", "file": "m", "tensor": f"t{n}", "component": "packed", "message": f"message {n}"}
        for n in range(2)
    ]
    text = read(page(facts)).text
    assert "Failed: 2 findings" in text
    assert text.index("message 1") < text.index("Summary")
    assert "Passed" not in text


def test_a_page_without_a_comparison_says_so() -> None:
    text = " ".join(read(page(facts_of(None))).text)
    assert "Not compared with a source checkpoint" in text
    assert "Summary" not in text


def test_a_page_without_a_manifest_shows_the_finding() -> None:
    facts = facts_of(None)
    facts["manifest"] = None
    assert "Provenance" not in " ".join(read(page(facts)).text)


def test_figures_that_do_not_exist_are_dashes() -> None:
    broken = packed("model.layers.0.q_proj.weight", rms=None)
    broken["n_wrong_codes"] = broken["n_wrong_scales"] = None
    broken["code_counts"] = [0] * 16
    comparison = compared([broken, packed("head.weight", kind="head", layer=None)], [])
    comparison["code_counts"] = [0] * 16
    text = read(page(facts_of(comparison))).text
    assert "–" in text
    assert "source has NaN or Inf" in text
    assert "Errors by layer" not in text  # one has no layer, the other no error


def test_an_artifact_without_packed_weights_has_a_page() -> None:
    text = " ".join(read(page(facts_of(compared([], [kept("model.norm.weight")])))).text)
    assert "Kept tensors" in text
    assert "Largest errors" not in text


def test_the_same_facts_give_the_same_bytes(facts: VerificationFacts, tmp_path: Path) -> None:
    write_html(facts, tmp_path / "a.html")
    write_html(facts, tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_calibrated_and_tuned_tensors_are_counted_apart() -> None:
    comparison = compared([packed("a.weight"), packed("b.weight")], [kept("model.norm.weight")])
    comparison |= {"n_exact": 1, "n_chosen": 1, "n_near": 1, "n_tuned": 1, "n_identical": 0, "scale_change": 0.25}
    comparison["packed"][1]["n_far_scales"] = 3
    comparison["kept"][0]["tuned"] = True
    text = " ".join(read(page(facts_of(comparison))).text)
    assert "the tuned scales differ from it by at most 25%: 1 of 1 tensors" in text
    assert "Calibrated codes and scales are close to the source: 1 of 1 tensors" in text
    assert "bit-identical to the source, except for 1 tuned: 1 of 1 tensors" in text
    assert "calibrated, 3 scales far from the source" in text


def test_findings_are_not_a_table_that_a_phone_cuts_off(facts: VerificationFacts) -> None:
    n_tables = count(read(page(facts)), "table")
    facts["passed"] = False
    facts["findings"] = [
        {"reason": "codes_mismatch", "file": "m", "tensor": "t", "component": None, "message": "a long message"}
    ]
    assert count(read(page(facts)), "table") == n_tables


def test_the_long_tables_come_last(facts: VerificationFacts) -> None:
    text = read(page(facts)).text
    assert text.index("Largest errors") < text.index("Provenance") < text.index("Packed weights")


def test_every_figure_of_the_summary_is_explained(facts: VerificationFacts) -> None:
    reader = read(page(facts))
    terms = {text for text in reader.text if text.startswith(("Relative RMS", "Signal-to-noise", "Cosine", "Maximum"))}
    assert len(terms) == 4
