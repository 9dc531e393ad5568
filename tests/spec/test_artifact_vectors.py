"""spec/vectors/artifacts: valid artifacts open, verify and decode to the expected bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qformat.artifact import layout, manifest
from qformat.artifact.manifest import KeptRecord, TensorRecord
from qformat.artifact.reading import manifest_parser
from qformat.artifact.reading.reader import KeptTensor, PackedTensor, open_artifact
from qformat.artifact.reading.verify import verify_integrity
from qformat.artifact.tensor_spec import TensorSpec
from qformat.codec.floats import FloatFormat
from qformat.names import MANIFEST_NAME
from tests.spec import corpus

ALL = corpus.artifacts()
AS_WRITTEN = [vector for vector in ALL if vector["as_written"]]


def test_directories_and_descriptions_match() -> None:
    assert {path.name for path in corpus.ARTIFACTS.iterdir()} == {vector["name"] for vector in ALL}


def test_the_corpus_stays_small() -> None:
    assert sum(path.stat().st_size for path in corpus.VECTORS.rglob("*") if path.is_file()) < 2_000_000


@pytest.mark.parametrize("vector", ALL, ids=corpus.name_of)
def test_a_valid_artifact_has_no_findings(vector: corpus.Vector) -> None:
    report = verify_integrity(corpus.ARTIFACTS / vector["name"], sha256=True)
    assert report.findings == ()


@pytest.mark.parametrize("vector", ALL, ids=corpus.name_of)
def test_valid_artifacts_open_and_decode_to_the_expected_bits(vector: corpus.Vector) -> None:
    with open_artifact(corpus.ARTIFACTS / vector["name"]) as artifact:
        assert set(artifact) == set(vector["tensors"])
        for name, expected in vector["tensors"].items():
            tensor = artifact[name]
            assert list(tensor.shape) == expected["shape"]
            if expected["encoding"] == "kept":
                assert isinstance(tensor, KeptTensor)
                assert tensor.dtype == expected["dtype"]
                assert np.ascontiguousarray(tensor.data).tobytes().hex() == expected["bytes"]
            else:
                assert isinstance(tensor, PackedTensor)
                assert tensor.layout.float_format.value == expected["dtype"]
                for dtype, bits in expected["decoded"].items():
                    assert tensor.decode(FloatFormat(dtype)).tobytes().hex() == bits, f"{name} as {dtype}"


def new_tensors(name: str, record: TensorRecord) -> list[TensorSpec]:
    if isinstance(record, KeptRecord):
        return [TensorSpec(name, record.dtype, record.shape)]
    return list(record.layout.components(name).values())


@pytest.mark.parametrize("vector", AS_WRITTEN, ids=corpus.name_of)
def test_the_layout_of_a_written_artifact_depends_on_names_and_sizes_only(vector: corpus.Vector) -> None:
    folder = corpus.ARTIFACTS / vector["name"]
    parsed = parse(folder)
    names = sorted(parsed.tensors, key=layout.natural_order)
    assert names == list(parsed.tensors)
    groups = [new_tensors(name, parsed.tensors[name]) for name in names]
    shards = layout.place(groups, max_shard_nbytes=vector["max_shard_nbytes"])
    assert {shard.name for shard in shards} == {path.name for path in folder.glob("*.safetensors")}
    for shard in shards:
        data = (folder / shard.name).read_bytes()
        assert data.startswith(shard.header)
        assert len(data) == shard.nbytes


@pytest.mark.parametrize("vector", AS_WRITTEN, ids=corpus.name_of)
def test_a_written_manifest_is_byte_identical_after_a_round_trip(vector: corpus.Vector) -> None:
    folder = corpus.ARTIFACTS / vector["name"]
    assert parse(folder).to_bytes() == (folder / MANIFEST_NAME).read_bytes()


def parse(folder: Path) -> manifest.Manifest:
    path = folder / MANIFEST_NAME
    return manifest_parser.parse(path.read_bytes(), path)
