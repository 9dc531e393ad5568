"""Read a qformat artifact with the Python standard library alone: `python tools/reference_reader.py ARTIFACT [--tensor NAME]`.

Written from spec/README.md, section numbers in brackets, and from nothing else: it proves that the text is enough. Slow
and plain. It checks the structure and every SHA-256 (XXH3-128 is not in the standard library), and decodes any tensor.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import stat
import struct
import sys
from pathlib import Path
from typing import Any, NoReturn

ELEMENT_NBYTES = dict.fromkeys(
    ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1
) | {"I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8}  # fmt: skip
CODEBOOK_BITS = (
    "BF800000 BF3239B1 BF066B30 BECA32A0 BE91A24D BE3D353F BDBA7871 00000000 "
    "3DA2FAFF 3E24CAE3 3E7C04DD 3EAD033A 3EE1A4B8 3F1007AB 3F3913B3 3F800000"
)
CODEBOOK_BYTES = b"".join(bytes.fromhex(bits)[::-1] for bits in CODEBOOK_BITS.split())
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
MANIFEST, INDEX, CONFIG = "qformat.json", "model.safetensors.index.json", "config.json"
LARGEST_SIZE, CHUNK_NBYTES = 2**48, 2**22
PLACES = struct.Struct("<Q")


class Refused(Exception):
    """The artifact is not valid; `reason` is a code of section 9."""

    def __init__(self, reason: str, file: object, tensor: str | None = None) -> None:
        super().__init__(f"{file}: {f'tensor {tensor!r}: ' if tensor else ''}{reason}")
        self.reason = reason


def demand(truth: object, reason: str, file: object, tensor: str | None = None) -> None:
    if not truth:
        raise Refused(reason, file, tensor)


def load_json(data: bytes, file: object, *, at_most: int = 2**62, tensor: str | None = None) -> Any:  # [8]
    demand(len(data) <= at_most, "json_limit", file, tensor)

    def no(reason: str) -> NoReturn:
        raise Refused(reason, file, tensor)

    def number(text: str) -> int | float:
        integer = re.fullmatch(r"-?\d+", text) is not None
        demand(len(text) <= (20 if integer else 64), "json_limit", file, tensor)
        demand(integer or math.isfinite(float(text)), "json_limit", file, tensor)
        return int(text) if integer else float(text)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        demand(len(dict(pairs)) == len(pairs), "json_duplicate_key", file, tensor)
        return dict(pairs)

    try:
        text = data.decode("utf-8")
        depth = 0
        for token in re.findall(r'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', text, re.DOTALL):
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token, 0)
            demand(depth <= 32, "json_limit", file, tensor)
        constant = lambda _: no("json_syntax")  # noqa: E731
        return json.loads(
            text, parse_int=number, parse_float=number, parse_constant=constant, object_pairs_hook=unique
        )
    except ValueError:
        no("json_syntax")


def is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_SIZE


def is_shape(value: object) -> bool:
    return isinstance(value, list) and all(is_size(item) for item in value)


def is_hex(value: object, digits: int) -> bool:
    return isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", value) is not None


def open_file(folder: Path, name: str) -> int:  # [2.3]
    path = folder / name
    try:
        if path.is_symlink():
            in_cache, target = folder.parent.name == "snapshots", path.resolve()
            blobs = (folder.parent.parent / "blobs").resolve()
            demand(in_cache and target.parent == blobs, "path_escapes", path)
            path = target
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        raise Refused("missing_file", path) from None
    demand(stat.S_ISREG(os.fstat(descriptor).st_mode), "not_a_regular_file", path)
    return descriptor


def read_small(folder: Path, name: str, at_most: int) -> bytes:
    descriptor = open_file(folder, name)
    try:
        demand(os.fstat(descriptor).st_size <= at_most, "json_limit", name)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def parse_manifest(data: bytes) -> dict[str, Any]:  # [7]
    manifest = load_json(data, MANIFEST, at_most=2**27)
    demand(isinstance(manifest, dict) and manifest.get("format") == "qformat", "manifest_field", MANIFEST)
    version = manifest.get("format_version")
    good = isinstance(version, str) and re.fullmatch(r"1\.(0|[1-9][0-9]{0,3})", version)
    demand(good, "unsupported_version", MANIFEST)
    end = re.search(rb'  "manifest_sha256": "([0-9a-f]{64})"\n}\n\Z', data)
    demand(end, "manifest_digest", MANIFEST)
    assert end is not None
    zeroed = data[: end.start(1)] + b"0" * 64 + data[end.end(1) :]
    demand(hashlib.sha256(zeroed).hexdigest().encode() == end[1], "manifest_digest", MANIFEST)
    kinds = {"must_understand": list, "generator": str, "source": dict, "recipe": dict, "tensors": dict, "files": dict}
    for member, kind in kinds.items():
        demand(isinstance(manifest.get(member), kind), "manifest_field", MANIFEST)
    demand(all(isinstance(item, str) for item in manifest["must_understand"]), "manifest_field", MANIFEST)
    demand(not manifest["must_understand"], "unsupported_feature", MANIFEST)
    demand(manifest["tensors"], "manifest_field", MANIFEST)
    for name, entry in manifest["tensors"].items():
        demand(is_tensor_entry(entry), "manifest_field", MANIFEST, name)
    for name, entry in manifest["files"].items():
        plain = name not in {"", ".", ".."} and "/" not in name and "\\" not in name and name.isprintable()
        demand(plain, "path_escapes", MANIFEST)
        good = isinstance(entry, dict) and is_size(entry.get("nbytes")) and is_hex(entry.get("sha256"), 64)
        demand(good and is_hex(entry.get("header_xxh3", "0" * 32), 32), "manifest_field", MANIFEST)
    return manifest


def is_tensor_entry(entry: Any) -> bool:  # [7.2]
    if not isinstance(entry, dict) or not is_shape(entry.get("shape")) or len(entry["shape"]) > 8:
        return False
    dtype, block = entry.get("dtype"), entry.get("block_size")
    if entry.get("encoding") == "kept":
        return isinstance(dtype, str) and is_hex(entry.get("xxh3"), 32) and isinstance(entry.get("reason"), str)
    if entry.get("encoding") != "nf4" or dtype not in list(TORCH_NAMES) or type(block) is not int:
        return False
    double, digests = entry.get("double_quant"), entry.get("components")
    if block not in (32, 64, 128, 256) or type(double) is not bool or not isinstance(digests, dict):
        return False
    nested = {"nested_absmax", "nested_quant_map"} if double else set()
    wanted = {"packed", "absmax", "quant_map", "quant_state"} | nested
    return digests.keys() == wanted and all(is_hex(d, 32) for d in (*digests.values(), entry.get("source_xxh3", "0" * 32)))


def components(name: str, entry: dict[str, Any]) -> dict[str, tuple[str, list[int]]]:  # [3.2]
    """Name in the shards -> dtype and shape, for a tensor of the manifest."""
    if entry["encoding"] == "kept":
        return {name: (entry["dtype"], entry["shape"])}
    n = math.prod(entry["shape"])
    blocks = -(-n // entry["block_size"])
    text = '{"quant_type": "nf4", "blocksize": %d, "dtype": "%s", "shape": %s' % (  # [5.3]
        entry["block_size"], TORCH_NAMES[entry["dtype"]], json.dumps(entry["shape"]))  # fmt: skip
    longest = len(text) + 1
    parts = {"": ("U8", [-(-n // 2), 1]), ".absmax": ("F32", [blocks]), ".quant_map": ("F32", [16])}
    if entry["double_quant"]:
        longest += len(', "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": ') + 24
        parts |= {".absmax": ("U8", [blocks]), ".nested_absmax": ("F32", [-(-blocks // 256)]),
                  ".nested_quant_map": ("F32", [256])}  # fmt: skip
    parts[".quant_state.bitsandbytes__nf4"] = ("U8", [-(-longest // 64) * 64])
    return {name + suffix: (dtype, shape) for suffix, (dtype, shape) in parts.items()}


def read_header(descriptor: int, shard: str) -> dict[str, tuple[str, list[int], int, int]]:  # [3.1]
    """Name -> dtype, shape, first byte and byte behind the last, in the file."""
    file_nbytes = os.fstat(descriptor).st_size
    demand(file_nbytes >= 8, "truncated", shard)
    (nbytes,) = PLACES.unpack(os.pread(descriptor, 8, 0))
    demand(nbytes <= 2**25, "header_length", shard)
    demand(8 + nbytes <= file_nbytes, "truncated", shard)
    text = os.pread(descriptor, nbytes, 8)
    demand(text.startswith(b"{"), "header_syntax", shard)
    record = load_json(text.rstrip(b" "), shard)
    metadata = record.pop("__metadata__", {})
    good = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    demand(good, "header_field", shard)
    demand(record, "header_syntax", shard)
    found = {}
    for name, entry in record.items():
        good = name.isprintable() and 1 <= len(name.encode("utf-8", "replace")) <= 512
        demand(good, "header_limit", shard, name)
        good = isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}
        demand(good, "header_field", shard, name)
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        demand(isinstance(dtype, str) and dtype in ELEMENT_NBYTES, "unsupported_dtype", shard, name)
        demand(is_shape(shape) and is_shape(offsets) and len(offsets) == 2, "header_field", shard, name)
        demand(len(shape) <= 8, "header_limit", shard, name)
        size = math.prod(shape) * ELEMENT_NBYTES[dtype]
        demand(offsets[1] - offsets[0] == size, "header_offsets", shard, name)
        start = 8 + nbytes + offsets[0]
        demand(start % ELEMENT_NBYTES[dtype] == 0, "alignment", shard, name)
        found[name] = (dtype, shape, start, start + size)
    position = 8 + nbytes
    for name, (_, _, start, stop) in sorted(found.items(), key=lambda item: item[1][2:]):
        demand(start == position, "header_offsets", shard, name)
        position = stop
    demand(position <= file_nbytes, "truncated", shard)
    demand(position >= file_nbytes, "trailing_bytes", shard)
    demand((8 + nbytes) % 4096 == 0, "alignment", shard)
    for name, (_, _, start, stop) in found.items():  # [3.3]
        demand(start % min((stop - start) & (start - stop), 4096 * (stop > start)) == 0
               if stop > start else start % 4096 == 0, "alignment", shard, name)  # fmt: skip
    return found


class Artifact:
    """An artifact whose structure and SHA-256 digests were checked. Keeps its shards open."""

    def __init__(self, folder: Path) -> None:
        demand(folder.is_dir(), "missing_file", folder)
        self.manifest = parse_manifest(read_small(folder, MANIFEST, 2**27))
        self.tensors, self.files = self.manifest["tensors"], self.manifest["files"]
        self.places: dict[str, tuple[str, list[int], int, int]] = {}
        self.shards: dict[str, int] = {}  # tensor of a shard -> open file
        shard_of: dict[str, str] = {}
        for file, entry in self.files.items():
            descriptor = open_file(folder, file)
            demand(os.fstat(descriptor).st_size == entry["nbytes"], "file_size", file)
            if "header_xxh3" in entry:
                for name, place in read_header(descriptor, file).items():
                    demand(name not in self.places, "duplicate_tensor", file, name)
                    self.places[name], self.shards[name], shard_of[name] = place, descriptor, file
        wanted = {k: v for name, entry in self.tensors.items() for k, v in components(name, entry).items()}
        for name, (dtype, shape, _, _) in self.places.items():
            demand(name in wanted, "unknown_tensor", shard_of[name], name)
            demand(dtype == wanted[name][0], "component_dtype", shard_of[name], name)
            demand(shape == wanted[name][1], "component_shape", shard_of[name], name)
        for name in wanted:
            demand(name in self.places, "missing_component", folder, name)
        index = load_json(read_small(folder, INDEX, 2**26), INDEX)
        demand(isinstance(index, dict) and index.get("weight_map") == shard_of, "index_mismatch", INDEX)
        self.check_config(load_json(read_small(folder, CONFIG, 2**22), CONFIG))
        for name, entry in self.tensors.items():
            if entry["encoding"] == "nf4":
                self.check_packed(name, entry)
        for file, entry in self.files.items():  # [7.3]
            descriptor, digest = open_file(folder, file), hashlib.sha256()
            with os.fdopen(descriptor, "rb") as opened:
                while data := opened.read(CHUNK_NBYTES):
                    digest.update(data)
            demand(digest.hexdigest() == entry["sha256"], "file_digest", file)
        extra = {path.name for path in folder.iterdir()} - {*self.files, MANIFEST}
        demand(not extra, "extra_file", sorted(extra))

    def check_config(self, config: Any) -> None:  # [10]
        quantization = config.get("quantization_config") if isinstance(config, dict) else None
        demand(isinstance(quantization, dict), "config_field", CONFIG)
        wanted = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                  "bnb_4bit_quant_storage": "uint8"}  # fmt: skip
        demand(quantization.items() >= wanted.items(), "config_field", CONFIG)
        skip = quantization.get("llm_int8_skip_modules")
        good = isinstance(skip, list) and all(isinstance(entry, str) for entry in skip)
        packed = {name.removesuffix(".weight") for name, entry in self.tensors.items() if entry["encoding"] == "nf4"}
        demand(good and packed.isdisjoint(skip), "skip_modules", CONFIG)

    def check_packed(self, name: str, entry: dict[str, Any]) -> None:  # [3.2, 5.3]
        demand(self.data(name + ".quant_map") == CODEBOOK_BYTES, "codebook", name)
        floats = (".nested_absmax", ".nested_quant_map") if entry["double_quant"] else (".absmax",)
        good = all(math.isfinite(value) for part in floats for value in self.floats(name + part))
        demand(good, "nonfinite_scale", name)
        state = self.state(name)
        wanted: dict[str, object] = {"quant_type": "nf4", "blocksize": entry["block_size"],
                                     "dtype": TORCH_NAMES[entry["dtype"]], "shape": entry["shape"]}  # fmt: skip
        demand(isinstance(state, dict), "quant_state", name)
        if entry["double_quant"]:
            offset = state.pop("nested_offset", None)
            good = type(offset) in (int, float) and abs(offset) <= 3.4028234663852886e38
            demand(good and state.pop("nested_dtype", None) in ["float32", "bfloat16"], "quant_state", name)
            wanted["nested_blocksize"] = 256
        same_types = all(type(state.get(key)) is type(value) for key, value in wanted.items())
        demand(state == wanted and same_types and is_shape(state["shape"]), "quant_state", name)

    def data(self, name: str) -> bytes:
        _, _, start, stop = self.places[name]
        return os.pread(self.shards[name], stop - start, start)

    def floats(self, name: str) -> tuple[float, ...]:
        data = self.data(name)
        return struct.unpack(f"<{len(data) // 4}f", data)

    def state(self, name: str) -> Any:
        return load_json(self.data(name + ".quant_state.bitsandbytes__nf4").rstrip(b" "), name, tensor=name)

    def decode(self, name: str, dtype: str | None = None) -> bytes:
        """The bytes of a tensor: a kept one's as they are, a packed one's in `dtype` BF16, F16 or F32 (default: its own)."""
        entry = self.tensors[name]
        if entry["encoding"] == "kept":
            return self.data(name)
        dtype, packed = dtype or entry["dtype"], self.data(name)
        if entry["double_quant"]:  # [5.2]
            table, nested = self.floats(name + ".nested_quant_map"), self.floats(name + ".nested_absmax")
            offset = float32(float(self.state(name)["nested_offset"]))
            codes = enumerate(self.data(name + ".absmax"))
            scales = [float32(float32(table[code] * nested[i // 256]) + offset) for i, code in codes]
        else:
            scales = list(self.floats(name + ".absmax"))
        codebook = struct.unpack("<16f", CODEBOOK_BYTES)
        out = bytearray()
        for i in range(math.prod(entry["shape"])):  # [4.3]
            code = packed[i // 2] & 15 if i % 2 else packed[i // 2] >> 4
            out += rounded(float32(codebook[code] * scales[i // entry["block_size"]]), dtype)
        return bytes(out)


def float32(value: float) -> float:
    """Round: a product or sum of two float32 is rounded twice here, which changes nothing, float64 being wide enough."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def rounded(value: float, dtype: str) -> bytes:  # [6]
    try:
        if dtype == "BF16" and not math.isnan(value):
            (bits,) = struct.unpack("<I", struct.pack("<f", value))
            return struct.pack("<H", (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
        return {"BF16": b"\xc0\x7f"}[dtype] if dtype == "BF16" else struct.pack({"F16": "<e", "F32": "<f"}[dtype], value)
    except OverflowError:
        return struct.pack("<e", math.copysign(math.inf, value))


def main() -> int:
    parser = argparse.ArgumentParser(description="Check a qformat artifact, and print a tensor's decoded bytes as hex.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--tensor")
    parser.add_argument("--dtype", choices=list(TORCH_NAMES))
    options = parser.parse_args()
    try:
        artifact = Artifact(options.artifact)
    except Refused as refused:
        print(refused, file=sys.stderr)
        return 1
    if options.tensor is None:
        print(f"{options.artifact}: {len(artifact.tensors)} tensors, {len(artifact.files) + 1} files, no fault found")
    elif options.tensor in artifact.tensors:
        print(artifact.decode(options.tensor, options.dtype).hex())
    else:
        print(f"{options.artifact}: has no tensor {options.tensor!r}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
