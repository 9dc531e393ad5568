"""PEFT's LoRA on a model of `load_model`, compared with PEFT on transformers + bitsandbytes and the same artifact.

If both multiply in bf16, base layers and their gradients are bit-identical. PEFT differs: its wrapper of bitsandbytes
layers rounds the adapter's output to bf16 before adding. The plain wrapper, which NF4Linear gets, adds in fp32 and
rounds once. `with_peers_rounding` removes this difference, and then 20 steps are bit-identical.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qformat.kernels.backends import VARIABLE
from qformat.model.nf4_linear import NF4Linear
from tests.model.peers.real_text import windows
from tests.model.sides import (
    SAME_PRODUCTS,
    adapters,
    all_equal,
    backward,
    gradients,
    load_exact,
    load_ours,
    load_peer,
    train,
    with_lora,
    with_peers_rounding,
)
from tests.rounding import rounds_like

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

N_STEPS = 20


@dataclass(frozen=True)
class Case:
    """An artifact to train, with a learning rate for comparisons and a fast one to show that the model learns."""

    artifact: Path
    batches: list[Tensor]
    rate: float
    fast_rate: float


@pytest.fixture(params=["random", pytest.param("SmolLM2", marks=pytest.mark.slow)])
def case(request: pytest.FixtureRequest) -> Case:
    if request.param == "random":
        artifact = request.getfixturevalue("random_llama")
        return Case(artifact, [torch.arange(40)[None]] * N_STEPS, rate=2e-3, fast_rate=2e-2)
    artifact = request.getfixturevalue("smollm2_nf4")
    batches = windows(artifact, count=2 * N_STEPS, size=128)
    pairs = [torch.cat(batches[i : i + 2]) for i in range(0, len(batches), 2)]
    return Case(artifact, pairs, rate=5e-4, fast_rate=5e-4)


def test_all_linear_selects_every_nf4_linear_but_not_the_head(random_llama: Path) -> None:
    model = load_ours(random_llama)
    layers = {name for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    wrapped = with_lora(model).base_model.model
    assert {name for name, module in wrapped.named_modules() if hasattr(module, "lora_A")} == layers
    assert len(layers) == 14
    assert {weight.dtype for weight in adapters(wrapped).values()} == {torch.float32}


def test_a_model_learns(case: Case) -> None:
    model = with_lora(load_ours(case.artifact))
    losses = train(model, case.batches, rate=case.fast_rate)
    assert sum(losses[-5:]) < sum(losses[:5]) - 5 * 0.05


@pytest.mark.skipif(not SAME_PRODUCTS, reason="no CPU instructions for products of bf16: qformat multiplies in fp32")
def test_training_is_bit_identical_to_bitsandbytes(case: Case) -> None:
    ours, peer = with_peers_rounding(with_lora(load_ours(case.artifact))), with_lora(load_peer(case.artifact))
    assert train(ours, case.batches, rate=case.rate) == train(peer, case.batches, rate=case.rate)
    assert all_equal(adapters(ours), adapters(peer))


def test_training_is_the_same_on_the_torch_backend(random_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for backend in ("", "torch"):
        monkeypatch.setenv(VARIABLE, backend)
        model = with_lora(load_ours(random_llama))
        losses = train(model, [torch.arange(40)[None]] * N_STEPS, rate=2e-3)
        found.append((losses, adapters(model)))
    assert found[0][0] == found[1][0]
    assert all_equal(found[0][1], found[1][1])


@pytest.mark.parametrize("seed", [0, 1])
def test_the_loss_curve_is_as_close_to_fp32_as_that_of_bitsandbytes(case: Case, seed: int) -> None:
    found, expected, exact = (
        train(with_lora(load(case.artifact), seed=seed), case.batches, rate=case.rate)
        for load in (load_ours, load_peer, load_exact)
    )
    if SAME_PRODUCTS:
        assert found[0] == expected[0]  # lora_B is zero
    assert rounds_like(torch.tensor(found), torch.tensor(expected), torch.tensor(exact))


def test_a_saved_adapter_loads_on_both_sides(case: Case, tmp_path: Path) -> None:
    from peft import PeftModel

    trained = with_lora(load_ours(case.artifact))
    train(trained, case.batches, rate=case.rate)
    trained.save_pretrained(tmp_path / "adapter")
    loaded = [
        PeftModel.from_pretrained(load(case.artifact), tmp_path / "adapter").eval()
        for load in (load_ours, load_peer, load_exact)
    ]
    with torch.no_grad():
        expected, ours, peers, exact = (model(case.batches[0]).logits for model in (trained.eval(), *loaded))
        same_rounding = with_peers_rounding(loaded[0])(case.batches[0]).logits
    assert torch.equal(ours, expected)
    assert rounds_like(ours, peers, exact)
    if SAME_PRODUCTS:
        assert torch.equal(same_rounding, peers)


def evaluate(model: Any, ids: Tensor) -> None:
    """Run the model as a trainer's evaluation does, with many rows and with one, then return to training mode."""
    model.eval()
    with torch.no_grad():
        model(ids)
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    with torch.inference_mode():
        model(ids)
    model.train()


def test_an_evaluation_between_steps_does_not_change_the_gradients(random_llama: Path) -> None:
    ids = torch.arange(40)[None]
    found = []
    for evaluated in (False, True):
        model = with_lora(load_ours(random_llama))
        train(model, [ids], rate=2e-3)
        if evaluated:
            evaluate(model, ids)
        backward(model, ids)
        found.append(gradients(model))
    assert len(found[0]) == 28
    assert all_equal(*found)


@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit:UserWarning")
def test_an_evaluation_breaks_the_gradients_of_bitsandbytes(random_llama: Path) -> None:
    """Its inference kernel has no gradient, and a weight that was rewritten for it uses that kernel in training too."""
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("bitsandbytes rewrites weights for inference only on CPUs with AVX512-BF16")
    ids = torch.arange(40)[None]
    model = with_lora(load_peer(random_llama, repacks=True))
    train(model, [ids], rate=2e-3)
    norms = []
    for _ in range(2):
        backward(model, ids)
        norms.append(gradients(model)["base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"].norm())
        model.zero_grad()
        model.eval()
        with torch.no_grad():
            model(ids)
        model.train()
    assert norms[1] < norms[0] / 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_adapter_gradients(random_llama: Path, reentrant: bool) -> None:
    ids = torch.arange(40)[None]
    found = []
    for checkpointing in (False, True):
        model = load_ours(random_llama)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        wrapped = with_lora(model)
        train(wrapped, [ids], rate=2e-3)
        backward(wrapped, ids)
        found.append(gradients(wrapped))
    assert all_equal(*found)


def test_a_copied_model_trains_identically(random_llama: Path) -> None:
    ids = torch.arange(40)[None]
    original = load_ours(random_llama)
    losses = [train(with_lora(model), [ids] * 3, rate=2e-3) for model in (copy.deepcopy(original), original)]
    assert losses[0] == losses[1]
