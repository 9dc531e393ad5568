"""Make the generated part of the conformance corpus, spec/vectors, anew: `python -m tools.spec.make_vectors`.

On purpose only: golden files change when the specification does, never to make a test pass. Tests do not call this.
Writes tensors.json, artifacts.json and artifacts/; edited.json is written by hand and stays as it is.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qformat.artifact import layout
from qformat.artifact.components import Component, PackedShape
from qformat.artifact.digests import xxh3
from qformat.artifact.manifest import FileRecord, KeptRecord, Manifest, PackedRecord, seal
from qformat.artifact.packed_arrays import PackedArrays, store_scales
from qformat.artifact.tensor_spec import ELEMENT_NBYTES, TensorSpec
from qformat.codec import nf4
from qformat.codec.codebooks import DYNAMIC_MAP, DYNAMIC_THRESHOLDS, NF4_CODEBOOK, NF4_THRESHOLDS
from qformat.codec.floats import FloatFormat, Raw, narrow, widen
from qformat.codec.nested import decode_absmax, encode_absmax
from qformat.codec.quant_state import QuantState

VECTORS = Path(__file__).resolve().parents[2] / "spec" / "vectors"
BF16, F16, F32 = FloatFormat.BF16, FloatFormat.F16, FloatFormat.F32
F32_MAX = np.finfo(np.float32).max

Floats = NDArray[np.float32]
JsonObject = dict[str, Any]


def reference_decode(arrays: PackedArrays, float_format: FloatFormat) -> Raw:
    """What the reference codec decodes components to: vectors do not depend on the fast kernels."""
    with np.errstate(over="ignore", invalid="ignore"):
        scales = arrays.absmax
        if arrays.second_level is not None:
            nested_absmax, nested_quant_map, offset = arrays.second_level
            scales = decode_absmax(arrays.absmax, nested_absmax, offset, nested_quant_map=nested_quant_map)
        layout = arrays.layout
        values = nf4.decode(arrays.packed, scales, n_elements=layout.n_elements, block_size=layout.block_size)
        return narrow(values, float_format)


def component_bytes(arrays: PackedArrays) -> dict[Component, bytes]:
    return {part: data.tobytes() for part, data in arrays.components().items()}


def encode(
    raw: Raw, float_format: FloatFormat, shape: Sequence[int], block_size: int, double_quant: bool
) -> PackedArrays:
    """Encode with the reference codec."""
    layout = PackedShape(tuple(shape), float_format, block_size, double_quant)
    assert layout.n_elements == raw.size
    packed, absmax = nf4.encode(widen(raw, float_format), block_size=block_size)
    return store_scales(absmax, layout).with_codes(packed)


def stored(
    state: QuantState,
    packed: NDArray[np.uint8],
    absmax: NDArray[Any],
    nested_absmax: Floats | None = None,
    nested_quant_map: Floats | None = None,
) -> PackedArrays:
    """Numbers that no encoder chose."""
    return PackedArrays(
        state=state, packed=packed, absmax=absmax, nested_absmax=nested_absmax, nested_quant_map=nested_quant_map
    )


def raw_of(values: Any, float_format: FloatFormat) -> Raw:
    return narrow(np.asarray(values, np.float32).reshape(-1), float_format)


def neighbours(values: Floats) -> Floats:
    """Each value and the float32 on either side of it."""
    infinity = np.float32(np.inf)
    return np.stack([np.nextafter(values, -infinity), values, np.nextafter(values, infinity)], axis=1).reshape(-1)


# --- tensors.json ---------------------------------------------------------------------------------------------------


class TensorVectors:
    def __init__(self) -> None:
        self.vectors: list[JsonObject] = []

    def encode(
        self,
        name: str,
        about: str,
        rules: str,
        values: Any,
        *,
        dtype: FloatFormat = BF16,
        shape: Sequence[int] | None = None,
        block: int = 64,
        double: bool = True,
        decoded: Sequence[FloatFormat] = (BF16, F16, F32),
        raw: Raw | None = None,
    ) -> None:
        """A vector for encoder and decoder. `values` are rounded to the dtype unless `raw` gives the bits."""
        raw = raw_of(values, dtype) if raw is None else raw
        shape = (1, raw.size) if shape is None else shape
        encoded = encode(raw, dtype, shape, block, double)
        self._add(name, about, rules, encoded, decoded, raw)

    def decode(
        self,
        name: str,
        about: str,
        rules: str,
        encoded: PackedArrays,
        decoded: Sequence[FloatFormat] = (BF16, F16, F32),
    ) -> None:
        """A vector for decoders only: valid codes that this encoder does not write."""
        self._add(name, about, rules, encoded, decoded, None)

    def refuse(self, name: str, about: str, rules: str, values: Any, *, dtype: FloatFormat, block: int = 64) -> None:
        raw = raw_of(values, dtype)
        self.vectors.append(
            {
                "name": name, "about": about, "rules": rules.split(), "dtype": dtype.value, "shape": [1, raw.size],
                "block_size": block, "double_quant": True, "input": raw.tobytes().hex(), "reason": "nonfinite_weight",
            }
        )  # fmt: skip

    def _add(
        self, name: str, about: str, rules: str, e: PackedArrays, decoded: Sequence[FloatFormat], raw: Raw | None
    ) -> None:
        vector: JsonObject = {
            "name": name, "about": about, "rules": rules.split(), "dtype": e.layout.float_format.value,
            "shape": list(e.layout.shape), "block_size": e.layout.block_size, "double_quant": e.layout.double_quant,
            "input": None if raw is None else raw.tobytes().hex(),
            "packed": e.packed.tobytes().hex(), "absmax": e.absmax.tobytes().hex(),
        }  # fmt: skip
        if e.nested_absmax is not None and e.nested_quant_map is not None:
            vector["nested_absmax"] = e.nested_absmax.tobytes().hex()
            if not np.array_equal(e.nested_quant_map, DYNAMIC_MAP):
                vector["nested_quant_map"] = e.nested_quant_map.tobytes().hex()
            assert e.state.nested_offset is not None
            vector["nested_offset_bits"] = f"{np.float32(e.state.nested_offset).view(np.uint32):08X}"
        vector["quant_state"] = e.state.to_padded_json().decode("ascii")
        vector["decoded"] = {f.value: reference_decode(e, f).tobytes().hex() for f in decoded}
        self.vectors.append(vector)


def tensor_vectors() -> list[JsonObject]:
    v = TensorVectors()
    rng = np.random.default_rng(20240229)
    for dtype in (BF16, F16, F32):
        for block in nf4.BLOCK_SIZES:
            v.encode(
                f"plain_{dtype.value.lower()}_{block}", f"normal weights in {dtype.value}, whole blocks of {block}",
                "E1 E3 E5 E6 E9 E11 N3 N4 N5 N7 N8 N9 F1", rng.normal(0, 0.02, (8, block)), dtype=dtype,
                shape=(8, block), block=block, double=block != 128,
            )  # fmt: skip
    ties = np.concatenate([neighbours(NF4_THRESHOLDS), NF4_CODEBOOK, [np.float32(-1), np.float32(1), np.float32(0)]])
    v.encode("ties_whole_block", "each threshold, one step below and above it, and each codebook value; absmax 1",
             "E1 E2 E6", ties, dtype=F32, block=64, double=False, shape=(4, 16))  # fmt: skip
    v.encode("ties_partial_block", "the same in one partial block, which divides", "E2 E7", ties, dtype=F32, block=256,
             double=False)  # fmt: skip
    differing = multiply_and_divide_differ(rng)
    v.encode("reciprocal_in_whole_block", "weights whose code depends on multiplying by the reciprocal", "E6",
             differing, dtype=F32, block=32, double=False)  # fmt: skip
    v.encode("division_in_partial_block", "the same weights in a partial block: other codes", "E7",
             differing, dtype=F32, block=64, double=False)  # fmt: skip
    for n, what in ((1, "one element"), (63, "a block minus one"), (65, "a block plus one"), (127, "a prime")):
        v.encode(f"odd_{n}", f"{what}: odd tail, partial block", "E7 E9 E10 E11", rng.normal(0, 0.02, n), shape=(n, 1))
    v.encode("one_negative", "one element, negative: code 0", "E2 E10", [-0.5], shape=(1, 1), double=False)
    v.encode("rows_across_blocks", "5 x 13: blocks run across rows", "E3 E7 E10", rng.normal(0, 1, (5, 13)),
             shape=(5, 13), block=32, dtype=F16)  # fmt: skip
    v.encode("zeros", "an all-zero tensor", "E8 N6", np.zeros(128), shape=(2, 64))
    v.encode("zero_block", "an all-zero block between others", "E8 N7",
             np.concatenate([rng.normal(0, 1, 64), np.zeros(64), rng.normal(0, 1, 64)]), shape=(3, 64))  # fmt: skip
    v.encode("zero_tail", "a partial block of zeros, odd", "E8 E10", np.append(rng.normal(0, 1, 64), np.zeros(7)))
    v.encode("negative_zero", "-0.0 has code 7 and decodes to +0.0", "E8", [-0.0, 0.0, 1.0, -1.0] * 16, double=False)
    tiny16 = np.arange(64, dtype=np.uint16) * np.uint16(2) + np.uint16(1)
    v.encode("subnormal_bf16", "a block of bfloat16 subnormals: below 1e-38 the divisor is 1e-38", "E5 E6 F1", None,
             raw=np.where(np.arange(64) % 2, tiny16 | np.uint16(0x8000), tiny16), double=False)  # fmt: skip
    v.encode("subnormal_f16", "a block of binary16 subnormals", "F1 F2 E5", None,
             raw=np.where(np.arange(64) % 2, tiny16 * 8 | np.uint16(0x8000), tiny16 * 8).astype(np.uint16),
             dtype=F16)  # fmt: skip
    v.encode("around_smallest_divisor", "absmax just below, at and above 1e-38, one block each", "E5",
             np.concatenate([np.linspace(-m, m, 32) for m in neighbours(np.array([1e-38], np.float32))]),
             dtype=F32, block=32, double=False)  # fmt: skip
    for dtype, largest in ((BF16, 0x7F7F), (F16, 0x7BFF)):
        bits = np.where(np.arange(64) % 3 == 0, largest | 0x8000, largest).astype(np.uint16)
        bits[5:40] = raw_of(rng.normal(0, 1, 35) * (3e38 if dtype is BF16 else 6e4) / 4, dtype)
        v.encode(f"largest_{dtype.value.lower()}", f"the largest finite {dtype.value} of both signs", "E6 F3", None,
                 raw=bits, dtype=dtype, double=dtype is F16)  # fmt: skip
    v.encode("largest_f32", "the largest float32: its reciprocal is subnormal; rounding to 16 bits overflows",
             "E6 F3 N7", np.concatenate([np.linspace(-1, 1, 64) * F32_MAX, np.zeros(64)]), dtype=F32,
             shape=(2, 64))  # fmt: skip
    scales = np.abs(rng.normal(0, 1, 513)) * np.where(np.arange(513) // 256 == 1, 100, 1) + 0.01
    weights = rng.normal(0, 0.3, (513, 32)).clip(-1, 1)
    weights[:, 3] = 1
    values = (weights * scales[:, None]).reshape(-1)[:-7]
    v.encode("three_nested_groups", "513 blocks: two whole nested groups and one of a single block", "N3 N4 N5 N7",
             values, shape=(1, values.size), block=32, decoded=(BF16,))  # fmt: skip
    v.encode("equal_scales", "two blocks with the same absmax: nested_absmax 0, every code 0", "N6 N7",
             [1.5, -0.25] * 64, shape=(2, 64))  # fmt: skip
    huge, half_ulp = 2.0**53, 2.0**29
    for name, order, what in (
        ("sum_in_index_order_1", (huge, 1.0, 1.0, half_ulp), "small values are lost behind a large one"),
        ("sum_in_index_order_2", (1.0, 1.0, huge, half_ulp), "the same values in another order: another mean"),
    ):
        blocks = np.zeros((4, 32))
        blocks[:, 0] = order
        v.encode(name, f"the mean's sum is float64 and in index order: {what}", "N3", blocks, shape=(4, 32), block=32)
    v.encode("second_level_ties", "scales whose normalised value is exactly a threshold of the dynamic map", "N5",
             second_level_ties(), dtype=F32, block=32, decoded=(F32,))  # fmt: skip
    v.refuse("nan_refused", "a NaN", "E4", [0.5, np.nan, 0.25], dtype=BF16)
    v.refuse("infinity_refused", "an infinity in a whole block", "E4", [1.0] * 63 + [-np.inf], dtype=F16)
    v.refuse(
        "nan_in_tail_refused", "a NaN as the last element of a partial block", "E4", [1.0] * 64 + [np.nan], dtype=F32
    )
    decoder_vectors(v)
    return v.vectors


def multiply_and_divide_differ(rng: np.random.Generator) -> Floats:
    """32 weights with absmax 0.7 whose codes differ between x * (1 / absmax) and x / absmax."""
    absmax = np.float32(0.7)
    found = [absmax]
    around = np.concatenate([neighbours(neighbours(NF4_THRESHOLDS * absmax)), neighbours(NF4_CODEBOOK * absmax)])
    product, quotient = around * (np.float32(1) / absmax), around / absmax
    differs = np.searchsorted(NF4_THRESHOLDS, product) != np.searchsorted(NF4_THRESHOLDS, quotient)
    found += list(np.unique(around[differs]))
    assert 2 <= len(found) <= 32, len(found)
    return np.array(found + list(rng.normal(0, 0.1, 32 - len(found))), np.float32)


def second_level_ties() -> Floats:
    """Blocks whose absmax, centered and divided by the group's largest, hits thresholds of the dynamic map exactly.

    All numbers are integers below 2^24 and symmetric around the offset, so that nothing but the division rounds.
    """
    thresholds = DYNAMIC_THRESHOLDS[DYNAMIC_THRESHOLDS > 0.1]

    def hits(largest: int) -> Floats:
        centered = np.rint(thresholds.astype(np.float64) * largest).astype(np.float32)
        found: Floats = centered[centered / np.float32(largest) == thresholds]
        return found

    largest = max(range(2**22 - 4000, 2**22), key=lambda candidate: len(hits(candidate)))
    ties = hits(largest)
    assert len(ties) >= 20, len(ties)
    steps = np.unique(np.concatenate([ties - 1, ties, ties + 1]))[:70]
    centered = np.concatenate([[np.float32(largest)], steps])
    absmax = np.float32(2**22) + np.stack([centered, -centered], axis=1).reshape(-1)
    assert encode_absmax(absmax).offset == 2**22
    blocks = np.zeros((absmax.size, 32), np.float32)
    blocks[np.arange(absmax.size), np.arange(absmax.size) % 32] = absmax
    return blocks.reshape(-1)


def decoder_vectors(v: TensorVectors) -> None:
    every_code = nf4.pack(np.arange(64, dtype=np.uint8) % 16)
    state = QuantState(32, BF16, (2, 32), 0.25)
    negative = stored(state, every_code, np.array([0, 127], np.uint8), np.array([1], np.float32), DYNAMIC_MAP)
    v.decode("negative_scale", "a decoded scale is negative: signs turn, zeros become -0.0", "E11 S12 N7", negative)
    other = stored(state, every_code, np.array([1, 255], np.uint8), np.array([-2], np.float32),
                    np.linspace(0.5, -3, 256).astype(np.float32))  # fmt: skip
    v.decode("other_nested_map", "a stored map that is not the dynamic one, and a negative nested_absmax", "N2", other)
    in_bfloat16 = stored(QuantState(32, BF16, (2, 32), 0.052978515625, "bfloat16"), every_code,
                          np.array([3, 250], np.uint8), np.array([0.017], np.float32), DYNAMIC_MAP)  # fmt: skip
    v.decode("nested_dtype_bfloat16", "as bitsandbytes writes it after a forward on some CPUs", "N11", in_bfloat16)
    not_float32 = stored(QuantState(32, BF16, (2, 32), 0.1), every_code, np.array([3, 250], np.uint8),
                          np.array([0.017], np.float32), DYNAMIC_MAP)  # fmt: skip
    v.decode("offset_rounded_to_float32", "an offset with more digits than a float32 has", "N7 N10", not_float32)
    bf16_ties = [
        0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF808000, 0xBF818000, 0x00008000, 0x00018000, 0x7F7F8000,
        0x7F7F7FFF, 0xFF7F8000, 0x00000001, 0x3F7FFFFF,
    ]  # fmt: skip
    f16_ties = [
        0x3F801000, 0x3F803000, 0x3F801001, 0x3F800FFF, 0x477FF000, 0x477FEFFF, 0xC77FF000, 0x33000000, 0x33000001,
        0x33800000, 0x33C00000, 0x387FE000, 0x387FF000,
    ]  # fmt: skip
    scales = np.array(bf16_ties + f16_ties + [0] * 6, np.uint32).view(np.float32)
    codes = np.tile(np.array([15, 0, 7, 8], np.uint8), 256)
    rounding = stored(QuantState(32, F32, (1, 1024), None), nf4.pack(codes), scales)
    v.decode("rounding", "ties to even, gradual underflow, overflow: the scales are the values", "F2 F3 E11", rounding)
    products = stored(QuantState(32, F32, (1, 512), None),
                       nf4.pack(np.arange(512, dtype=np.uint8) % 16),
                       np.float32(2.0) ** np.array([-149, -140, -130, -126, -24, -14, -8, -1, 0, 3, 15, 16, 64, 126,
                                                    127, 127], np.float32) * np.float32(1))  # fmt: skip
    v.decode("products_of_every_code", "each codebook value times scales over the whole range", "E1 E11 F1", products)
    ignored = stored(QuantState(64, BF16, (1, 3), None),
                      np.array([0x0F, 0x8C], np.uint8), np.array([1], np.float32))  # fmt: skip
    v.decode("last_nibble_ignored", "an odd tensor whose unused nibble is not 7", "E10", ignored)


# --- artifacts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    dtype: str
    shape: tuple[int, ...]
    data: bytes
    reason: str = "not_a_matrix"


def small_json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


class ArtifactVectors:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.described: list[JsonObject] = []

    def add(
        self,
        name: str,
        about: str,
        rules: str,
        tensors: Mapping[str, PackedArrays | Kept],
        *,
        max_shard_nbytes: int = 10**9,
        side_files: Mapping[str, bytes] | None = None,
        format_version: str = "1.0",
        extra: JsonObject | None = None,
    ) -> Path:
        """Write an artifact as a writer of section 3.3 and 7.4 does."""
        ordered = dict(sorted(tensors.items(), key=lambda item: layout.natural_order(item[0])))
        groups = [list(_new_tensors(key, tensor).values()) for key, tensor in ordered.items()]
        shards = layout.place(groups, max_shard_nbytes=max_shard_nbytes)
        contents = {new.name: data for key, tensor in ordered.items() for new, data in _contents(key, tensor)}
        files = {
            shard.name: shard.header + b"".join(contents[placed.tensor.name] for placed in shard.tensors)
            for shard in shards
        }
        records = {shard.name: _record(files[shard.name], len(shard.header)) for shard in shards}
        weight_map = {placed.tensor.name: shard.name for shard in shards for placed in shard.tensors}
        small = dict(side_files or {})
        small["config.json"] = _config(ordered)
        total = sum(len(data) for data in contents.values())
        small["model.safetensors.index.json"] = small_json(
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        )
        manifest = Manifest(
            tensors={key: _tensor_record(tensor) for key, tensor in ordered.items()},
            files=records | {file: _record(data, None) for file, data in small.items()},
            recipe={"defaults": {"block_size": 64, "double_quant": True}, "rules": []},
            source={"kind": "safetensors", "files": {"model.safetensors": {"nbytes": 0}}},
            generator="qformat test vectors",
            format_version=format_version,
            extra=extra or {},
        )
        small["qformat.json"] = manifest.to_bytes()
        path = self.folder / name
        path.mkdir(parents=True)
        for file, data in (files | small).items():
            (path / file).write_bytes(data)
        self.described.append(
            {
                "name": name, "about": about, "rules": rules.split(), "as_written": True,
                "max_shard_nbytes": max_shard_nbytes,
                "tensors": {key: _expected(tensor) for key, tensor in ordered.items()},
            }
        )  # fmt: skip
        return path

    def rewritten(self, path: Path) -> None:
        """Say that the artifact just added was changed by hand: valid, but not what a writer makes."""
        self.described[-1]["as_written"] = False
        assert self.described[-1]["name"] == path.name


def _new_tensors(name: str, tensor: PackedArrays | Kept) -> dict[Component, TensorSpec]:
    if isinstance(tensor, Kept):
        return {Component.PACKED: TensorSpec(name, tensor.dtype, tensor.shape)}
    return tensor.layout.components(name)


def _contents(name: str, tensor: PackedArrays | Kept) -> list[tuple[TensorSpec, bytes]]:
    parts = {Component.PACKED: tensor.data} if isinstance(tensor, Kept) else component_bytes(tensor)
    made = [(new, parts[part]) for part, new in _new_tensors(name, tensor).items()]
    for new, data in made:
        assert len(data) == new.nbytes, new.name
    return made


def _record(data: bytes, header_nbytes: int | None) -> FileRecord:
    digest = None if header_nbytes is None else xxh3(data[:header_nbytes])
    return FileRecord(len(data), hashlib.sha256(data).hexdigest(), digest)


def _tensor_record(tensor: PackedArrays | Kept) -> PackedRecord | KeptRecord:
    if isinstance(tensor, Kept):
        return KeptRecord(tensor.dtype, tensor.shape, xxh3(tensor.data), tensor.reason)
    components = {part: xxh3(data) for part, data in component_bytes(tensor).items()}
    return PackedRecord(tensor.layout, components, None)


def _config(tensors: Mapping[str, PackedArrays | Kept]) -> bytes:
    kept = {
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if isinstance(tensor, Kept) and name.endswith("proj.weight")
    }
    quantization = {
        "_load_in_4bit": True, "_load_in_8bit": False, "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": sorted(kept | {"lm_head"}), "llm_int8_threshold": 6.0, "load_in_4bit": True,
        "load_in_8bit": False, "quant_method": "bitsandbytes",
    }  # fmt: skip
    return small_json({"model_type": "llama", "quantization_config": quantization})


def _expected(tensor: PackedArrays | Kept) -> JsonObject:
    if isinstance(tensor, Kept):
        return {"encoding": "kept", "dtype": tensor.dtype, "shape": list(tensor.shape), "bytes": tensor.data.hex()}
    decoded = {f.value: reference_decode(tensor, f).tobytes().hex() for f in FloatFormat}
    return {"encoding": "nf4", "dtype": tensor.layout.float_format.value, "shape": list(tensor.layout.shape),
            "decoded": decoded}  # fmt: skip


def artifact_vectors(folder: Path) -> list[JsonObject]:
    rng = np.random.default_rng(1729)

    def weight(
        shape: Sequence[int], dtype: FloatFormat = BF16, block: int = 64, *, double: bool = True
    ) -> PackedArrays:
        return encode(raw_of(rng.normal(0, 0.02, math.prod(shape)), dtype), dtype, shape, block, double)

    def norm(n: int, dtype: FloatFormat = BF16) -> Kept:
        return Kept(dtype.value, (n,), raw_of(rng.normal(1, 0.1, n), dtype).tobytes())

    layer = "model.layers.0.self_attn."
    a = ArtifactVectors(folder)
    a.add("double_quant", "the usual artifact: a packed weight with double quantization, a kept norm, a side file",
          "L1 S1 S2 S3 S9 S10 S13 S14 S15 N1 N8 N9 M1 M2 M3 M4 M5 M6 M9 B1 B2 B3",
          {layer + "q_proj.weight": weight((8, 24)), "model.norm.weight": norm(24)},
          side_files={"generation_config.json": b'{"do_sample": false}\n'})  # fmt: skip
    single_level = weight((16, 20), F16, 128, double=False)
    a.add("single_level", "without double quantization: float32 scales", "S9 S12 N8 N9",
          {layer + "q_proj.weight": single_level, "model.norm.weight": norm(5, F16)})  # fmt: skip
    a.add("mixed_shards", "several shards, formats and block sizes; layer 10 comes after layer 2; a kept projection",
          "S10 S14 S15 B2 B3",
          {
              "model.layers.10.mlp.up_proj.weight": weight((8, 32), F32, 32),
              "model.layers.2.mlp.up_proj.weight": weight((8, 32), BF16, 256, double=False),
              "model.layers.2.mlp.down_proj.weight": weight((32, 8), F16, 32),
              "model.layers.02.mlp.gate_proj.weight": Kept("BF16", (2, 4), rng.bytes(16), "skipped_by_recipe"),
              "model.embed_tokens.weight": Kept("F32", (4, 8), rng.bytes(128), "embedding"),
              "model.position_ids": Kept("I64", (1, 3), np.arange(3, dtype="<i8").tobytes(), "not_a_weight"),
              "model.flag": Kept("BOOL", (1,), b"\x01", "not_a_weight"),
          }, max_shard_nbytes=1300)  # fmt: skip
    a.add("version_1_7", "a later minor version with members that this version does not know",
          "V1 V2", {layer + "q_proj.weight": weight((4, 16))}, format_version="1.7",
          extra={"statistics": {"kl": 0.0125, "texts": ["news", "code"]}})  # fmt: skip
    add_unknown_members(folder / "version_1_7" / "qformat.json")
    a.rewritten(folder / "version_1_7")
    every_code = nf4.pack(np.arange(128, dtype=np.uint8) % 16)
    a.add("nested_bfloat16", "nested_dtype bfloat16, as bitsandbytes writes it on some CPUs", "N11",
          {layer + "q_proj.weight": stored(QuantState(64, BF16, (4, 32), 0.052978515625, "bfloat16"),
                                            every_code, np.array([9, 200], np.uint8), np.array([0.03], np.float32),
                                            DYNAMIC_MAP)})  # fmt: skip
    a.add("negative_scales", "a negative decoded scale, a negative stored one, and a map that is not the dynamic one",
          "S12 N2 N7 E11",
          {
              layer + "k_proj.weight": stored(QuantState(64, BF16, (4, 32), 0.001), every_code,
                                               np.array([0, 255], np.uint8), np.array([0.5], np.float32), DYNAMIC_MAP),
              layer + "q_proj.weight": stored(QuantState(64, BF16, (4, 32), None), every_code,
                                               np.array([-0.75, 0.5], np.float32)),
              layer + "v_proj.weight": stored(QuantState(64, BF16, (4, 32), 0.5), every_code,
                                               np.array([5, 6], np.uint8), np.array([-1], np.float32),
                                               DYNAMIC_MAP[::-1].copy()),
          })  # fmt: skip
    a.add("kept_only", "nothing packed; kept tensors of every dtype, empty, scalar and of eight dimensions",
          "S4 S5 M3 X6",
          {f"model.buffer.{dtype}": Kept(dtype, (3,), rng.bytes(3 * nbytes) if dtype != "BOOL" else b"\0\1\1")
           for dtype, nbytes in ELEMENT_NBYTES.items()}
          | {"model.empty": Kept("F32", (0, 4), b""), "model.scalar": Kept("BF16", (), b"\x80\x3f"),
             "model.eight": Kept("U8", (1, 2, 1, 2, 1, 1, 1, 1), b"\1\2\3\4")})  # fmt: skip
    a.add("names", "names that are not ASCII, in tensors and files; one of 512 bytes", "L3 L4 X5",
          {"modèle.层.0.q_proj.weight": weight((2, 32)), "a b \"quoted\" \\ é": norm(3), "n" * 512: norm(1)},
          side_files={"许可证 1.txt": "Frei für alle.\n".encode()})  # fmt: skip
    a.add("odd_sizes", "one element, odd tails, partial blocks", "E7 E10 S9",
          {"model.a_proj.weight": weight((1, 1)), "model.b_proj.weight": weight((3, 5), F16, double=False),
           "model.c_proj.weight": weight((5, 13), F32, 32),
           "model.d_proj.weight": weight((1, 63), F32, 32)})  # fmt: skip
    a.add("other_layout", "valid, but by another writer: file names, order, white space and metadata differ",
          "S13 S2 S3", {layer + "q_proj.weight": weight((4, 16)), "model.norm.weight": norm(8)})  # fmt: skip
    relay(folder / "other_layout")
    a.rewritten(folder / "other_layout")
    return a.described


def add_unknown_members(path: Path) -> None:
    """Put unknown members into a tensor's and a file's entry as well, and seal again."""
    text = path.read_text("utf-8")
    text = text.replace('"double_quant":true,', '"double_quant":true,"mean_error":0.001,', 1)
    text = text.replace('"config.json": {', '"config.json": {"purpose":["model",null,1e-3],', 1)
    path.write_bytes(seal(_unsealed(text.encode("utf-8"))))


def _unsealed(data: bytes) -> bytes:
    start = data.rindex(b'"manifest_sha256": "') + len(b'"manifest_sha256": "')
    return data[:start] + b"0" * 64 + data[start + 64 :]


def relay(folder: Path) -> None:
    """Write a one-shard artifact's files as another writer might: all that section 3.3 leaves to writers differs."""
    (shard,) = folder.glob("*.safetensors")
    data = shard.read_bytes()
    nbytes = int.from_bytes(data[:8], "little")
    record = json.loads(data[8 : 8 + nbytes])
    entries = {name: entry for name, entry in record.items() if name != "__metadata__"}
    # Ascending alignment is just as good here: 512 empty bytes of alignment are not needed, offsets stay multiples.
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
        made = _record(content, 8 + len(text) if path is renamed else None)
        manifest["files"][path.name] = {"sha256": made.sha256, "nbytes": made.nbytes}
        if made.header_xxh3 is not None:
            manifest["files"][path.name]["header_xxh3"] = made.header_xxh3
    digest = manifest.pop("manifest_sha256")
    body = json.dumps({**dict(reversed(manifest.items())), "manifest_sha256": digest}, indent=2)
    manifest_path.write_bytes(seal(_unsealed(body.encode("utf-8") + b"\n")))


def _alignment(entry: JsonObject) -> int:
    begin, end = entry["data_offsets"]
    return layout.alignment(end - begin)


def one_entry_a_line(document: JsonObject, list_name: str) -> bytes:
    """JSON with one line a vector, so that a changed vector is one changed line."""
    head = {key: value for key, value in document.items() if key != list_name}
    lines = [json.dumps(entry, ensure_ascii=False) for entry in document[list_name]]
    opening = json.dumps(head, ensure_ascii=False, indent=1)[:-2]
    body = ",\n  ".join(lines)
    return f'{opening},\n "{list_name}": [\n  {body}\n ]\n}}\n'.encode()


def main() -> None:
    tensors = tensor_vectors()
    folder = VECTORS / "artifacts"
    if folder.exists():
        shutil.rmtree(folder)
    artifacts = artifact_vectors(folder)
    made_by = {"format_version": "1.0", "made_by": "tools/spec/make_vectors.py"}
    (VECTORS / "tensors.json").write_bytes(one_entry_a_line({**made_by, "vectors": tensors}, "vectors"))
    (VECTORS / "artifacts.json").write_bytes(one_entry_a_line({**made_by, "artifacts": artifacts}, "artifacts"))
    nbytes = sum(path.stat().st_size for path in VECTORS.rglob("*") if path.is_file())
    print(f"{len(tensors)} tensors, {len(artifacts)} artifacts, {nbytes:,} bytes in all")


if __name__ == "__main__":
    main()
