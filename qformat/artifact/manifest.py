"""Records of the manifest, `qformat.json`, and their JSON form (spec section 7).

`qformat.artifact.reading.manifest_parser` parses them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from qformat import strict_json
from qformat.artifact.components import Component, PackedShape
from qformat.artifact.manifest_seal import sealed
from qformat.artifact.tensor_spec import data_nbytes

FORMAT_NAME = "qformat"
FORMAT_VERSION = "1.0"
MAJOR_VERSION = 1


JsonObject = dict[str, strict_json.Json]


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Entry of a file.

    Attributes:
        nbytes: Size in bytes.
        sha256: SHA-256 of the file.
        header_xxh3: XXH3-128 of everything before the data of a shard (length field, JSON text and padding). None for
            every other file.
    """

    nbytes: int
    sha256: str
    header_xxh3: str | None = None

    @classmethod
    def of(cls, data: bytes) -> FileRecord:
        """Return the entry of a file with these bytes, which is not a shard."""
        return cls(len(data), hashlib.sha256(data).hexdigest())

    @property
    def is_shard(self) -> bool:
        """Whether the file is a shard."""
        return self.header_xxh3 is not None


@dataclass(frozen=True, slots=True)
class PackedRecord:
    """Entry of a packed tensor.

    Attributes:
        layout: Shape, float format and options.
        components: XXH3-128 of each component.
        source_xxh3: XXH3-128 of the source tensor's bytes, None if it is unknown.
    """

    layout: PackedShape
    components: Mapping[Component, str]
    source_xxh3: str | None


@dataclass(frozen=True, slots=True)
class KeptRecord:
    """Entry of a kept tensor.

    Attributes:
        dtype: Dtype in the header of the shard.
        shape: Shape in the header of the shard.
        xxh3: XXH3-128 of its bytes.
        reason: Why the tensor is not packed.
        source_xxh3: XXH3-128 of the source tensor's bytes if tuning changed them, otherwise None.
    """

    dtype: str
    shape: tuple[int, ...]
    xxh3: str
    reason: str
    source_xxh3: str | None = None

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return data_nbytes(self.dtype, self.shape)


TensorRecord = PackedRecord | KeptRecord


@dataclass(frozen=True, slots=True)
class Manifest:
    """Contents of `qformat.json`.

    Attributes:
        tensors: Entries of the tensors by name, in natural order.
        files: Entries of the files by name.
        recipe: Options of the conversion.
        source: Description of the source checkpoint.
        generator: Program and version that wrote the artifact.
        format_version: Version of the format.
        must_understand: Features that a reader has to know.
        evaluation: Results on held-out text, None if the artifact was not evaluated.
        sealed: Accepted changes of files, None if there are none.
        extra: Optional members that this version of qformat does not know.
    """

    tensors: Mapping[str, TensorRecord]
    files: Mapping[str, FileRecord]
    recipe: JsonObject
    source: JsonObject
    generator: str
    format_version: str = FORMAT_VERSION
    must_understand: tuple[str, ...] = ()
    evaluation: JsonObject | None = None
    sealed: tuple[JsonObject, ...] | None = None
    extra: Mapping[str, strict_json.Json] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return the bytes of the file. They are deterministic and end with their own SHA-256."""
        record: dict[str, object] = {
            "format": FORMAT_NAME,
            "format_version": self.format_version,
            "must_understand": list(self.must_understand),
            "generator": self.generator,
            "source": self.source,
            "recipe": self.recipe,
            **({} if self.evaluation is None else {"evaluation": self.evaluation}),
            **({} if self.sealed is None else {"sealed": list(self.sealed)}),
            **self.extra,
            "tensors": {name: _tensor_json(entry) for name, entry in self.tensors.items()},
            "files": {name: file_json(entry) for name, entry in sorted(self.files.items())},
        }
        return sealed(record)


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


def file_json(record: FileRecord) -> dict[str, object]:
    """Return the JSON form of a file's entry."""
    entry: dict[str, object] = {"nbytes": record.nbytes, "sha256": record.sha256}
    if record.header_xxh3 is not None:
        entry["header_xxh3"] = record.header_xxh3
    return entry
