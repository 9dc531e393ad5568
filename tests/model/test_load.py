"""`load_model` on the real SmolLM2, compared with transformers + bitsandbytes on the same artifact, and its errors."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qformat
from qformat.artifact.components import Component
from qformat.artifact.reading.reader import PackedTensor
from qformat.converters.convert import convert
from qformat.errors import ArtifactError, DeviceMemoryError, Reason, UsageError
from qformat.kernels.backends import VARIABLE
from qformat.model import load
from qformat.model.devices import host_layers
from qformat.model.load import load_model, load_tokenizer, shards_on_device
from qformat.model.nf4_linear import NF4Linear
from qformat.model.shard_tensors import map_shards, tensors_of
from tests.artifact.damaged import reseal
from tests.model.mapped_ranges import mapped_ranges
from tests.model.sides import SAME_PRODUCTS, load_exact
from tests.rounding import rounding, rounds_like, sum_error
from tests.small_models import llama_config, llama_tensors, write_checkpoint

PEFT_ASKS = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

MULTIPLIES_AS_THE_PEER = pytest.mark.skipif(
    not SAME_PRODUCTS, reason="no CPU instructions for bf16 products: qformat multiplies in fp32, bitsandbytes in bf16"
)

PROMPT = "What are the three primary colours? Answer in one sentence."


@pytest.fixture(scope="module")
def artifact(smollm2_nf4: Path) -> Path:
    return smollm2_nf4


@pytest.fixture(scope="module")
def ours(artifact: Path) -> Any:
    return load_model(artifact, device="cpu")


@pytest.fixture(scope="module")
def peer(artifact: Path) -> Any:
    """transformers + bitsandbytes. Use it only with gradients enabled; without, it rewrites the scales on some CPUs."""
    from transformers import AutoModelForCausalLM

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return AutoModelForCausalLM.from_pretrained(artifact)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    source = write_checkpoint(
        tmp_path / "source",
        llama_tensors(hidden=128, intermediate=192, vocabulary=50),
        config=llama_config(hidden=128, intermediate=192, vocabulary=50),
        n_shards=2,
    )
    convert(source, tmp_path / "artifact")
    return tmp_path / "artifact"


def question(artifact: Path) -> Any:
    return load_tokenizer(artifact).apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


def test_logits_equal_those_of_bitsandbytes(artifact: Path, ours: Any, peer: Any) -> None:
    """They are bit-identical if both multiply in bf16; otherwise they must be as close to fp32."""
    inputs = question(artifact)
    assert inputs["input_ids"].shape[1] > 16  # too many rows for the small-M product, so the same GEMM runs
    found, expected = ours(**inputs).logits, peer(**inputs).logits
    if SAME_PRODUCTS:
        assert torch.equal(found, expected)
    else:
        assert rounds_like(found, expected, load_exact(artifact)(**inputs).logits)


@MULTIPLIES_AS_THE_PEER
def test_greedy_generation_by_decoding_gives_the_same_tokens_as_bitsandbytes(
    artifact: Path, ours: Any, peer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Use the product that decodes, as bitsandbytes does: the small-M product adds in another order."""
    inputs = question(artifact)
    monkeypatch.setenv(VARIABLE, "torch")
    found = ours.generate(**inputs, max_new_tokens=24, min_new_tokens=24, do_sample=False)
    ids = step = inputs["input_ids"]
    cache = None
    for _ in range(24):  # `generate` would disable gradients, and bitsandbytes would rewrite its scales
        output = peer(step, past_key_values=cache, use_cache=True)
        cache, logits = output.past_key_values, output.logits[:, -1].detach()
        logits[:, peer.generation_config.eos_token_id] = -torch.inf
        step = logits.argmax(-1, keepdim=True)
        ids = torch.cat([ids, step], dim=1)
    assert torch.equal(found, ids)


def test_every_tensor_lies_in_the_mapped_file_and_has_a_storage_of_its_own(artifact: Path, ours: Any) -> None:
    mapped = mapped_ranges(artifact)
    for name, tensor in ours.state_dict().items():
        assert any(start <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= stop for start, stop in mapped)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


def test_exactly_the_packed_layers_are_nf4_linear(artifact: Path, ours: Any) -> None:
    with qformat.open(artifact) as opened:
        packed = {name.removesuffix(".weight") for name, tensor in opened.items() if isinstance(tensor, PackedTensor)}
    assert {name for name, module in ours.named_modules() if isinstance(module, NF4Linear)} == packed


def test_the_state_dict_has_the_components_of_the_artifact_unmodified(artifact: Path, ours: Any) -> None:
    from safetensors import safe_open

    state = ours.state_dict()
    found = {}
    for shard in sorted(artifact.glob("*.safetensors")):
        with safe_open(shard, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in list(opened.keys())}
    assert found.keys() <= state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in found.items())
    assert state.keys() - found.keys() == {"lm_head.weight"}  # tied


def test_tied_weights_stay_tied(ours: Any) -> None:
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


def test_a_model_can_be_copied_and_pickled(tiny: Path) -> None:
    model = load_model(tiny, device="cpu")
    ids = torch.arange(20)[None]
    expected = model(ids).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids).logits, expected)
    assert pickle.loads(pickle.dumps(model.config)).hidden_size == 128


def test_a_state_dict_loads_back(tiny: Path) -> None:
    model, other = load_model(tiny, device="cpu"), load_model(tiny, device="cpu")
    layer = other.model.layers[0].mlp.up_proj
    before = layer.weight.clone()
    layer.weight.data.zero_()
    layer.absmax.zero_()
    assert other.load_state_dict(model.state_dict()).missing_keys == []
    assert torch.equal(layer.weight, before)
    with qformat.open(tiny) as opened:  # the file is mapped privately
        assert opened["model.layers.0.mlp.up_proj.weight"].packed.any()
    state = dict(model.state_dict())
    name = "model.layers.0.mlp.up_proj.weight.quant_map"
    with pytest.raises(RuntimeError, match="quant_map: values of the codebook differ"):
        other.load_state_dict({**state, name: state[name].flip(0)})
    del state["model.layers.0.mlp.up_proj.weight.absmax"]
    with pytest.raises(RuntimeError, match=r"up_proj\.weight\.absmax"):
        other.load_state_dict(state)


@pytest.mark.parametrize("change", [lambda model: model.half(), lambda model: model.to(torch.float32)])
def test_a_change_of_dtype_does_not_modify_the_components(tiny: Path, change: Callable[[Any], Any]) -> None:
    model = load_model(tiny, device="cpu")
    expected = model.model.layers[0].mlp.up_proj.dequantize(torch.float32)
    layer = change(model).model.layers[0].mlp.up_proj
    assert layer.nested_absmax.dtype == torch.float32
    assert torch.equal(layer.dequantize(torch.float32), expected)
    assert model(torch.arange(9)[None]).logits.dtype == model.dtype


@PEFT_ASKS
def test_gradient_checkpointing_gives_the_same_gradients(tiny: Path) -> None:
    found = []
    for checkpointing in (False, True):
        model = load_model(tiny, device="cpu").train()
        if checkpointing:
            model.activation_checkpointing_enable()
        embedding = model.model.embed_tokens.weight
        model(torch.arange(20)[None]).logits.sum().backward()
        assert model.model.layers[0].mlp.up_proj.weight.grad is None
        found.append(embedding.grad)
    assert torch.equal(found[0], found[1])


def test_a_model_compiles_without_a_graph_break(tiny: Path) -> None:
    model = load_model(tiny, device="cpu")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_a_bias_is_added(tmp_path: Path) -> None:
    config = {**llama_config(hidden=64, intermediate=64, vocabulary=50), "attention_bias": True}
    tensors = llama_tensors(hidden=64, intermediate=64, vocabulary=50)
    from tests.small_models import weight

    for layer in range(2):
        for name in "qkvo":
            tensors[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = weight((64,), seed=layer)
    convert(write_checkpoint(tmp_path / "source", tensors, config=config), tmp_path / "artifact")
    model = load_model(tmp_path / "artifact", device="cpu")
    projection = model.model.layers[0].self_attn.q_proj
    assert isinstance(projection, NF4Linear)
    for rows in (1, 30):
        x = torch.randn(rows, 64, dtype=torch.bfloat16)
        weight, bias = projection.dequantize(torch.float32).double(), projection.bias.double()
        exact = nn.functional.linear(x.double(), weight, bias)
        size = nn.functional.linear(x.double().abs(), weight.abs(), bias.abs())
        # The weight may be rounded to bf16; the sum of 64 products is rounded, and its sum with the bias again.
        once = rounding(torch.bfloat16)
        with torch.no_grad():
            assert ((projection(x).double() - exact).abs() <= (3.1 * once + sum_error(65)) * size).all()
    del tensors["model.layers.1.self_attn.q_proj.bias"]
    convert(write_checkpoint(tmp_path / "less", tensors, config=config), tmp_path / "missing")
    with pytest.raises(ArtifactError, match=r"self_attn\.q_proj\.bias.*no shard has it") as caught:
        load_model(tmp_path / "missing", device="cpu")
    assert caught.value.reason is Reason.MISSING_COMPONENT


def edit_config(artifact: Path, **fields: object) -> None:
    """Change config.json and its record in the manifest."""
    path = artifact / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    reseal(artifact)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "unheard_of"}, "transformers .* cannot read it.*trust_remote_code"),
        ({"architectures": ["UnheardOfForCausalLM"]}, "has no 'UnheardOfForCausalLM'.*trust_remote_code"),
        ({"num_hidden_layers": 3}, "no shard has it"),
        ({"num_hidden_layers": 1}, "has no such"),
        ({"intermediate_size": 256}, r"shape \[128, 192\], but the model expects \[128, 256\]"),
        ({"hidden_act": "unheard_of"}, "cannot build a model from it"),
        ({"hidden_size": "many"}, "cannot read it: .*'hidden_size' expected int, got str"),
        ({"num_attention_heads": 0}, "cannot read it"),
        ({"architectures": "LlamaForCausalLM"}, "field 'architectures': is not a list of strings"),
        ({"architectures": ["set_seed"]}, "has no 'set_seed'"),
        ({"torch_dtype": "float99"}, "cannot read it"),
        ({"torch_dtype": "int8"}, "field 'dtype': is torch.int8, expected a floating-point dtype"),
    ],
)
def test_a_config_that_does_not_fit_is_rejected(tiny: Path, fields: dict[str, object], message: str) -> None:
    edit_config(tiny, **fields)
    with pytest.raises(ArtifactError, match=message):
        load_model(tiny, device="cpu")


def test_a_device_that_does_not_exist_is_rejected(tiny: Path) -> None:
    with pytest.raises(UsageError, match="device 'cuda:99' cannot be used on this machine"):
        load_model(tiny, device="cuda:99")
    with pytest.raises(UsageError, match="device 'abacus' cannot be used on this machine"):
        load_model(tiny, device="abacus")


def test_shards_on_a_device_equal_the_files(tiny: Path) -> None:
    """Load as for a GPU, with the CPU as the target of the copies."""
    with qformat.open(tiny) as opened:
        copied = tensors_of(opened, shards_on_device(opened.structure, torch.device("cpu"), verify="full"))
        mapped = tensors_of(opened, map_shards(opened))
    assert copied.keys() == mapped.keys()
    for name, tensor in mapped.items():
        other = copied[name]
        if isinstance(tensor, torch.Tensor):
            assert isinstance(other, torch.Tensor)
            pairs = [(tensor, other)]
        else:
            assert not isinstance(other, torch.Tensor)
            pairs = [(part, other.components[key]) for key, part in tensor.components.items()]
        for there, here in pairs:
            assert torch.equal(there, here)
            assert there.data_ptr() != here.data_ptr()
            assert there.untyped_storage().nbytes() == here.untyped_storage().nbytes() == here.nbytes


def test_a_device_without_room_is_rejected_before_anything_is_read(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "free_nbytes", lambda device: 1000)
    monkeypatch.setattr(load, "stream_shards", lambda *_, **__: pytest.fail("something was read"))
    with (
        qformat.open(tiny) as opened,
        pytest.raises(DeviceMemoryError, match=r"memory on cpu: the weights need [\d.]+ [kM]B, 1 kB is free"),
    ):
        shards_on_device(opened.structure, torch.device("cpu"), verify="structure")


def test_only_full_verification_finds_a_flipped_bit(tiny: Path) -> None:
    with qformat.open(tiny) as opened:
        located = opened.located["model.layers.0.mlp.up_proj.weight" + Component.PACKED.value]
        shard, position = tiny / located.shard, located.entry.start
    data = bytearray(shard.read_bytes())
    data[position] ^= 1
    shard.write_bytes(data)
    load_model(tiny, device="cpu")
    with pytest.raises(ArtifactError, match="up_proj") as caught:
        load_model(tiny, device="cpu", verify="full")
    assert caught.value.reason is Reason.COMPONENT_DIGEST


def test_without_verification_the_manifest_is_not_read(tiny: Path) -> None:
    expected = load_model(tiny, device="cpu").state_dict()
    (tiny / "qformat.json").write_text("damaged")
    found = load_model(tiny, device="cpu", verify="none").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(ArtifactError):
        load_model(tiny, device="cpu")


def test_the_needed_memory_is_reported_if_copies_do_not_fit(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_layers, "free_nbytes", lambda device: 1000)
    with pytest.raises(DeviceMemoryError, match=r"memory on cpu: the model needs 153 kB, 1 kB is available"):
        load_model(tiny, device="cpu", dtype=torch.float32)


def test_loading_and_generating_import_neither_bitsandbytes_nor_kernels(tiny: Path) -> None:
    import subprocess
    import sys

    script = (
        "import sys, torch\n"
        "from qformat.model.load import load_model\n"
        "import qformat.model.text.generation\n"
        f"model = load_model({str(tiny)!r}, device='cpu')\n"
        "assert model(torch.arange(9)[None]).logits.isfinite().all()\n"
        "assert not {'bitsandbytes', 'kernels', 'peft'} & {*sys.modules}\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
