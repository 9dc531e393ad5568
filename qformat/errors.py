"""Every error that qformat raises on purpose.

    QformatError
    ├── UsageError              the arguments contradict each other or have no meaning       (exit code 2)
    │   └── BackendError        the forced backend cannot run here
    ├── InvalidFileError        a file is damaged or unsupported; carries a `Reason`         (exit code 1)
    │   ├── SourceError         ... a file of the source checkpoint
    │   └── ArtifactError       ... a file of an artifact
    ├── DataError               a row of training data cannot be used; has the file and line (exit code 1)
    ├── HubError                a request to the Hub failed, or its answer is invalid        (exit code 1)
    ├── TargetError             the output cannot be written to the requested place          (exit code 1)
    ├── VerificationError       a check ran to its end and failed                            (exit code 1)
    ├── DeviceMemoryError       the memory of a device is too small                          (exit code 1)
    ├── AdapterError            an adapter or a training checkpoint is damaged or unsuitable (exit code 1)
    ├── DivergenceError         a loss, gradient or activation is NaN or Inf                 (exit code 1)
    └── Interrupted             the user stopped the run; the same command resumes it        (exit code 130)

`Reason` is the closed list of reason codes of the format (spec section 9). They are stable, so that programs can rely
on them.

A message that recommends another option holds the option as a value, an `Option`. In text it has the form that Python
callers write, `force=True`; the command line shows the same option as `--force`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from qformat.printable import MAX_CHARACTERS_OF_A_NAME, shortened, shown
from qformat.secrets import masked


@dataclass(frozen=True, slots=True)
class Option:
    """An option that a message recommends or mentions, under its name in the library.

    Attributes:
        name: Name of the keyword argument.
        value: Value that the message recommends; None if the message only mentions the option.
    """

    name: str
    value: str | bool | tuple[str, ...] | None = None

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}={self.value!r}"


Words = tuple[str | Option, ...]
"""Parts of a message, in order."""

LINE_END = "\n"
"""Part of a message that begins a new line."""


def spelled(words: Words, spell: Callable[[Option], str] = str) -> str:
    """Return a message as one text.

    Args:
        words: Parts of the message.
        spell: Function that returns the text of an option. By default an option has the form of a Python argument.
    """
    return "".join(part if isinstance(part, str) else spell(part) for part in words)


def on_lines(lines: Sequence[str]) -> Words:
    """Return parts of a message that show each text on a line of its own."""
    return tuple(word for line in lines for word in (LINE_END, line))


def first_line(problem: BaseException) -> str:
    """Return the first line of a library's error, for a message that continues after it."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()] or [type(problem).__name__]
    first = f"{lines[0]} {lines[1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    return first.removesuffix(".")


def install_extra(extra: str) -> str:
    """Return the advice to install an extra of qformat.

    It names the checkout, because qformat is not on PyPI: a package of that name there has another owner.
    """
    return f"Install the extra {extra!r} of qformat: run pip install '.[{extra}]' in its checkout"


class Reason(StrEnum):
    """Why a file is rejected. The values are stable: vectors, `--json` and callers rely on them.

    Each member says what the code means and then what to do.
    """

    MISSING_FILE = "missing_file"
    """A required file or directory does not exist or cannot be opened, or a Git LFS pointer or a web page takes its
    place. Check the path and the permissions, or fetch the file again."""

    EXTRA_FILE = "extra_file"
    """The directory contains a file that the manifest does not list. Move the file elsewhere; the artifact itself
    may be intact."""

    NOT_A_REGULAR_FILE = "not_a_regular_file"
    """A directory, FIFO, device or socket has the name of a required file. Replace it with the regular file."""

    PATH_ESCAPES = "path_escapes"
    """A file name inside a file is not a plain name, or a symbolic link of an artifact leads outside the Hub's cache.
    Copy the linked file into the directory; do not use a file from an untrusted author that contains such a name."""

    FILE_SIZE = "file_size"
    """The size of a file differs from the size in the manifest. Fetch the file again."""

    FILE_DIGEST = "file_digest"
    """The contents of a file or of a shard's header differ from the digest in the manifest. Fetch the file
    again."""

    COMPONENT_DIGEST = "component_digest"
    """The bytes of a component or a kept tensor differ from the digest in the manifest. Fetch the shard
    again."""

    MANIFEST_DIGEST = "manifest_digest"
    """The manifest does not end with its own digest, so it was edited or damaged. Fetch the manifest again;
    never edit it by hand."""

    MANIFEST_FIELD = "manifest_field"
    """A member of the manifest is missing or has a value that is not allowed. Report it to the author of the
    artifact, or convert the model again."""

    UNSUPPORTED_VERSION = "unsupported_version"
    """The format version of the artifact is not 1.x. Install a version of qformat that reads it."""

    UNSUPPORTED_FEATURE = "unsupported_feature"
    """The artifact requires a feature that this version of qformat does not know. Install a newer qformat."""

    JSON_SYNTAX = "json_syntax"
    """A text that must be JSON is not valid UTF-8 or not valid JSON. Fetch the file again, or correct it if you
    wrote it."""

    JSON_LIMIT = "json_limit"
    """A file exceeds the limit on its size, or a JSON text one on its nesting, its number of values or the length of a
    number. Check that the file is the right one; a file of an ordinary model is far below every limit."""

    JSON_DUPLICATE_KEY = "json_duplicate_key"
    """A key occurs twice in one JSON object. Remove one of the two, or fetch the file again."""

    HEADER_LENGTH = "header_length"
    """The length field of a safetensors header exceeds its limit. Check that the file is a safetensors file, or
    download it again."""

    HEADER_SYNTAX = "header_syntax"
    """A safetensors header does not begin with `{` or contains no tensor. Check that the file is a safetensors
    file, or download it again."""

    HEADER_FIELD = "header_field"
    """An entry of a safetensors header has missing, unknown or invalid fields. Fetch the file again, or save it
    again with a current safetensors library."""

    HEADER_LIMIT = "header_limit"
    """The name of a tensor or its number of dimensions exceeds a limit. Rename or reshape the tensor in the source
    checkpoint."""

    HEADER_OFFSETS = "header_offsets"
    """The offsets of a tensor contradict its shape and dtype, or leave a gap or an overlap. Fetch the file
    again, or save it again with a current safetensors library."""

    TRUNCATED = "truncated"
    """A file ends too early. Fetch the file again."""

    UNREADABLE = "unreadable"
    """The disk reports an error when a file is read. Check the disk, then restore the file from a copy."""

    TRAILING_BYTES = "trailing_bytes"
    """A file continues after the end of its data. Fetch the file again."""

    ALIGNMENT = "alignment"
    """The data of a tensor does not begin at a multiple of its required alignment. Convert the model again, or save
    the file again with a current safetensors library."""

    INDEX_MISMATCH = "index_mismatch"
    """The index and the shards do not contain the same tensors. Fetch the index and the shards again, from the
    same revision."""

    DUPLICATE_TENSOR = "duplicate_tensor"
    """A tensor occurs in two shards. Remove files of another revision from the directory, or fetch the shards
    again."""

    CONFIG_FIELD = "config_field"
    """`config.json` has a missing or unexpected field. Fetch the file again, or correct the field that the
    message names."""

    SKIP_MODULES = "skip_modules"
    """The list of modules that stay in 16 bit is missing from `config.json`, or contains a packed module. Download
    the file again, or convert the model again."""

    MISSING_COMPONENT = "missing_component"
    """No shard contains a required component or kept tensor. Download all shards again, from the same revision."""

    UNKNOWN_TENSOR = "unknown_tensor"
    """A shard contains a tensor that the manifest does not imply. Fetch the shard and the manifest again, from
    the same revision."""

    COMPONENT_DTYPE = "component_dtype"
    """The dtype of a tensor is not the one that the manifest or its quant_state implies. Fetch the shard and the
    manifest again, from the same revision."""

    COMPONENT_SHAPE = "component_shape"
    """The shape of a tensor is not the one that the manifest or its quant_state implies. Fetch the shard and the
    manifest again, from the same revision."""

    QUANT_STATE = "quant_state"
    """The quant_state record of a packed tensor is invalid, unsupported or contradicts the manifest. Convert the
    16-bit model again with qformat."""

    CODEBOOK = "codebook"
    """A stored codebook is not the NF4 codebook. Convert the 16-bit model again with qformat."""

    NONFINITE_SCALE = "nonfinite_scale"
    """A stored scale or an entry of a scale map is NaN or Inf. Fetch the shard again, or convert the model
    again."""

    NONFINITE_WEIGHT = "nonfinite_weight"
    """A weight is NaN or Inf: 4 bits cannot represent it, and a training on it diverges. Repair the source
    checkpoint."""

    UNSUPPORTED_DTYPE = "unsupported_dtype"
    """The dtype of a tensor is not supported. Save the checkpoint again in bfloat16, float16 or float32."""

    ALREADY_QUANTIZED = "already_quantized"
    """The source checkpoint is already quantized, in a form that this command does not accept. Use the 16-bit
    checkpoint of the model."""

    UNSUPPORTED_SOURCE = "unsupported_source"
    """The file format, the architecture or another property of the source checkpoint is not supported. Use a
    checkpoint of the model in safetensors files."""

    SOURCE_CHANGED = "source_changed"
    """A file of the source changed while it was read, or after an interrupted run began. Restore the old file and
    run the same command again, or start again without the interrupted run."""

    CODES_MISMATCH = "codes_mismatch"
    """The codes or scales of the artifact are not the ones that its source checkpoint gives. Check that it is the
    right source checkpoint, or convert the model again."""

    SOURCE_MISMATCH = "source_mismatch"
    """The artifact and the source checkpoint belong to different models or different revisions. Use the source
    checkpoint that the manifest names."""

    SIGNATURE = "signature"
    """The signature was not made with the given key, or does not cover exactly the files of the manifest. Check the
    public key, and do not trust the artifact until its author explains the difference."""


class QformatError(Exception):
    """Base class of every error that qformat raises on purpose.

    A message holds names and values from files and servers. It shows their control characters as escapes, and long
    parts without their middle. A part that is a line end by itself begins a new line.

    Attributes:
        words: Message in parts, so that the options in it can be shown in another form.
    """

    def __init__(self, *words: str | Option) -> None:
        # A server may repeat the token that it received in anything that becomes part of a message.
        self.words: Words = tuple(
            word if isinstance(word, Option) or word == LINE_END else shown(masked(word)) for word in words
        )
        super().__init__(spelled(self.words))


class UsageError(QformatError):
    """The caller's arguments contradict each other, are out of range or refer to something that does not exist."""


class BackendError(UsageError):
    """The requested backend cannot run on this machine or device."""


class InvalidFileError(QformatError):
    """A file is damaged, unsupported or inconsistent.

    The message has the form `FILE: tensor 'NAME': field 'FIELD': PROBLEM. NEXT STEP`, without the parts that do not
    apply.

    Attributes:
        reason: Stable code of the problem.
        path: File or directory.
        problem: What is wrong.
        tensor: Name of the tensor, None if the problem concerns no single tensor.
        field: Field of the record or header, None if the problem concerns no single field.
        next_step: What the user can do, None if nothing is known to help.
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
        parts = [_name(path)]
        if tensor is not None:
            parts.append(f"tensor {_name(tensor)!r}")
        if field is not None:
            parts.append(f"field {_name(field)!r}")
        where = ": ".join(parts)
        super().__init__(f"{where}: ", problem, *_as_next_step(next_step))
        self.reason = reason
        self.path = str(path)
        self.problem = problem
        self.tensor = tensor
        self.field = field
        self.next_step = None if next_step is None else spelled(_words(next_step))


def _words(text: str | Words) -> Words:
    return (text,) if isinstance(text, str) else text


def _name(name: Path | str) -> str:
    """Return a name without its middle if it is long."""
    return shortened(str(name), MAX_CHARACTERS_OF_A_NAME)


def _as_next_step(text: str | Words | None) -> Words:
    return (". ", *_words(text)) if text else ()


class SourceError(InvalidFileError):
    """A file of the source checkpoint is damaged, unsupported or inconsistent."""


class ArtifactError(InvalidFileError):
    """A file of an artifact is damaged, unsupported or violates the specification."""


class DataError(QformatError):
    """Training data cannot be used. The message has the form `FILE: line N: PROBLEM. NEXT STEP`.

    Attributes:
        reason: Stable name of the problem, for counting (`qformat.training.data.place.BadRow`).
        path: File of the data.
        problem: What is wrong.
        place: `line 17` or `row 17`, counted from 1; None if the problem concerns the whole file.
        next_step: What the user can do.
    """

    def __init__(
        self, reason: str, path: Path | str, problem: str, *, place: str | None, next_step: str | Words
    ) -> None:
        where = _name(path) if place is None else f"{_name(path)}: {place}"
        super().__init__(f"{where}: ", problem, *_as_next_step(next_step))
        self.reason = reason
        self.path = str(path)
        self.problem = problem
        self.place = place
        self.next_step = spelled(_words(next_step))
        self._next_words = _words(next_step)

    def advising(self, *more: str | Option) -> DataError:
        """Return the same error with a longer next step."""
        next_step = (*self._next_words, *more)
        return DataError(self.reason, self.path, self.problem, place=self.place, next_step=next_step)


class HubError(QformatError):
    """The Hub rejected a request, did not answer, or sent an invalid answer.

    The message has the form `REPOSITORY: PROBLEM. NEXT STEP` and never contains a token.

    Attributes:
        repository: Repository of the request.
        problem: What is wrong.
        next_step: What the user can do.
        status: HTTP status of the answer, None if there was no answer.
        code: Error code of the Hub, such as `GatedRepo`, None if the answer has none.
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
        super().__init__(f"{_name(repository)}: ", problem, *_as_next_step(next_step))
        self.repository = repository
        self.problem = problem
        self.next_step = spelled(_words(next_step))
        self.status = status
        self.code = code


class TargetError(QformatError):
    """The output cannot be written: it exists, or its directory is locked, read-only or on a full disk."""


class VerificationError(QformatError):
    """A check ran to its end and failed."""


class DeviceMemoryError(QformatError):
    """The memory of the device is too small, and nothing is left that could be moved out of it."""


class AdapterError(QformatError):
    """An adapter, or a checkpoint of its training, is damaged or belongs to another model."""


class DivergenceError(QformatError):
    """A loss, a gradient or an activation is NaN or Inf. The message has the step or the layer."""


class Interrupted(QformatError):
    """The user stopped the run. Nothing is lost, and the same command resumes it."""
