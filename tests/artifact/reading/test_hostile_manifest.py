"""Manifests with wrong values or digests, and files that are not manifests, are rejected with the reason."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qformat.errors import Reason
from tests.artifact.damaged import shards
from tests.artifact.reading.resealed import H32, Json, W, change_manifest, refusal

OTHER = "model.layers.0.mlp.down_proj.weight"


def without(key: str) -> Callable[[Json], object]:
    return lambda record: record.pop(key)


def with_(key: str, value: object) -> Callable[[Json], object]:
    return lambda record: record.update({key: value})


def tensor(name: str, **changes: object) -> Callable[[Json], object]:
    return lambda record: record["tensors"][name].update(changes)


def file(name: str, **changes: object) -> Callable[[Json], object]:
    return lambda record: record["files"].setdefault(name, {"nbytes": 1, "sha256": "0" * 64}).update(changes)


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
    ("a file of a list", lambda r: r["files"].update({"generation_config.json": []}), Reason.MANIFEST_FIELD),
    ("a file that is not there", file("lost"), Reason.MISSING_FILE),
    ("the manifest itself", file("qformat.json"), Reason.MANIFEST_FIELD),
    *((f"file {name!r}", file(name), Reason.PATH_ESCAPES) for name in
      ("", ".", "..", "../LICENSE", "/etc/passwd", "a/b", "a\\b", "a\0b", "a\nb", "./LICENSE", "\u202e")),
    ("a long name", file("x" * 255), Reason.MISSING_FILE),
    ("a longer name", file("x" * 256), Reason.PATH_ESCAPES),
    ("a name of a megabyte", file("x" * 2**20), Reason.PATH_ESCAPES),
    ("wrong size", file("generation_config.json", nbytes=5), Reason.FILE_SIZE),
    ("negative size", file("generation_config.json", nbytes=-1), Reason.MANIFEST_FIELD),
    ("size of a float", file("generation_config.json", nbytes=23.0), Reason.MANIFEST_FIELD),
    ("huge size", file("generation_config.json", nbytes=2**48), Reason.FILE_SIZE),
    ("size beyond the limit", file("generation_config.json", nbytes=2**48 + 1), Reason.MANIFEST_FIELD),
    ("no digest", lambda r: r["files"]["generation_config.json"].pop("sha256"), Reason.MANIFEST_FIELD),
    ("a licence said to be a shard", file("LICENSE", header_xxh3=H32), Reason.HEADER_LENGTH),
    ("a shard said to be none", lambda r: r["files"]["model-00001-of-00002.safetensors"].pop("header_xxh3"),
     Reason.MANIFEST_FIELD),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason"), [lie[1:] for lie in MANIFEST_LIES], ids=[lie[0] for lie in MANIFEST_LIES]
)
def test_a_manifest_with_wrong_values_is_rejected(
    change: Callable[[Json], object], reason: Reason, artifact: Path
) -> None:
    change_manifest(artifact, change)
    error = refusal(artifact)
    assert error.reason is reason, error


def test_a_changed_manifest_with_its_old_digest_is_rejected(artifact: Path) -> None:
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
def test_a_manifest_that_does_not_end_with_its_digest_is_rejected(
    change: Callable[[bytes], bytes], artifact: Path
) -> None:
    path = artifact / "qformat.json"
    path.write_bytes(change(path.read_bytes()))
    assert refusal(artifact).reason in {Reason.MANIFEST_DIGEST, Reason.JSON_SYNTAX}


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b"null", b"{", b"\0" * 100, b"[" * 10**6, b'{"format": "qformat"}']
)
def test_a_file_that_is_not_a_manifest_is_rejected(data: bytes, artifact: Path) -> None:
    (artifact / "qformat.json").write_bytes(data)
    assert Path(refusal(artifact).path).name == "qformat.json"


def test_a_manifest_beyond_the_limit_is_not_read(artifact: Path) -> None:
    os.truncate(artifact / "qformat.json", 2**40)
    assert refusal(artifact).reason is Reason.JSON_LIMIT


def test_a_shard_listed_twice_is_rejected(artifact: Path) -> None:
    path = artifact / "qformat.json"
    data = path.read_bytes()
    line = next(line for line in data.splitlines() if b'"LICENSE"' in line)
    path.write_bytes(data.replace(line, line + b"\n" + line))
    assert refusal(artifact).reason is Reason.JSON_DUPLICATE_KEY


def test_a_shard_under_two_names_is_rejected(artifact: Path) -> None:
    first = next(shards(artifact))
    shutil.copy(first, artifact / "copy.safetensors")
    change_manifest(artifact, lambda r: r["files"].update({"copy.safetensors": r["files"][first.name]}))
    assert refusal(artifact).reason is Reason.DUPLICATE_TENSOR
