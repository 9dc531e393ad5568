"""Shards, index and config with correct digests that contradict each other, and files that change while open."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from qformat.artifact.reading.reader import open_artifact
from qformat.errors import ArtifactError, Reason
from tests.artifact.damaged import edit_json, reseal, rewrite_shard, shard_of, shards, verify
from tests.artifact.reading.resealed import Json, W, change_manifest, refusal
from tests.small_models import INDEX

# Shards and index


def test_the_same_tensor_in_two_shards_is_rejected(artifact: Path) -> None:
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


def test_a_tensor_that_is_not_in_the_manifest_is_rejected(artifact: Path) -> None:
    def add(header: Json, parts: dict[str, bytes]) -> None:
        header["stowaway"] = {"dtype": "U8", "shape": [1]}
        parts["stowaway"] = b"x"

    rewrite_shard(shard_of(artifact, W), add)
    reseal(artifact)
    error = refusal(artifact)
    assert error.reason is Reason.UNKNOWN_TENSOR
    assert error.tensor == "stowaway"


def test_data_that_does_not_begin_at_a_page_is_rejected(artifact: Path) -> None:
    path = next(shards(artifact))
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    path.write_bytes(struct.pack("<Q", length + 64) + data[8 : 8 + length] + b" " * 64 + data[8 + length :])
    reseal(artifact)
    error = refusal(artifact)
    assert error.reason is Reason.ALIGNMENT
    assert Path(error.path) == path


def test_a_component_that_is_not_aligned_to_its_size_is_rejected(artifact: Path) -> None:
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
def test_an_index_that_contradicts_the_shards_is_rejected(change: Callable[[Json], object], artifact: Path) -> None:
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
    ],
)
def test_a_small_file_with_invalid_json_is_rejected(
    name: str, text: bytes, reason: Reason | None, artifact: Path
) -> None:
    (artifact / name).write_bytes(text)
    reseal(artifact)
    error = refusal(artifact)
    assert error.reason is (reason or (Reason.INDEX_MISMATCH if name == INDEX else Reason.CONFIG_FIELD))
    assert Path(error.path).name == name


def test_an_index_with_nan_is_rejected(artifact: Path) -> None:
    (artifact / INDEX).write_bytes(b'{"a": NaN}')
    reseal(artifact)
    assert refusal(artifact).reason is Reason.JSON_SYNTAX


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
def test_a_config_that_other_readers_would_interpret_differently_is_rejected(
    change: Callable[[Json], object], artifact: Path
) -> None:
    edit_json(artifact / "config.json", lambda config: change(config["quantization_config"]))  # type: ignore[arg-type]
    reseal(artifact)
    error = refusal(artifact)
    assert error.reason in {Reason.CONFIG_FIELD, Reason.SKIP_MODULES}
    assert Path(error.path).name == "config.json"


def test_thousands_of_files_are_all_checked_and_closed(artifact: Path) -> None:
    """More files than a process may open are rejected without a crash, and descriptors are closed."""
    before, digest = len(os.listdir("/proc/self/fd")), sha256(b"x").hexdigest()
    for number in range(300):
        (artifact / f"LICENSE.{number}").write_bytes(b"x")
    change_manifest(
        artifact, lambda r: r["files"].update({f"LICENSE.{n}": {"nbytes": 1, "sha256": digest} for n in range(300)})
    )
    open_artifact(artifact).close()
    for number in range(300):
        (artifact / f"LICENSE.{number}").write_bytes(b"y")
    report = verify(artifact)
    assert len(report.findings) == 300
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_shrinks_after_opening_raises_an_error_and_not_sigbus(artifact: Path) -> None:
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


def test_a_file_that_is_removed_after_opening_raises_an_error(artifact: Path) -> None:
    with open_artifact(artifact) as opened:
        shutil.rmtree(artifact)
        with pytest.raises(ArtifactError) as refused:
            opened[W]
        assert refused.value.reason is Reason.MISSING_FILE
