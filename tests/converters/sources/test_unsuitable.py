"""Locations that are not checkpoints are named as what they are, with the way to a checkpoint."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from qformat.cli.main import run
from qformat.converters.compare.compare import compare
from qformat.converters.convert import convert, plan
from qformat.errors import Reason, SourceError, UsageError
from tests.converters.refused_source import refusal
from tests.converters.sources.decoded_kinds import torch_llama, write_bin
from tests.converters.sources.gguf.gguf_models import write_gguf
from tests.converters.sources.hub.serving import NAME, serving
from tests.converters.sources.hub.serving import plan as plan_from_hub
from tests.small_models import INDEX, llama_config, llama_tensors, raw_tensor, write_checkpoint, write_tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")


@pytest.mark.parametrize(
    "address",
    [
        "https://huggingface.co/owner/name",
        "https://huggingface.co/owner/name/",
        "https://huggingface.co/owner/name/tree/main",
        "https://huggingface.co/owner/name/resolve/main/model.safetensors?download=true",
        "http://www.huggingface.co/owner/name#readme",
        "https:/huggingface.co/owner/name",  # what pathlib makes of it
        "huggingface.co/owner/name",
        "hf.co/owner/name",
        "hf://owner/name",
        "git@hf.co:owner/name.git",
        "https://user:hf_token@huggingface.co/owner/name",
    ],
)
def test_an_address_of_the_hub_gives_the_name_of_its_repository(address: str, tmp_path: Path) -> None:
    for call in (lambda: plan(address), lambda: convert(address, tmp_path / "out"), lambda: compare(tmp_path, address)):
        with pytest.raises(UsageError) as refused:
            call()
        assert str(refused.value).endswith("is an address. Give the repository of the Hub as owner/name")
        assert "hf_token" not in str(refused.value)


@pytest.mark.parametrize(
    "address", ["https://huggingface.co/a/b/tree/v1.0", "https://hf.co/a/b/blob/v1.0/x.gguf", "hf://a/b@v1.0/x.gguf"]
)
def test_a_revision_in_an_address_becomes_the_option(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", address, "out"]) == 2
    assert "Give the repository of the Hub as a/b, with --revision=v1.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "address", ["s3://bucket/model", "https://example.org/model.gguf", "https://hf.co/gpt2", "ssh://x/y"]
)
def test_an_address_of_another_host_is_named_as_one(address: str) -> None:
    with pytest.raises(UsageError, match=r"is an address\. Give the directory of a checkpoint"):
        plan(address)


def test_a_directory_whose_name_looks_like_an_address_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "hf.co" / "owner" / "name")
    convert("hf.co/owner/name", "out")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_of_the_folder_gives_the_folder(name: str, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source", side_files={"tokenizer.json": b"{}"})
    error = refusal(source / name)
    assert error.reason is Reason.MISSING_FILE
    assert str(error) == f"{source / name}: is a file. Give the folder that holds it: {source}"


SIGNS: dict[str, tuple[str, str]] = {
    "adapter_config.json": ("PEFT adapter (LoRA)", "merge_and_unload"),
    "model_index.json": ("pipeline of diffusers", "text_encoder"),
    "zero_to_fp32.py": ("DeepSpeed ZeRO", "zero_to_fp32.py"),
    "global_step500": ("DeepSpeed ZeRO", "zero_to_fp32.py"),
    "pytorch_model_fsdp.bin": ("saved under FSDP", "Rename it to pytorch_model.bin"),
    "pytorch_model_fsdp_0": ("training with FSDP", "accelerate merge-weights"),
    "__0_0.distcp": ("training with FSDP", "accelerate merge-weights"),
    "model-00001-of-00002.safetensors": ("their index is missing", INDEX),
    "pytorch_model-00001-of-00002.bin": ("their index is missing", "pytorch_model.bin.index.json"),
}


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("name", SIGNS)
def test_a_folder_without_weights_is_named_by_what_it_holds(name: str, with_config: bool, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    if with_config:
        (source / "config.json").write_text(json.dumps(llama_config()))
    (source / "adapter_model.safetensors").write_bytes(b"")
    (source / name).write_bytes(b"{}")
    error = refusal(source)
    problem, next_step = SIGNS[name]
    assert Path(error.path) == source / name
    assert problem in error.problem
    assert next_step in str(error.next_step)


def test_a_checkpoint_beside_an_adapter_or_the_state_of_a_training_is_converted(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source")
    for name in SIGNS:
        (source / name).write_bytes(b"{}")
    convert(source, tmp_path / "out")


def test_a_renamed_file_of_fsdp_is_converted_as_the_message_says(tmp_path: Path) -> None:
    source = write_bin(tmp_path / "source", torch_llama())
    (source / "pytorch_model.bin").rename(source / "pytorch_model_fsdp.bin")
    assert "Rename it" in str(refusal(source).next_step)
    (source / "pytorch_model_fsdp.bin").rename(source / "pytorch_model.bin")
    convert(source, tmp_path / "converted")


def test_a_repository_with_only_an_adapter_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with serving(monkeypatch, tmp_path / "home") as hub:
        hub.add_folder(NAME, source)
        with pytest.raises(SourceError, match="PEFT adapter"):
            plan_from_hub(NAME)


# Quantized in other ways


def mlx_tensors(*, bits: int) -> dict[str, NDArray[np.generic]]:
    """Return what MLX writes for one Linear layer: codes in words of 32 bits, scales and biases of groups."""
    name = "model.layers.0.self_attn.q_proj"
    groups = np.ones((64, 1), np.float16)
    codes = np.zeros((64, 64 * bits // 32), np.uint32)
    return {f"{name}.weight": codes, f"{name}.scales": groups, f"{name}.biases": groups}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    "fields", [["quantization"], ["quantization", "quantization_config"], ["quantization_config"], []]
)
def test_a_checkpoint_of_mlx_is_named(fields: list[str], bits: int, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    record = {"group_size": 64, "bits": bits, "mode": "affine"}
    (source / "config.json").write_text(json.dumps({**llama_config(), **dict.fromkeys(fields, record)}))
    safetensors.numpy.save_file(mlx_tensors(bits=bits), source / "model.safetensors")
    error = refusal(source)
    assert error.reason is Reason.ALREADY_QUANTIZED
    assert "MLX" in str(error)
    assert "16-bit checkpoint" in str(error.next_step)
    assert (f"({bits} bits, groups of 64)" in str(error)) is bool(fields)


@pytest.mark.parametrize("shape", [(), (1,), (64, 1)])
def test_fp8_with_one_scale_for_a_weight_or_a_row_is_named(shape: tuple[int, ...], tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = {**llama_tensors(), name: raw_tensor("F8_E4M3", (64, 64)), f"{name}_scale": raw_tensor("F32", shape)}
    config = {**llama_config(), "quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}}
    error = refusal(write_checkpoint(tmp_path / "source", tensors, config=config))
    assert error.tensor == f"{name}_scale"
    assert "AutoFP8" in str(error)
    assert f"{name}_scale_inv" in str(error)


def split_part(number: int, count: int) -> bytes:
    def key(name: str, value: int) -> bytes:
        return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<IH", 2, value)

    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 3)
    return head + key("split.no", number) + key("split.count", count) + key("split.tensors.count", 9) + bytes(64)


@pytest.mark.parametrize(("number", "count"), [(0, 2), (1, 2), (8, 9)])
def test_a_part_of_a_split_gguf_file_is_named(number: int, count: int, tmp_path: Path) -> None:
    path = tmp_path / f"model-{number + 1:05}-of-{count:05}.gguf"
    path.write_bytes(split_part(number, count))
    error = refusal(path)
    assert f"is part {number + 1} of {count} of a split GGUF file" in str(error)
    assert "llama-gguf-split --merge" in str(error.next_step)


def test_a_folder_with_all_parts_of_a_split_gguf_file_is_named(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(3):
        (source / f"model-{number + 1:05}-of-00003.gguf").write_bytes(split_part(number, 3))
    error = refusal(source)
    assert "is part of a split GGUF file of 3 parts" in str(error)
    assert "llama-gguf-split --merge" in str(error.next_step)


def test_a_file_that_says_that_it_is_the_only_part_is_converted(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "source", metadata={"split.count": 1, "split.no": 0})
    convert(source, tmp_path / "out")
