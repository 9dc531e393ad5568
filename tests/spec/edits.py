"""The edit operations of spec/vectors/edited.json, which its README describes.

They share no code with qformat, so that a bug there cannot be hidden here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

MANIFEST = "qformat.json"
Edit = dict[str, Any]

_LABELS = {
    "": "packed",
    ".absmax": "absmax",
    ".nested_absmax": "nested_absmax",
    ".nested_quant_map": "nested_quant_map",
    ".quant_map": "quant_map",
    ".quant_state.bitsandbytes__nf4": "quant_state",
}


def apply(edits: list[Edit], folder: Path) -> None:
    """Apply edits in order to the artifact in `folder`."""
    for edit in edits:
        OPERATIONS[edit["op"]](folder, edit)


def _content(edit: Edit) -> bytes:
    data = bytes.fromhex(edit["hex"]) if "hex" in edit else edit["text"].encode("utf-8")
    return bytes(data * edit.get("times", 1))


# --- files ----------------------------------------------------------------------------------------------------------


def _remove(folder: Path, edit: Edit) -> None:
    (folder / edit["file"]).unlink()


def _write(folder: Path, edit: Edit) -> None:
    (folder / edit["file"]).write_bytes(_content(edit))


def _append(folder: Path, edit: Edit) -> None:
    with (folder / edit["file"]).open("ab") as file:
        file.write(_content(edit))


def _resize(folder: Path, edit: Edit) -> None:
    """Truncate a file, or extend it with zeros. A negative size counts from the end."""
    path = folder / edit["file"]
    nbytes = edit["nbytes"] if edit["nbytes"] >= 0 else path.stat().st_size + edit["nbytes"]
    os.truncate(path, nbytes)


def _flip(folder: Path, edit: Edit) -> None:
    path = folder / edit["file"]
    data = bytearray(path.read_bytes())
    data[edit["at"]] ^= 1 << edit["bit"]
    path.write_bytes(data)


def _replace(folder: Path, edit: Edit) -> None:
    path = folder / edit["file"]
    path.write_bytes(_replaced_once(path.read_bytes(), edit))


def _replaced_once(data: bytes, edit: Edit) -> bytes:
    old, new = edit["old"].encode("utf-8"), edit["new"].encode("utf-8")
    assert data.count(old) == 1, f"{old!r} occurs {data.count(old)} times"
    return data.replace(old, new)


def _make_folder(folder: Path, edit: Edit) -> None:
    (folder / edit["file"]).mkdir()


def _make_fifo(folder: Path, edit: Edit) -> None:
    os.mkfifo(folder / edit["file"])


def _move(folder: Path, edit: Edit) -> None:
    (folder / edit["to"]).parent.mkdir(exist_ok=True)
    (folder / edit["file"]).rename(folder / edit["to"])


def _link(folder: Path, edit: Edit) -> None:
    (folder / edit["file"]).symlink_to(edit["target"])


# --- JSON files -----------------------------------------------------------------------------------------------------


def _set(folder: Path, edit: Edit) -> None:
    path = folder / edit["file"]
    document = json.loads(path.read_bytes())
    _at(document, edit["at"][:-1])[edit["at"][-1]] = edit["value"]
    path.write_text(json.dumps(document, indent=2) + "\n", "utf-8")


def _delete(folder: Path, edit: Edit) -> None:
    path = folder / edit["file"]
    document = json.loads(path.read_bytes())
    del _at(document, edit["at"][:-1])[edit["at"][-1]]
    path.write_text(json.dumps(document, indent=2) + "\n", "utf-8")


def _at(document: Any, keys: list[str | int]) -> Any:
    for key in keys:
        document = document[key]
    return document


# --- shards ---------------------------------------------------------------------------------------------------------


def _read_shard(path: Path) -> tuple[bytes, bytes]:
    """Return the bytes of the header and the data."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return content[8:start], content[start:]


def _write_shard(path: Path, header: bytes, data: bytes, *, multiple: int = 4096) -> None:
    padded = -(-(8 + len(header)) // multiple) * multiple - 8
    path.write_bytes(padded.to_bytes(8, "little") + header.ljust(padded) + data)


def _header_set(folder: Path, edit: Edit) -> None:
    path = folder / edit["file"]
    header, data = _read_shard(path)
    document = json.loads(header)
    _at(document, edit["at"][:-1])[edit["at"][-1]] = edit["value"]
    _write_shard(path, json.dumps(document).encode("utf-8"), data)


def _header_delete(folder: Path, edit: Edit) -> None:
    path = folder / edit["file"]
    header, data = _read_shard(path)
    document = json.loads(header)
    del _at(document, edit["at"][:-1])[edit["at"][-1]]
    _write_shard(path, json.dumps(document).encode("utf-8"), data)


def _header_replace(folder: Path, edit: Edit) -> None:
    path = folder / edit["file"]
    header, data = _read_shard(path)
    _write_shard(path, _replaced_once(header.rstrip(b" "), edit), data)


def _header_write(folder: Path, edit: Edit) -> None:
    """Replace the text of the header, padded to a multiple of `multiple` (4096)."""
    path = folder / edit["file"]
    _, data = _read_shard(path)
    _write_shard(path, _content(edit), data, multiple=edit.get("multiple", 4096))


def _header_pad(folder: Path, edit: Edit) -> None:
    """Pad the header to a multiple other than 4096."""
    path = folder / edit["file"]
    header, data = _read_shard(path)
    _write_shard(path, header.rstrip(b" "), data, multiple=edit["multiple"])


def _header_length(folder: Path, edit: Edit) -> None:
    path = folder / edit["file"]
    path.write_bytes(edit["value"].to_bytes(8, "little") + path.read_bytes()[8:])


def _reorder(folder: Path, edit: Edit) -> None:
    """Write the tensors of a shard in the order of `names`, without gaps. Other tensors are dropped."""
    path = folder / edit["file"]
    header, data = _read_shard(path)
    document = json.loads(header)
    entries = {"__metadata__": document["__metadata__"]}
    payload = b""
    for name in edit["names"]:
        begin, end = document[name]["data_offsets"]
        entries[name] = {**document[name], "data_offsets": [len(payload), len(payload) + end - begin]}
        payload += data[begin:end]
    _write_shard(path, json.dumps(entries).encode("utf-8"), payload)


def _drop(folder: Path, edit: Edit) -> None:
    """Remove a tensor from its shard. The data after it moves up."""
    path = _shard_of(folder, edit["tensor"])
    document = json.loads(_read_shard(path)[0])
    names = [name for name in document if name not in {"__metadata__", edit["tensor"]}]
    names.sort(key=lambda name: document[name]["data_offsets"])
    _reorder(folder, {"file": path.name, "names": names})


def _add(folder: Path, edit: Edit) -> None:
    """Add a tensor after the others of a shard."""
    path = folder / edit["file"]
    header, data = _read_shard(path)
    document = json.loads(header)
    content = _content(edit)
    offsets = [len(data), len(data) + len(content)]
    document[edit["tensor"]] = {"dtype": edit["dtype"], "shape": edit["shape"], "data_offsets": offsets}
    _write_shard(path, json.dumps(document).encode("utf-8"), data + content)


def _data(folder: Path, edit: Edit) -> None:
    """Overwrite bytes of a tensor from offset `at` on."""
    path, start, nbytes = _range_of(folder, edit["tensor"])
    new = _content(edit)
    assert edit["at"] + len(new) <= nbytes
    content = bytearray(path.read_bytes())
    content[start + edit["at"] : start + edit["at"] + len(new)] = new
    path.write_bytes(content)


def _state(folder: Path, edit: Edit) -> None:
    """Replace text in a quant_state record, or all of it, and pad it to its old size."""
    path, start, nbytes = _range_of(folder, edit["tensor"] + ".quant_state.bitsandbytes__nf4")
    content = bytearray(path.read_bytes())
    text = bytes(content[start : start + nbytes]).rstrip(b" ")
    new = _replaced_once(text, edit) if "old" in edit else _content(edit)
    assert len(new) <= nbytes, f"{len(new)} bytes for a record of {nbytes}"
    content[start : start + nbytes] = new.ljust(nbytes)
    path.write_bytes(content)


def _shard_of(folder: Path, tensor: str) -> Path:
    (found,) = (path for path in folder.glob("*.safetensors") if tensor in json.loads(_read_shard(path)[0]))
    return found


def _range_of(folder: Path, tensor: str) -> tuple[Path, int, int]:
    path = _shard_of(folder, tensor)
    header, _ = _read_shard(path)
    begin, end = json.loads(header)[tensor]["data_offsets"]
    return path, 8 + len(header) + begin, end - begin


# --- the manifest's digests -----------------------------------------------------------------------------------------


def _seal(folder: Path, _: Edit) -> None:
    """Update the manifest's digest of itself."""
    path = folder / MANIFEST
    data = path.read_bytes()
    (start,) = (match.end() for match in re.finditer(rb'"manifest_sha256": "(?=[0-9a-f]{64}"\n}\n\Z)', data))
    zeroed = data[:start] + b"0" * 64 + data[start + 64 :]
    path.write_bytes(data[:start] + hashlib.sha256(zeroed).hexdigest().encode() + data[start + 64 :])


def _refresh(folder: Path, edit: Edit) -> None:
    """Update every size and digest of the manifest, as far as the files can be read, and seal it."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_bytes())
    digests: dict[str, str] = {}
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        entry["nbytes"], entry["sha256"] = len(data), hashlib.sha256(data).hexdigest()
        if "header_xxh3" in entry:
            start = min(8 + int.from_bytes(data[:8], "little"), len(data))
            entry["header_xxh3"] = xxhash.xxh3_128_hexdigest(data[:start])
            digests |= _data_digests(data[8:start], data[start:])
    for name, entry in manifest["tensors"].items():
        if entry["encoding"] == "kept":
            entry["xxh3"] = digests.get(name, entry["xxh3"])
        else:
            found = {label: digests[name + suffix] for suffix, label in _LABELS.items() if name + suffix in digests}
            entry["components"] |= {label: digest for label, digest in found.items() if label in entry["components"]}
    path.write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
    _seal(folder, edit)


def _data_digests(header: bytes, data: bytes) -> dict[str, str]:
    """Return the digest of each tensor with a readable header entry."""
    try:
        document = json.loads(header)
    except ValueError:
        return {}
    digests = {}
    for name, entry in document.items() if isinstance(document, dict) else ():
        match entry:
            case {"data_offsets": [int(begin), int(end)]} if 0 <= begin <= end <= len(data):
                digests[name] = xxhash.xxh3_128_hexdigest(data[begin:end])
    return digests


OPERATIONS: dict[str, Callable[[Path, Edit], None]] = {
    "remove": _remove,
    "write": _write,
    "append": _append,
    "resize": _resize,
    "flip": _flip,
    "replace": _replace,
    "folder": _make_folder,
    "fifo": _make_fifo,
    "move": _move,
    "link": _link,
    "set": _set,
    "delete": _delete,
    "header_set": _header_set,
    "header_delete": _header_delete,
    "header_replace": _header_replace,
    "header_write": _header_write,
    "header_pad": _header_pad,
    "header_length": _header_length,
    "reorder": _reorder,
    "drop": _drop,
    "add": _add,
    "data": _data,
    "state": _state,
    "seal": _seal,
    "refresh": _refresh,
}
