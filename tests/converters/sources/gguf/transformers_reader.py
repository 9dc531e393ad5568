"""What transformers' own reader makes of a GGUF file, for comparison."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qformat.converters.sources.open_source import open_source
from qformat.converters.sources.source import Source
from tests.converters.sources.decoded_kinds import read

_ABOUT_THE_FILE = {"_name_or_path", "_model_name_or_path", "architectures", "dtype", "transformers_version"}


def loaded_by_transformers(folder: Path, dtype: torch.dtype) -> Any:
    """Return the decoded model that transformers loads from the file."""
    from transformers import AutoModelForCausalLM, GgufConfig

    return AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", dtype=dtype, quantization_config=GgufConfig(dequantize=True)
    )


def stored_names(model: Any) -> dict[str, torch.Tensor]:
    """Return a model's tensors as a checkpoint stores them: individual experts, and no tied head."""
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


def assert_equals_transformers(
    folder: Path, dtype: torch.dtype = torch.bfloat16, *, besides: Collection[str] = ()
) -> None:
    """Compare every value and setting of a source with what transformers reads from the same file.

    Args:
        folder: Folder with `model.gguf`.
        dtype: Format of the model.
        besides: Settings that transformers does not read from the file.
    """
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
        if key not in {*_ABOUT_THE_FILE, *besides}:
            same = theirs[key] == value
            assert same or (isinstance(value, float) and np.float32(theirs[key]) == np.float32(value)), key
    source.close()


def built(source: Source, dtype: torch.dtype) -> Any:
    """Return the model of transformers that the config and the tensors of a source give."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = dict(source.config)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    state = {
        name: torch.from_numpy(read(source, name, chunk_nbytes=1 << 20)).view(dtype).reshape(tensor.shape)
        for name, tensor in source.tensors.items()
    }
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval()
