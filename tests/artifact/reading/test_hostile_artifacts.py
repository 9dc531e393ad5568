"""Intent: files that agree with each other and with every digest, and still do not say what an artifact must say.

Each case is made against a whole artifact and sealed again, as a wrong or hostile writer would; opening must refuse it
with the reason, the file and the tensor. The first part repeats what other readers load in silence or crash on.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qformat.artifact.reading.reader import open_artifact
from qformat.errors import ArtifactError, Reason
from tests.artifact.damaged import edit_json, make_tiny_artifact, reseal, rewrite_shard, shard_of, shards, verify

W = "model.layers.0.self_attn.o_proj.weight"
OTHER = "model.layers.0.mlp.down_proj.weight"
STATE = ".quant_state.bitsandbytes__nf4"
INDEX = "model.safetensors.index.json"
Json = dict[str, Any]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_artifact(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def artifact(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "artifact")


def refusal(artifact: Path) -> ArtifactError:
    """Return why the artifact is not opened; verify must find something as well."""
    with pytest.raises(ArtifactError) as refused:
        open_artifact(artifact)
    assert not verify(artifact).good
    assert len(str(refused.value)) < 4000
    return refused.value


def patch(artifact: Path, component: str, data: bytes | Callable[[bytes], bytes], *, offset: int = 0) -> None:
    """Overwrite bytes of a component in place and seal again."""
    path = shard_of(artifact, component)
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    start, stop = (8 + length + at for at in json.loads(whole[8 : 8 + length])[component]["data_offsets"])
    part = whole[start:stop]
    new = data(part) if callable(data) else part[:offset] + data + part[offset + len(data) :]
    assert len(new) == len(part)
    path.write_bytes(whole[:start] + new + whole[stop:])
    reseal(artifact)


def change_manifest(artifact: Path, change: Callable[[Json], object]) -> None:
    record = json.loads((artifact / "qformat.json").read_bytes())
    change(record)
    reseal(artifact, record, update_files=False)


def test_sealing_again_without_a_change_keeps_an_artifact_whole(artifact: Path) -> None:
    reseal(artifact)
    assert verify(artifact).good
    for path in shards(artifact):
        rewrite_shard(path, lambda header, parts: None)
    reseal(artifact)
    assert verify(artifact).good


# Components that are missing, too short, too long, of another dtype (crashes, garbage or silence elsewhere)


@pytest.mark.parametrize("suffix", ["", ".absmax", ".nested_absmax", ".nested_quant_map", ".quant_map", STATE])
def test_a_missing_component_is_named(suffix: str, artifact: Path) -> None:
    def drop(header: Json, parts: dict[str, bytes]) -> None:
        del header[W + suffix], parts[W + suffix]

    rewrite_shard(shard_of(artifact, W + suffix), drop)
    edit_json(artifact / INDEX, lambda index: index["weight_map"].pop(W + suffix))  # type: ignore[attr-defined]
    reseal(artifact)
    error = refusal(artifact)
    assert error.reason is Reason.MISSING_COMPONENT
    assert error.tensor == W


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_a_missing_kept_tensor_is_named(name: str, artifact: Path) -> None:
    def drop(header: Json, parts: dict[str, bytes]) -> None:
        del header[name], parts[name]

    rewrite_shard(shard_of(artifact, name), drop)
    reseal(artifact)
    error = refusal(artifact)
    assert error.reason is Reason.MISSING_COMPONENT
    assert error.tensor == name


@pytest.mark.parametrize("suffix", ["", ".absmax", ".nested_absmax", ".nested_quant_map", ".quant_map", STATE])
@pytest.mark.parametrize("factor", [0, 0.5, 2])
def test_a_component_of_another_length_is_named(factor: float, suffix: str, artifact: Path) -> None:
    name = W + suffix

    def resize(header: Json, parts: dict[str, bytes]) -> None:
        shape = header[name]["shape"]
        element = len(parts[name]) // max(1, int(np.prod(shape)))
        shape[0] = int(shape[0] * factor)
        parts[name] = (parts[name] * 2)[: element * int(np.prod(shape))]

    rewrite_shard(shard_of(artifact, name), resize)
    reseal(artifact)
    error = refusal(artifact)
    assert error.reason is Reason.COMPONENT_SHAPE
    assert error.tensor == name


@pytest.mark.parametrize(
    ("suffix", "dtype", "shape"),
    [
        ("", "I8", [160, 1]),
        ("", "U8", [160]),
        ("", "U8", [1, 160]),
        ("", "U8", [8, 20]),
        ("", "F32", [40, 1]),
        (".absmax", "I8", [5]),
        (".absmax", "U8", [5, 1]),
        (".nested_quant_map", "I32", [256]),
        (".nested_quant_map", "F32", [16, 16]),
        (".nested_absmax", "I32", [1]),
        (".nested_absmax", "F32", []),
        (".quant_map", "F16", [32]),
        (STATE, "I8", [192]),
    ],
)
def test_a_component_of_another_dtype_or_shape_is_named(
    suffix: str, dtype: str, shape: list[int], artifact: Path
) -> None:
    name = W + suffix
    rewrite_shard(shard_of(artifact, name), lambda header, _: header[name].update(dtype=dtype, shape=shape))
    reseal(artifact)
    error = refusal(artifact)
    assert error.reason in {Reason.COMPONENT_DTYPE, Reason.COMPONENT_SHAPE}
    assert error.tensor == name


# Values


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("suffix", [".nested_absmax", ".nested_quant_map"])
def test_a_scale_that_is_not_finite_is_named(suffix: str, value: float, artifact: Path) -> None:
    patch(artifact, W + suffix, np.float32(value).tobytes())
    error = refusal(artifact)
    assert error.reason is Reason.NONFINITE_SCALE
    assert error.tensor == W
    assert error.field == suffix[1:]


@pytest.mark.parametrize("entry", range(16))
@pytest.mark.parametrize("change", [np.nan, -0.0, 5.0])
def test_a_codebook_that_is_not_nf4_in_every_bit_is_refused(entry: int, change: float, artifact: Path) -> None:
    if entry == 7 and np.float32(change) == 0:
        change = -0.0  # the entry is 0.0: the sign is a bit, too
    patch(artifact, W + ".quant_map", np.float32(change).tobytes(), offset=4 * entry)
    error = refusal(artifact)
    assert error.reason is Reason.CODEBOOK
    assert error.tensor == W


def state_with(**changes: object) -> Callable[[bytes], bytes]:
    def change(part: bytes) -> bytes:
        record = json.loads(part)
        for key, value in changes.items():
            if value is ...:
                del record[key]
            else:
                record[key] = value
        text = json.dumps(record).encode()
        return text[: len(part)].ljust(len(part))

    return change


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quant_type": "x"}, Reason.QUANT_STATE),
        ({"quant_type": "fp4"}, Reason.QUANT_STATE),
        ({"quant_type": None}, Reason.QUANT_STATE),
        ({"quant_type": ["nf4"]}, Reason.QUANT_STATE),
        ({"quant_type": ...}, Reason.QUANT_STATE),
        ({"blocksize": 0}, Reason.QUANT_STATE),
        ({"blocksize": 1}, Reason.QUANT_STATE),
        ({"blocksize": -64}, Reason.QUANT_STATE),
        ({"blocksize": 128}, Reason.QUANT_STATE),
        ({"blocksize": 64.0}, Reason.QUANT_STATE),
        ({"blocksize": "64"}, Reason.QUANT_STATE),
        ({"blocksize": True}, Reason.QUANT_STATE),
        ({"blocksize": 2**63}, Reason.QUANT_STATE),
        ({"blocksize": ...}, Reason.QUANT_STATE),
        ({"dtype": "load"}, Reason.QUANT_STATE),
        ({"dtype": "hub"}, Reason.QUANT_STATE),
        ({"dtype": "__doc__"}, Reason.QUANT_STATE),
        ({"dtype": "float16"}, Reason.QUANT_STATE),
        ({"dtype": "int8"}, Reason.QUANT_STATE),
        ({"dtype": []}, Reason.QUANT_STATE),
        ({"dtype": {}}, Reason.QUANT_STATE),
        ({"shape": [40, 8]}, Reason.QUANT_STATE),
        ({"shape": [320]}, Reason.QUANT_STATE),
        ({"shape": [8, 40, 1]}, Reason.QUANT_STATE),
        ({"shape": [8, 40.0]}, Reason.QUANT_STATE),
        ({"shape": [-8, -40]}, Reason.QUANT_STATE),
        ({"shape": "8x40"}, Reason.QUANT_STATE),
        ({"shape": 320}, Reason.QUANT_STATE),
        ({"shape": []}, Reason.QUANT_STATE),
        ({"nested_blocksize": 1}, Reason.QUANT_STATE),
        ({"nested_blocksize": 0}, Reason.QUANT_STATE),
        ({"nested_blocksize": 256.0}, Reason.QUANT_STATE),
        ({"nested_blocksize": ...}, Reason.QUANT_STATE),
        ({"nested_dtype": "float16"}, Reason.QUANT_STATE),
        ({"nested_dtype": "bfloat16"}, None),
        ({"nested_dtype": 5}, Reason.QUANT_STATE),
        ({"nested_dtype": {}}, Reason.QUANT_STATE),
        ({"nested_offset": "0.05"}, Reason.QUANT_STATE),
        ({"nested_offset": 1e300}, Reason.QUANT_STATE),
        ({"nested_offset": -1e39}, Reason.QUANT_STATE),
        ({"nested_offset": True}, Reason.QUANT_STATE),
        ({"nested_offset": None}, Reason.QUANT_STATE),
        ({"nested_offset": 0}, None),
        ({"nested_offset": -1}, None),
        ({"nested_offset": ..., "nested_dtype": ..., "nested_blocksize": ...}, Reason.QUANT_STATE),
        ({"absmax": 5}, Reason.QUANT_STATE),
        ({"quant_map": []}, Reason.QUANT_STATE),
        ({"": ""}, Reason.QUANT_STATE),
    ],
)
def test_a_quant_state_that_lies_is_refused(changes: Json, reason: Reason | None, artifact: Path) -> None:
    patch(artifact, W + STATE, state_with(**changes))
    if reason is None:
        open_artifact(artifact).close()
        return
    error = refusal(artifact)
    assert error.reason is reason
    assert error.tensor == W
    assert error.field is not None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", Reason.JSON_SYNTAX),
        (b"\0" * 192, Reason.JSON_SYNTAX),
        (b"null", Reason.QUANT_STATE),
        (b"[]", Reason.QUANT_STATE),
        (b"5", Reason.QUANT_STATE),
        (b"[" * 192, Reason.JSON_LIMIT),
        (b'{"quant_type": "nf4", "quant_type": "nf4"}', Reason.JSON_DUPLICATE_KEY),
        (b'{"nested_offset": NaN}', Reason.JSON_SYNTAX),
        (b'{"nested_offset": Infinity}', Reason.JSON_SYNTAX),
        (b'{"nested_offset": 1e999}', Reason.JSON_LIMIT),
        (b'{"blocksize": ' + b"9" * 150 + b"}", Reason.JSON_LIMIT),
        (b'{"a": "\\ud800"}', Reason.JSON_SYNTAX),
        (b"\xff\xfe", Reason.JSON_SYNTAX),
        (b"\xef\xbb\xbf{}", Reason.JSON_SYNTAX),
    ],
)
def test_a_quant_state_that_is_no_json_object_is_refused(text: bytes, reason: Reason, artifact: Path) -> None:
    patch(artifact, W + STATE, lambda part: text[: len(part)].ljust(len(part)))
    error = refusal(artifact)
    assert error.reason is reason
    assert error.tensor == W


# Shards and index


def test_the_same_tensor_in_two_shards_is_refused(artifact: Path) -> None:
    first, second = shards(artifact)
    stolen: dict[str, tuple[Json, bytes]] = {}
    rewrite_shard(
        first, lambda header, parts: stolen.update({n: (dict(header[n]), parts[n]) for n in list(header)[:1]})
    )
    (name, (entry, data)) = next(iter(stolen.items()))

    def add(header: Json, parts: dict[str, bytes]) -> None:
        old = dict(header)
        header.clear()
        header.update({name: entry, **old})
        parts[name] = bytes(len(data))

    rewrite_shard(second, add)
    reseal(artifact)
    error = refusal(artifact)
    assert error.reason is Reason.DUPLICATE_TENSOR
    assert error.tensor == name
    assert first.name in str(error)
    assert Path(error.path) == second


def test_a_tensor_that_the_manifest_does_not_have_is_refused(artifact: Path) -> None:
    def add(header: Json, parts: dict[str, bytes]) -> None:
        header["stowaway"] = {"dtype": "U8", "shape": [1]}
        parts["stowaway"] = b"x"

    rewrite_shard(shard_of(artifact, W), add)
    reseal(artifact)
    error = refusal(artifact)
    assert error.reason is Reason.UNKNOWN_TENSOR
    assert error.tensor == "stowaway"


def test_data_that_does_not_begin_at_a_page_is_refused(artifact: Path) -> None:
    path = next(shards(artifact))
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    path.write_bytes(struct.pack("<Q", length + 64) + data[8 : 8 + length] + b" " * 64 + data[8 + length :])
    reseal(artifact)
    error = refusal(artifact)
    assert error.reason is Reason.ALIGNMENT
    assert Path(error.path) == path


def test_a_component_that_is_not_aligned_to_its_size_is_refused(artifact: Path) -> None:
    def reverse(header: Json, parts: dict[str, bytes]) -> None:
        entries = sorted(header.items(), key=lambda item: len(parts[item[0]]))
        aligned = [item for item in entries if item[1]["dtype"] != "U8"] + [
            item for item in entries if item[1]["dtype"] == "U8"
        ]
        header.clear()
        header.update(aligned)

    rewrite_shard(shard_of(artifact, W), reverse)
    reseal(artifact)
    assert refusal(artifact).reason is Reason.ALIGNMENT


def index_change(change: Callable[[Json], object]) -> Callable[[Path], None]:
    def apply(artifact: Path) -> None:
        edit_json(artifact / INDEX, change)
        reseal(artifact)

    return apply


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["weight_map"].pop(W),
        lambda index: index["weight_map"].update({W: "model-00009-of-00009.safetensors"}),
        lambda index: index["weight_map"].update({"lost": "model-00001-of-00002.safetensors"}),
        lambda index: index["weight_map"].update({"lost": "unknown.safetensors"}),
        lambda index: index["weight_map"].update({W: "../../etc/passwd"}),
        lambda index: index["weight_map"].update({W: None}),
        lambda index: index["weight_map"].update({W: 5}),
        lambda index: index["weight_map"].update({W: {}}),
        lambda index: index["weight_map"].update({"lost": None}),
        lambda index: index.update(weight_map=[]),
        lambda index: index.update(weight_map=None),
        lambda index: index.pop("weight_map"),
    ],
)
def test_an_index_that_disagrees_with_the_shards_is_refused(change: Callable[[Json], object], artifact: Path) -> None:
    index_change(change)(artifact)
    error = refusal(artifact)
    assert error.reason is Reason.INDEX_MISMATCH
    assert Path(error.path).name == INDEX


@pytest.mark.parametrize("name", [INDEX, "config.json"])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", Reason.JSON_SYNTAX),
        (b"{}", None),
        (b"[]", None),
        (b"null", None),
        (b"{} {}", Reason.JSON_SYNTAX),
        (b'{"a": 1, "a": 2}', Reason.JSON_DUPLICATE_KEY),
        (b"\xff", Reason.JSON_SYNTAX),
        (b"[" * 100_000, Reason.JSON_LIMIT),
        (b'{"a": NaN}', Reason.JSON_SYNTAX),
    ],
)
def test_a_small_file_that_is_no_good_json_is_refused(
    name: str, text: bytes, reason: Reason | None, artifact: Path
) -> None:
    (artifact / name).write_bytes(text)
    reseal(artifact)
    error = refusal(artifact)
    assert error.reason is (reason or (Reason.INDEX_MISMATCH if name == INDEX else Reason.CONFIG_FIELD))
    assert Path(error.path).name == name


# config.json


@pytest.mark.parametrize(
    "change",
    [
        lambda q: q.update(quant_method="gptq"),
        lambda q: q.pop("quant_method"),
        lambda q: q.update(load_in_4bit=False),
        lambda q: q.update(load_in_4bit=[True]),
        lambda q: q.update(bnb_4bit_quant_type="fp4"),
        lambda q: q.update(bnb_4bit_quant_storage="bfloat16"),
        lambda q: q.pop("bnb_4bit_quant_storage"),
        lambda q: q.update(llm_int8_skip_modules=None),
        lambda q: q.pop("llm_int8_skip_modules"),
        lambda q: q.update(llm_int8_skip_modules="lm_head"),
        lambda q: q.update(llm_int8_skip_modules=[5]),
        lambda q: q["llm_int8_skip_modules"].append(W.removesuffix(".weight")),
    ],
)
def test_a_config_that_other_readers_would_read_otherwise_is_refused(
    change: Callable[[Json], object], artifact: Path
) -> None:
    edit_json(artifact / "config.json", lambda config: change(config["quantization_config"]))  # type: ignore[arg-type]
    reseal(artifact)
    error = refusal(artifact)
    assert error.reason in {Reason.CONFIG_FIELD, Reason.SKIP_MODULES}
    assert Path(error.path).name == "config.json"


# The manifest


def without(key: str) -> Callable[[Json], object]:
    return lambda record: record.pop(key)


def with_(key: str, value: object) -> Callable[[Json], object]:
    return lambda record: record.update({key: value})


def tensor(name: str, **changes: object) -> Callable[[Json], object]:
    return lambda record: record["tensors"][name].update(changes)


def file(name: str, **changes: object) -> Callable[[Json], object]:
    return lambda record: record["files"].setdefault(name, {"nbytes": 1, "sha256": "0" * 64}).update(changes)


H32, H64 = "0" * 32, "0" * 64

MANIFEST_LIES: list[tuple[str, Callable[[Json], object], Reason]] = [
    *((f"no {key}", without(key), Reason.MANIFEST_FIELD) for key in
      ("format", "must_understand", "generator", "source", "recipe", "tensors", "files")),
    ("no version", without("format_version"), Reason.UNSUPPORTED_VERSION),
    *((f"version {v!r}", with_("format_version", v), Reason.UNSUPPORTED_VERSION) for v in
      ("2.0", "0.9", "1", "1.0.0", "01.0", "1.00", "1.x", "", 1.0, 1, None, "१.०", "1.0\n", "99999999999999999999.0")),
    ("other format", with_("format", "gguf"), Reason.MANIFEST_FIELD),
    ("unknown feature", with_("must_understand", ["rotations"]), Reason.UNSUPPORTED_FEATURE),
    ("features of numbers", with_("must_understand", [1]), Reason.MANIFEST_FIELD),
    ("features of a string", with_("must_understand", "rotations"), Reason.MANIFEST_FIELD),
    ("generator of a number", with_("generator", 1), Reason.MANIFEST_FIELD),
    ("source of a list", with_("source", []), Reason.MANIFEST_FIELD),
    ("recipe of a string", with_("recipe", "x"), Reason.MANIFEST_FIELD),
    ("no tensors", with_("tensors", {}), Reason.MANIFEST_FIELD),
    ("tensors of a list", with_("tensors", []), Reason.MANIFEST_FIELD),
    ("tensor of a number", lambda r: r["tensors"].update({W: 5}), Reason.MANIFEST_FIELD),
    ("unknown encoding", tensor(W, encoding="nf8"), Reason.MANIFEST_FIELD),
    ("encoding of a list", tensor(W, encoding=[]), Reason.MANIFEST_FIELD),
    ("packed dtype", tensor(W, dtype="I8"), Reason.MANIFEST_FIELD),
    ("packed dtype of a list", tensor(W, dtype=["BF16"]), Reason.MANIFEST_FIELD),
    ("other dtype", tensor(W, dtype="F16"), Reason.QUANT_STATE),
    ("block size 48", tensor(W, block_size=48), Reason.MANIFEST_FIELD),
    ("block size true", tensor(W, block_size=True), Reason.MANIFEST_FIELD),
    ("block size 64.0", tensor(W, block_size=64.0), Reason.MANIFEST_FIELD),
    ("other block size, as many blocks", tensor(OTHER, block_size=128), Reason.QUANT_STATE),
    ("other block size, other blocks", tensor(W, block_size=128), Reason.COMPONENT_SHAPE),
    ("double_quant 1", tensor(W, double_quant=1), Reason.MANIFEST_FIELD),
    ("double_quant false", tensor(W, double_quant=False), Reason.MANIFEST_FIELD),
    ("transposed", tensor(W, shape=[40, 8]), Reason.QUANT_STATE),
    ("shape of another size", tensor(W, shape=[8, 41]), Reason.COMPONENT_SHAPE),
    ("negative shape", tensor(W, shape=[-8, -40]), Reason.MANIFEST_FIELD),
    ("shape of floats", tensor(W, shape=[8.0, 40.0]), Reason.MANIFEST_FIELD),
    ("shape of bools", tensor(W, shape=[True, 320]), Reason.MANIFEST_FIELD),
    ("huge shape", tensor(W, shape=[2**48, 2**48]), Reason.COMPONENT_SHAPE),
    ("hugest shape", tensor(W, shape=[2**48] * 8), Reason.COMPONENT_SHAPE),
    ("beyond hugest shape", tensor(W, shape=[2**48 + 1]), Reason.MANIFEST_FIELD),
    ("nine dimensions", tensor(W, shape=[1] * 9), Reason.MANIFEST_FIELD),
    ("empty shape", tensor(W, shape=[]), Reason.COMPONENT_SHAPE),
    ("no elements", tensor(W, shape=[0, 40]), Reason.COMPONENT_SHAPE),
    ("components of a list", tensor(W, components=[]), Reason.MANIFEST_FIELD),
    ("a component more", lambda r: r["tensors"][W]["components"].update(extra=H32), Reason.MANIFEST_FIELD),
    ("a component less", lambda r: r["tensors"][W]["components"].pop("absmax"), Reason.MANIFEST_FIELD),
    ("short digest", lambda r: r["tensors"][W]["components"].update(absmax="0" * 31), Reason.MANIFEST_FIELD),
    ("capital digest", lambda r: r["tensors"][W]["components"].update(absmax="A" * 32), Reason.MANIFEST_FIELD),
    ("digest with a line end", lambda r: r["tensors"][W]["components"].update(absmax=H32 + "\n"),
     Reason.MANIFEST_FIELD),
    ("digest of a number", lambda r: r["tensors"][W]["components"].update(absmax=0), Reason.MANIFEST_FIELD),
    ("bad source digest", tensor(W, source_xxh3="x"), Reason.MANIFEST_FIELD),
    ("null source digest", tensor(W, source_xxh3=None), Reason.MANIFEST_FIELD),
    ("kept dtype", tensor("model.norm.weight", dtype="F16"), Reason.COMPONENT_DTYPE),
    ("kept dtype nobody knows", tensor("model.norm.weight", dtype="F99"), Reason.COMPONENT_DTYPE),
    ("kept dtype of a number", tensor("model.norm.weight", dtype=5), Reason.MANIFEST_FIELD),
    ("kept shape", tensor("model.norm.weight", shape=[4, 2]), Reason.COMPONENT_SHAPE),
    ("kept reason", tensor("model.norm.weight", reason=None), Reason.MANIFEST_FIELD),
    ("kept digest", tensor("model.norm.weight", xxh3=None), Reason.MANIFEST_FIELD),
    ("packed said to be kept", lambda r: r["tensors"].update({W: {
        "encoding": "kept", "dtype": "U8", "shape": [160, 1], "xxh3": H32, "reason": "x"}}), Reason.UNKNOWN_TENSOR),
    ("kept said to be packed", lambda r: r["tensors"].update({"lm_head.weight": r["tensors"][W]}),
     Reason.COMPONENT_DTYPE),
    ("a tensor too many", lambda r: r["tensors"].update({"lost": {
        "encoding": "kept", "dtype": "U8", "shape": [1], "xxh3": H32, "reason": "x"}}), Reason.MISSING_COMPONENT),
    ("a tensor too few", lambda r: r["tensors"].pop("model.norm.weight"), Reason.UNKNOWN_TENSOR),
    ("a component is a tensor of its own", lambda r: r["tensors"].update({W + ".quant_map": {
        "encoding": "kept", "dtype": "F32", "shape": [16], "xxh3": H32, "reason": "x"}}), Reason.MANIFEST_FIELD),
    ("no files", with_("files", {}), Reason.MISSING_COMPONENT),
    ("a file of a list", lambda r: r["files"].update({"LICENSE": []}), Reason.MANIFEST_FIELD),
    ("a file that is not there", file("lost"), Reason.MISSING_FILE),
    ("the manifest itself", file("qformat.json"), Reason.MANIFEST_FIELD),
    *((f"file {name!r}", file(name), Reason.PATH_ESCAPES) for name in
      ("", ".", "..", "../LICENSE", "/etc/passwd", "a/b", "a\\b", "a\0b", "a\nb", "./LICENSE", "\u202e")),
    ("a long name", file("x" * 255), Reason.MISSING_FILE),
    ("a longer name", file("x" * 256), Reason.PATH_ESCAPES),
    ("a name of a megabyte", file("x" * 2**20), Reason.PATH_ESCAPES),
    ("wrong size", file("LICENSE", nbytes=5), Reason.FILE_SIZE),
    ("negative size", file("LICENSE", nbytes=-1), Reason.MANIFEST_FIELD),
    ("size of a float", file("LICENSE", nbytes=23.0), Reason.MANIFEST_FIELD),
    ("huge size", file("LICENSE", nbytes=2**48), Reason.FILE_SIZE),
    ("size beyond the limit", file("LICENSE", nbytes=2**48 + 1), Reason.MANIFEST_FIELD),
    ("no digest", lambda r: r["files"]["LICENSE"].pop("sha256"), Reason.MANIFEST_FIELD),
    ("a licence said to be a shard", file("LICENSE", header_xxh3=H32), Reason.HEADER_LENGTH),
    ("a shard said to be none", lambda r: r["files"]["model-00001-of-00002.safetensors"].pop("header_xxh3"),
     Reason.MANIFEST_FIELD),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason"), [lie[1:] for lie in MANIFEST_LIES], ids=[lie[0] for lie in MANIFEST_LIES]
)
def test_a_manifest_that_lies_is_refused(change: Callable[[Json], object], reason: Reason, artifact: Path) -> None:
    change_manifest(artifact, change)
    error = refusal(artifact)
    assert error.reason is reason, error


def test_a_manifest_that_was_changed_and_not_sealed_again_is_refused(artifact: Path) -> None:
    path = artifact / "qformat.json"
    path.write_bytes(path.read_bytes().replace(b'"reason":"not_a_matrix"', b'"reason":"not_b_matrix"'))
    assert refusal(artifact).reason is Reason.MANIFEST_DIGEST


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data + b"\n",
        lambda data: b" " + data,
        lambda data: data.replace(b"\n}\n", b"\n} "),
        lambda data: data.replace(b'  "manifest_sha256"', b' "manifest_sha256"'),
        lambda data: data.replace(b"manifest_sha256", b"manifest_sha257"),
        lambda data: data[:-70] + b"F" * 64 + data[-6:],
    ],
)
def test_a_manifest_that_does_not_end_in_its_seal_is_refused(change: Callable[[bytes], bytes], artifact: Path) -> None:
    path = artifact / "qformat.json"
    path.write_bytes(change(path.read_bytes()))
    assert refusal(artifact).reason in {Reason.MANIFEST_DIGEST, Reason.JSON_SYNTAX}


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b"null", b"{", b"\0" * 100, b"[" * 10**6, b'{"format": "qformat"}']
)
def test_a_manifest_that_is_none_is_refused(data: bytes, artifact: Path) -> None:
    (artifact / "qformat.json").write_bytes(data)
    assert Path(refusal(artifact).path).name == "qformat.json"


def test_a_manifest_beyond_the_limit_is_not_read(artifact: Path) -> None:
    os.truncate(artifact / "qformat.json", 2**40)
    assert refusal(artifact).reason is Reason.JSON_LIMIT


def test_a_shard_listed_twice_is_refused(artifact: Path) -> None:
    path = artifact / "qformat.json"
    data = path.read_bytes()
    line = next(line for line in data.splitlines() if b'"LICENSE"' in line)
    path.write_bytes(data.replace(line, line + b"\n" + line))
    assert refusal(artifact).reason is Reason.JSON_DUPLICATE_KEY


def test_a_shard_under_two_names_is_refused(artifact: Path) -> None:
    first = next(shards(artifact))
    shutil.copy(first, artifact / "copy.safetensors")
    change_manifest(artifact, lambda r: r["files"].update({"copy.safetensors": r["files"][first.name]}))
    assert refusal(artifact).reason is Reason.DUPLICATE_TENSOR


def test_thousands_of_files_are_all_checked_and_closed(artifact: Path) -> None:
    """More files than a process may have open at a time are refused and not a crash; descriptors are given back."""
    before = len(os.listdir("/proc/self/fd"))
    for number in range(300):
        (artifact / f"LICENSE.{number}").write_bytes(b"x")
    change_manifest(
        artifact, lambda r: r["files"].update({f"LICENSE.{n}": {"nbytes": 1, "sha256": H64} for n in range(300)})
    )
    open_artifact(artifact).close()
    report = verify(artifact)
    assert len(report.findings) == 300
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_shrinks_after_it_was_opened_is_an_error_and_no_bus_error(artifact: Path) -> None:
    with open_artifact(artifact) as opened:
        for path in shards(artifact):
            os.truncate(path, path.stat().st_size - 1)
        for name in opened:
            with pytest.raises(ArtifactError) as refused:
                opened[name]
            assert refused.value.reason is Reason.FILE_SIZE
        for path in shards(artifact):
            os.truncate(path, 0)
        with pytest.raises(ArtifactError):
            opened[W]


def test_a_file_that_vanishes_after_it_was_opened_is_an_error(artifact: Path) -> None:
    with open_artifact(artifact) as opened:
        shutil.rmtree(artifact)
        with pytest.raises(ArtifactError) as refused:
            opened[W]
        assert refused.value.reason is Reason.MISSING_FILE
