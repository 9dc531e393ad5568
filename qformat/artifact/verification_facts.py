"""Result of a verification as plain JSON values, for `qformat verify --json` and the report page.

`qformat.converters.compare.verification` creates them. A value that does not exist, such as the error of a tensor that
was not compared, is null.
"""

from __future__ import annotations

from typing import TypedDict

from qformat.artifact.manifest import JsonObject


class FindingFacts(TypedDict):
    """One problem.

    Attributes:
        reason: Reason code of spec section 9.
        file: Name of the file.
        tensor: Name of the tensor.
        component: Component of the tensor, or field.
        message: Description of the problem.
    """

    reason: str
    file: str
    tensor: str | None
    component: str | None
    message: str


class IntegrityFacts(TypedDict):
    """Result of the check of the structure and the digests.

    Attributes:
        passed: Whether no problem was found.
        n_files: Number of files, including the manifest.
        nbytes: Total size of the files that the manifest lists, in bytes.
        sha256_checked: Whether the SHA-256 of every shard was checked.
        signature_checked: Whether the signature was checked with a public key. A wrong signature is a finding.
    """

    passed: bool
    n_files: int
    nbytes: int
    sha256_checked: bool
    signature_checked: bool


class FileFacts(TypedDict):
    """Entry of a file in the manifest.

    Attributes:
        nbytes: Size in bytes.
        sha256: SHA-256 of the file.
    """

    nbytes: int
    sha256: str


class ManifestFacts(TypedDict):
    """Origin of the artifact, from its manifest.

    Attributes:
        format_version: Version of the format.
        generator: Program and version that wrote the artifact.
        source: Description of the source checkpoint.
        recipe: Options of the conversion.
        files: Entries of the files by name.
    """

    format_version: str
    generator: str
    source: JsonObject
    recipe: JsonObject
    files: dict[str, FileFacts]


class ErrorFacts(TypedDict):
    """Error of decoded weights against the source.

    Attributes:
        n_weights: Number of weights.
        relative_rms: Root mean square of the error, divided by that of the source weights.
        snr_db: Signal-to-noise ratio in decibels.
        max_abs_error: Largest absolute error, in units of the weights.
        cosine: Cosine similarity.
    """

    n_weights: int
    relative_rms: float | None
    snr_db: float | None
    max_abs_error: float | None
    cosine: float | None


class PackedFacts(TypedDict):
    """Comparison of a packed weight with its source tensor.

    Attributes:
        name: Name of the weight.
        kind: Last part of the path of its module, such as `q_proj`.
        layer: First number in its name.
        dtype: Dtype of the source tensor.
        shape: Shape of the weight.
        block_size: Number of elements per block.
        double_quant: Whether the absmax values are quantized as well.
        source_nbytes: Size of the source tensor in bytes.
        nbytes: Size of all components in bytes.
        errors: Error of the decoded weight.
        code_counts: How often each of the 16 codes occurs.
        n_wrong_codes: Number of codes that differ from the default encoding of the source.
        n_wrong_scales: Number of scales that differ from the default encoding of the source.
        n_far_scales: Number of scales of a calibrated weight that are far from the source.
        source_named: Whether the source tensor has the digest in the manifest.
    """

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
    """Comparison of a kept tensor with its source tensor.

    Attributes:
        name: Name of the tensor.
        dtype: Dtype of the tensor.
        shape: Shape of the tensor.
        reason: Why the tensor is not packed.
        nbytes: Size in bytes.
        n_wrong_bytes: Number of bytes that differ from the source tensor.
        source_named: Whether the source tensor has the digest in the manifest.
        tuned: Whether tuning changed the tensor.
    """

    name: str
    dtype: str
    shape: list[int]
    reason: str
    nbytes: int
    n_wrong_bytes: int
    source_named: bool
    tuned: bool


class KindFacts(TypedDict):
    """Summary of the packed weights of one kind of module.

    Attributes:
        kind: Last part of the paths of the modules, such as `q_proj`.
        n_tensors: Number of packed weights.
        errors: Error of all their decoded weights.
    """

    kind: str
    n_tensors: int
    errors: ErrorFacts


class ComparisonFacts(TypedDict):
    """Comparison of an artifact with its source checkpoint.

    Attributes:
        source: Path of the source.
        source_nbytes: Size of the compared source tensors in bytes.
        bits_per_weight: Average size of a packed weight's element in bits, including scales.
        bits_per_parameter: Average size of an element of any tensor in bits.
        overall: Error of all packed weights.
        code_counts: How often each of the 16 codes occurs.
        n_packed: Number of packed weights.
        n_exact: Number of them, without calibrated ones, whose codes and scales are the default encoding of the source.
        n_chosen: Number of calibrated weights: their codes were chosen on a text.
        n_near: Number of calibrated weights that are close to the source.
        n_kept: Number of kept tensors.
        n_identical: Number of kept tensors that are bit-identical to the source.
        n_tuned: Number of kept tensors that tuning changed.
        scale_change: Largest relative change of a scale by tuning, null for an artifact that was not tuned.
        n_source_digests: Number of tensors for which the manifest has a digest of the source tensor.
        n_source_named: Number of them whose digest is that of the given source.
        by_kind: Summaries by kind of module.
        packed: Comparisons of the packed weights.
        kept: Comparisons of the kept tensors.
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
    """Duration of each stage in seconds.

    Attributes:
        integrity: Duration of the check of structure and digests.
        comparison: Duration of the comparison with the source.
    """

    integrity: float
    comparison: float


class VerificationFacts(TypedDict):
    """Complete result of a verification.

    Attributes:
        path: Path of the artifact.
        passed: Whether no problem was found.
        findings: All problems.
        notices: Changed, missing and additional files that only accompany the model.
        integrity: Result of the check of structure and digests.
        manifest: Origin of the artifact, null if its manifest cannot be read.
        comparison: Comparison with the source, null without a source.
        seconds: Durations.
    """

    path: str
    passed: bool
    findings: list[FindingFacts]
    notices: list[FindingFacts]
    integrity: IntegrityFacts
    manifest: ManifestFacts | None
    comparison: ComparisonFacts | None
    seconds: Seconds
