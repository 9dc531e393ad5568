"""Fuzzing whole artifacts: random changes to the objects in the JSON files, sealed again, and to raw bytes.

Only an ArtifactError may come out, and what opens must be usable to the last tensor. Unusual artifacts that follow the
rules must open: a generator of them is as important as damage.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qformat.artifact.reading.reader import open_artifact
from qformat.artifact.reading.verify import verify_integrity
from qformat.codec.codebooks import DYNAMIC_MAP, NF4_CODEBOOK
from qformat.errors import ArtifactError
from tests.artifact.damaged import make_tiny_artifact, reseal
from tests.small_models import ELEMENT_NBYTES, contents

Json = Any

FUZZ = settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SOAK = settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))

ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 300),
    st.sampled_from(
        [
            2**31,
            2**48,
            2**63,
            2**64,
            -(2**63),
            0.0,
            -0.0,
            64.0,
            1e308,
            5e-324,
            "",
            "nf4",
            "kept",
            "..",
            "\ud800",
            "🦙",
            "a" * 600,
        ]
    ),
    st.text(max_size=4),
    st.builds(list),
    st.builds(dict),
    st.lists(st.integers(-1, 50), max_size=10),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return contents(make_tiny_artifact(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def folder(pristine: dict[str, bytes]) -> Iterator[Path]:
    """A folder in memory, where there is such a thing: its files are written thousands of times."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=base) as temporary:
        yield Path(temporary)


def restore(folder: Path, files: dict[str, bytes]) -> None:
    for path in folder.iterdir():
        if path.name not in files:
            path.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def use(folder: Path) -> bool:
    """Open the artifact and touch all of it; only an ArtifactError may come out. Return whether it opened."""
    report = verify_integrity(folder, sha256=True, workers=1)
    for finding in report.findings:
        finding.message.encode("utf-8")
    try:
        with open_artifact(folder) as artifact:
            for name in artifact:
                tensor = artifact[name]
                assert tensor.decode().shape == tensor.shape
    except ArtifactError as error:
        str(error).encode("utf-8")
        assert not report.good
        return False
    return True


def paths_in(value: Json, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value inside a JSON value."""
    found = [prefix] if prefix else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += paths_in(inner, (*prefix, key))
    return found


def mutate(data: st.DataObject, record: Json) -> Json:
    """Change one to three values anywhere inside."""
    record = copy.deepcopy(record)
    for _ in range(data.draw(st.integers(1, 3))):
        places = paths_in(record)
        if not places:
            break
        *parents, last = data.draw(st.sampled_from(places))
        holder = record
        for key in parents:
            holder = holder[key]
        match data.draw(st.integers(0, 4)):
            case 0:
                holder[last] = data.draw(ODD_VALUES)
            case 1:
                del holder[last]
            case 2:
                source = data.draw(st.sampled_from(places))
                value = record
                for key in source:
                    value = value[key] if not isinstance(value, dict) or key in value else {}
                    if not isinstance(value, (dict, list)):
                        break
                holder[last] = copy.deepcopy(value)
            case 3 if isinstance(holder, dict):
                holder[
                    data.draw(
                        st.text(max_size=4)
                        | st.sampled_from(["qformat.json", "lm_head.weight", "encoding", "header_xxh3"])
                    )
                ] = holder[last]
            case 4 if isinstance(holder[last], int) and not isinstance(holder[last], bool):
                holder[last] += data.draw(st.sampled_from([-1, 1, 64, 2**32]))
    return record


def write_json(path: Path, record: Json) -> None:
    path.write_bytes(json.dumps(record, indent=1).encode("utf-8"))


def fuzz_objects(folder: Path, pristine: dict[str, bytes], data: st.DataObject) -> None:
    restore(folder, pristine)
    name = data.draw(st.sampled_from(["qformat.json", "qformat.json", "model.safetensors.index.json", "config.json"]))
    record = mutate(data, json.loads(pristine[name]))
    if name == "qformat.json":
        record.pop("manifest_sha256", None)
        if record:
            reseal(folder, record, update_files=False)
    else:
        write_json(folder / name, record)
        reseal(folder)
    use(folder)


def fuzz_quant_state(folder: Path, pristine: dict[str, bytes], data: st.DataObject) -> None:
    restore(folder, pristine)
    name = data.draw(st.sampled_from(sorted(name for name in pristine if name.endswith(".safetensors"))))
    whole = pristine[name]
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    states = [entry for key, entry in header.items() if key.endswith("nf4")]
    if not states:
        return
    start, stop = (8 + length + at for at in states[0]["data_offsets"])
    record = mutate(data, json.loads(whole[start:stop]))
    text = json.dumps(record).encode()[: stop - start].ljust(stop - start)
    (folder / name).write_bytes(whole[:start] + text + whole[stop:])
    reseal(folder)
    use(folder)


def fuzz_bytes(folder: Path, pristine: dict[str, bytes], data: st.DataObject) -> None:
    restore(folder, pristine)
    name = data.draw(st.sampled_from(sorted(pristine)))
    changed = bytearray(pristine[name])
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, max(0, len(changed) - 1)))
        match data.draw(st.integers(0, 3)):
            case 0:
                changed[position : position + 1] = data.draw(st.binary(max_size=3))
            case 1:
                del changed[position : position + data.draw(st.integers(1, 5000))]
            case 2:
                changed[position:position] = changed[: data.draw(st.integers(0, 300))]
            case 3:
                changed[position : position + 8] = struct.pack(
                    "<Q", data.draw(st.sampled_from([0, 1, 2**25, 2**63, 2**64 - 1]))
                )
    (folder / name).write_bytes(changed)
    sealed = data.draw(st.booleans()) and name != "qformat.json" and len(changed) > 8
    if sealed:
        reseal(folder)
    use(folder)
    if not sealed:
        assert verify_integrity(folder, workers=1).good == (bytes(changed) == pristine[name])


@FUZZ
@given(st.data())
def test_changed_objects_in_manifest_index_and_config_give_nothing_but_an_artifact_error(
    folder: Path, pristine: dict[str, bytes], data: st.DataObject
) -> None:
    fuzz_objects(folder, pristine, data)


@FUZZ
@given(st.data())
def test_changed_objects_in_quant_states_give_nothing_but_an_artifact_error(
    folder: Path, pristine: dict[str, bytes], data: st.DataObject
) -> None:
    fuzz_quant_state(folder, pristine, data)


@FUZZ
@given(st.data())
def test_changed_bytes_of_any_file_give_nothing_but_an_artifact_error(
    folder: Path, pristine: dict[str, bytes], data: st.DataObject
) -> None:
    fuzz_bytes(folder, pristine, data)


@pytest.mark.slow
@pytest.mark.parametrize("fuzz", [fuzz_objects, fuzz_quant_state, fuzz_bytes])
def test_fuzzing_at_length_gives_nothing_but_an_artifact_error(
    folder: Path, pristine: dict[str, bytes], fuzz: Any
) -> None:
    @SOAK
    @given(st.data())
    def soak(data: st.DataObject) -> None:
        fuzz(folder, pristine, data)

    soak()


# Unusual and valid


def quant_state_text(data: st.DataObject, record: Json) -> bytes:
    """Spell the record in one of the ways that JSON allows, padded with spaces to any multiple of 64."""
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
    """Draw names with shapes and options that qformat's own converter does not make all of."""
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


def write_artifact(folder: Path, tensors: list[tuple[str, Json]], data: st.DataObject) -> None:
    """Write an artifact by the rules of the format and nothing of the code under test but its two tables of numbers."""
    from qformat.codec.floats import FloatFormat
    from qformat.codec.nf4 import BLOCK_SIZES
    from qformat.codec.quant_state import padded_nbytes

    seed = np.random.default_rng(len(tensors))
    parts: dict[str, tuple[str, list[int], bytes]] = {}
    records: dict[str, Json] = {}
    for name, what in tensors:
        n = int(np.prod(what["shape"], dtype=object)) if what["shape"] else 1
        if what["kind"] == "kept":
            raw = seed.integers(0, 2, n * ELEMENT_NBYTES[what["dtype"]], np.uint8).tobytes()
            parts[name] = (what["dtype"], what["shape"], raw)
            records[name] = {
                "encoding": "kept",
                "dtype": what["dtype"],
                "shape": what["shape"],
                "xxh3": xxhash.xxh3_128_hexdigest(raw),
                "reason": data.draw(st.text(max_size=5)),
            }
            continue
        block_size = what["block_size"] if what["block_size"] in BLOCK_SIZES else BLOCK_SIZES[0]
        n_blocks = -(-n // block_size)
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
        text = pad_to(quant_state_text(data, state), nbytes) or json.dumps(state).encode().ljust(nbytes)
        own = {
            "": ("packed", "U8", [-(-n // 2), 1], seed.integers(0, 256, -(-n // 2), np.uint8).tobytes()),
            ".quant_map": ("quant_map", "F32", [16], NF4_CODEBOOK.astype("<f4").tobytes()),
            ".quant_state.bitsandbytes__nf4": ("quant_state", "U8", [nbytes], text),
        }
        if what["double"]:
            n_nested = -(-n_blocks // 256)
            own[".absmax"] = ("absmax", "U8", [n_blocks], seed.integers(0, 256, n_blocks, np.uint8).tobytes())
            own[".nested_absmax"] = (
                "nested_absmax",
                "F32",
                [n_nested],
                seed.normal(0, 1, n_nested).astype("<f4").tobytes(),
            )
            own[".nested_quant_map"] = ("nested_quant_map", "F32", [256], DYNAMIC_MAP.astype("<f4").tobytes())
        else:
            own[".absmax"] = ("absmax", "F32", [n_blocks], (-seed.random(n_blocks)).astype("<f4").tobytes())
        digests = {}
        for suffix, (label, dtype, shape, raw) in own.items():
            parts[name + suffix] = (dtype, shape, raw)
            digests[label] = xxhash.xxh3_128_hexdigest(raw)
        records[name] = {
            "encoding": "nf4",
            "dtype": what["dtype"],
            "shape": what["shape"],
            "block_size": block_size,
            "double_quant": what["double"],
            "components": digests,
        }
    write_shards(folder, parts, records, data)


def write_shards(
    folder: Path, parts: dict[str, tuple[str, list[int], bytes]], records: dict[str, Json], data: st.DataObject
) -> None:
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


@settings(FUZZ, max_examples=300)
@given(unusual_tensors(), st.data())
def test_an_unusual_artifact_that_follows_the_rules_is_opened(
    folder: Path, tensors: list[tuple[str, Json]], data: st.DataObject
) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    write_artifact(folder, tensors, data)
    report = verify_integrity(folder, sha256=True, workers=1)
    assert report.good, report.findings
    with open_artifact(folder) as artifact:
        assert set(artifact) == {name for name, _ in tensors}
        for name, what in tensors:
            assert artifact[name].shape == tuple(what["shape"])
            assert artifact[name].decode().shape == tuple(what["shape"])
        assert artifact.manifest.extra == {"optional_thing": [1, {"a": "b"}]}
