"""`qformat.json`, the manifest: its records, and how they are written (spec section 7).

`qformat.artifact.reading.manifest_parser` reads it.
"""

from __future__ import annotations

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
    """Return a file's entry as it stands in the manifest."""
    entry: dict[str, object] = {"nbytes": record.nbytes, "sha256": record.sha256}
    if record.header_xxh3 is not None:
        entry["header_xxh3"] = record.header_xxh3
    return entry
