"""Exports are bit-identical to the reader's weights for all chunk sizes and workers, with the files of a checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import qformat
from qformat.artifact.reading.reader import PackedTensor
from qformat.artifact.writing.output_kind import CHECKPOINT
from qformat.artifact.writing.staging import Staging
from qformat.codec.floats import FloatFormat, narrow
from qformat.converters.convert import convert
from qformat.converters.decode.execute import execute_export
from qformat.converters.decode.plan import make_export_plan
from qformat.converters.export import TARGETS, export
from qformat.converters.sources.chunks import CHUNK_SIZES, ChunkSizes
from tests.converters.decode.exports import CONFIG, SHARD_NBYTES, exported, tensors_in
from tests.converters.faulty_disk import FaultyDisk
from tests.repository import ROOT
from tests.small_models import SIDE_FILES, Tensor, tiny_tensors, weight, write_checkpoint

# What is written


@pytest.mark.parametrize("chunk_nbytes", [1024, 4096, CHUNK_SIZES.nbytes])
@pytest.mark.parametrize("to", TARGETS)
def test_every_weight_is_bit_identical_to_the_readers_for_all_chunk_sizes(
    to: str, chunk_nbytes: int, artifact: Path, tmp_path: Path
) -> None:
    sizes = ChunkSizes(nbytes=chunk_nbytes, cast_elements=chunk_nbytes // 64)
    export(artifact, tmp_path / "out", to, sizes=sizes)
    written = tensors_in(tmp_path / "out")
    target = TARGETS[to]
    with qformat.open(artifact) as opened:
        assert written.keys() == set(opened)
        for name in opened:
            tensor = opened[name]
            dtype, shape, data = written[name]
            assert tuple(shape) == tensor.shape, name
            if isinstance(tensor, PackedTensor):
                expected = tensor.decode(target)
            elif tensor.dtype in FloatFormat.__members__:
                expected = narrow(np.asarray(tensor.decode(), np.float32).reshape(-1), target)
            else:
                assert dtype == tensor.dtype
                expected = tensor.data
            assert data == expected.tobytes(), name
            assert dtype == (target.value if dtype in FloatFormat.__members__ else tensor.dtype), name  # type: ignore[union-attr]


def test_tensors_already_in_the_target_format_are_copied_bit_for_bit(tmp_path: Path) -> None:
    """This includes NaN payloads and signed zeros, because nothing is computed."""
    odd = Tensor("BF16", (4,), np.array([0x7FA1, 0xFF93, 0x8000, 0x7F80], "<u2").tobytes())
    source = write_checkpoint(
        tmp_path / "source",
        {**tiny_tensors(), "model.norm.weight": odd},
        config={"architectures": ["LlamaForCausalLM"]},
    )
    convert(source, tmp_path / "artifact")
    export(tmp_path / "artifact", tmp_path / "out", "bf16")
    assert tensors_in(tmp_path / "out")["model.norm.weight"][2] == odd.data


def test_config_index_and_side_files_are_those_of_a_plain_checkpoint(artifact: Path, tmp_path: Path) -> None:
    (artifact / "README.md").write_text("# A model\n")
    try:
        out = tmp_path / "out"
        files = exported(artifact, out, "fp16")
    finally:
        (artifact / "README.md").unlink()
    shards = {name for name in files if name.endswith(".safetensors")}
    assert files.keys() - shards == {"config.json", "model.safetensors.index.json", "README.md", *SIDE_FILES}
    assert {name: files[name] for name in SIDE_FILES} == SIDE_FILES
    assert files["README.md"] == b"# A model\n"
    assert json.loads(files["config.json"]) == {**CONFIG, "torch_dtype": "float16"}
    index = json.loads(files["model.safetensors.index.json"])
    assert set(index["weight_map"].values()) == shards
    assert index["weight_map"].keys() == tensors_in(out).keys()
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in tensors_in(out).values())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {"dtype": "float16"}),
        ({"dtype": "bfloat16"}, {"dtype": "float16"}),
        ({"torch_dtype": "bfloat16"}, {"torch_dtype": "float16"}),
        (
            {"dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "hidden_size": 8}, "vision_config": {"a": 1}},
            {"dtype": "float16", "text_config": {"dtype": "float16", "hidden_size": 8}, "vision_config": {"a": 1}},
        ),
    ],
)
def test_the_dtype_of_the_config_is_the_one_written(
    config: dict[str, object], expected: dict[str, object], tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "source", tiny_tensors(), config={**CONFIG, **config})
    convert(source, tmp_path / "artifact")
    export(tmp_path / "artifact", tmp_path / "out", "fp16")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {**CONFIG, **expected}


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_the_number_of_workers_does_not_change_any_byte(workers: int, artifact: Path, tmp_path: Path) -> None:
    assert exported(artifact, tmp_path / "one", workers=1) == exported(artifact, tmp_path / "n", workers=workers)


def test_an_export_can_be_converted_again(tiny: Path, tmp_path: Path) -> None:
    export(tiny, tmp_path / "out", "fp32")
    convert(tmp_path / "out", tmp_path / "again")
    assert qformat.verify(tmp_path / "again").passed


# Memory


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks the structure instead of measuring: nothing larger than a chunk is read, decoded or written at a time."""
    source = write_checkpoint(
        tmp_path / "source",
        {"model.layers.0.mlp.up_proj.weight": weight((512, 512))},
        config={"architectures": ["LlamaForCausalLM"]},
    )
    convert(source, tmp_path / "artifact")
    sizes: list[int] = []

    class Watching(FaultyDisk):
        def perform(self, name: str, arguments: tuple[object, ...]) -> object:
            if name == "raw_pwrite":
                sizes.append(len(arguments[1]))  # type: ignore[arg-type]
            return super().perform(name, arguments)

    read = os.preadv

    def watched(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        sizes.extend(map(len, buffers))
        return read(descriptor, buffers, offset)

    with qformat.open(tmp_path / "artifact") as opened:  # headers are no chunks
        plan = make_export_plan(opened, FloatFormat.BF16, max_shard_nbytes=SHARD_NBYTES)
        with Staging.begin(tmp_path / "out", plan.fingerprint, disk=Watching(), kind=CHECKPOINT) as staging:
            monkeypatch.setattr(os, "preadv", watched)
            execute_export(plan, opened, staging, workers=1, progress=lambda _: None, sizes=ChunkSizes(nbytes=8192))
    assert max(sizes) <= 8192
    assert len(sizes) > 3 * 64


def test_an_export_loads_no_torch(tiny: Path, tmp_path: Path) -> None:
    script = (
        f"import sys, qformat; qformat.export({str(tiny)!r}, {str(tmp_path / 'out')!r}, 'bf16')\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
