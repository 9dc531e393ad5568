"""What a verification found out, as plain JSON values: printed by `qformat verify --json`, shown by the page.

`qformat.converters.compare.verification` makes them.

A figure is null where it does not exist, such as the error of a tensor that was not compared.
"""

from __future__ import annotations

from typing import TypedDict

from qformat.artifact.manifest import JsonObject


class FindingFacts(TypedDict):
    """One thing that is wrong. The reason is a code of spec section 9."""

    reason: str
    file: str
    tensor: str | None
    component: str | None
    message: str


class IntegrityFacts(TypedDict):
    """The check of structure and digests. nbytes: of every file that the manifest names.

    signature_checked: the signature was checked with a public key; what is wrong with it is a finding.
    """

    passed: bool
    n_files: int
    nbytes: int
    sha256_checked: bool
    signature_checked: bool


class FileFacts(TypedDict):
    """A file of the artifact, as the manifest has it."""

    nbytes: int
    sha256: str


class ManifestFacts(TypedDict):
    """Where the artifact comes from."""

    format_version: str
    generator: str
    source: JsonObject
    recipe: JsonObject
    files: dict[str, FileFacts]


class ErrorFacts(TypedDict):
    """How far decoded weights are from the source's. max_abs_error is in units of the weights."""

    n_weights: int
    relative_rms: float | None
    snr_db: float | None
    max_abs_error: float | None
    cosine: float | None


class PackedFacts(TypedDict):
    """A packed weight beside its source. layer: the first number in its name; kind: the last part of its path."""

    name: str
    kind: str
    layer: int | None
    dtype: str
    shape: list[int]
    block_size: int
    double_quant: bool
    source_nbytes: int
    nbytes: int
    errors: ErrorFacts
    code_counts: list[int]
    n_wrong_codes: int | None
    n_wrong_scales: int | None
    n_far_scales: int | None
    source_named: bool | None


class KeptFacts(TypedDict):
    """A kept tensor beside its source."""

    name: str
    dtype: str
    shape: list[int]
    reason: str
    nbytes: int
    n_wrong_bytes: int
    source_named: bool
    tuned: bool


class KindFacts(TypedDict):
    """All packed weights of one kind of module."""

    kind: str
    n_tensors: int
    errors: ErrorFacts


class ComparisonFacts(TypedDict):
    """The comparison with a source.

    n_exact of n_packed, n_identical of n_kept and n_source_named of n_source_digests tensors passed the three checks.
    The codes of n_chosen packed weights were chosen on a text, n_near of them are near the source; n_exact counts the
    others. n_tuned kept tensors differ as the manifest says that they do, and scales may by a share of scale_change.
    bits_per_weight is that of packed weights, bits_per_parameter that of all tensors.
    """

    source: str
    source_nbytes: int
    bits_per_weight: float | None
    bits_per_parameter: float | None
    overall: ErrorFacts
    code_counts: list[int]
    n_packed: int
    n_exact: int
    n_chosen: int
    n_near: int
    n_kept: int
    n_identical: int
    n_tuned: int
    scale_change: float | None
    n_source_digests: int
    n_source_named: int
    by_kind: list[KindFacts]
    packed: list[PackedFacts]
    kept: list[KeptFacts]


class Seconds(TypedDict):
    """What the stages took."""

    integrity: float
    comparison: float


class VerificationFacts(TypedDict):
    """Everything. manifest and comparison are null where the artifact could not be read, or was not compared."""

    path: str
    passed: bool
    findings: list[FindingFacts]
    integrity: IntegrityFacts
    manifest: ManifestFacts | None
    comparison: ComparisonFacts | None
    seconds: Seconds
