"""Parsing and checking of the manifest, `qformat.json` (spec section 7)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from qformat import strict_json
from qformat.artifact.components import DOUBLE_QUANT, SINGLE_LEVEL, PackedShape
from qformat.artifact.limits import MAX_DIMENSIONS, MAX_MANIFEST_NBYTES, MAX_SIZE
from qformat.artifact.manifest import (
    FORMAT_NAME,
    MAJOR_VERSION,
    FileRecord,
    JsonObject,
    KeptRecord,
    Manifest,
    PackedRecord,
    TensorRecord,
)
from qformat.artifact.manifest_seal import check_seal
from qformat.artifact.reading.regular_files import check_plain_name
from qformat.codec.floats import FloatFormat
from qformat.codec.nf4 import BLOCK_SIZES
from qformat.errors import ArtifactError, Reason
from qformat.names import MANIFEST_NAME

KNOWN_FEATURES: frozenset[str] = frozenset()
"""Features of `must_understand` that this reader supports."""

_HEX128 = re.compile(r"[0-9a-f]{32}")
_HEX256 = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"(0|[1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})")

_DOUBLE_QUANT_BY_LABEL = {part.label: part for part in DOUBLE_QUANT}
_SINGLE_LEVEL_BY_LABEL = {part.label: part for part in SINGLE_LEVEL}


def parse(data: bytes, path: Path) -> Manifest:
    """Parse and check the bytes of a manifest.

    Args:
        data: Bytes of the manifest.
        path: Path of the manifest, for error messages.

    Raises:
        ArtifactError: The manifest is invalid (json_*, unsupported_version, manifest_digest, unsupported_feature,
            manifest_field, path_escapes).
    """
    record = strict_json.loads(data, path=path, max_nbytes=MAX_MANIFEST_NBYTES, error=ArtifactError)
    fields = _Fields(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT_NAME:
        fields.refuse("format", f"is not {FORMAT_NAME!r}")
    version = _check_version(record.get("format_version"), path)
    check_seal(data, path)
    must_understand = fields.strings(record, "must_understand")
    for feature in must_understand:
        if feature not in KNOWN_FEATURES:
            raise ArtifactError(
                Reason.UNSUPPORTED_FEATURE,
                path,
                f"the artifact requires the feature {feature!r}, which this version of qformat does not support",
                field="must_understand",
                next_step="Install a newer qformat",
            )
    tensors = fields.mapping(record, "tensors")
    files = fields.mapping(record, "files")
    if not tensors:
        fields.refuse("tensors", "lists no tensor")
    _check_component_names(fields, tensors)
    if MANIFEST_NAME in files:
        fields.refuse("files", "lists the manifest itself")
    known = {
        "format", "format_version", "must_understand", "generator",
        "source", "recipe", "evaluation", "sealed", "tensors", "files", "manifest_sha256",
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
        sealed=_parse_sealed(fields, record),
        extra={key: value for key, value in record.items() if key not in known},
    )


@dataclass(frozen=True, slots=True)
class _Fields:
    """Checked access to members of JSON objects. Errors have the manifest, the tensor and the field."""

    path: Path
    tensor: str | None = None

    def refuse(self, name: str, problem: str) -> NoReturn:
        raise ArtifactError(Reason.MANIFEST_FIELD, self.path, problem, tensor=self.tensor, field=name)

    def mapping(self, record: JsonObject, name: str) -> JsonObject:
        value = record.get(name)
        return value if isinstance(value, dict) else self.refuse(name, "is missing or is not an object")

    def string(self, record: JsonObject, name: str) -> str:
        value = record.get(name)
        return value if isinstance(value, str) else self.refuse(name, "is missing or is not a string")

    def strings(self, record: JsonObject, name: str) -> list[str]:
        value = record.get(name)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.refuse(name, "is missing or is not a list of strings")
        return [str(item) for item in value]

    def matching(self, record: JsonObject, name: str, pattern: re.Pattern[str], meaning: str) -> str:
        value = self.string(record, name)
        return value if pattern.fullmatch(value) else self.refuse(name, f"{value!r} is not {meaning}")

    def source_digest(self, record: JsonObject) -> str | None:
        return self.matching(record, "source_xxh3", _HEX128, "an XXH3-128") if "source_xxh3" in record else None

    def size(self, record: JsonObject, name: str) -> int:
        value = record.get(name)
        if type(value) is not int or not 0 <= value <= MAX_SIZE:
            self.refuse(name, f"is missing or is not an integer from 0 to {MAX_SIZE}")
        return value

    def shape(self, record: JsonObject) -> tuple[int, ...]:
        value = record.get("shape")
        if (
            not isinstance(value, list)
            or len(value) > MAX_DIMENSIONS
            or not all(type(size) is int and 0 <= size <= MAX_SIZE for size in value)
        ):
            self.refuse("shape", f"is missing or is not a list of at most {MAX_DIMENSIONS} sizes")
        return tuple(int(size) for size in value if isinstance(size, int))


def _check_version(value: strict_json.Json, path: Path) -> str:
    match = _VERSION.fullmatch(value) if isinstance(value, str) else None
    if match is None or int(match[1]) != MAJOR_VERSION:
        raise ArtifactError(
            Reason.UNSUPPORTED_VERSION,
            path,
            f"the format version is {value!r}, but this version of qformat reads only {MAJOR_VERSION}.x",
            field="format_version",
            next_step="Install a qformat that reads this version",
        )
    return match[0]


def _check_component_names(fields: _Fields, tensors: JsonObject) -> None:
    """Reject a tensor that has the name of another tensor's component."""
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
        fields.refuse("tensors", "is not an object")
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
        fields.refuse("encoding", f"is {encoding!r}, expected 'nf4' or 'kept'")
    if not name.endswith(".weight"):
        fields.refuse("tensors", "is packed, but its name does not end in '.weight'")
    dtype = fields.string(value, "dtype")
    if dtype not in FloatFormat.__members__:
        fields.refuse("dtype", f"is {dtype!r}, expected BF16, F16 or F32")
    block_size = value.get("block_size")
    if type(block_size) is not int or block_size not in BLOCK_SIZES:
        fields.refuse("block_size", f"is {block_size!r}, expected one of {BLOCK_SIZES}")
    double_quant = value.get("double_quant")
    if type(double_quant) is not bool:
        fields.refuse("double_quant", f"is {double_quant!r}, expected true or false")
    components = fields.mapping(value, "components")
    expected = _DOUBLE_QUANT_BY_LABEL if double_quant else _SINGLE_LEVEL_BY_LABEL
    if components.keys() != expected.keys():
        fields.refuse("components", f"lists {sorted(components)}, expected {sorted(expected)}")
    return PackedRecord(
        layout=PackedShape(fields.shape(value), FloatFormat[dtype], block_size, double_quant),
        components={
            part: fields.matching(components, label, _HEX128, "an XXH3-128") for label, part in expected.items()
        },
        source_xxh3=fields.source_digest(value),
    )


def _parse_sealed(fields: _Fields, record: JsonObject) -> tuple[JsonObject, ...] | None:
    if "sealed" not in record:
        return None
    value = record["sealed"]
    entries = [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
    if not isinstance(value, list) or len(entries) != len(value):
        fields.refuse("sealed", "is not a list of objects")
    for entry in entries:
        fields.string(entry, "file")
        for name in ("previous_sha256", "sha256"):
            if name not in entry or entry[name] is not None:
                fields.matching(entry, name, _HEX256, "a SHA-256")
    return tuple(entries)


def _parse_file(fields: _Fields, name: str, value: strict_json.Json) -> FileRecord:
    check_plain_name(name, path=fields.path, error=ArtifactError)
    if not isinstance(value, dict):
        fields.refuse("files", f"{name!r} is not an object")
    if name.endswith(".safetensors") and "header_xxh3" not in value:
        fields.refuse("files", f"{name!r} has no header_xxh3, but other readers would open it as a shard")
    return FileRecord(
        nbytes=fields.size(value, "nbytes"),
        sha256=fields.matching(value, "sha256", _HEX256, "a SHA-256"),
        header_xxh3=fields.matching(value, "header_xxh3", _HEX128, "an XXH3-128") if "header_xxh3" in value else None,
    )  # fmt: skip
