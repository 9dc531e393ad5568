"""The errors that qformat raises, all of them.

    QformatError
    ├── UsageError              the caller asked for something that makes no sense           (exit code 2)
    │   └── BackendError        the forced backend cannot run here
    ├── InvalidFileError        a file does not say what it must; carries a `Reason`         (exit code 1)
    │   ├── SourceError         ... a file of the checkpoint that is converted
    │   └── ArtifactError       ... a file of a 4-bit artifact
    ├── DataError               a row of training data cannot be used; names file and line   (exit code 1)
    ├── HubError                the Hub refuses, does not answer or answers nonsense         (exit code 1)
    ├── TargetError             the output cannot be written where it was asked for          (exit code 1)
    ├── VerificationError       a check was run to its end and failed                        (exit code 1)
    ├── DeviceMemoryError       a device's memory is too small for what was asked            (exit code 1)
    ├── AdapterError            an adapter or a checkpoint of one is damaged or does not fit (exit code 1)
    ├── DivergenceError         a loss, gradient or activation is no longer a finite number  (exit code 1)
    └── Interrupted             the user stopped it; the same command continues              (exit code 130)

`Reason` is the closed list of reason codes of the format (spec section 9): stable names for machines.

A message that tells the caller to choose another option holds that option as a value, an `Option`. Its text is what
Python callers write, `force=True`; the command line spells the same option `--force`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Option:
    """An option that a message names, under its name in the library.

    value: what the message tells the caller to set it to; None where the message only names the option.
    """

    name: str
    value: str | bool | tuple[str, ...] | None = None

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}={self.value!r}"


Words = tuple[str | Option, ...]
"""The parts of a message, in order."""


def spelled(words: Words, spell: Callable[[Option], str] = str) -> str:
    """Return a message with its options as `spell` writes them, by default as Python callers do."""
    return "".join(part if isinstance(part, str) else spell(part) for part in words)


class Reason(StrEnum):
    """Why a file is refused. The values are stable: vectors, `--json` and callers rely on them."""

    MISSING_FILE = "missing_file"
    EXTRA_FILE = "extra_file"
    NOT_A_REGULAR_FILE = "not_a_regular_file"
    PATH_ESCAPES = "path_escapes"
    FILE_SIZE = "file_size"
    FILE_DIGEST = "file_digest"
    COMPONENT_DIGEST = "component_digest"
    MANIFEST_DIGEST = "manifest_digest"
    MANIFEST_FIELD = "manifest_field"
    UNSUPPORTED_VERSION = "unsupported_version"
    UNSUPPORTED_FEATURE = "unsupported_feature"
    JSON_SYNTAX = "json_syntax"
    JSON_LIMIT = "json_limit"
    JSON_DUPLICATE_KEY = "json_duplicate_key"
    HEADER_LENGTH = "header_length"
    HEADER_SYNTAX = "header_syntax"
    HEADER_FIELD = "header_field"
    HEADER_LIMIT = "header_limit"
    HEADER_OFFSETS = "header_offsets"
    TRUNCATED = "truncated"
    UNREADABLE = "unreadable"
    TRAILING_BYTES = "trailing_bytes"
    ALIGNMENT = "alignment"
    INDEX_MISMATCH = "index_mismatch"
    DUPLICATE_TENSOR = "duplicate_tensor"
    CONFIG_FIELD = "config_field"
    SKIP_MODULES = "skip_modules"
    MISSING_COMPONENT = "missing_component"
    UNKNOWN_TENSOR = "unknown_tensor"
    COMPONENT_DTYPE = "component_dtype"
    COMPONENT_SHAPE = "component_shape"
    QUANT_STATE = "quant_state"
    CODEBOOK = "codebook"
    NONFINITE_SCALE = "nonfinite_scale"
    NONFINITE_WEIGHT = "nonfinite_weight"
    UNSUPPORTED_DTYPE = "unsupported_dtype"
    ALREADY_QUANTIZED = "already_quantized"
    UNSUPPORTED_SOURCE = "unsupported_source"
    SOURCE_CHANGED = "source_changed"
    CODES_MISMATCH = "codes_mismatch"
    SOURCE_MISMATCH = "source_mismatch"
    SIGNATURE = "signature"


class QformatError(Exception):
    """Base of every error that qformat raises on purpose. words: the message, with the options that it names."""

    def __init__(self, *words: str | Option) -> None:
        super().__init__(spelled(words))
        self.words: Words = words


class UsageError(QformatError):
    """The caller's arguments do not fit together or name nothing."""


class BackendError(UsageError):
    """A backend was asked for by name and cannot run on this machine or device."""


class InvalidFileError(QformatError):
    """A file does not say what it must.

    The message reads `FILE: tensor 'NAME': field 'FIELD': PROBLEM. NEXT STEP`, leaving out what does not apply.
    """

    def __init__(
        self,
        reason: Reason,
        path: Path | str,
        problem: str,
        *,
        tensor: str | None = None,
        field: str | None = None,
        next_step: str | Words | None = None,
    ) -> None:
        parts = [str(path)]
        if tensor is not None:
            parts.append(f"tensor {tensor!r}")
        if field is not None:
            parts.append(f"field {field!r}")
        parts.append(problem)
        message = ": ".join(parts)
        super().__init__(message, *_as_next_step(next_step))
        self.reason = reason
        self.path = str(path)
        self.problem = problem
        self.tensor = tensor
        self.field = field
        self.next_step = None if next_step is None else spelled(_words(next_step))


def _words(text: str | Words) -> Words:
    return (text,) if isinstance(text, str) else text


def _as_next_step(text: str | Words | None) -> Words:
    return (". ", *_words(text)) if text else ()


class SourceError(InvalidFileError):
    """A file of the source checkpoint is damaged, unsupported or inconsistent."""


class ArtifactError(InvalidFileError):
    """A file of an artifact is damaged, unsupported or inconsistent with the specification."""


class DataError(QformatError):
    """Training data cannot be used. The message reads `FILE: line N: PROBLEM. NEXT STEP`.

    reason: a stable name to count by (`qformat.training.data.reading.rows.BadRow`).
    place: `line 17` or `row 17`, both counted from 1, or None where it concerns the whole file.
    """

    def __init__(self, reason: str, path: Path | str, problem: str, *, place: str | None, next_step: str) -> None:
        where = str(path) if place is None else f"{path}: {place}"
        super().__init__(f"{where}: {problem}. {next_step}")
        self.reason = reason
        self.path = str(path)
        self.problem = problem
        self.place = place
        self.next_step = next_step


class HubError(QformatError):
    """The Hub refuses a request, does not answer, or answers what makes no sense.

    The message reads `REPOSITORY: PROBLEM. NEXT STEP` and never holds a token.
    status: of the HTTP answer, None where there was none. code: what the Hub calls it, such as `GatedRepo`, if it says.
    """

    def __init__(
        self,
        repository: str,
        problem: str,
        *,
        next_step: str | Words,
        status: int | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(f"{repository}: {problem}", *_as_next_step(next_step))
        self.repository = repository
        self.problem = problem
        self.next_step = spelled(_words(next_step))
        self.status = status
        self.code = code


class TargetError(QformatError):
    """The output cannot be written where it was asked for: it exists, is locked, is read-only or is full."""


class VerificationError(QformatError):
    """A check was run to its end and failed."""


class DeviceMemoryError(QformatError):
    """The device's memory does not suffice, and nothing is left that could be moved away."""


class AdapterError(QformatError):
    """An adapter, or a checkpoint of its training, is damaged, or was made for another model. Names the difference."""


class DivergenceError(QformatError):
    """A loss, a gradient or an activation is no longer a finite number; names the step, or the layer."""


class Interrupted(QformatError):
    """The work was stopped on request; nothing is lost and the same command continues it."""
