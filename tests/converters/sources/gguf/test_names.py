"""Names, config and every value are the same as in transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qformat.codec.foreign.ggml_types import BLOCK_TYPES
from qformat.converters.convert import plan
from qformat.converters.sources.gguf.architectures import ARCHITECTURES
from qformat.converters.sources.open_source import open_source
from qformat.errors import SourceError
from tests.converters.sources.decoded_kinds import read
from tests.converters.sources.gguf.gguf_models import QUANTIZED, Sizes, write_gguf
from tests.converters.sources.gguf.transformers_reader import assert_equals_transformers

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")


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


def test_biases_of_a_llama_are_reordered_like_its_rows(tmp_path: Path) -> None:
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

    for name, architecture in ARCHITECTURES.items():
        number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
        names = gguf.get_tensor_name_map(number, 3)
        in_layers = {**architecture.parts, **architecture.attention, **architecture.convolution}
        ours = {f"blk.2.{stored}": f"model.layers.2.{part.name}" for stored, part in in_layers.items()}
        ours |= {stored: part.name for stored, part in architecture.outside.items()}
        for stored, found in ours.items():
            known = names.get_name(found.replace("experts.{}", "experts"), try_suffixes=(".weight", ".bias"))
            assert known == stored, name


def test_the_table_knows_what_transformers_reads() -> None:
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    read = {name.replace("_moe", "moe") for name in GGUF_CONFIG_MAPPING}
    assert {name for name, found in ARCHITECTURES.items() if found.read_by_transformers} == read & ARCHITECTURES.keys()


def test_the_documentation_lists_what_is_read() -> None:
    text = (Path(__file__).parents[4] / "docs" / "sources.md").read_text()
    (architectures,) = re.findall(r"^\| architectures \|(.*)\|$", text, re.MULTILINE)
    assert re.findall(r"`(\w+)`", architectures) == list(ARCHITECTURES)
    (types,) = re.findall(r"^\| block types \|(.*)\|$", text, re.MULTILINE)
    assert set(types.replace(" ", "").split(",")) == {found.name for found in BLOCK_TYPES.values()}


def llama3_factors(factor: float) -> np.ndarray:
    """Compute the factors with the loop of llama.cpp's converter."""
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


def test_other_frequency_factors_are_rejected(tmp_path: Path) -> None:
    folder = write_gguf(tmp_path / "gguf", extra={"rope_freqs.weight": np.linspace(1, 9, 32, dtype=np.float32)})
    with pytest.raises(SourceError, match="factors other than those of Llama 3"):
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
