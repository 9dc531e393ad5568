"""Modify artifacts into what a later version of the format or another writer could write."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from qformat.artifact import layout
from qformat.artifact.digests import xxh3
from qformat.artifact.manifest import FileRecord
from qformat.artifact.manifest_seal import seal
from tools.spec.reference_codec import JsonObject


def file_record(data: bytes, header_nbytes: int | None) -> FileRecord:
    """Return the manifest's record of a file. Only shards have a header."""
    digest = None if header_nbytes is None else xxh3(data[:header_nbytes])
    return FileRecord(len(data), hashlib.sha256(data).hexdigest(), digest)


def add_unknown_members(path: Path) -> None:
    """Add unknown members to the entries of a tensor and of a file, and seal the manifest again."""
    text = path.read_text("utf-8")
    text = text.replace('"double_quant":true,', '"double_quant":true,"mean_error":0.001,', 1)
    text = text.replace('"config.json": {', '"config.json": {"purpose":["model",null,1e-3],', 1)
    path.write_bytes(seal(_unsealed(text.encode("utf-8"))))


def _unsealed(data: bytes) -> bytes:
    start = data.rindex(b'"manifest_sha256": "') + len(b'"manifest_sha256": "')
    return data[:start] + b"0" * 64 + data[start + 64 :]


def relay(folder: Path) -> None:
    """Rewrite a one-shard artifact as another writer could: everything that section 3.3 leaves to writers differs."""
    (shard,) = folder.glob("*.safetensors")
    data = shard.read_bytes()
    nbytes = int.from_bytes(data[:8], "little")
    record = json.loads(data[8 : 8 + nbytes])
    entries = {name: entry for name, entry in record.items() if name != "__metadata__"}
    # Another order that keeps every offset a multiple of its alignment, without padding.
    ordered = sorted(entries, key=lambda name: (-_alignment(entries[name]), name[::-1]))
    payload, header_entries = b"", {}
    for name in ordered:
        begin, end = entries[name]["data_offsets"]
        offsets = [len(payload), len(payload) + end - begin]
        header_entries[name] = {
            "data_offsets": offsets,
            "shape": entries[name]["shape"],
            "dtype": entries[name]["dtype"],
        }
        payload += data[8 + nbytes + begin : 8 + nbytes + end]
    document = dict(reversed(header_entries.items())) | {"__metadata__": {"format": "pt", "author": "somebody else"}}
    text = json.dumps(document, indent=1).encode("utf-8")
    text = text.ljust(8192 - 8)
    renamed = folder / "weights.safetensors"
    shard.unlink()
    renamed.write_bytes(len(text).to_bytes(8, "little") + text + payload)
    index_path = folder / "model.safetensors.index.json"
    index_path.write_bytes(json.dumps({"weight_map": dict.fromkeys(entries, renamed.name)}).encode())
    manifest_path = folder / "qformat.json"
    manifest = json.loads(manifest_path.read_bytes())
    for old, path in ((shard.name, renamed), (index_path.name, index_path)):
        del manifest["files"][old]
        content = path.read_bytes()
        made = file_record(content, 8 + len(text) if path is renamed else None)
        manifest["files"][path.name] = {"sha256": made.sha256, "nbytes": made.nbytes}
        if made.header_xxh3 is not None:
            manifest["files"][path.name]["header_xxh3"] = made.header_xxh3
    digest = manifest.pop("manifest_sha256")
    body = json.dumps({**dict(reversed(manifest.items())), "manifest_sha256": digest}, indent=2)
    manifest_path.write_bytes(seal(_unsealed(body.encode("utf-8") + b"\n")))


def _alignment(entry: JsonObject) -> int:
    begin, end = entry["data_offsets"]
    return layout.alignment(end - begin)
