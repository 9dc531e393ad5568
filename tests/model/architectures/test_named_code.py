"""A file cannot make transformers fetch code: only the caller may name an implementation that is not built in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import qformat
from qformat.errors import ArtifactError
from qformat.model.build import build_on_meta, read_config
from qformat.model.checkpoint import load_checkpoint
from qformat.model.rules import named_code
from qformat.model.rules.expected_tensors import compare_with_model
from qformat.model.rules.named_code import ATTENTION, EXPERTS, check_named_code
from qformat.model.transformers_quantizer import METHOD
from tests.artifact.damaged import edit_json
from tests.small_models import llama_config, write_llama

KERNEL = "owner/kernel"


@pytest.fixture(autouse=True)
def _no_fetching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if transformers chooses an implementation that it would fetch."""
    real = PreTrainedModel._check_and_adjust_attn_implementation

    def checked(self: Any, name: str | None, *arguments: Any, **options: Any) -> Any:
        assert name != KERNEL
        return real(self, name, *arguments, **options)

    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", checked)


def with_fields(folder: Path, **fields: object) -> Path:
    path = write_llama(folder) / "config.json"
    path.write_text(json.dumps({**llama_config(), **fields}))
    return folder


NAMED = [
    ("attn_implementation", {"attn_implementation": KERNEL}),
    ("attn_implementation", {"_attn_implementation": KERNEL}),
    ("attn_implementation", {"attn_implementation": {"": KERNEL}}),
    ("attn_implementation", {"attn_implementation": "flash_attention_2"}),
    ("attn_implementation", {"attn_implementation": "paged|flash_attention_2"}),
    ("attn_implementation", {"attn_implementation": 5}),
    ("experts_implementation", {"experts_implementation": "sonicmoe"}),
    ("experts_implementation", {"_experts_implementation": KERNEL}),
    ("vision_config.attn_implementation", {"vision_config": {"attn_implementation": KERNEL}}),
    ("parts.attn_implementation", {"parts": [{"_attn_implementation_internal": KERNEL}]}),
]


@pytest.mark.parametrize(("field", "fields"), NAMED, ids=json.dumps)
def test_code_that_a_config_names_is_refused_with_the_field(
    field: str, fields: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = {"general_availability_check": lambda: False}
    monkeypatch.setattr(named_code, "FLASH_ATTENTION_COMPATIBILITY_MATRIX", {2: missing})
    source = with_fields(tmp_path, **fields)
    with pytest.raises(ArtifactError, match=rf"config.json: field '{field}': names .*Remove the field"):
        load_checkpoint(source, device="cpu")


def test_the_parts_of_a_composite_model_are_checked(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llava")
    config.text_config._attn_implementation = KERNEL  # some classes leave what the file names there
    with pytest.raises(ArtifactError, match=r"field 'text_config.attn_implementation': names 'owner/kernel'"):
        check_named_code(config, LlamaForCausalLM, tmp_path, attention=None)


def test_from_pretrained_after_register_does_not_fetch_named_code(random_llama: Path, tmp_path: Path) -> None:
    artifact = shutil.copytree(random_llama, tmp_path / "nf4")
    edit_json(artifact / "config.json", lambda config: config.update(attn_implementation=KERNEL))
    replaced = AUTO_QUANTIZER_MAPPING[METHOD]
    qformat.register()
    try:
        with pytest.raises(ArtifactError, match="field 'attn_implementation': names 'owner/kernel'"):
            AutoModelForCausalLM.from_pretrained(artifact)
    finally:
        AUTO_QUANTIZER_MAPPING[METHOD] = replaced


def test_a_conversion_does_not_ask_for_named_code() -> None:
    config = json.dumps({**llama_config(), "attn_implementation": KERNEL}).encode()
    compared = compare_with_model(config, {}, [])
    assert compared.not_compared is not None
    assert KERNEL in compared.not_compared


def test_the_caller_overrides_what_the_file_names(tmp_path: Path) -> None:
    source = with_fields(tmp_path, attn_implementation=KERNEL)
    config = read_config(source, trust_remote_code=False)
    model = build_on_meta(source, config, dtype=torch.bfloat16, trust_remote_code=False, attention="eager")
    assert model.config._attn_implementation == "eager"


def test_the_caller_may_name_any_code(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", attn_implementation=KERNEL)
    check_named_code(config, LlamaForCausalLM, tmp_path, attention=KERNEL)


def test_installed_flash_attention_is_allowed_unless_the_model_would_replace_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = {"general_availability_check": lambda: True}
    monkeypatch.setattr(named_code, "FLASH_ATTENTION_COMPATIBILITY_MATRIX", {2: installed})
    config = AutoConfig.for_model("llama", attn_implementation="flash_attention_2")
    check_named_code(config, LlamaForCausalLM, tmp_path, attention=None)
    replacing: Any = SimpleNamespace(_compatible_flash_implementations=[KERNEL])
    with pytest.raises(ArtifactError, match="flash_attention_2"):
        check_named_code(config, replacing, tmp_path, attention=None)


def test_the_allowed_names_are_those_of_transformers() -> None:
    assert {"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()} >= ATTENTION
    assert {"eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()} >= EXPERTS
