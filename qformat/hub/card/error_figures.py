"""Quantization errors for the model card, from the output of `qformat verify --source --json`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, cast

from qformat import strict_json
from qformat.artifact.manifest import JsonObject, Manifest
from qformat.artifact.verification_facts import VerificationFacts
from qformat.errors import ArtifactError, UsageError
from qformat.named_files import read_named

_MAX_NBYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """Errors of the packed weights of one kind of module.

    Attributes:
        kind: Last part of the module's path, such as `q_proj`.
        n_tensors: Number of packed tensors.
        n_weights: Number of packed weights.
        relative_rms: Root mean square error, relative to the root mean square of the source's weights.
        max_abs_error: Largest absolute error, in the unit of the weights.
        snr_db: Signal-to-noise ratio in dB.
        cosine: Cosine similarity. All four errors are None if they are not defined.
    """

    kind: str
    n_tensors: int
    n_weights: int
    relative_rms: float | None
    max_abs_error: float | None
    snr_db: float | None
    cosine: float | None


@dataclass(frozen=True, slots=True)
class ErrorFigures:
    """Errors per kind of module and over all packed weights.

    Attributes:
        rows: Errors per kind of module.
        overall: Errors over all packed weights.
        n_exact: Number of packed tensors that are byte-identical to a new encoding of the source.
    """

    rows: tuple[ErrorRow, ...]
    overall: ErrorRow
    n_exact: int

    @classmethod
    def parse(cls, record: strict_json.Json | VerificationFacts, manifest: Manifest, where: Path | str) -> ErrorFigures:
        """Return the figures of a verification.

        Args:
            record: The object that `qformat verify --source --json` prints.
            manifest: Manifest of the artifact that is published.
            where: File that the record comes from, for messages.

        Raises:
            UsageError: The record is not a verification against a source, did not pass, or is about other files.
        """
        fields = _Fields(where)
        top = fields.object(cast(strict_json.Json, record), "the file")
        if top.get("passed") is not True:
            fields.refuse("the verification did not pass")
        files = fields.object(fields.object(top.get("manifest"), "manifest").get("files"), "manifest.files")
        verified = {name: fields.object(entry, name).get("sha256") for name, entry in files.items()}
        if verified != {name: entry.sha256 for name, entry in manifest.files.items()}:
            fields.refuse("it is about other files than the artifact's")
        comparison = top.get("comparison")
        if comparison is None:
            fields.refuse("the verification did not compare the artifact with a source")
        comparison = fields.object(comparison, "comparison")
        kinds = comparison.get("by_kind")
        if not isinstance(kinds, list):
            fields.refuse("comparison.by_kind is not a list")
        rows = []
        for item in kinds:
            entry = fields.object(item, "by_kind")
            kind = entry.get("kind")
            errors = fields.object(entry.get("errors"), "errors")
            rows.append(fields.row(str(kind), fields.count(entry, "n_tensors"), errors))
        overall = fields.row(
            "all", fields.count(comparison, "n_packed"), fields.object(comparison.get("overall"), "overall")
        )
        return cls(tuple(rows), overall, fields.count(comparison, "n_exact"))


def read_error_figures(path: Path, manifest: Manifest) -> ErrorFigures:
    """Read the figures from a file with the output of `qformat verify ART --source SRC --json`.

    Args:
        path: File to read.
        manifest: Manifest of the artifact that is published.

    Raises:
        UsageError: The file cannot be read, or is not a passed verification of this artifact against a source.
    """
    try:
        data = read_named(path, max_nbytes=_MAX_NBYTES)
        record = strict_json.loads(data, path=path, max_nbytes=_MAX_NBYTES, error=ArtifactError)
    except OSError as problem:
        raise UsageError(f"{path}: cannot be read: {problem.strerror}") from None
    except ArtifactError as problem:
        raise UsageError(str(problem)) from None
    return ErrorFigures.parse(record, manifest, path)


class _Fields:
    def __init__(self, where: Path | str) -> None:
        self.where = where

    def refuse(self, problem: str) -> NoReturn:
        raise UsageError(
            f"{self.where}: {problem}. Create it with: qformat verify ART --source SRC --json > {self.where}"
        )

    def object(self, value: strict_json.Json, name: str) -> JsonObject:
        return value if isinstance(value, dict) else self.refuse(f"{name} is not an object")

    def count(self, record: JsonObject, name: str) -> int:
        value = record.get(name)
        return value if type(value) is int and value >= 0 else self.refuse(f"{name} is not a count")

    def number(self, record: JsonObject, name: str) -> float | None:
        value = record.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            self.refuse(f"{name} is not a number")
        return None if value is None else float(value)

    def row(self, kind: str, n_tensors: int, errors: JsonObject) -> ErrorRow:
        return ErrorRow(
            kind,
            n_tensors,
            self.count(errors, "n_weights"),
            self.number(errors, "relative_rms"),
            self.number(errors, "max_abs_error"),
            self.number(errors, "snr_db"),
            self.number(errors, "cosine"),
        )
