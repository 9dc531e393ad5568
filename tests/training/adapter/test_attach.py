"""Loading adapters: on the weights they were trained on, on others, and damaged ones."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from qformat.errors import AdapterError
from qformat.model.load import load_model, open_shards
from qformat.names import BASE_RECORD_NAME
from qformat.training.adapter import pattern_matcher
from qformat.training.adapter.attach import load_adapter
from qformat.training.adapter.base_record import BaseRecord, read_base_record
from qformat.training.adapter.lora_linear import NF4LoraLinear
from qformat.training.result import TrainingResult
from tests.artifact.not_fetched import STAND_INS
from tests.model.sides import load_exact
from tests.rounding import rounds_like
from tests.training import runs

TOKENS = torch.arange(5, 25)[None]


def base_of(artifact: Path) -> BaseRecord:
    shards = open_shards(artifact)
    try:
        return BaseRecord.of(shards.layout)
    finally:
        shards.close()


@pytest.fixture
def adapter(undisturbed: TrainingResult, tmp_path: Path) -> Path:
    """A copy of the adapter that a test may damage."""
    folder = tmp_path / "adapter"
    shutil.copytree(undisturbed.output, folder)
    return folder


def edit(adapter: Path, **fields: object) -> None:
    """Change adapter_config.json."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def load(artifact: Path, adapter: Path, *, force: bool = False) -> PeftModel:
    return load_adapter(load_model(artifact, device="cpu"), adapter, base_of(artifact), force_adapter=force)


def test_logits_equal_those_of_plain_peft(artifact: Path, adapter: Path) -> None:
    plain = PeftModel.from_pretrained(load_model(artifact, device="cpu"), str(adapter)).eval()
    with torch.no_grad():
        ours, theirs = load(artifact, adapter)(TOKENS).logits, plain(TOKENS).logits
        bare = load_model(artifact, device="cpu")(TOKENS).logits
        exact = PeftModel.from_pretrained(load_exact(artifact), str(adapter)).eval()(TOKENS).logits
    assert rounds_like(ours, theirs, exact)
    assert not torch.equal(ours, bare)


def test_an_adapter_of_other_weights_is_rejected_with_both_digests(adapter: Path, tmp_path: Path) -> None:
    other = runs.make_artifact(tmp_path, seed=1)
    recorded = read_base_record(adapter)
    assert recorded is not None
    with pytest.raises(AdapterError, match=f"{recorded.digest}.*{base_of(other).digest}.*force_adapter=True"):
        load(other, adapter)
    load(other, adapter, force=True)


def test_an_adapter_of_another_model_is_rejected_with_the_tensor(adapter: Path, tmp_path: Path) -> None:
    other = runs.make_artifact(tmp_path, layers=1)
    with pytest.raises(AdapterError, match=r"layers\.1\..*does not fit this model \(found \[.*expected nothing\)"):
        load(other, adapter, force=True)


def test_an_adapter_whose_rank_differs_from_its_config_is_rejected(artifact: Path, adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    with pytest.raises(AdapterError, match=r"\(found \[4, \d+\], expected \[8, "):
        load(artifact, adapter)


def test_a_missing_tensor_is_reported(artifact: Path, adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    weights.pop(gone := sorted(weights)[3])
    save_file(weights, path)
    with pytest.raises(AdapterError, match=rf"{gone}.*\(found nothing, expected"):
        load(artifact, adapter)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _list(path: Path) -> None:
    path.write_text("[1]")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", BASE_RECORD_NAME])
@pytest.mark.parametrize("kind", ["LFS", "HTML", "an answer of the Hub"])
def test_what_takes_the_place_of_a_file_is_named(artifact: Path, adapter: Path, name: str, kind: str) -> None:
    content, problem, next_step = STAND_INS[kind]
    (adapter / name).write_bytes(content)
    with pytest.raises(AdapterError) as refused:
        load(artifact, adapter)
    for part in (str(adapter / name), problem, next_step):
        assert part in str(refused.value)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", BASE_RECORD_NAME])
@pytest.mark.parametrize("damage", [_cut, _empty, _list, Path.unlink])
def test_damage_is_reported(
    artifact: Path, adapter: Path, name: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    damage(adapter / name)
    if name == BASE_RECORD_NAME and damage is Path.unlink:
        with caplog.at_level(logging.WARNING):
            load(artifact, adapter)
        assert "does not record which weights it was trained on" in caplog.text
    elif name == BASE_RECORD_NAME and damage is _cut:
        load(artifact, adapter)  # only the final newline was cut
    else:
        with pytest.raises(AdapterError, match=name.split(".", maxsplit=1)[0]):
            load(artifact, adapter)


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": "IA3"},
        {"r": -1},
        {"r": "many"},
        {"target_modules": 7},
        {"target_modules": ["nowhere"]},
        {"target_modules": None},
        {"peft_type": "../x"},
        {"r": 2**30},
        {"rank_pattern": {"q_proj": 2**30}},
        {"lora_alpha": "x"},
        {"layers_to_transform": [99], "target_modules": ["q_proj"]},
        {"trainable_token_indices": [2**40]},
        {"trainable_token_indices": {"embed_tokens": [1, 1]}},
        {"target_parameters": ["experts.down_proj"]},
        {"layer_replication": [[0, 10**9]]},
        {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
        {"init_lora_weights": "pissa_niter_1000000"},
        {"modules_to_save": ["(.*)*x"]},
        {"layers_pattern": "(.*)*x", "layers_to_transform": [0]},
        {"exclude_modules": "["},
        {"auto_mapping": {"base_model_class": "os", "parent_library": "os"}},
    ],
    ids=str,
)
def test_an_invalid_config_is_rejected_or_harmless(artifact: Path, adapter: Path, change: dict[str, object]) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    if "auto_mapping" in change:
        load(artifact, adapter)
    else:
        with pytest.raises(AdapterError):
            load(artifact, adapter)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "alpha_pattern"])
def test_a_pattern_that_takes_too_long_is_rejected(
    artifact: Path, adapter: Path, field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient = tmp_path / "matcher.py"
    impatient.write_text(Path(pattern_matcher.__file__).read_text().replace("CPU_S = 1.0", "CPU_S = 0.1"))
    monkeypatch.setattr(pattern_matcher, "__file__", str(impatient))
    slow = "(?:[a-z]|[^A])*!"
    edit(adapter, **{field: {slow: 4} if field.endswith("_pattern") else slow})
    with pytest.raises(AdapterError, match=rf"adapter_config.json: field '{field}': matching .* takes too long"):
        load(artifact, adapter)


def test_patterns_give_the_same_model_as_names(artifact: Path, adapter: Path) -> None:
    named = load(artifact, adapter)
    edit(
        adapter,
        target_modules=r"(?:.*?(?:self_attn|mlp).*?(?:[qkvo]_proj|gate_proj|up_proj|down_proj).*?)",
        exclude_modules=".*norm",
        r=1,
        rank_pattern={"nowhere": 3, r"^model\.layers\.\d+\.(self_attn|mlp)\..*_proj": 4},
        lora_alpha=1,
        alpha_pattern={"model.layers.0.mlp.up_proj": 2, "(k|q)_proj": 5, "q_proj": 7},
    )
    found = load(artifact, adapter)
    layers, expected = dict(found.named_modules()), dict(named.named_modules())
    adapted = {name for name, layer in layers.items() if isinstance(layer, NF4LoraLinear)}
    assert adapted == {name for name, layer in expected.items() if isinstance(layer, NF4LoraLinear)}
    scales = {name.removeprefix("base_model.model.model.layers."): layers[name].scaling["default"] for name in adapted}
    assert {name: scale for name, scale in scales.items() if scale != 1 / 4} == {
        "0.mlp.up_proj": 2 / 4,
        **{f"{number}.self_attn.{name}_proj": 5 / 4 for number in range(2) for name in "kq"},
    }


def test_a_bitsandbytes_folder_is_identified_by_its_bytes(artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(artifact, folder)
    (folder / "qformat.json").unlink()
    before = base_of(folder)
    assert before == base_of(folder)
    assert before.digest.startswith("files-xxh3:")
    shard = next(folder.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert base_of(folder) != before
