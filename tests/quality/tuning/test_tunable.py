"""What is trained: relative changes of scales, norms of any model; and how both are stored."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from qformat.artifact.components import Component
from qformat.artifact.reading.reader import PackedTensor, open_artifact
from qformat.codec.nested import encode_absmax
from qformat.errors import UsageError
from qformat.model.checkpoint import load_checkpoint
from qformat.model.load import load_model
from qformat.quality.tuning.settings import TuningSettings
from qformat.quality.tuning.steps import learning_rate, rows_of_step
from qformat.quality.tuning.tunable import LARGEST_CHANGE, TunableModel, make_tunable, share_kept_tensors
from tests.quality import models
from tests.rounding import rounding
from tests.small_models import tensor_of, write_checkpoint

WEIGHT = "model.layers.0.mlp.gate_proj.weight"


def tunable_of(artifact: Path) -> TunableModel:
    with open_artifact(artifact) as opened:
        return make_tunable(load_model(artifact, device="cpu"), opened)


def test_before_training_it_is_the_artifact_bit_for_bit(artifact: Path) -> None:
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = load_model(artifact, device="cpu")(ids).logits
        assert torch.equal(tunable_of(artifact).model(ids).logits, expected)


def test_scales_and_norms_are_trained_and_nothing_else(artifact: Path) -> None:
    tunable = tunable_of(artifact)
    tunable.model(torch.arange(40)[None]).logits.float().square().mean().backward()
    trained = {id(parameter) for parameter in tunable.parameters().values()}
    assert len(tunable.linears) == 14
    assert sorted(tunable.norms) == [
        "model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight",
        "model.layers.1.input_layernorm.weight", "model.layers.1.post_attention_layernorm.weight", "model.norm.weight",
    ]  # fmt: skip
    for parameter in tunable.model.parameters():
        assert (parameter.grad is not None) == (id(parameter) in trained)
    assert all(parameter.dtype == torch.float32 for parameter in tunable.parameters().values())
    assert all(bool((parameter.grad != 0).any()) for parameter in tunable.parameters().values())


def test_rounding_gives_the_codecs_bytes_and_the_model_that_a_reader_gets(artifact: Path, tmp_path: Path) -> None:
    tunable = tunable_of(artifact)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in tunable.linears.values():
            layer.change.uniform_(-0.2, 0.2, generator=generator)
        tunable.norms["model.norm.weight"].add_(0.0123)
    scales = tunable.linears[WEIGHT].scales().detach().numpy().copy()
    with open_artifact(artifact) as opened:
        found = tunable.rounded(opened)
    expected = encode_absmax(scales)
    np.testing.assert_array_equal(found[WEIGHT][Component.ABSMAX], expected.codes)
    np.testing.assert_array_equal(found[WEIGHT][Component.NESTED_ABSMAX], expected.nested_absmax)
    assert Component.PACKED not in found[WEIGHT]
    assert not tunable.linears[WEIGHT].change.any()
    norm = tunable.norms["model.norm.weight"]
    assert torch.equal(norm.bfloat16().float(), norm)
    assert bytes(found["model.norm.weight"][Component.PACKED]) == norm.bfloat16().view(torch.uint8).numpy().tobytes()


def test_scales_of_zero_stay_and_negative_ones_stay_negative(artifact: Path) -> None:
    tunable = tunable_of(artifact)
    layer = tunable.linears[WEIGHT]
    with torch.no_grad():
        layer.start[0], layer.start[1] = 0, -0.25
        layer.change.fill_(3.0)
        tunable.limit()
    assert float(layer.change.detach().max()) == LARGEST_CHANGE
    assert layer.scales()[0] == 0
    assert layer.scales()[1] == -0.25 * (1 + LARGEST_CHANGE)
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer(x).float().sum().backward()
    assert layer.change.grad[0] == 0
    assert bool(torch.isfinite(layer.change.grad).all())
    with open_artifact(artifact) as opened:
        rounded = tunable.rounded(opened)
    assert np.isfinite(rounded[WEIGHT][Component.NESTED_ABSMAX]).all()


def test_norms_with_biases_of_another_architecture_are_found(tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=40
    )
    GPTNeoXForCausalLM(config).bfloat16().save_pretrained(tmp_path / "source")
    tunable = tunable_of(models.write_artifact(tmp_path / "source", tmp_path / "nf4"))
    assert len(tunable.norms) == 6  # weight and bias of three LayerNorms
    assert all("norm" in name for name in tunable.norms)
    tunable.model(torch.arange(8)[None]).logits.float().square().mean().backward()
    assert all(parameter.grad is not None for parameter in tunable.parameters().values())


def test_kept_tensors_are_shared_with_the_16_bit_model(artifact: Path, source: Path) -> None:
    tunable, teacher = tunable_of(artifact), load_checkpoint(source, device="cpu")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        before = tunable.model(ids).logits
        share_kept_tensors(tunable, teacher)
        assert torch.equal(tunable.model(ids).logits, before)
    mine, theirs = tunable.model.get_input_embeddings().weight, teacher.get_input_embeddings().weight
    assert mine.data_ptr() == theirs.data_ptr()
    assert not {p.data_ptr() for p in tunable.parameters().values()} & {p.data_ptr() for p in teacher.parameters()}


def test_an_artifact_without_packed_layers_is_rejected(tmp_path: Path) -> None:
    source = models.write_source(tmp_path / "source")
    (tmp_path / "recipe.toml").write_text('[[rule]]\npattern = "*"\naction = "keep"\n')
    artifact = models.write_artifact(source, tmp_path / "kept", recipe=tmp_path / "recipe.toml")
    with pytest.raises(UsageError, match="contains no packed layers"):
        tunable_of(artifact)


def test_norms_that_were_kept_in_float32_end_in_float32(tmp_path: Path) -> None:
    source = models.write_source(tmp_path / "source")
    tensors = models.tensors()
    tensors["model.norm.weight"] = tensor_of(np.full(64, 1.25, np.float32), "F32")
    import json

    write_checkpoint(source, tensors, config=json.loads((source / "config.json").read_text()), side_files={})
    artifact = models.write_artifact(source, tmp_path / "nf4")
    tunable = tunable_of(artifact)
    with open_artifact(artifact) as opened:
        found = tunable.rounded(opened)
        assert isinstance(opened[WEIGHT], PackedTensor)
    assert found["model.norm.weight"][Component.PACKED].nbytes == 256


def test_each_pass_over_the_windows_takes_every_one_once() -> None:
    settings = TuningSettings(batch_size=3, seed=4)
    rows = np.concatenate([rows_of_step(step, 10, settings) for step in range(10)])
    assert [sorted(rows[start : start + 10]) for start in (0, 10, 20)] == [list(range(10))] * 3
    assert (rows[:10] != rows[10:20]).any()
    other = TuningSettings(batch_size=3, seed=5)
    assert (rows[:9] != np.concatenate([rows_of_step(step, 10, other) for step in range(3)])).any()


def test_the_learning_rate_warms_up_and_ends_at_zero() -> None:
    settings = TuningSettings(steps=100, learning_rate=1.0)
    rates = [learning_rate(step, settings) for step in range(101)]
    assert settings.warmup_steps == 5
    assert np.argmax(rates) == 4
    # Linear warm-up times half a cosine, in float64: a handful of roundings of numbers of at most pi.
    expected = [min(1, (step + 1) / 5) * math.cos(math.pi * step / 200) ** 2 for step in range(101)]
    np.testing.assert_allclose(rates, expected, rtol=0, atol=8 * math.pi * rounding(torch.float64))
