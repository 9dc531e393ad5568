"""Random artifacts that follow the rules of the format, including ones that qformat's converter never creates."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from hypothesis import strategies as st

from qformat.codec.codebooks import DYNAMIC_MAP, NF4_CODEBOOK
from qformat.codec.floats import FloatFormat
from qformat.codec.nf4 import BLOCK_SIZES
from qformat.codec.quant_state import padded_nbytes
from tests.artifact.damaged import COMPONENTS, reseal
from tests.small_models import ELEMENT_NBYTES

Json = Any


def quant_state_text(data: st.DataObject, record: Json) -> bytes:
    """Draw one of the JSON forms of a record, padded with spaces to any multiple of 64."""
    separators = data.draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\t:  ")]))
    items = data.draw(st.permutations(list(record.items())))
    text = json.dumps(dict(items), separators=separators).encode()
    if data.draw(st.booleans()):
        text = text.replace(b'"nf4"', b'"\\u006ef4"')
    return text


def pad_to(text: bytes, nbytes: int) -> bytes | None:
    return text.ljust(nbytes) if len(text) <= nbytes else None


@st.composite
def unusual_tensors(draw: st.DrawFn) -> list[tuple[str, Json]]:
    """Draw names with shapes and options, including ones that qformat's converter never creates."""
    characters = st.characters(categories=["L", "N", "P", "S"])
    names = draw(
        st.lists(
            st.text(characters, min_size=1, max_size=10).filter(str.isprintable), min_size=1, max_size=5, unique=True
        )
    )  # fmt: skip
    drawn = []
    for name in names:
        if draw(st.booleans()):
            shape = draw(
                st.one_of(st.lists(st.integers(0, 20), max_size=3), st.just([1] * 8), st.just([]), st.just([300, 70]))
            )
            drawn.append(
                (
                    name + ".weight",
                    {
                        "kind": "packed",
                        "shape": shape,
                        "dtype": draw(st.sampled_from(["BF16", "F16", "F32"])),
                        "block_size": draw(st.sampled_from([32, 64, 128, 256, 512, 1024, 2048, 4096])),
                        "double": draw(st.booleans()),
                    },
                )
            )
        else:
            dtype = draw(st.sampled_from(sorted(ELEMENT_NBYTES)))
            drawn.append(
                (name, {"kind": "kept", "shape": draw(st.lists(st.integers(0, 5), max_size=8)), "dtype": dtype})
            )
    return drawn  # fmt: skip


Parts = dict[str, tuple[str, list[int], bytes]]
"""Dtype, shape and bytes of the tensors in the shards, by name."""


def write_artifact(folder: Path, tensors: list[tuple[str, Json]], data: st.DataObject) -> None:
    """Write an artifact that follows the rules of the format, using only the two codebooks of the code under test."""
    random = np.random.default_rng(len(tensors))
    parts: Parts = {}
    records: dict[str, Json] = {}
    for name, what in tensors:
        make = kept if what["kind"] == "kept" else packed
        own, records[name] = make(what, data, random)
        parts |= {name + suffix: part for suffix, part in own.items()}
    write_shards(folder, parts, records, data)


def n_elements(what: Json) -> int:
    return int(np.prod(what["shape"], dtype=object)) if what["shape"] else 1


def kept(what: Json, data: st.DataObject, random: np.random.Generator) -> tuple[Parts, Json]:
    """Return a kept tensor, with an empty suffix, and its record."""
    raw = random.integers(0, 2, n_elements(what) * ELEMENT_NBYTES[what["dtype"]], np.uint8).tobytes()
    record = {
        "encoding": "kept",
        "dtype": what["dtype"],
        "shape": what["shape"],
        "xxh3": xxhash.xxh3_128_hexdigest(raw),
        "reason": data.draw(st.text(max_size=5)),
    }
    return {"": (what["dtype"], what["shape"], raw)}, record


def packed(what: Json, data: st.DataObject, random: np.random.Generator) -> tuple[Parts, Json]:
    """Return the components of a packed weight, by suffix, and its record."""
    n = n_elements(what)
    block_size = what["block_size"] if what["block_size"] in BLOCK_SIZES else BLOCK_SIZES[0]
    n_blocks = -(-n // block_size)
    text = quant_state(what, block_size, data)
    own = {
        "": ("U8", [-(-n // 2), 1], random.integers(0, 256, -(-n // 2), np.uint8).tobytes()),
        ".quant_map": ("F32", [16], NF4_CODEBOOK.astype("<f4").tobytes()),
        ".quant_state.bitsandbytes__nf4": ("U8", [len(text)], text),
    }
    if what["double"]:
        n_nested = -(-n_blocks // 256)
        nested_absmax = random.normal(0, 1, n_nested).astype("<f4").tobytes()
        own[".absmax"] = ("U8", [n_blocks], random.integers(0, 256, n_blocks, np.uint8).tobytes())
        own[".nested_absmax"] = ("F32", [n_nested], nested_absmax)
        own[".nested_quant_map"] = ("F32", [256], DYNAMIC_MAP.astype("<f4").tobytes())
    else:
        own[".absmax"] = ("F32", [n_blocks], (-random.random(n_blocks)).astype("<f4").tobytes())
    labels = {"": "packed", **COMPONENTS}
    record = {
        "encoding": "nf4",
        "dtype": what["dtype"],
        "shape": what["shape"],
        "block_size": block_size,
        "double_quant": what["double"],
        "components": {labels[suffix]: xxhash.xxh3_128_hexdigest(raw) for suffix, (_, _, raw) in own.items()},
    }
    return own, record


def quant_state(what: Json, block_size: int, data: st.DataObject) -> bytes:
    """Return the padded text of a quant_state, in an unusual form if that fits."""
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    state = {"quant_type": "nf4", "blocksize": block_size, "dtype": names[what["dtype"]], "shape": what["shape"]}
    if what["double"]:
        offset = data.draw(st.sampled_from([0, -1, 0.0, 1e-30, 0.05, -3.5, 3.4028234663852886e38]))
        state |= {
            "nested_blocksize": 256,
            "nested_dtype": data.draw(st.sampled_from(["float32", "bfloat16"])),
            "nested_offset": offset,
        }
    nbytes = padded_nbytes(
        block_size=block_size,
        float_format=FloatFormat(what["dtype"]),
        shape=tuple(what["shape"]),
        double_quant=what["double"],
    )
    return pad_to(quant_state_text(data, state), nbytes) or json.dumps(state).encode().ljust(nbytes)


def write_shards(folder: Path, parts: Parts, records: dict[str, Json], data: st.DataObject) -> None:
    n_shards = data.draw(st.integers(1, min(4, len(parts))))
    owner = {name: data.draw(st.integers(0, n_shards - 1)) for name in parts}
    files: dict[str, bytes] = {"NOTES": b"anything"}
    heads: dict[str, bytes] = {}
    weight_map = {}
    for number in sorted(set(owner.values())):
        shard = data.draw(
            st.sampled_from([f"model-{number + 1:05d}-of-{n_shards:05d}.safetensors", f"ünüsual {number}.safetensors"])
        )
        members = [name for name in parts if owner[name] == number]
        members.sort(
            key=lambda name: (
                -((len(parts[name][2]) & -len(parts[name][2])) or 2**60) if len(parts[name][2]) % 4096 else -(2**60)
            )
        )
        header: Json = {} if data.draw(st.booleans()) else {"__metadata__": {"format": "pt", "by": "🦙"}}
        offset = 0
        for name in members:
            dtype, shape, raw = parts[name]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(raw)]}
            offset += len(raw)
            weight_map[name] = shard
        text = json.dumps(header, ensure_ascii=data.draw(st.booleans())).encode()
        pages = data.draw(st.integers(1, 3)) - 1
        text = text.ljust(-(-(8 + len(text)) // 4096) * 4096 + 4096 * pages - 8)
        heads[shard] = struct.pack("<Q", len(text)) + text
        files[shard] = heads[shard] + b"".join(parts[name][2] for name in members)
    quantization = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": [],
    }
    files["config.json"] = json.dumps({"quantization_config": quantization, "more": {"of": ["it"]}}).encode()
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map, "metadata": {}}).encode()
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    listed = {}
    for name, raw in data.draw(st.permutations(list(files.items()))):
        listed[name] = {"nbytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        if name in heads:
            listed[name]["header_xxh3"] = xxhash.xxh3_128_hexdigest(heads[name])
    record = {
        "format": "qformat",
        "format_version": data.draw(st.sampled_from(["1.0", "1.1", "1.999"])),
        "must_understand": [],
        "generator": "somebody else",
        "source": {},
        "recipe": {"x": None},
        "tensors": dict(data.draw(st.permutations(list(records.items())))),
        "files": listed,
        "optional_thing": [1, {"a": "b"}],
    }
    reseal(folder, record, update_files=False)
