"""transformers loads an export, with the weights that bitsandbytes decodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from qformat.converters.convert import convert
from qformat.converters.export import TARGETS, export


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
