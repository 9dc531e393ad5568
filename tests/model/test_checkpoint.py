"""`load_checkpoint` compared with transformers on the same files, and the search for a model by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from qformat.errors import ArtifactError, UsageError
from qformat.model.checkpoint import find_folder, load_any, load_checkpoint
from qformat.model.nf4_linear import NF4Linear
from tests.model.mapped_ranges import mapped_ranges
from tests.rounding import rounds_like
from tests.small_models import llama_config, llama_tensors, write_checkpoint

SIZES = {"hidden": 128, "intermediate": 192, "vocabulary": 50}
IDS = torch.arange(24)[None] % 50


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", llama_tensors(**SIZES), config=llama_config(**SIZES), n_shards=2)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(IDS).logits
    assert isinstance(found, torch.Tensor)
    return found


def test_a_checkpoint_gives_the_logits_that_transformers_gives(source: Path) -> None:
    peer = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    assert torch.equal(logits(load_checkpoint(source, device="cpu")), logits(peer))


def test_each_weight_is_its_part_of_a_mapped_file(source: Path) -> None:
    model = load_checkpoint(source, device="cpu")
    mapped = mapped_ranges(source)
    for name, weight in model.named_parameters():
        assert any(start <= weight.data_ptr() and weight.data_ptr() + weight.nbytes <= stop for start, stop in mapped)
        assert weight.untyped_storage().nbytes() == weight.nbytes, name


def test_another_dtype_can_be_chosen(source: Path) -> None:
    peer = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert torch.equal(logits(load_checkpoint(source, device="cpu", dtype=torch.float32)), logits(peer))


def test_every_kind_of_model_is_recognized(source: Path, random_llama: Path, tmp_path: Path) -> None:
    def packed(path: Path) -> bool:
        return any(isinstance(module, NF4Linear) for module in load_any(path, device="cpu").modules())

    assert not packed(source)
    assert packed(random_llama)
    without_manifest = tmp_path / "bitsandbytes"
    without_manifest.mkdir()
    for file in random_llama.iterdir():
        if file.name != "qformat.json":
            (without_manifest / file.name).write_bytes(file.read_bytes())
    assert packed(without_manifest)


def test_transformers_loads_a_mixture_whose_experts_it_merges(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    torch.manual_seed(0)
    peer = MixtralForCausalLM(config).to(torch.bfloat16).eval()
    peer.save_pretrained(tmp_path / "mixture")
    ours = load_checkpoint(tmp_path / "mixture", device="cpu")
    # transformers multiplies by experts in another way after it has loaded them.
    exact = MixtralForCausalLM.from_pretrained(tmp_path / "mixture", dtype=torch.float32).eval()
    assert rounds_like(logits(ours), logits(peer), logits(exact))


def test_a_checkpoint_without_a_needed_tensor_is_rejected(source: Path) -> None:
    tensors = llama_tensors(**SIZES)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    for path in source.glob("*.safetensors*"):
        path.unlink()
    write_checkpoint(source, tensors, config=llama_config(**SIZES))
    with pytest.raises(ArtifactError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_checkpoint(source, device="cpu")


def test_a_name_is_a_directory_or_a_snapshot_in_the_cache_of_the_hub(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    cache = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    assert find_folder(source) == source
    with pytest.raises(UsageError, match="hf download owner/small"):
        find_folder("owner/small")
    repository = cache / "models--owner--small"
    revision = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    snapshot = repository / "snapshots" / revision
    snapshot.parent.mkdir()
    source.rename(snapshot)
    assert find_folder("owner/small") == snapshot
    with pytest.raises(UsageError, match="missing: does not exist"):
        find_folder(tmp_path / "missing")
    with pytest.raises(UsageError, match="main: is not a directory"):
        find_folder(repository / "refs" / "main")
