"""Calibrated conversions of tiny models: their contents, their accuracy, and what is rejected."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import qformat
from qformat.artifact.manifest import KeptRecord
from qformat.artifact.reading.verify import verify_integrity
from qformat.converters.convert import ConversionOptions, plan
from qformat.errors import DataError, DivergenceError, SourceError, UsageError
from qformat.model.load import load_model
from qformat.quality.calibration.decoder import build_decoder
from qformat.quality.calibration.settings import CalibrationSettings
from qformat.quality.windows import read_windows
from tests.model.sides import SAME_PRODUCTS, load_exact, load_ours, load_peer
from tests.quality import models
from tests.quality.calibration.calibrated import TOKENS, calibrate, inputs_of, record_of, weights_of
from tests.rounding import rounds_like
from tests.small_models import contents, llama_config, llama_tensors, tensor_of, write_checkpoint
from tests.training import runs


@pytest.fixture(scope="module")
def calibrated(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate(source, tmp_path_factory.mktemp("calibrated") / "out", text)


def windows_of(source: Path, text: Path) -> torch.Tensor:
    windows = read_windows(text, AutoTokenizer.from_pretrained(source), length=128).sample(TOKENS // 128, seed=0)
    return torch.from_numpy(windows.ids).long()


def test_it_is_intact_and_has_the_same_layout_as_the_plain_artifact(calibrated: Path, artifact: Path) -> None:
    assert verify_integrity(calibrated, sha256=True).passed
    with qformat.open(calibrated) as ours, qformat.open(artifact) as plain:
        assert ours.located == plain.located
        assert ours.manifest.recipe["defaults"] == plain.manifest.recipe["defaults"]
        kept = [name for name, record in plain.manifest.tensors.items() if isinstance(record, KeptRecord)]
        assert kept
        assert all(ours.manifest.tensors[name] == plain.manifest.tensors[name] for name in kept)
    mine, theirs = contents(calibrated), contents(artifact)
    assert {name: len(data) for name, data in mine.items() if name != "qformat.json"} == {
        name: len(data) for name, data in theirs.items() if name != "qformat.json"
    }


def test_the_manifest_records_method_and_digest_of_the_text_but_not_the_text(
    calibrated: Path, text: Path, source: Path
) -> None:
    record = record_of(calibrated)
    assert record["method"] == "error_feedback"
    assert record["data_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert (record["windows"], record["window_length"], record["tokens"]) == (16, 128, 2048)
    assert record["damping"] == 0.01
    assert record["seed"] == 0
    assert record["plain"] == {}
    assert record["versions"]["torch"] == torch.__version__
    written = (calibrated / "qformat.json").read_text()
    assert str(text) not in written
    assert str(source) not in written


def test_outputs_of_every_kind_of_layer_come_nearer_than_by_plain_rounding(
    calibrated: Path, artifact: Path, source: Path, text: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    given = inputs_of(model, windows_of(source, text))
    exact = {name: p.detach() for name, p in model.named_parameters()}
    plain, ours = weights_of(artifact), weights_of(calibrated)
    for name in plain:
        errors = [(given[name] @ (w[name] - exact[name]).T).square().mean().item() for w in (plain, ours)]
        assert errors[1] < errors[0], name


def test_the_model_comes_nearer_on_the_text_of_its_calibration(
    calibrated: Path, artifact: Path, source: Path, text: Path
) -> None:
    ids = windows_of(source, text)

    def log_probabilities(path: Path | None) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        if path is not None:
            model.load_state_dict(weights_of(path), strict=False)
        with torch.no_grad():
            return torch.log_softmax(model(ids).logits.double(), -1)

    exact = log_probabilities(None)
    kl = [(exact.exp() * (exact - log_probabilities(path))).sum(-1).mean().item() for path in (artifact, calibrated)]
    assert kl[1] < kl[0]


def test_transformers_and_bitsandbytes_compute_the_logits_that_we_do(calibrated: Path) -> None:
    ids = torch.arange(64)[None] % runs.VOCABULARY
    with torch.no_grad():
        ours, theirs, exact = (load(calibrated)(ids).logits for load in (load_ours, load_peer, load_exact))
    assert torch.equal(ours, theirs) if SAME_PRODUCTS else rounds_like(ours, theirs, exact)


def test_the_same_command_gives_the_same_bytes(calibrated: Path, source: Path, text: Path, tmp_path: Path) -> None:
    assert contents(calibrate(source, tmp_path / "again", text)) == contents(calibrated)


@pytest.mark.parametrize("dtype", ["F16", "F32"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_other_formats_and_options_of_the_source_and_the_conversion(
    dtype: str, double_quant: bool, text: Path, tmp_path: Path
) -> None:
    sizes = {"hidden": 64, "intermediate": 96, "vocabulary": runs.VOCABULARY}
    source = write_checkpoint(tmp_path / "source", llama_tensors(**sizes, dtype=dtype), config=llama_config(**sizes))
    runs.small_tokenizer().save_pretrained(source)
    options: dict[str, Any] = {"double_quant": double_quant, "block_size": 32, "skip": ("model.layers.1.mlp.*",)}
    out = calibrate(source, tmp_path / "out", text, **options)
    assert verify_integrity(out).passed
    with qformat.open(out) as opened:
        assert "model.layers.1.mlp.up_proj.weight" not in weights_of(out)
        assert opened["model.layers.0.mlp.up_proj.weight"].layout.block_size == 32
    plain = models.write_artifact(source, tmp_path / "plain", **options)
    assert any(not torch.equal(a, b) for a, b in zip(weights_of(out).values(), weights_of(plain).values(), strict=True))
    load_model(out, device="cpu")(torch.zeros(1, 4, dtype=torch.long))


def test_weights_whose_blocks_run_across_rows_are_encoded_plainly_and_listed(text: Path, tmp_path: Path) -> None:
    sizes = {"hidden": 64, "intermediate": 96, "vocabulary": runs.VOCABULARY}
    source = write_checkpoint(tmp_path / "source", llama_tensors(**sizes), config=llama_config(**sizes))
    runs.small_tokenizer().save_pretrained(source)
    out = calibrate(source, tmp_path / "out", text)
    name = "model.layers.0.mlp.down_proj.weight"
    assert record_of(out)["plain"] == {
        f"model.layers.{layer}.mlp.down_proj.weight": "its blocks run across rows" for layer in (0, 1)
    }
    plain = weights_of(models.write_artifact(source, tmp_path / "plain"))
    ours = weights_of(out)
    assert torch.equal(ours[name], plain[name])
    assert not torch.equal(ours["model.layers.1.mlp.up_proj.weight"], plain["model.layers.1.mlp.up_proj.weight"])


def gpt_neox(folder: Path) -> Path:
    """Another architecture: fused q, k, v, parallel blocks, biases, other names, a final norm in the stack."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=runs.VOCABULARY
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    return folder


def opt(folder: Path) -> Path:
    """An architecture whose layers return tuples and whose positions come from an embedding."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=runs.VOCABULARY,
        word_embed_proj_dim=64, max_position_embeddings=256,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(folder)
    return folder


def gemma3(folder: Path) -> Path:
    """An architecture whose layers get different masks and rotary tables, and whose embeddings are scaled."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, vocab_size=runs.VOCABULARY, sliding_window=16, sliding_window_pattern=2,
        max_position_embeddings=256,
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(folder)
    return folder


def mixtral(folder: Path) -> Path:
    """A mixture of experts, which stay in 16 bit and are merged by transformers while loading."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=4, vocab_size=runs.VOCABULARY, max_position_embeddings=256,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


ARCHITECTURES = pytest.mark.parametrize("make", [gpt_neox, opt, gemma3, mixtral])


@ARCHITECTURES
def test_layers_run_one_by_one_give_the_hidden_states_of_transformers(make: Any, tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    packed = {task.source.name for task in plan(source).packed}
    decoder = build_decoder(source, list(tensors), packed)
    ids = torch.randint(0, runs.VOCABULARY, (5, 40), generator=torch.Generator().manual_seed(0))
    entered: list[torch.Tensor] = []
    with torch.no_grad():
        calls = decoder.record(ids.split(2), read=tensors.__getitem__, keep=entered.append)
        hidden = torch.cat(entered)
        expected, exact = (
            AutoModelForCausalLM.from_pretrained(source, dtype=dtype, experts_implementation=experts)(
                ids, output_hidden_states=True
            ).hidden_states
            for dtype, experts in ((torch.float32, None), (torch.float64, "eager"))
        )
        for index in range(len(decoder.layers)):
            assert rounds_like(hidden, expected[index], exact[index]), index
            layer = decoder.load_layer(index, tensors.__getitem__)
            hidden = torch.cat([calls[len(part)][index](layer, part) for part in hidden.split(2)])
            decoder.drop_layer(index)
            assert all(tensor.is_meta for tensor in layer.parameters())
    assert sum(map(len, decoder.targets)) == len(packed)
    assert not decoder.elsewhere


@ARCHITECTURES
def test_other_architectures_come_nearer_in_every_layer(make: Any, text: Path, tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    runs.small_tokenizer().save_pretrained(source)
    out = calibrate(source, tmp_path / "out", text)
    assert verify_integrity(out).passed
    plain, ours = weights_of(models.write_artifact(source, tmp_path / "plain")), weights_of(out)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    given = inputs_of(model, windows_of(source, text))
    exact = {name: p.detach() for name, p in model.named_parameters()}
    for name in plain:
        errors = [(given[name] @ (w[name] - exact[name]).T).square().mean().item() for w in (plain, ours)]
        assert errors[1] < errors[0], name


def test_a_weight_whose_input_is_always_zero_is_encoded_plainly(text: Path, tmp_path: Path) -> None:
    tensors = models.tensors()
    for layer in (0, 1):
        name = f"model.layers.{layer}.mlp.gate_proj.weight"
        tensors[name] = tensor_of(np.zeros(tensors[name].shape, np.float32), "BF16")
    config = {**llama_config(**models.SIZES), "max_position_embeddings": 128}
    source = write_checkpoint(tmp_path / "source", tensors, config=config)
    runs.small_tokenizer().save_pretrained(source)
    out, plain = calibrate(source, tmp_path / "out", text), models.write_artifact(source, tmp_path / "plain")
    with qformat.open(out) as ours, qformat.open(plain) as as_ever:
        name = "model.layers.1.mlp.down_proj.weight"
        assert ours.manifest.tensors[name] == as_ever.manifest.tensors[name]
        assert ours.manifest.tensors["model.layers.1.mlp.up_proj.weight"] != as_ever.manifest.tensors[
            "model.layers.1.mlp.up_proj.weight"]  # fmt: skip
    assert not weights_of(out)["model.layers.0.mlp.gate_proj.weight"].any()
    assert qformat.compare(out, source).passed


def test_progress_counts_all_layers(source: Path, text: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    calibrate(source, tmp_path / "out", text, on_layer=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 2), (1, 2), (2, 2)]


def test_the_plan_lists_what_is_not_calibrated_and_writes_nothing(source: Path, text: Path, tmp_path: Path) -> None:
    options = ConversionOptions(calibration=CalibrationSettings(text), block_size=128)
    planned = plan(source, options)
    record = planned.recipe["calibration"]
    assert isinstance(record, dict)
    assert set(record["plain"]) == {task.source.name for task in planned.packed if task.layout.shape[1] == 64}
    assert planned.nbytes > plan(source, ConversionOptions(block_size=128)).nbytes


def test_a_text_shorter_than_a_window_is_rejected(source: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the block holds one scale")
    with pytest.raises(DataError, match="fewer than one window of 128"):
        calibrate(source, tmp_path / "out", short)


def test_fewer_tokens_than_a_window_are_rejected(source: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="100 calibration tokens: expected at least 128"):
        calibrate(source, tmp_path / "out", text, tokens=100)
    with pytest.raises(UsageError, match="0 calibration tokens"):
        calibrate(source, tmp_path / "out", text, tokens=0)


def test_a_source_without_a_tokenizer_is_rejected(text: Path, tmp_path: Path) -> None:
    source = models.write_source(tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    with pytest.raises(SourceError, match="the model has no tokenizer, which calibration needs"):
        calibrate(source, tmp_path / "out", text)


def test_a_tokenizer_of_another_model_is_rejected(text: Path, tmp_path: Path) -> None:
    source = models.write_source(tmp_path / "source", vocabulary=200)
    with pytest.raises(SourceError, match="the vocabulary has only 200 tokens"):
        calibrate(source, tmp_path / "out", text)


def test_an_architecture_unknown_to_transformers_is_rejected(source: Path, text: Path, tmp_path: Path) -> None:
    other = shutil.copytree(source, tmp_path / "source")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "wonder", "architectures": ["Wonder"]}))
    with pytest.raises(SourceError, match="wonder"):
        calibrate(other, tmp_path / "out", text)


def test_an_encoder_decoder_model_is_rejected(text: Path, tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=64, d_ff=128, num_layers=1, num_heads=2, d_kv=32, vocab_size=runs.VOCABULARY)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "source")
    runs.small_tokenizer().save_pretrained(tmp_path / "source")
    with pytest.raises(SourceError, match="encoder-decoder"):
        calibrate(tmp_path / "source", tmp_path / "out", text)


def test_non_finite_activations_are_reported_with_the_layer(text: Path, tmp_path: Path) -> None:
    tensors = models.tensors()
    name = "model.layers.1.input_layernorm.weight"  # a kept tensor: the conversion itself does not look at it
    tensors[name] = tensor_of(np.full(64, np.inf, np.float32), "BF16")
    config = {**llama_config(**models.SIZES), "max_position_embeddings": 128}
    source = write_checkpoint(tmp_path / "source", tensors, config=config)
    runs.small_tokenizer().save_pretrained(source)
    with pytest.raises(DivergenceError, match=r"model\.layers\.1\.self_attn\.q_proj: its input .* is not finite"):
        calibrate(source, tmp_path / "out", text)
    assert not (tmp_path / "out").exists()


def test_a_weight_with_nan_or_inf_is_rejected_before_any_layer_runs(text: Path, tmp_path: Path) -> None:
    tensors = models.tensors()
    values = np.zeros((64, 64), np.float32)
    values[3, 4] = np.nan
    tensors["model.layers.1.self_attn.o_proj.weight"] = tensor_of(values, "BF16")
    config = {**llama_config(**models.SIZES), "max_position_embeddings": 128}
    source = write_checkpoint(tmp_path / "source", tensors, config=config)
    runs.small_tokenizer().save_pretrained(source)
    seen: list[int] = []
    with pytest.raises(SourceError, match=r"o_proj.*the weight at \[3, 4\] is nan"):
        calibrate(source, tmp_path / "out", text, on_layer=lambda done, total: seen.append(done))
    assert not seen
