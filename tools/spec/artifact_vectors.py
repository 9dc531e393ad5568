"""The vectors of complete artifacts: valid directories, and the decoded values of each tensor."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qformat.artifact import layout
from qformat.artifact.components import Component
from qformat.artifact.digests import xxh3
from qformat.artifact.manifest import KeptRecord, Manifest, PackedRecord
from qformat.artifact.packed_arrays import PackedArrays
from qformat.artifact.tensor_spec import ELEMENT_NBYTES, TensorSpec
from qformat.codec import nf4
from qformat.codec.codebooks import DYNAMIC_MAP
from qformat.codec.floats import FloatFormat
from qformat.codec.quant_state import QuantState
from tools.spec.altered_artifacts import add_unknown_members, file_record, relay
from tools.spec.reference_codec import (
    BF16,
    F16,
    F32,
    JsonObject,
    component_bytes,
    encode,
    raw_of,
    reference_decode,
    stored,
)


@dataclass(frozen=True)
class Kept:
    """A kept tensor."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes
    reason: str = "not_a_matrix"


def small_json(value: object) -> bytes:
    """Return indented JSON as UTF-8."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


class ArtifactVectors:
    """Writes artifacts below a directory and collects their descriptions."""

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
        """Write an artifact as sections 3.3 and 7.4 require, and describe it."""
        ordered = dict(sorted(tensors.items(), key=lambda item: layout.natural_order(item[0])))
        groups = [list(_new_tensors(key, tensor).values()) for key, tensor in ordered.items()]
        shards = layout.place(groups, max_shard_nbytes=max_shard_nbytes)
        contents = {new.name: data for key, tensor in ordered.items() for new, data in _contents(key, tensor)}
        files = {
            shard.name: shard.header + b"".join(contents[placed.tensor.name] for placed in shard.tensors)
            for shard in shards
        }
        records = {shard.name: file_record(files[shard.name], len(shard.header)) for shard in shards}
        weight_map = {placed.tensor.name: shard.name for shard in shards for placed in shard.tensors}
        small = dict(side_files or {})
        small["config.json"] = _config(ordered)
        total = sum(len(data) for data in contents.values())
        small["model.safetensors.index.json"] = small_json(
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        )
        manifest = Manifest(
            tensors={key: _tensor_record(tensor) for key, tensor in ordered.items()},
            files=records | {file: file_record(data, None) for file, data in small.items()},
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
        """Record that the artifact just added was changed by hand: it is valid, but no writer makes it."""
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


LAYER = "model.layers.0.self_attn."


@dataclass(frozen=True)
class Drawn:
    """Random tensors. The order of the calls determines every byte."""

    rng: np.random.Generator

    def weight(
        self, shape: Sequence[int], dtype: FloatFormat = BF16, block: int = 64, *, double: bool = True
    ) -> PackedArrays:
        return encode(raw_of(self.rng.normal(0, 0.02, math.prod(shape)), dtype), dtype, shape, block, double)

    def norm(self, n: int, dtype: FloatFormat = BF16) -> Kept:
        return Kept(dtype.value, (n,), raw_of(self.rng.normal(1, 0.1, n), dtype).tobytes())


def artifact_vectors(folder: Path) -> list[JsonObject]:
    """Write everything in artifacts/ and return the contents of artifacts.json."""
    a, drawn = ArtifactVectors(folder), Drawn(np.random.default_rng(1729))
    add_usual(a, drawn, folder)
    add_scales(a)
    add_kept_and_names(a, drawn, folder)
    add_accompanied(a, drawn)
    return a.described


def add_usual(a: ArtifactVectors, drawn: Drawn, folder: Path) -> None:
    """Add artifacts that a conversion writes, and one that a later version of the format may write."""
    a.add("double_quant", "the usual artifact: a packed weight with double quantization, a kept norm, a side file",
          "L1 S1 S2 S3 S9 S10 S13 S14 S15 N1 N8 N9 M1 M2 M3 M4 M5 M6 M9 B1 B2 B3",
          {LAYER + "q_proj.weight": drawn.weight((8, 24)), "model.norm.weight": drawn.norm(24)},
          side_files={"generation_config.json": b'{"do_sample": false}\n'})  # fmt: skip
    single_level = drawn.weight((16, 20), F16, 128, double=False)
    a.add("single_level", "without double quantization: float32 scales", "S9 S12 N8 N9",
          {LAYER + "q_proj.weight": single_level, "model.norm.weight": drawn.norm(5, F16)})  # fmt: skip
    a.add("mixed_shards", "several shards, formats and block sizes; layer 10 comes after layer 2; a kept projection",
          "S10 S14 S15 B2 B3",
          {
              "model.layers.10.mlp.up_proj.weight": drawn.weight((8, 32), F32, 32),
              "model.layers.2.mlp.up_proj.weight": drawn.weight((8, 32), BF16, 256, double=False),
              "model.layers.2.mlp.down_proj.weight": drawn.weight((32, 8), F16, 32),
              "model.layers.02.mlp.gate_proj.weight": Kept("BF16", (2, 4), drawn.rng.bytes(16), "skipped_by_recipe"),
              "model.embed_tokens.weight": Kept("F32", (4, 8), drawn.rng.bytes(128), "embedding"),
              "model.position_ids": Kept("I64", (1, 3), np.arange(3, dtype="<i8").tobytes(), "not_a_weight"),
              "model.flag": Kept("BOOL", (1,), b"\x01", "not_a_weight"),
          }, max_shard_nbytes=1300)  # fmt: skip
    a.add("version_1_7", "a later minor version with members that this version does not know",
          "V1 V2", {LAYER + "q_proj.weight": drawn.weight((4, 16))}, format_version="1.7",
          extra={"statistics": {"kl": 0.0125, "texts": ["news", "code"]}})  # fmt: skip
    add_unknown_members(folder / "version_1_7" / "qformat.json")
    a.rewritten(folder / "version_1_7")


def add_scales(a: ArtifactVectors) -> None:
    """Add artifacts with scales that other writers may store."""
    every_code = nf4.pack(np.arange(128, dtype=np.uint8) % 16)
    a.add("nested_bfloat16", "nested_dtype bfloat16, as bitsandbytes writes it on some CPUs", "N11",
          {LAYER + "q_proj.weight": stored(QuantState(64, BF16, (4, 32), 0.052978515625, "bfloat16"),
                                            every_code, np.array([9, 200], np.uint8), np.array([0.03], np.float32),
                                            DYNAMIC_MAP)})  # fmt: skip
    a.add("negative_scales", "a negative decoded scale, a negative stored one, and a map that is not the dynamic one",
          "S12 N2 N7 E11",
          {
              LAYER + "k_proj.weight": stored(QuantState(64, BF16, (4, 32), 0.001), every_code,
                                               np.array([0, 255], np.uint8), np.array([0.5], np.float32), DYNAMIC_MAP),
              LAYER + "q_proj.weight": stored(QuantState(64, BF16, (4, 32), None), every_code,
                                               np.array([-0.75, 0.5], np.float32)),
              LAYER + "v_proj.weight": stored(QuantState(64, BF16, (4, 32), 0.5), every_code,
                                               np.array([5, 6], np.uint8), np.array([-1], np.float32),
                                               DYNAMIC_MAP[::-1].copy()),
          })  # fmt: skip


def add_kept_and_names(a: ArtifactVectors, drawn: Drawn, folder: Path) -> None:
    """Add artifacts with kept tensors, unusual names, odd sizes and another writer's layout."""
    a.add("kept_only", "nothing packed; kept tensors of every dtype, empty, scalar and of eight dimensions",
          "S4 S5 M3 X6",
          {f"model.buffer.{dtype}": Kept(dtype, (3,), drawn.rng.bytes(3 * nbytes) if dtype != "BOOL" else b"\0\1\1")
           for dtype, nbytes in ELEMENT_NBYTES.items()}
          | {"model.empty": Kept("F32", (0, 4), b""), "model.scalar": Kept("BF16", (), b"\x80\x3f"),
             "model.eight": Kept("U8", (1, 2, 1, 2, 1, 1, 1, 1), b"\1\2\3\4")})  # fmt: skip
    a.add("names", "names that are not ASCII, in tensors and files; one of 512 bytes", "L3 L4 X5",
          {"modèle.层.0.q_proj.weight": drawn.weight((2, 32)), "a b \"quoted\" \\ é": drawn.norm(3),
           "n" * 512: drawn.norm(1)},
          side_files={"许可证 1.txt": "Frei für alle.\n".encode()})  # fmt: skip
    a.add("odd_sizes", "one element, odd tails, partial blocks", "E7 E10 S9",
          {"model.a_proj.weight": drawn.weight((1, 1)), "model.b_proj.weight": drawn.weight((3, 5), F16, double=False),
           "model.c_proj.weight": drawn.weight((5, 13), F32, 32),
           "model.d_proj.weight": drawn.weight((1, 63), F32, 32)})  # fmt: skip
    a.add("other_layout", "valid, but by another writer: file names, order, white space and metadata differ",
          "S13 S2 S3",
          {LAYER + "q_proj.weight": drawn.weight((4, 16)), "model.norm.weight": drawn.norm(8)})  # fmt: skip
    relay(folder / "other_layout")
    a.rewritten(folder / "other_layout")


def add_accompanied(a: ArtifactVectors, drawn: Drawn) -> None:
    """Add an artifact with files that accompany the model, and with the record of an accepted change."""
    a.add("accompanied", "a tokenizer, which is part of the model; a card, licences and an image, which accompany it",
          "L7 L8 M12",
          {LAYER + "q_proj.weight": drawn.weight((4, 16)), "model.norm.weight": drawn.norm(8)},
          side_files={"README.md": b"# A model\n", "LICENSE": b"free\n", "Notice_2.TXT": b"by us\n",
                      "tokenizer.json": b"{}\n", "chat_template.jinja": b"{{ messages }}\n",
                      "architecture.svg": b"<svg/>\n"},
          extra={"sealed": [
              {"file": "chat_template.jinja", "previous_sha256": None, "sha256": hashlib.sha256(
                  b"{{ messages }}\n").hexdigest()},
              {"file": "merges.txt", "previous_sha256": "0" * 64, "sha256": None},
          ]})  # fmt: skip
