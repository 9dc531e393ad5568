"""How far an artifact is from its source, for the model card: from what `qformat verify --source --json` prints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, cast

from qformat import strict_json
from qformat.artifact.manifest import JsonObject, Manifest
from qformat.artifact.reading.regular_files import read_small
from qformat.artifact.verification_facts import VerificationFacts
from qformat.errors import ArtifactError, UsageError

_MAX_NBYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """The errors of the weights of one kind of module; None where a figure does not exist."""

    kind: str
    n_tensors: int
    n_weights: int
    relative_rms: float | None
    max_abs_error: float | None
    snr_db: float | None
    cosine: float | None


@dataclass(frozen=True, slots=True)
class ErrorFigures:
    """The errors by kind of module, and of all weights together."""

    rows: tuple[ErrorRow, ...]
    overall: ErrorRow
    n_exact: int
    """Weights whose codes and scales are what plain encoding of the source gives."""

    @classmethod
    def parse(cls, record: strict_json.Json | VerificationFacts, manifest: Manifest, where: Path | str) -> ErrorFigures:
        """Take the figures from a verification, given as the object that `verify --json` prints.

        Raises: UsageError where it is no verification with a source, found something wrong, or is of other files.
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
            fields.refuse("the verification compared with no source")
        comparison = fields.object(comparison, "comparison")
        kinds = comparison.get("by_kind")
        if not isinstance(kinds, list):
            fields.refuse("comparison.by_kind is no list")
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
    """Read the figures from a file that `qformat verify ART --source SRC --json` wrote. Raises UsageError."""
    try:
        data = read_small(path.parent, path.name, max_nbytes=_MAX_NBYTES, error=ArtifactError)
        record = strict_json.loads(data, path=path, max_nbytes=_MAX_NBYTES, error=ArtifactError)
    except ArtifactError as problem:
        raise UsageError(str(problem)) from None
    return ErrorFigures.parse(record, manifest, path)


class _Fields:
    def __init__(self, where: Path | str) -> None:
        self.where = where

    def refuse(self, problem: str) -> NoReturn:
        raise UsageError(
            f"{self.where}: {problem}. Make it with: qformat verify ART --source SRC --json > {self.where}"
        )

    def object(self, value: strict_json.Json, name: str) -> JsonObject:
        return value if isinstance(value, dict) else self.refuse(f"{name} is no object")

    def count(self, record: JsonObject, name: str) -> int:
        value = record.get(name)
        return value if type(value) is int and value >= 0 else self.refuse(f"{name} is no count")

    def number(self, record: JsonObject, name: str) -> float | None:
        value = record.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            self.refuse(f"{name} is no number")
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
