"""Exports: the bits of the reader and of bitsandbytes, a plan that tells every byte, and faults at every call."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qformat
from qformat.artifact.reading.reader import PackedTensor
from qformat.artifact.writing.output_kind import CHECKPOINT
from qformat.artifact.writing.staging import Staging
from qformat.codec.floats import FloatFormat, narrow, widen
from qformat.converters.convert import ConversionOptions, convert
from qformat.converters.decode.execute import execute_export
from qformat.converters.decode.plan import make_export_plan
from qformat.converters.export import TARGETS, export, plan_export
from qformat.converters.sources.chunks import CHUNK_SIZES, ChunkSizes
from qformat.errors import ArtifactError, Reason, TargetError, UsageError
from tests.artifact.damaged import regions
from tests.converters.faulty_disk import FaultyDisk, Killed, PowerCut, journal_tensors, place
from tests.repository import ROOT
from tests.small_models import (
    SIDE_FILES,
    Tensor,
    contents,
    names_beside,
    raw_tensor,
    tensor_of,
    tiny_tensors,
    weight,
    write_checkpoint,
    write_llama,
    write_tiny,
)
from tests.standstill import wait_until_held

SHARD_NBYTES = 400
"""Five tensors, three shards."""


def many_kinds() -> dict[str, Tensor]:
    """Return tensors of every kind: packed and kept, other dtypes, partial and several nested blocks, empty ones."""
    return {
        **tiny_tensors(),
        "model.layers.1.self_attn.o_proj.weight": weight((300, 130), "F32", seed=6),
        "model.layers.1.mlp.down_proj.weight": weight((33, 31), "BF16", seed=7),
        "model.layers.1.input_layernorm.weight": weight((64,), "F32", seed=8),
        "model.layers.1.post_attention_layernorm.weight": weight((64,), "F16", seed=9),
        "counts": raw_tensor("I64", (5,), seed=10),
        "mask": raw_tensor("BOOL", (2, 3), seed=11),
        "eighths": raw_tensor("F8_E4M3", (7,), seed=12),
        "empty": weight((0, 4), "BF16"),
        "scalar": weight((), "F32", seed=13),
    }


@pytest.fixture(scope="module", params=[True, False], ids=["double quantization", "one level"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    source = write_checkpoint(folder / "source", many_kinds(), config={"model_type": "llama", "torch_dtype": "float32"})
    convert(source, folder / "artifact", ConversionOptions(double_quant=request.param, max_shard_nbytes=9000))
    return folder / "artifact"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    convert(write_tiny(folder / "source"), folder / "artifact", ConversionOptions(max_shard_nbytes=2000))
    return folder / "artifact"


def exported(artifact: Path, out: Path, to: str = "bf16", **arguments: Any) -> dict[str, bytes]:
    export(artifact, out, to, max_shard_nbytes=SHARD_NBYTES, **{"disk": FaultyDisk(), **arguments})
    return contents(out)


def tensors_in(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Return dtype, shape and bytes of every tensor, read without the code under test."""
    found = {}
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = (entry["dtype"], entry["shape"], data[8 + length + begin : 8 + length + end])
    return found


# What is written


@pytest.mark.parametrize("chunk_nbytes", [1024, 4096, CHUNK_SIZES.nbytes])
@pytest.mark.parametrize("to", TARGETS)
def test_every_weight_has_the_bits_of_the_reader_whatever_the_chunks(
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


def test_what_has_the_format_already_is_copied_bit_for_bit(tmp_path: Path) -> None:
    """NaN payloads and signed zeros included: nothing is computed."""
    odd = Tensor("BF16", (4,), np.array([0x7FA1, 0xFF93, 0x8000, 0x7F80], "<u2").tobytes())
    source = write_checkpoint(tmp_path / "source", {**tiny_tensors(), "model.norm.weight": odd}, config={})
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
    assert json.loads(files["config.json"]) == {"model_type": "llama", "torch_dtype": "float16"}
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
    source = write_checkpoint(tmp_path / "source", tiny_tensors(), config={"model_type": "llama", **config})
    convert(source, tmp_path / "artifact")
    export(tmp_path / "artifact", tmp_path / "out", "fp16")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "llama", **expected}


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_the_number_of_workers_changes_no_byte(workers: int, artifact: Path, tmp_path: Path) -> None:
    assert exported(artifact, tmp_path / "one", workers=1) == exported(artifact, tmp_path / "n", workers=workers)


def test_an_export_can_be_converted_again(tiny: Path, tmp_path: Path) -> None:
    export(tiny, tmp_path / "out", "fp32")
    convert(tmp_path / "out", tmp_path / "again")
    assert qformat.verify(tmp_path / "again").good


# The plan


@pytest.mark.parametrize("max_shard_nbytes", [1, 500, 20_000, 10**9])
@pytest.mark.parametrize("to", TARGETS)
def test_a_plan_covers_every_shard_without_holes_and_tells_the_size_to_the_byte(
    to: str, max_shard_nbytes: int, artifact: Path, tmp_path: Path
) -> None:
    planned = plan_export(artifact, to, max_shard_nbytes=max_shard_nbytes)
    export(artifact, tmp_path / "out", to, max_shard_nbytes=max_shard_nbytes, disk=FaultyDisk())
    assert planned.nbytes == sum(len(data) for data in contents(tmp_path / "out").values())
    for shard in planned.shards:
        position = len(shard.header)
        places = sorted(
            (task.place for task in planned.tasks if task.place.shard == shard.name), key=lambda p: (p.start, p.nbytes)
        )
        assert len(places) == len(shard.tensors)
        for found in places:
            assert found.start == position
            position += found.nbytes
        assert position == shard.nbytes == (tmp_path / "out" / shard.name).stat().st_size
    assert len({task.name for task in planned.tasks}) == len(planned.tasks)


def test_a_plan_reads_no_weight(tiny: Path, tmp_path: Path) -> None:
    copy = place(tmp_path / "copy", contents(tiny))
    expected = plan_export(copy, "bf16")
    damage(copy, "packed")
    assert plan_export(copy, "bf16") == expected


# Memory


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Structure, not a measurement: nothing larger than a chunk is read, decoded or written at a time."""
    source = write_checkpoint(tmp_path / "source", {"model.layers.0.mlp.up_proj.weight": weight((512, 512))}, config={})
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


# Peers


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as transformers writes it; blocks of 64 divide every row, see docs/bitsandbytes.md."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=131, hidden_size=128, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "source")
    convert(folder / "source", folder / "artifact")
    return folder / "artifact"


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
@pytest.mark.parametrize("to", TARGETS)
def test_transformers_loads_it_with_the_weights_that_bitsandbytes_decodes(to: str, llama: Path, tmp_path: Path) -> None:
    import bitsandbytes.functional as bnb
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    export(llama, tmp_path / "out", to, max_shard_nbytes=200_000)
    dtype = getattr(torch, TARGETS[to].torch_name)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == dtype
    assert not hasattr(model.config, "quantization_config")
    stored = {name: t for path in llama.glob("*.safetensors") for name, t in load_file(path).items()}
    n_packed = 0
    for name, parameter in model.state_dict().items():
        if f"{name}.absmax" not in stored:
            assert torch.equal(parameter, stored[name].to(dtype)), name
            continue
        parts = {key.removeprefix(f"{name}."): t for key, t in stored.items() if key.startswith(f"{name}.")}
        state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
        state.dtype = dtype
        expected = bnb.dequantize_4bit(stored[name], state)
        assert parameter.dtype == expected.dtype == dtype
        assert torch.equal(parameter.view(torch.uint8), expected.reshape(parameter.shape).view(torch.uint8)), name
        n_packed += 1
    assert n_packed == 14
    assert torch.isfinite(model(input_ids=torch.arange(20)[None]).logits).all()


def test_an_export_loads_no_torch(tiny: Path, tmp_path: Path) -> None:
    script = (
        f"import sys, qformat; qformat.export({str(tiny)!r}, {str(tmp_path / 'out')!r}, 'bf16')\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


# Overflow


def overflowing(folder: Path, **options: Any) -> Path:
    """An artifact with values beyond 65504: in a packed weight, in a kept one, and one that was infinite before."""
    values = widen(np.frombuffer(weight((4, 64)).data, "<u2"), FloatFormat.BF16).reshape(4, 64).copy()
    values[1, 5], values[1, 6], values[3, 7] = 1e5, -1e5, 7e4
    norm = np.array([1, 2e5, np.inf, -3e38], np.float32)
    tensors = {
        "model.layers.0.mlp.up_proj.weight": tensor_of(values, "BF16"),
        "model.layers.0.mlp.down_proj.weight": weight((4, 64)),
        "model.norm.weight": tensor_of(norm, "F32"),
    }
    convert(write_checkpoint(folder / "source", tensors, config={}), folder / "artifact", ConversionOptions(**options))
    return folder / "artifact"


@pytest.mark.parametrize("double_quant", [True, False])
def test_values_too_large_for_fp16_are_counted_and_named(double_quant: bool, tmp_path: Path) -> None:
    artifact = overflowing(tmp_path, double_quant=double_quant)
    summary = export(artifact, tmp_path / "out", "fp16")
    bits = np.frombuffer(tensors_in(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"][2], "<u2")
    n_infinite = int(((bits & 0x7FFF) == 0x7C00).sum())
    assert n_infinite >= 3
    assert summary.overflowed == {"model.layers.0.mlp.up_proj.weight": n_infinite, "model.norm.weight": 2}
    for to in ("bf16", "fp32"):
        assert export(artifact, tmp_path / to, to).overflowed == {}


def test_float32_values_too_large_for_bf16_are_counted(tmp_path: Path) -> None:
    norm = tensor_of(np.array([3.4e38, 3.38e38, 1], np.float32), "F32")
    source = write_checkpoint(tmp_path / "source", {**tiny_tensors(), "model.norm.weight": norm}, config={})
    convert(source, tmp_path / "artifact")
    assert export(tmp_path / "artifact", tmp_path / "out", "bf16").overflowed == {"model.norm.weight": 1}


def test_a_resumed_export_still_knows_what_overflowed(tmp_path: Path) -> None:
    artifact = overflowing(tmp_path)
    expected = export(artifact, tmp_path / "undisturbed", "fp16").overflowed
    kill_after(artifact, tmp_path / "out", n_done=3, to="fp16")
    assert export(artifact, tmp_path / "out", "fp16", max_shard_nbytes=SHARD_NBYTES).overflowed == expected


# Damage


def damage(folder: Path, component: str) -> str:
    """Flip a bit in the middle of a component of the first tensor that has it; return the tensor's name."""
    region = next(region for region in regions(folder) if region.component == component)
    path = folder / region.file
    data = bytearray(path.read_bytes())
    data[(region.start + region.stop) // 2] ^= 1
    path.write_bytes(data)
    assert region.tensor is not None
    return region.tensor


@pytest.mark.parametrize("component", ["packed", "absmax", "nested_absmax", "nested_quant_map", "data"])
def test_a_changed_bit_is_refused_with_tensor_and_file_and_nothing_stands_under_out(
    component: str, tiny: Path, tmp_path: Path
) -> None:
    artifact = place(tmp_path / "artifact", contents(tiny))
    name = damage(artifact, component)
    with pytest.raises(ArtifactError) as refused:
        exported(artifact, tmp_path / "out", "fp32")
    assert refused.value.reason is Reason.COMPONENT_DIGEST
    assert refused.value.tensor == name
    assert f"{component} (bytes" in str(refused.value)
    assert ".safetensors" in refused.value.path
    assert not (tmp_path / "out").exists()
    for path in artifact.iterdir():
        path.write_bytes((tiny / path.name).read_bytes())
    assert exported(artifact, tmp_path / "out", "fp32") == exported(tiny, tmp_path / "undisturbed", "fp32")


@pytest.mark.parametrize("name", ["config.json", "LICENSE"])
def test_a_changed_side_file_is_refused(name: str, tiny: Path, tmp_path: Path) -> None:
    artifact = place(tmp_path / "artifact", contents(tiny))
    data = (artifact / name).read_bytes()
    (artifact / name).write_bytes(data.replace(b"llama", b"mamba") if b"llama" in data else data.swapcase())
    with pytest.raises(ArtifactError) as refused:
        exported(artifact, tmp_path / "out")
    assert refused.value.reason is Reason.FILE_DIGEST
    assert not (tmp_path / "out").exists()


def cut(folder: Path) -> None:
    path = next(iter(sorted(folder.glob("*.safetensors"))))
    path.write_bytes(path.read_bytes()[:-1])


def without_manifest(folder: Path) -> None:
    (folder / "qformat.json").unlink()


@pytest.mark.parametrize(("spoil", "reason"), [(cut, Reason.FILE_SIZE), (without_manifest, Reason.MISSING_FILE)])
def test_what_cannot_be_opened_is_refused_before_anything_is_written(
    spoil: Callable[[Path], None], reason: Reason, tiny: Path, tmp_path: Path
) -> None:
    artifact = place(tmp_path / "artifact", contents(tiny))
    spoil(artifact)
    with pytest.raises(ArtifactError) as refused:
        exported(artifact, tmp_path / "out")
    assert refused.value.reason is reason
    assert names_beside(artifact) == {"artifact"}


# Targets


def test_a_checkpoint_is_replaced_with_force_and_an_artifact_never(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = exported(tiny, out, "fp32")
    with pytest.raises(TargetError, match="force=True"):
        exported(tiny, out)
    assert contents(out) == first
    assert exported(tiny, out, force=True) == exported(tiny, tmp_path / "fresh")
    other = place(tmp_path / "artifact", contents(tiny))
    with pytest.raises(TargetError, match="is a 4-bit artifact"):
        exported(tiny, other, force=True)
    assert contents(other) == contents(tiny)
    thesis = place(tmp_path / "thesis", {"thesis.txt": b"years of work"})
    with pytest.raises(TargetError, match="no checkpoint"):
        exported(tiny, thesis, force=True)
    assert names_beside(out) == {"out", "fresh", "artifact", "thesis"}


def test_out_inside_the_artifact_is_refused(tiny: Path) -> None:
    with pytest.raises(TargetError, match="lies inside"):
        exported(tiny, tiny / "out")
    with pytest.raises(TargetError, match="holds the source"):
        exported(tiny, tiny.parent)


def test_senseless_arguments_are_wrong_usage(tiny: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any]
    for to, arguments in (("int8", {}), ("bf16", {"workers": 0}), ("bf16", {"max_shard_nbytes": 0})):
        with pytest.raises(UsageError):
            export(tiny, tmp_path / "out", to, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_another_artifact_or_format_does_not_continue_what_is_half_done(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kill_after(tiny, out, n_done=2)
    with pytest.raises(TargetError, match=r"another artifact or options.*restart=True"):
        exported(tiny, out, "fp32")
    assert exported(tiny, out, "fp32", restart=True) == exported(tiny, tmp_path / "undisturbed", "fp32")
    assert names_beside(out) == {"out", "undisturbed"}


# Faults


def kill_after(artifact: Path, out: Path, *, n_done: int, to: str = "bf16") -> Path:
    """Kill an export when `n_done` tensors are in the journal; return the work folder."""

    class KilledAfter(FaultyDisk):
        def intercept(self, name: str, arguments: tuple[object, ...]) -> object:
            if name == "raw_write" and self.names.count("raw_write") == 1 + n_done:
                self._dead = True
            return super().intercept(name, arguments)

    with pytest.raises(Killed):
        exported(artifact, out, to, workers=1, disk=KilledAfter())
    work = out.with_name(out.name + ".partial")
    assert journal_tensors(work) == n_done
    return work


@pytest.mark.parametrize("n_done", range(5))
def test_a_resumed_export_makes_only_what_the_journal_does_not_have(n_done: int, tiny: Path, tmp_path: Path) -> None:
    kill_after(tiny, tmp_path / "out", n_done=n_done)
    lines: list[bytes] = []

    class Counting(FaultyDisk):
        def perform(self, name: str, arguments: tuple[object, ...]) -> object:
            if name == "raw_write":
                lines.append(bytes(arguments[1]))  # type: ignore[call-overload]
            return super().perform(name, arguments)

    done: list[int] = []
    resumed = exported(tiny, tmp_path / "out", disk=Counting(), on_progress=done.append)
    assert sum(b'"tensor":' in line for line in lines) == 5 - n_done
    assert sum(done) == plan_export(tiny, "bf16").tensor_nbytes
    assert resumed == exported(tiny, tmp_path / "undisturbed")


def test_staged_bytes_that_do_not_have_the_digests_of_the_journal_are_made_again(tiny: Path, tmp_path: Path) -> None:
    work = kill_after(tiny, tmp_path / "out", n_done=4)
    for path in (work / "folder").glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
    assert exported(tiny, tmp_path / "out") == exported(tiny, tmp_path / "undisturbed")


TARGET = pytest.mark.parametrize("replacing", [False, True], ids=["new OUT", "replacing a checkpoint"])


class Rehearsal:
    """What the fault tests share: the artifact, the bytes before and after, and how often the disk is called."""

    def __init__(self, artifact: Path, folder: Path, *, replacing: bool) -> None:
        self.artifact = artifact
        self.replacing = replacing
        self.old = {**exported(artifact, folder / "old", "fp32"), "note.txt": b"mine"} if replacing else None
        self.whole = exported(artifact, folder / "whole")
        disk = FaultyDisk()
        out = self.target(folder / "rehearsal")
        exported(artifact, out, disk=disk, force=replacing, workers=1)
        self.names = disk.names

    def target(self, parent: Path) -> Path:
        parent.mkdir()
        return place(parent / "out", self.old) if self.old is not None else parent / "out"

    def check_and_repeat(self, out: Path) -> None:
        standing = contents(out) if out.exists() else None
        assert standing in (self.old, self.whole)
        refused: TargetError | None = None
        try:
            exported(self.artifact, out, force=self.replacing)
        except TargetError as caught:
            refused = caught
        if refused is not None:
            # The fault came behind the very last mark of the finished run: it is as if the command were given twice.
            assert standing == self.whole
            assert "exists already" in str(refused)
        assert contents(out) == self.whole
        assert names_beside(out) == {"out"}


@TARGET
@pytest.mark.parametrize("fault", ["kill", "ENOSPC", "full from here on", "EIO", "short write"])
def test_a_fault_at_any_call_leaves_the_old_or_the_new_and_a_repetition_gives_the_same_bytes(
    fault: str, replacing: bool, tiny: Path, tmp_path: Path
) -> None:
    rehearsal = Rehearsal(tiny, tmp_path, replacing=replacing)
    assert len(rehearsal.names) > 40
    for k, call in enumerate(rehearsal.names):
        if "write" in fault and "write" not in call:
            continue  # only a write can be short
        out = rehearsal.target(tmp_path / str(k))
        failure: BaseException | None = None
        try:
            exported(tiny, out, disk=FaultyDisk(k, fault), force=replacing, workers=1)
        except (Killed, TargetError) as caught:
            failure = caught
        if fault == "short write":
            assert failure is None
        elif isinstance(failure, TargetError):
            assert str(out.parent) in str(failure)
            assert fault != "kill"
        else:
            assert fault in {"kill", "full from here on"}
        rehearsal.check_and_repeat(out)


@TARGET
def test_a_power_cut_at_any_call_that_loses_unsynced_bytes_is_repaired_by_the_repetition(
    replacing: bool, tiny: Path, tmp_path: Path
) -> None:
    rehearsal = Rehearsal(tiny, tmp_path, replacing=replacing)
    for k in range(len(rehearsal.names)):
        out = rehearsal.target(tmp_path / str(k))
        for repetition in range(2):
            with contextlib.suppress(Killed, TargetError):
                exported(tiny, out, disk=PowerCut(k, seed=k + repetition), force=replacing, workers=1)
        rehearsal.check_and_repeat(out)


def test_an_early_sync_that_fails_is_an_error(tiny: Path, tmp_path: Path) -> None:
    """The kernel reports a lost write to one fsync only: the one of the thread must not be forgotten."""

    class LostWrite(FaultyDisk):
        def perform(self, name: str, arguments: tuple[object, ...]) -> object:
            import threading

            if name == "raw_fsync" and threading.current_thread().name == "qformat-sync":
                raise OSError(5, "Input/output error")
            return super().perform(name, arguments)

    with pytest.raises(TargetError, match="Input/output error"):
        exported(tiny, tmp_path / "out", disk=LostWrite(), sizes=ChunkSizes(sync_nbytes=1))
    assert not (tmp_path / "out").exists()
    assert exported(tiny, tmp_path / "out") == exported(tiny, tmp_path / "undisturbed")


KILLED_EXPORT = """
import sys
from pathlib import Path
from qformat.converters.export import export
from tests.standstill import hold_writes

hold_writes(after=int(sys.argv[3]))
export(Path(sys.argv[1]), Path(sys.argv[2]), "bf16", max_shard_nbytes=9000)
"""


@pytest.mark.parametrize("n_writes", [0, 9, 20])
def test_an_export_that_is_killed_continues_and_gives_the_same_bytes(n_writes: int, tmp_path: Path) -> None:
    convert(write_llama(tmp_path / "source"), tmp_path / "artifact")
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED_EXPORT, tmp_path / "artifact", out, str(n_writes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        wait_until_held(process)
        process.kill()
    assert not out.exists()
    assert (tmp_path / "out.partial" / "journal").exists()
    export(tmp_path / "artifact", out, "bf16", max_shard_nbytes=9000)
    export(tmp_path / "artifact", tmp_path / "undisturbed", "bf16", max_shard_nbytes=9000)
    assert contents(out) == contents(tmp_path / "undisturbed")
