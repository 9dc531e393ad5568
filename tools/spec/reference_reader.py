"""Read an artifact with only the standard library: `python -m tools.spec.reference_reader ARTIFACT [--tensor NAME]`.

Written only from spec/README.md (sections in brackets), to prove that the text is sufficient. It is simple and slow: it
checks the structure and every SHA-256 (XXH3-128 is not in the standard library) and decodes any tensor.
"""

import argparse
import ctypes
import hashlib
import json
import math
import os
import re
import stat
import struct
import sys
from pathlib import Path
from typing import Any

DTYPES = {1: "BOOL U8 I8 F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ", 2: "I16 U16 F16 BF16", 4: "I32 U32 F32",
          8: "I64 U64 F64 C64"}  # fmt: skip
ELEMENT_NBYTES = {dtype: nbytes for nbytes, dtypes in DTYPES.items() for dtype in dtypes.split()}
CODEBOOK_BITS = """BF800000 BF3239B1 BF066B30 BECA32A0 BE91A24D BE3D353F BDBA7871 00000000
                   3DA2FAFF 3E24CAE3 3E7C04DD 3EAD033A 3EE1A4B8 3F1007AB 3F3913B3 3F800000"""
CODEBOOK = b"".join(bytes.fromhex(bits)[::-1] for bits in CODEBOOK_BITS.split())
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
MANIFEST, INDEX, CONFIG, SIGNATURE = "qformat.json", "model.safetensors.index.json", "config.json", "model.sig"
QUANTIZATION = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_quant_storage": "uint8"}  # fmt: skip
HEADER_LIMIT, CHUNK_NBYTES, LARGEST_FLOAT32, STATE = 2**25, 2**22, 2.0**128 - 2.0**104, ".quant_state.bitsandbytes__nf4"
DOCUMENT = r".*\.(md|rst|pdf|png|jpg|jpeg|gif|webp|svg)"
LICENSE = r"((LICENSE|LICENCE|COPYING|NOTICE|USE_POLICY)([-_][^.]*)?|[^.]*[-_]LICEN[CS]E)(\.txt)?"
TRAINING = r"""training_args\.bin|trainer_state\.json|(optimizer|scheduler|scaler)\.pt|rng_state(_[0-9]+)?\.pth
               |(all|train|eval|test|predict)_results\.json|checkpoint-[0-9]+|runs"""
ACCOMPANIES = re.compile(f"{DOCUMENT}|{LICENSE}|{TRAINING}", re.VERBOSE | re.IGNORECASE | re.ASCII | re.DOTALL)  # [2.5]
SKIP_LIST, PARTS = "llm_int8_skip_modules", (".absmax", ".nested_absmax", ".nested_quant_map", ".quant_map", STATE)


class Refused(Exception):
    """The artifact is not valid; the arguments are a reason code of section 9, the file and the tensor."""


def demand(truth: object, reason: str, file: object, tensor: str | None = None) -> None:
    if not truth:
        raise Refused(reason, file, tensor)


def limit_of(file: str) -> int:  # [9]
    return 2**22 if file in {CONFIG, "generation_config.json"} else 2 ** (20 if file.endswith(".jinja") else 26)


def parse_json(data: bytes, file: str, at_most: int) -> Any:  # [8]
    def number(text: str) -> int | float:
        integer = re.fullmatch(r"-?\d+", text) is not None
        demand(len(text) <= ((4300 if file == CONFIG else 20) if integer else 64), "json_limit", file)
        demand(integer or math.isfinite(float(text)), "json_limit", file)
        return int(text) if integer and text != "-0" else float(text)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        demand(len(dict(pairs)) == len(pairs), "json_duplicate_key", file)
        return dict(pairs)

    try:
        text, depth = data.decode("utf-8"), 0
        skeleton = re.sub(r'"(?:[^"\\]++|\\.)*+"?', "", text, flags=re.DOTALL)
        demand(1 + len(re.findall(r"[,\[{]", skeleton)) <= min(at_most // 16, 1_310_720), "json_limit", file)
        for bracket in re.findall(r"[\[\]{}]", skeleton):
            depth += 1 if bracket in "[{" else -1
            demand(depth <= 32, "json_limit", file)
        value = json.loads(text, parse_int=number, parse_float=number, object_pairs_hook=unique)
        json.dumps(value, ensure_ascii=False, allow_nan=file == CONFIG).encode("utf-8")  # fails on unpaired surrogates
        return value
    except ValueError as problem:
        raise Refused("json_syntax", file) from problem


def is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= 2**48 for size in value)


def is_hex(value: object, digits: int) -> bool:
    return isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", value) is not None


def open_file(folder: Path, name: str) -> int:  # [2.3]
    path = folder / name
    try:
        if path.is_symlink():
            blobs, path = (folder.parent.parent / "blobs").resolve(), path.resolve()
            demand(folder.parent.name == "snapshots" and path.parent == blobs, "path_escapes", folder / name)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as problem:
        raise Refused("missing_file", folder / name) from problem
    demand(stat.S_ISREG(os.fstat(descriptor).st_mode), "not_a_regular_file", folder / name)
    return descriptor


def read_json(folder: Path, name: str) -> tuple[bytes, Any]:
    with os.fdopen(open_file(folder, name), "rb") as file:
        demand(os.fstat(file.fileno()).st_size <= limit_of(name), "json_limit", name)
        return (data := file.read()), parse_json(data, name, limit_of(name))


def check_manifest(data: bytes, manifest: Any) -> tuple[dict[str, Any], dict[str, Any]]:  # [7]
    demand(isinstance(manifest, dict) and manifest.get("format") == "qformat", "manifest_field", MANIFEST)
    version = re.fullmatch(r"1\.(0|[1-9][0-9]{0,3})", str(manifest.get("format_version")))
    demand(version and isinstance(manifest["format_version"], str), "unsupported_version", MANIFEST)
    seal = re.search(rb'  "manifest_sha256": "([0-9a-f]{64})"\n}\n\Z', data)
    digest = hashlib.sha256(data[: seal.start(1)] + b"0" * 64 + data[seal.end(1) :]).hexdigest() if seal else ""
    demand(seal and seal[1] == digest.encode(), "manifest_digest", MANIFEST)
    kinds = {"must_understand": list, "generator": str, "source": dict, "recipe": dict, "tensors": dict, "files": dict}
    demand(all(isinstance(manifest.get(key), kind) for key, kind in kinds.items()), "manifest_field", MANIFEST)
    good = manifest["tensors"] and all(isinstance(item, str) for item in manifest["must_understand"])
    sealed = manifest.get("sealed", [])
    good = good and isinstance(sealed, list) and all(is_change(entry) for entry in sealed)
    demand(good and isinstance(manifest.get("evaluation", {}), dict), "manifest_field", MANIFEST)
    demand(not manifest["must_understand"], "unsupported_feature", MANIFEST)
    for name, entry in manifest["tensors"].items():
        demand(isinstance(entry, dict) and is_tensor_entry(entry, name), "manifest_field", MANIFEST, name)
    taken = {name + part for name, entry in manifest["tensors"].items() if entry["encoding"] == "nf4" for part in PARTS}
    demand(taken.isdisjoint(manifest["tensors"]), "manifest_field", MANIFEST)
    for name, entry in manifest["files"].items():
        demand(name.isprintable() and not re.fullmatch(r"\.{0,2}|.*[/\\].*", name), "path_escapes", MANIFEST)
        good = isinstance(entry, dict) and is_sizes([entry.get("nbytes")]) and is_hex(entry.get("sha256"), 64)
        good = good and is_hex(entry.get("header_xxh3", "" if name.endswith(".safetensors") else "0" * 32), 32)
        demand(good and name != MANIFEST, "manifest_field", MANIFEST)
    return manifest["tensors"], manifest["files"]


def is_change(entry: Any) -> bool:  # [M12]
    digests = [entry.get(key, "") for key in ("previous_sha256", "sha256")] if isinstance(entry, dict) else [""]
    return all(item is None or is_hex(item, 64) for item in digests) and isinstance(entry.get("file"), str)


def is_tensor_entry(entry: dict[str, Any], name: str) -> bool:  # [7.2]
    dtype, block, double, digests, xxh3 = map(entry.get, ("dtype", "block_size", "double_quant", "components", "xxh3"))
    if not is_sizes(entry.get("shape")) or len(entry["shape"]) > 8 or not isinstance(dtype, str):
        return False
    if entry.get("encoding") == "kept":
        return is_hex(xxh3, 32) and is_hex(entry.get("source_xxh3", xxh3), 32) and isinstance(entry.get("reason"), str)
    if type(block) is not int or type(double) is not bool or not isinstance(digests, dict):
        return False
    labels = {"packed", "absmax", "quant_map", "quant_state"} | set(["nested_absmax", "nested_quant_map"] * double)
    hexes = [*digests.values(), entry.get("source_xxh3", "0" * 32)]
    good = entry.get("encoding") == "nf4" and dtype in TORCH_NAMES and block in (32, 64, 128, 256)
    return good and name.endswith(".weight") and digests.keys() == labels and all(is_hex(item, 32) for item in hexes)


def state_of(entry: dict[str, Any]) -> dict[str, object]:  # [5.3]
    """Return the expected quant_state of a packed tensor, with the offset and dtype that determine its size."""
    nested = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 10**23}  # 24 characters
    state = {"quant_type": "nf4", "blocksize": entry["block_size"], "dtype": TORCH_NAMES[entry["dtype"]]}
    return {**state, "shape": entry["shape"], **(nested if entry["double_quant"] else {})}


def components(name: str, entry: dict[str, Any]) -> dict[str, tuple[str, list[int]]]:  # [3.2]
    """Return the dtype and shape of each component of a tensor by its name in the shards."""
    if entry["encoding"] == "kept":
        return {name: (entry["dtype"], entry["shape"])}
    n, size = math.prod(entry["shape"]), -(-len(json.dumps(state_of(entry))) // 64) * 64
    m = -(-n // entry["block_size"])
    parts = {"": ("U8", [-(-n // 2), 1]), ".absmax": ("F32", [m]), ".quant_map": ("F32", [16]), STATE: ("U8", [size])}
    if entry["double_quant"]:
        parts |= {
            ".absmax": ("U8", [m]),
            ".nested_absmax": ("F32", [-(-m // 256)]),
            ".nested_quant_map": ("F32", [256]),
        }
    return {name + suffix: part for suffix, part in parts.items()}


def read_header(descriptor: int, shard: str) -> dict[str, tuple[str, list[int], int, int]]:  # [3.1]
    """Return dtype, shape, offset of the first byte and offset after the last byte of each tensor by name."""
    file_nbytes = os.fstat(descriptor).st_size
    demand(file_nbytes >= 8, "truncated", shard)
    nbytes = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    demand(nbytes <= HEADER_LIMIT, "header_length", shard)
    data_start, text = 8 + nbytes, os.pread(descriptor, nbytes, 8)
    demand(data_start <= file_nbytes, "truncated", shard)
    demand(text.startswith(b"{"), "header_syntax", shard)
    record = parse_json(text.rstrip(b" "), shard, HEADER_LIMIT)
    metadata = record.pop("__metadata__", {})
    good = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    demand(good, "header_field", shard)
    demand(record, "header_syntax", shard)
    found = {}
    for name, entry in record.items():
        demand(name.isprintable() and 1 <= len(name.encode()) <= 512, "header_limit", shard, name)
        good = isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}
        demand(good, "header_field", shard, name)
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        demand(isinstance(dtype, str) and dtype in ELEMENT_NBYTES, "unsupported_dtype", shard, name)
        demand(is_sizes(shape) and is_sizes(offsets) and len(offsets) == 2, "header_field", shard, name)
        demand(len(shape) <= 8, "header_limit", shard, name)
        start, stop = data_start + offsets[0], data_start + offsets[1]
        demand(stop - start == math.prod(shape) * ELEMENT_NBYTES[dtype], "header_offsets", shard, name)
        demand(start % ELEMENT_NBYTES[dtype] == 0, "alignment", shard, name)
        found[name] = (dtype, shape, start, stop)
    position = data_start
    for name, (_, _, start, stop) in sorted(found.items(), key=lambda item: item[1][2:]):
        demand(start == position, "header_offsets", shard, name)
        position = stop
    demand(position == file_nbytes, "truncated" if position > file_nbytes else "trailing_bytes", shard)
    demand(data_start % 4096 == 0, "alignment", shard)
    for name, (_, _, start, stop) in found.items():  # [3.3]: the largest power of two in the size, at most 4096
        demand(start % math.gcd(stop - start, 4096) == 0, "alignment", shard, name)
    return found


class Artifact:
    """An artifact whose structure and SHA-256 digests are checked on creation. Keeps its shards open."""

    def __init__(self, folder: Path) -> None:
        self.tensors, self.files = check_manifest(*read_json(folder, MANIFEST))
        self.places: dict[str, tuple[str, list[int], int, int]] = {}
        self.opened: dict[str, int] = {}  # tensor of a shard -> open file
        shard_of: dict[str, str] = {}
        for file, entry in self.files.items():
            if ACCOMPANIES.fullmatch(file) and "header_xxh3" not in entry:
                continue
            descriptor, digest = open_file(folder, file), hashlib.sha256()
            demand(os.fstat(descriptor).st_size == entry["nbytes"], "file_size", file)
            if "header_xxh3" in entry:
                for name, place in read_header(descriptor, file).items():
                    demand(name not in self.places, "duplicate_tensor", file, name)
                    self.places[name], self.opened[name], shard_of[name] = place, descriptor, file
            demand("header_xxh3" in entry or entry["nbytes"] <= limit_of(file), "json_limit", file)
            for start in range(0, entry["nbytes"], CHUNK_NBYTES):
                digest.update(os.pread(descriptor, CHUNK_NBYTES, start))
            demand(digest.hexdigest() == entry["sha256"], "file_digest", file)  # [7.3]
        wanted = {part: form for name, entry in self.tensors.items() for part, form in components(name, entry).items()}
        for name, (dtype, shape, _, _) in self.places.items():
            demand(name in wanted, "unknown_tensor", shard_of[name], name)
            demand(dtype == wanted[name][0], "component_dtype", shard_of[name], name)
            demand(shape == wanted[name][1], "component_shape", shard_of[name], name)
        demand(wanted.keys() == self.places.keys(), "missing_component", folder)
        index, config = read_json(folder, INDEX)[1], read_json(folder, CONFIG)[1]
        demand(isinstance(index, dict) and index.get("weight_map") == shard_of, "index_mismatch", INDEX)
        found: Any = config.get("quantization_config") if isinstance(config, dict) else None  # [10]
        good = isinstance(found, dict) and all(repr(found.get(key)) == repr(QUANTIZATION[key]) for key in QUANTIZATION)
        demand(good, "config_field", CONFIG)
        packed, skip = {k: v for k, v in self.tensors.items() if v["encoding"] == "nf4"}, found.get(SKIP_LIST)
        good = isinstance(skip, list) and all(isinstance(item, str) for item in skip)
        demand(good and not any(x.startswith(item + ".") for x in packed for item in skip), "skip_modules", CONFIG)
        for name, entry in packed.items():
            self.check_packed(name, entry)
        extra = {path.name for path in folder.iterdir()} - {*self.files, MANIFEST, SIGNATURE}
        good = all(name[0] == "." or ACCOMPANIES.fullmatch(name) for name in extra)
        demand(good, "extra_file", folder)

    def check_packed(self, name: str, entry: dict[str, Any]) -> None:  # [3.2, 5.3]
        demand(self.data(name + ".quant_map") == CODEBOOK, "codebook", name)
        parts = (".nested_absmax", ".nested_quant_map") if entry["double_quant"] else (".absmax",)
        good = all(math.isfinite(value) for part in parts for value in self.floats(name + part))
        demand(good, "nonfinite_scale", name)
        state = self.state(name)
        if entry["double_quant"] and isinstance(state, dict):
            good = type(state.get("nested_offset")) in (int, float) and abs(state["nested_offset"]) <= LARGEST_FLOAT32
            demand(good and state.get("nested_dtype") in ["float32", "bfloat16"], "quant_state", name)
            state |= {"nested_offset": 10**23, "nested_dtype": "float32"}
        same = json.dumps(state, sort_keys=True) == json.dumps(state_of(entry), sort_keys=True)  # 64 is not 64.0
        demand(same, "quant_state", name)

    def data(self, name: str) -> bytes:
        (_, _, start, stop), opened = self.places[name], self.opened[name]
        starts = range(start, stop, CHUNK_NBYTES)
        return b"".join(os.pread(opened, min(CHUNK_NBYTES, stop - begin), begin) for begin in starts)

    def floats(self, name: str) -> list[float]:
        return [value for (value,) in struct.iter_unpack("<f", self.data(name))]

    def state(self, name: str) -> Any:
        return parse_json(self.data(name + STATE).rstrip(b" "), name, 4096)

    def decode(self, name: str, dtype: str | None = None) -> bytes:
        """Return a tensor's bytes: unmodified if it is kept, else decoded to BF16, F16 or F32 (default: its dtype)."""
        entry, data = self.tensors[name], self.data(name)
        if entry["encoding"] == "kept":
            return data
        if entry["double_quant"]:  # [5.2]
            table, nested = self.floats(name + ".nested_quant_map"), self.floats(name + ".nested_absmax")
            codes, offset = enumerate(self.data(name + ".absmax")), float32(self.state(name)["nested_offset"])
            scales = [float32(float32(table[code] * nested[i // 256]) + offset) for i, code in codes]
        else:
            scales = self.floats(name + ".absmax")
        values = [value for (value,) in struct.iter_unpack("<f", CODEBOOK)]
        nibbles = bytes(code for byte in data for code in (byte >> 4, byte & 15))[: math.prod(entry["shape"])]
        decoded = (float32(values[code] * scales[i // entry["block_size"]]) for i, code in enumerate(nibbles))  # [4.3]
        return b"".join(rounded(value, dtype or entry["dtype"]) for value in decoded)


def float32(value: float) -> float:
    """Round to float32. A float64 product or sum of two float32 is so precise that rounding it twice is harmless."""
    return ctypes.c_float(value).value


def rounded(value: float, dtype: str) -> bytes:  # [6]
    if dtype == "BF16":
        bits = int.from_bytes(struct.pack("<f", value), "little")
        return struct.pack("<H", 0x7FC0 if math.isnan(value) else (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
    try:
        return struct.pack("<e" if dtype == "F16" else "<f", value)
    except OverflowError:
        return struct.pack("<e", math.copysign(math.inf, value))


def main() -> None:
    parser = argparse.ArgumentParser(description="Check a qformat artifact, or print a tensor's decoded bytes as hex.")
    parser.add_argument("artifact", type=Path), parser.add_argument("--tensor")
    options = parser.parse_args()
    try:
        artifact = Artifact(options.artifact)
        demand(options.tensor in {None, *artifact.tensors}, "no such tensor", options.artifact, options.tensor)
    except Refused as refused:
        sys.exit(f"invalid artifact: {' '.join(str(part) for part in refused.args)}")
    print("no errors found" if options.tensor is None else artifact.decode(options.tensor).hex())


if __name__ == "__main__":
    main()
