"""`qformat.json`, the manifest: parsed in one place, written in one place (spec section 7)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from qformat import strict_json
from qformat.artifact.components import DOUBLE_QUANT, SINGLE_LEVEL, Component, PackedShape
from qformat.artifact.limits import MAX_DIMENSIONS, MAX_MANIFEST_NBYTES, MAX_SIZE
from qformat.artifact.reading.regular_files import check_plain_name
from qformat.artifact.tensor_spec import data_nbytes
from qformat.codec.floats import FloatFormat
from qformat.codec.nf4 import BLOCK_SIZES
from qformat.errors import ArtifactError, Reason
from qformat.names import MANIFEST_NAME

"""A signature of the manifest and the files that it lists (spec section 7.5); not listed itself."""

FORMAT_NAME = "qformat"
FORMAT_VERSION = "1.0"
MAJOR_VERSION = 1

KNOWN_FEATURES: frozenset[str] = frozenset()
"""Features that this reader understands when a manifest lists them under `must_understand`."""

_HEX128 = re.compile(r"[0-9a-f]{32}")
_HEX256 = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"(0|[1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})")
_SEAL = re.compile(rb'  "manifest_sha256": "([0-9a-f]{64})"\n}\n\Z')
_UNSEALED = b'  "manifest_sha256": "' + b"0" * 64 + b'"\n}\n'

_DOUBLE_QUANT_BY_LABEL = {part.label: part for part in DOUBLE_QUANT}
_SINGLE_LEVEL_BY_LABEL = {part.label: part for part in SINGLE_LEVEL}

JsonObject = dict[str, strict_json.Json]


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of the artifact. Shards also carry the XXH3-128 of their header, length prefix and padding included."""

    nbytes: int
    sha256: str
    header_xxh3: str | None = None


@dataclass(frozen=True, slots=True)
class PackedRecord:
    """A packed tensor: its layout, the XXH3-128 of each component, and that of the source's bytes if known."""

    layout: PackedShape
    components: Mapping[Component, str]
    source_xxh3: str | None


@dataclass(frozen=True, slots=True)
class KeptRecord:
    """A tensor that is not packed: dtype and shape as in the shard, its XXH3-128, and why it was kept.

    source_xxh3: None for the source's bytes; of one that was tuned, the XXH3-128 of the source's.
    """

    dtype: str
    shape: tuple[int, ...]
    xxh3: str
    reason: str
    source_xxh3: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return data_nbytes(self.dtype, self.shape)


TensorRecord = PackedRecord | KeptRecord


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of `qformat.json`. `extra` holds optional top-level members that this version does not know."""

    tensors: Mapping[str, TensorRecord]
    files: Mapping[str, FileRecord]
    recipe: JsonObject
    source: JsonObject
    generator: str
    format_version: str = FORMAT_VERSION
    must_understand: tuple[str, ...] = ()
    evaluation: JsonObject | None = None
    extra: Mapping[str, strict_json.Json] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return the sealed file: deterministic, ending with the SHA-256 of itself."""
        record: dict[str, object] = {
            "format": FORMAT_NAME,
            "format_version": self.format_version,
            "must_understand": list(self.must_understand),
            "generator": self.generator,
            "source": self.source,
            "recipe": self.recipe,
            **({} if self.evaluation is None else {"evaluation": self.evaluation}),
            **self.extra,
            "tensors": {name: _tensor_json(entry) for name, entry in self.tensors.items()},
            "files": {name: _file_json(entry) for name, entry in sorted(self.files.items())},
        }
        return _sealed(record)


def with_file(data: bytes, path: Path, name: str, file: FileRecord) -> bytes:
    """Return a manifest that lists one file more (or another file of that name); nothing else in it changes.

    data, path: an artifact's manifest, which is checked, and where it lies. Members that this version does not know
    stay as they are. Raises ArtifactError.
    """
    record = _checked_record(data, path)
    assert isinstance(record["files"], dict)
    return _sealed({**record, "files": dict(sorted({**record["files"], name: _file_json(file)}.items()))})


def with_evaluation(data: bytes, evaluation: JsonObject, path: Path) -> bytes:
    """Return the bytes of a manifest with another `evaluation` and all else that it says, known or not.

    Raises: ArtifactError, as `parse`.
    """
    written: dict[str, object] = {}
    for key, value in _checked_record(data, path).items():
        if key == "tensors":
            written["evaluation"] = evaluation
        if key != "evaluation":
            written[key] = value
    return _sealed(written)


def _checked_record(data: bytes, path: Path) -> JsonObject:
    """Return all members of a good manifest but its digest, those that this version does not know included."""
    parse(data, path)
    record = strict_json.loads(data, path=path, max_nbytes=MAX_MANIFEST_NBYTES, error=ArtifactError)
    assert isinstance(record, dict)
    del record["manifest_sha256"]
    return record


def _sealed(record: Mapping[str, object]) -> bytes:
    """Write the members of a manifest but the last (spec section 7.4), and seal it."""
    # One line a member and one line a tensor: small, and readable with ordinary tools.
    lines = ["{"]
    for key, value in record.items():
        if key in {"tensors", "files"}:
            assert isinstance(value, dict)
            entries = [f"    {strict_json.dumps(k)}: {strict_json.dumps(v)}" for k, v in value.items()]
            lines += [f"  {strict_json.dumps(key)}: {{", ",\n".join(entries), "  },"]
        else:
            lines.append(f"  {strict_json.dumps(key)}: {strict_json.dumps(value)},")
    return seal("\n".join(lines).encode("utf-8") + b"\n" + _UNSEALED)


def seal(unsealed: bytes) -> bytes:
    """Put the SHA-256 of a manifest, taken with 64 zeros in its place, into its last member."""
    digest = hashlib.sha256(unsealed).hexdigest().encode("ascii")
    return unsealed[: -len(_UNSEALED)] + _UNSEALED.replace(b"0" * 64, digest)


def parse(data: bytes, path: Path) -> Manifest:
    """Parse and check the bytes of a manifest.

    Raises: ArtifactError with json_*, unsupported_version, manifest_digest, unsupported_feature or manifest_field.
    """
    record = strict_json.loads(data, path=path, max_nbytes=MAX_MANIFEST_NBYTES, error=ArtifactError)
    fields = _Fields(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT_NAME:
        fields.refuse("format", f"not {FORMAT_NAME!r}")
    version = _check_version(record.get("format_version"), path)
    _check_seal(data, path)
    must_understand = fields.strings(record, "must_understand")
    for feature in must_understand:
        if feature not in KNOWN_FEATURES:
            raise ArtifactError(
                Reason.UNSUPPORTED_FEATURE,
                path,
                f"{feature!r} must be understood to read this artifact, and this version does not know it",
                field="must_understand",
                next_step="Install a newer qformat",
            )
    tensors = fields.mapping(record, "tensors")
    files = fields.mapping(record, "files")
    if not tensors:
        fields.refuse("tensors", "names no tensor")
    _check_component_names(fields, tensors)
    if MANIFEST_NAME in files:
        fields.refuse("files", "names the manifest itself")
    known = {
        "format", "format_version", "must_understand", "generator",
        "source", "recipe", "evaluation", "tensors", "files", "manifest_sha256",
    }  # fmt: skip
    return Manifest(
        tensors={name: _parse_tensor(fields, name, value) for name, value in tensors.items()},
        files={name: _parse_file(fields, name, value) for name, value in files.items()},
        recipe=fields.mapping(record, "recipe"),
        source=fields.mapping(record, "source"),
        generator=fields.string(record, "generator"),
        format_version=version,
        must_understand=tuple(must_understand),
        evaluation=fields.mapping(record, "evaluation") if "evaluation" in record else None,
        extra={key: value for key, value in record.items() if key not in known},
    )


@dataclass(frozen=True, slots=True)
class _Fields:
    """Checked access to members of JSON objects; every refusal names the manifest, the tensor and the field."""

    path: Path
    tensor: str | None = None

    def refuse(self, name: str, problem: str) -> NoReturn:
        raise ArtifactError(Reason.MANIFEST_FIELD, self.path, problem, tensor=self.tensor, field=name)

    def mapping(self, record: JsonObject, name: str) -> JsonObject:
        value = record.get(name)
        return value if isinstance(value, dict) else self.refuse(name, "missing or not an object")

    def string(self, record: JsonObject, name: str) -> str:
        value = record.get(name)
        return value if isinstance(value, str) else self.refuse(name, "missing or not a string")

    def strings(self, record: JsonObject, name: str) -> list[str]:
        value = record.get(name)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.refuse(name, "missing or not a list of strings")
        return [str(item) for item in value]

    def matching(self, record: JsonObject, name: str, pattern: re.Pattern[str], meaning: str) -> str:
        value = self.string(record, name)
        return value if pattern.fullmatch(value) else self.refuse(name, f"{value!r} is not {meaning}")

    def source_digest(self, record: JsonObject) -> str | None:
        return self.matching(record, "source_xxh3", _HEX128, "an XXH3-128") if "source_xxh3" in record else None

    def size(self, record: JsonObject, name: str) -> int:
        value = record.get(name)
        if type(value) is not int or not 0 <= value <= MAX_SIZE:
            self.refuse(name, f"missing or not a size of 0 to {MAX_SIZE}")
        return value

    def shape(self, record: JsonObject) -> tuple[int, ...]:
        value = record.get("shape")
        if (
            not isinstance(value, list)
            or len(value) > MAX_DIMENSIONS
            or not all(type(size) is int and 0 <= size <= MAX_SIZE for size in value)
        ):
            self.refuse("shape", f"missing or not a list of up to {MAX_DIMENSIONS} sizes")
        return tuple(int(size) for size in value if isinstance(size, int))


def _check_version(value: strict_json.Json, path: Path) -> str:
    match = _VERSION.fullmatch(value) if isinstance(value, str) else None
    if match is None or int(match[1]) != MAJOR_VERSION:
        raise ArtifactError(
            Reason.UNSUPPORTED_VERSION,
            path,
            f"{value!r}, this qformat reads {MAJOR_VERSION}.x",
            field="format_version",
            next_step="Install a qformat that reads this version",
        )
    return match[0]


def _check_seal(data: bytes, path: Path) -> None:
    match = _SEAL.search(data)
    if match is None:
        raise ArtifactError(Reason.MANIFEST_DIGEST, path, "does not end with its own digest", field="manifest_sha256")
    found = match[1].decode("ascii")
    expected = hashlib.sha256(data[: match.start()] + _UNSEALED).hexdigest()
    if found != expected:
        raise ArtifactError(
            Reason.MANIFEST_DIGEST,
            path,
            f"says {found}, but the file's digest is {expected}: the manifest was changed",
            field="manifest_sha256",
            next_step="Fetch or convert the artifact again",
        )


def _check_component_names(fields: _Fields, tensors: JsonObject) -> None:
    """No tensor may have the name of another one's component: the same bytes would be both."""
    suffixes = tuple(part.value for part in DOUBLE_QUANT if part.value)
    for name in tensors:
        if not name.endswith(suffixes):
            continue
        for part in DOUBLE_QUANT:
            owner = tensors.get(name.removesuffix(part.value)) if part.value and name.endswith(part.value) else None
            if isinstance(owner, dict) and owner.get("encoding") == "nf4":
                _Fields(fields.path, tensor=name).refuse("tensors", f"has the name of another tensor's {part.label}")


def _parse_tensor(fields: _Fields, name: str, value: strict_json.Json) -> TensorRecord:
    fields = _Fields(fields.path, tensor=name)
    if not isinstance(value, dict):
        fields.refuse("tensors", "not an object")
    encoding = value.get("encoding")
    if encoding == "kept":
        return KeptRecord(
            dtype=fields.string(value, "dtype"),
            shape=fields.shape(value),
            xxh3=fields.matching(value, "xxh3", _HEX128, "an XXH3-128"),
            reason=fields.string(value, "reason"),
            source_xxh3=fields.source_digest(value),
        )
    if encoding != "nf4":
        fields.refuse("encoding", f"{encoding!r}, expected 'nf4' or 'kept'")
    if not name.endswith(".weight"):
        fields.refuse("tensors", "only a weight can be packed")
    dtype = fields.string(value, "dtype")
    if dtype not in FloatFormat.__members__:
        fields.refuse("dtype", f"{dtype!r}, expected BF16, F16 or F32")
    block_size = value.get("block_size")
    if type(block_size) is not int or block_size not in BLOCK_SIZES:
        fields.refuse("block_size", f"{block_size!r}, expected one of {BLOCK_SIZES}")
    double_quant = value.get("double_quant")
    if type(double_quant) is not bool:
        fields.refuse("double_quant", f"{double_quant!r}, expected true or false")
    components = fields.mapping(value, "components")
    expected = _DOUBLE_QUANT_BY_LABEL if double_quant else _SINGLE_LEVEL_BY_LABEL
    if components.keys() != expected.keys():
        fields.refuse("components", f"{sorted(components)}, expected {sorted(expected)}")
    return PackedRecord(
        layout=PackedShape(fields.shape(value), FloatFormat[dtype], block_size, double_quant),
        components={
            part: fields.matching(components, label, _HEX128, "an XXH3-128") for label, part in expected.items()
        },
        source_xxh3=fields.source_digest(value),
    )


def _parse_file(fields: _Fields, name: str, value: strict_json.Json) -> FileRecord:
    check_plain_name(name, path=fields.path, error=ArtifactError)
    if not isinstance(value, dict):
        fields.refuse("files", f"{name!r} is not an object")
    if name.endswith(".safetensors") and "header_xxh3" not in value:
        fields.refuse("files", f"{name!r} has no header_xxh3: other readers would take it for a shard")
    return FileRecord(
        nbytes=fields.size(value, "nbytes"),
        sha256=fields.matching(value, "sha256", _HEX256, "a SHA-256"),
        header_xxh3=fields.matching(value, "header_xxh3", _HEX128, "an XXH3-128") if "header_xxh3" in value else None,
    )  # fmt: skip


def _tensor_json(record: TensorRecord) -> dict[str, object]:
    entry: dict[str, object]
    if isinstance(record, KeptRecord):
        entry = {
            "encoding": "kept",
            "dtype": record.dtype,
            "shape": record.shape,
            "xxh3": record.xxh3,
            "reason": record.reason,
        }
    else:
        layout = record.layout
        entry = {
            "encoding": "nf4",
            "dtype": layout.float_format.value,
            "shape": layout.shape,
            "block_size": layout.block_size,
            "double_quant": layout.double_quant,
            "components": {part.label: digest for part, digest in record.components.items()},
        }
    if record.source_xxh3 is not None:
        entry["source_xxh3"] = record.source_xxh3
    return entry


def _file_json(record: FileRecord) -> dict[str, object]:
    entry: dict[str, object] = {"nbytes": record.nbytes, "sha256": record.sha256}
    if record.header_xxh3 is not None:
        entry["header_xxh3"] = record.header_xxh3
    return entry
