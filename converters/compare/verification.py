"""Verifies an artifact, alone or against its source: one record of the results, and its JSON form.

The kernels of a comparison are imported only if there is a source, because importing them takes longer than checking
digests.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qformat.artifact.manifest import Manifest
from qformat.artifact.reading.reader import Artifact
from qformat.artifact.reading.structure import read_manifest
from qformat.artifact.reading.verify import (
    Finding,
    IntegrityReport,
    finding_of,
    signed_differences,
    verify_integrity,
)
from qformat.artifact.verification_facts import (
    ComparisonFacts,
    ErrorFacts,
    FindingFacts,
    KeptFacts,
    ManifestFacts,
    PackedFacts,
    VerificationFacts,
)
from qformat.converters.sources.file_source import INDEX_WINS
from qformat.converters.sources.open_source import is_repository, open_source
from qformat.converters.sources.source import Source
from qformat.cores import usable_cores
from qformat.errors import ArtifactError
from qformat.hub.signature import check_local_signature

if TYPE_CHECKING:
    from qformat.codec.cpu.error_sums import ErrorSums
    from qformat.converters.compare.comparison import Comparison, KeptComparison, PackedComparison

Stage = Literal["digests", "comparison"]


@dataclass(frozen=True, slots=True)
class Verification:
    """Result of verifying an artifact.

    Attributes:
        integrity: Structure, digests and, if it was checked, the signature.
        comparison: Comparison with the source. None without a source, or if the artifact is too damaged to be opened.
        signature_checked: Whether the signature was checked.
        integrity_s: Duration of the integrity check in seconds.
        comparison_s: Duration of the comparison in seconds.
    """

    integrity: IntegrityReport
    comparison: Comparison | None
    signature_checked: bool
    integrity_s: float
    comparison_s: float

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Everything that is wrong."""
        return self.integrity.findings + (self.comparison.findings if self.comparison is not None else ())

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    def to_json(self) -> VerificationFacts:
        """Return the whole record as plain JSON values, as `qformat verify --json` prints it."""
        integrity, comparison = self.integrity, self.comparison
        return {
            "path": str(integrity.path),
            "passed": self.passed,
            "findings": [_finding_json(finding) for finding in self.findings],
            "notices": [_finding_json(notice) for notice in self.integrity.notices],
            "integrity": {
                "passed": integrity.passed,
                "n_files": integrity.n_files,
                "nbytes": integrity.nbytes,
                "sha256_checked": integrity.sha256_checked,
                "signature_checked": self.signature_checked,
            },
            "manifest": None if integrity.manifest is None else _manifest_json(integrity.manifest),
            "comparison": None if comparison is None else _comparison_json(comparison),
            "seconds": {"integrity": round(self.integrity_s, 3), "comparison": round(self.comparison_s, 3)},
        }


def verify_against_source(
    artifact: Path | str,
    source: Path | str | None,
    *,
    sha256: bool = False,
    public_key: Path | None = None,
    workers: int | None = None,
    on_stage: Callable[[Stage, int], None] = lambda stage, nbytes: None,
    on_progress: Callable[[int], None] = lambda nbytes: None,
    on_compile: Callable[[], None] = lambda: None,
) -> Verification:
    """Check an artifact's integrity and compare it with its source. A problem is a finding and raises no exception.

    Args:
        artifact: Directory of the artifact.
        source: A checkpoint as for `convert`. A Hub repository is read at the commit recorded in the manifest. None
            skips the comparison.
        sha256: Whether to check the SHA-256 of every shard as well.
        public_key: Key to check the signature with. Includes the SHA-256 of every shard, because these are signed.
        workers: Number of threads. Defaults to one per usable core.
        on_stage: Called with the name and the number of bytes of a stage when it begins.
        on_progress: Called with the number of bytes processed since the last call.
        on_compile: Called once if kernels must be compiled.

    Raises:
        SourceError: The source cannot be opened.
        HubError: The Hub rejects a request or does not answer.
        UsageError: The source is not a checkpoint that can be read.
    """
    artifact, workers = Path(artifact), workers or usable_cores()
    manifest = None
    with ExitStack() as stack:
        opened = None
        if source is not None:
            manifest = _readable_manifest(artifact)
            revision = _recorded_commit(manifest, str(source)) if is_repository(source) else None
            index_wins = manifest is not None and INDEX_WINS in manifest.source
            opened = open_source(source, revision=revision, index_wins=index_wins)
            stack.callback(opened.close)
        started = time.monotonic()
        integrity = verify_integrity(
            artifact,
            manifest=manifest,
            sha256=sha256 or public_key is not None,
            workers=workers,
            on_plan=lambda nbytes: on_stage("digests", nbytes),
            on_progress=on_progress,
        )
        if public_key is not None:
            integrity = _with_signature(integrity, public_key)
        checked = time.monotonic()
        comparison = None
        if source is not None and opened is not None and integrity.structure is not None:
            from qformat.converters.compare.compare import compare

            on_stage("comparison", _nbytes(opened))
            try:
                comparison = compare(
                    Artifact(integrity.structure),
                    opened,
                    workers=workers,
                    on_progress=on_progress,
                    on_compile=on_compile,
                )
                if not is_repository(source):
                    # The location of a GGUF file is its directory; the result shows the file that the caller gave.
                    comparison = replace(comparison, source=Path(source))
            except ArtifactError:  # the integrity report says what is damaged
                if integrity.passed:
                    raise
        compared = time.monotonic()
    return Verification(integrity, comparison, public_key is not None, checked - started, compared - checked)


def _readable_manifest(artifact: Path) -> Manifest | None:
    try:
        return read_manifest(artifact)
    except ArtifactError:  # the integrity check reports what is wrong with it
        return None


def _recorded_commit(manifest: Manifest | None, source: str) -> str | None:
    """Return the commit that the artifact was converted from, if it was converted from this repository."""
    if manifest is None:
        return None
    commit = manifest.source.get("commit")
    return commit if manifest.source.get("repository") == source and isinstance(commit, str) else None


def _with_signature(integrity: IntegrityReport, public_key: Path) -> IntegrityReport:
    """Return the report with findings about the signature and about all files that differ from the manifest."""
    names = os.listdir(integrity.path) if integrity.path.is_dir() else []
    signed = signed_differences(integrity.notices, names, integrity.path)
    try:
        check_local_signature(integrity.path, public_key)
    except ArtifactError as error:
        signed.append(finding_of(error))
    return replace(integrity, findings=(*integrity.findings, *signed), notices=())


def _nbytes(source: Source) -> int:
    plain = sum(tensor.nbytes for tensor in source.tensors.values())
    return plain + sum(weight.nbytes for weight in source.packed.values())


def _finding_json(finding: Finding) -> FindingFacts:
    return {
        "reason": finding.reason.value,
        "file": finding.file,
        "tensor": finding.tensor,
        "component": finding.component,
        "message": finding.message,
    }


def _manifest_json(manifest: Manifest) -> ManifestFacts:
    return {
        "format_version": manifest.format_version,
        "generator": manifest.generator,
        "source": manifest.source,
        "recipe": manifest.recipe,
        "files": {name: {"nbytes": record.nbytes, "sha256": record.sha256} for name, record in manifest.files.items()},
    }


def _comparison_json(comparison: Comparison) -> ComparisonFacts:
    from qformat.codec.cpu.error_sums import add_up

    return {
        "source": str(comparison.source),
        "source_nbytes": comparison.source_nbytes,
        "bits_per_weight": comparison.bits_per_weight,
        "bits_per_parameter": comparison.bits_per_parameter,
        "overall": _error_json(comparison.overall),
        "code_counts": list(comparison.code_counts),
        "n_packed": comparison.n_packed,
        "n_exact": comparison.n_exact,
        "n_chosen": comparison.n_chosen,
        "n_near": comparison.n_near,
        "n_kept": comparison.n_kept,
        "n_identical": comparison.n_identical,
        "n_tuned": len(comparison.tuned),
        "scale_change": comparison.scale_change,
        "n_source_digests": comparison.n_source_digests,
        "n_source_named": comparison.n_source_named,
        "by_kind": [
            {
                "kind": kind,
                "n_tensors": len(tensors),
                "errors": _error_json(add_up(tensor.errors for tensor in tensors)),
            }
            for kind, tensors in comparison.by_kind().items()
        ],
        "packed": [_packed_json(tensor) for tensor in comparison.packed],
        "kept": [_kept_json(tensor) for tensor in comparison.kept],
    }


def _packed_json(tensor: PackedComparison) -> PackedFacts:
    from qformat.converters.compare.comparison import kind_of, layer_of

    return {
        "name": tensor.name,
        "kind": kind_of(tensor.name),
        "layer": layer_of(tensor.name),
        "dtype": tensor.layout.float_format.value,
        "shape": list(tensor.layout.shape),
        "block_size": tensor.layout.block_size,
        "double_quant": tensor.layout.double_quant,
        "source_nbytes": tensor.source_nbytes,
        "nbytes": tensor.nbytes,
        "errors": _error_json(tensor.errors),
        "code_counts": list(tensor.code_counts),
        "n_wrong_codes": tensor.n_wrong_codes,
        "n_wrong_scales": tensor.n_wrong_scales,
        "n_far_scales": tensor.n_far_scales,
        "source_named": tensor.source_named,
    }


def _kept_json(tensor: KeptComparison) -> KeptFacts:
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "reason": tensor.keep_reason,
        "nbytes": tensor.nbytes,
        "n_wrong_bytes": tensor.n_wrong_bytes,
        "source_named": tensor.source_named,
        "tuned": tensor.tuned,
    }


def _error_json(errors: ErrorSums) -> ErrorFacts:
    return {
        "n_weights": errors.n_weights,
        "relative_rms": errors.relative_rms,
        "snr_db": errors.snr_db,
        "max_abs_error": errors.max_abs_error,
        "cosine": errors.cosine,
    }
