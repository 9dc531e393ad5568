"""Directories without a checkpoint, with a quantized one or one of another kind, and their config.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import Mamba2Config

from qformat.artifact.reading.verify import verify_integrity
from qformat.converters.compare.compare import compare
from qformat.converters.convert import convert, plan
from qformat.converters.export import export
from qformat.errors import QformatError, Reason, SourceError
from tests.converters.refused_source import refusal
from tests.small_models import (
    INDEX,
    SIDE_FILES,
    contents,
    llama_config,
    llama_tensors,
    raw_tensor,
    tiny_tensors,
    write_checkpoint,
    write_tiny,
)

# Quantized already


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model.layers.0.mlp.down_proj.weight.absmax", "bitsandbytes"),
        ("model.layers.0.mlp.down_proj.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("model.layers.0.mlp.down_proj.SCB", "int8"),
        ("model.layers.0.mlp.down_proj.qweight", "GPTQ"),
        ("model.layers.0.mlp.down_proj.qzeros", "AWQ"),
        ("model.layers.0.mlp.down_proj.weight_packed", "compressed-tensors"),
        ("model.layers.0.mlp.down_proj.weight_scale_inv", "fp8"),
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", "MXFP4"),
    ],
)
def test_tensors_of_a_quantized_checkpoint_are_recognised_without_a_config(
    name: str, what: str, tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "source", {**llama_tensors(), name: raw_tensor("U8", (8,))})
    error = refusal(source)
    assert error.reason is Reason.ALREADY_QUANTIZED
    assert error.tensor == name
    assert what in str(error)
    assert "Convert the original 16-bit checkpoint" in str(error)


@pytest.mark.parametrize("quantization", [{"quant_method": "gptq"}, {"quant_method": "awq"}, {}, 5, [], "bitsandbytes"])
def test_a_config_of_a_quantized_checkpoint_is_rejected(quantization: object, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", config={"quantization_config": quantization})
    error = refusal(source)
    assert error.reason is Reason.ALREADY_QUANTIZED
    assert error.field == "quantization_config"


def test_an_artifact_is_not_converted_again(single: Path, tmp_path: Path) -> None:
    convert(single, tmp_path / "artifact")
    error = refusal(tmp_path / "artifact")
    assert error.reason is Reason.ALREADY_QUANTIZED


# config.json


def test_a_missing_config_is_reported(single: Path) -> None:
    (single / "config.json").unlink()
    error = refusal(single)
    assert error.reason is Reason.MISSING_FILE
    assert Path(error.path) == single / "config.json"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", Reason.JSON_SYNTAX),
        (b"null", Reason.CONFIG_FIELD),
        (b"[]", Reason.CONFIG_FIELD),
        (b'"text"', Reason.CONFIG_FIELD),
        (b"{", Reason.JSON_SYNTAX),
        (b"{} {}", Reason.JSON_SYNTAX),
        (b'{"a": 1e999}', Reason.JSON_LIMIT),
        (b'{"a": nan}', Reason.JSON_SYNTAX),
        (b'{"a": ' + b"1" * 4301 + b"}", Reason.JSON_LIMIT),
        (b'{"a": ' + b"[" * 33 + b"]" * 33 + b"}", Reason.JSON_LIMIT),
        (b'{"a": "\\ud800"}', Reason.JSON_SYNTAX),
        (b'{"\\udc00": 1}', Reason.JSON_SYNTAX),
        (b'{"a": "' + b"x" * 2**22 + b'"}', Reason.JSON_LIMIT),
        (
            b'{"architectures": ["A"], "a": "' + b"x" * (2**22 - 100) + b'"}',
            Reason.JSON_LIMIT,
        ),  # readable, but not with our addition
        (b'{"a": [' + b"1," * 2**20 + b"1]}", Reason.JSON_LIMIT),
    ],
)
def test_a_broken_config_is_rejected_with_a_reason(text: bytes, reason: Reason, single: Path) -> None:
    (single / "config.json").write_bytes(text)
    error = refusal(single)
    assert error.reason is reason, error
    assert "config.json" in error.path


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": 5},
        {"model_type": ["llama"]},
        {"model_type": {"a": {}}, "text_config": []},
        {"tie_word_embeddings": "yes"},
        {"text_config": {"tie_word_embeddings": 1, "model_type": None}},
        {"architectures": 17},
        {"quantization_config": None},
        {"torch_dtype": {"deep": [[[1]]]}},
        {"model_type": "llama\n\u202e🦙", "🦙": "\U0001f999"},
        {"vocab_size": 99999999999999999999, "small": -9999999999999999999, "x": 1e308, "y": -0.0, "z": 5e-324},
    ],
)
def test_a_config_with_unexpected_values_is_carried_over_unmodified(config: dict[str, object], tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], **config}
    source = write_checkpoint(tmp_path / "source", config=config)
    convert(source, tmp_path / "out")
    assert verify_integrity(tmp_path / "out").passed
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written.pop("quantization_config")["quant_method"] == "bitsandbytes"
    config.pop("quantization_config", None)
    assert written == config


PYTHON_CONFIGS: dict[str, tuple[str, bytes]] = {
    "Infinity": ('"time_step_limit": [0.0, Infinity]', b""),
    "minus Infinity and NaN": ('"floor": [-Infinity, NaN]', b""),
    "31 digits": ('"model_max_length": 1000000000000000019884624838656', b""),
    "a key twice": ('"initializer_range": 0.5, "initializer_range": 0.25', b""),
    "a byte order mark": ('"initializer_range": 0.25', b"\xef\xbb\xbf"),
}


@pytest.mark.parametrize("kind", PYTHON_CONFIGS)
def test_a_config_that_python_reads_keeps_its_values_and_gives_a_note(kind: str, tmp_path: Path) -> None:
    members, mark = PYTHON_CONFIGS[kind]
    source = write_checkpoint(tmp_path / "source", llama_tensors(), config=llama_config())
    plain = json.dumps(llama_config())
    text = plain.replace("{", "{" + members + ", ", 1).encode()
    (source / "config.json").write_bytes(mark + text)
    summary = convert(source, tmp_path / "out")
    (note,) = summary.plan.notes[:1]
    assert note.startswith("config.json ")
    written = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert written.pop("quantization_config")["quant_method"] == "bitsandbytes"
    assert repr(written) == repr(json.loads(text))
    assert verify_integrity(tmp_path / "out").passed
    assert compare(tmp_path / "out", source).passed
    export(tmp_path / "out", tmp_path / "exported", "bf16")
    exported = json.loads((tmp_path / "exported" / "config.json").read_bytes())
    (key,) = json.loads("{" + members + "}")
    assert repr(exported[key]) == repr(written[key])


@pytest.mark.parametrize("member", ["Infinity", "-Infinity"])
def test_transformers_reads_the_same_numbers_from_artifact_and_source(member: str, tmp_path: Path) -> None:
    config = Mamba2Config(hidden_size=32, num_heads=2, head_dim=32, num_hidden_layers=1, vocab_size=16)
    source = write_tiny(tmp_path / "source")
    text = json.dumps({**config.to_dict(), "time_step_limit": [0.0, "X"]}, default=str).replace('"X"', member)
    (source / "config.json").write_text(text)
    convert(source, tmp_path / "out")
    found, expected = (Mamba2Config.from_pretrained(path).time_step_limit for path in (tmp_path / "out", source))
    assert tuple(found) == tuple(expected) == (0.0, float(member))


def test_a_plain_config_gives_no_note(single: Path) -> None:
    assert plan(single).notes == ()


def test_an_index_that_python_reads_gives_a_note(sharded: Path) -> None:
    path = sharded / INDEX
    text = path.read_text()
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("{", '{"total": NaN, ', 1).encode())
    assert [note.split(" ")[:2] for note in plan(sharded).notes] == [[INDEX, "begins"], [INDEX, "contains"]]


# Other kinds of checkpoints


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("consolidated.00.pt", "PyTorch .pt"),
        ("flax_model.msgpack", "Flax"),
        ("tf_model.h5", "TensorFlow"),
    ],
)
def test_weights_of_another_format_are_reported_with_a_next_step(name: str, what: str, single: Path) -> None:
    (single / "model.safetensors").unlink()
    (single / name).write_bytes(b"")
    error = refusal(single)
    assert error.reason is Reason.UNSUPPORTED_SOURCE
    assert Path(error.path).name == name
    assert what in str(error)
    assert "save_pretrained" in str(error)


def test_the_error_for_a_directory_without_weights_lists_what_it_contains(single: Path) -> None:
    (single / "model.safetensors").rename(single / "adapter_model.safetensors")
    error = refusal(single)
    assert error.reason is Reason.MISSING_FILE
    assert "adapter_model.safetensors" in str(error)


def test_unknown_files_are_not_carried_over(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source", side_files=SIDE_FILES)
    for name in ("training_args.bin", "optimizer.pt", "adapter_model.safetensors", ".gitattributes", "README.md"):
        (source / name).write_bytes(b"x")
    (source / "checkpoint-500").mkdir()
    (source / "modeling_mine.py").write_text("# mine")
    convert(source, tmp_path / "out")
    expected = {
        "config.json",
        INDEX,
        "model-00001-of-00001.safetensors",
        "qformat.json",
        "modeling_mine.py",
        *SIDE_FILES,
    }
    assert set(contents(tmp_path / "out")) == expected


def test_every_source_error_is_a_qformat_error() -> None:
    assert issubclass(SourceError, QformatError)
    assert len(tiny_tensors()) == 5
