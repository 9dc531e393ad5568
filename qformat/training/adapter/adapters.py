"""LoRA adapters on a loaded model: made by PEFT for training, read from a folder to run with."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from safetensors import SafetensorError
from torch import nn

from qformat.errors import AdapterError, UsageError
from qformat.model.nf4_linear import NF4Linear
from qformat.names import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from qformat.training.adapter.base_record import BaseRecord, read_base_record
from qformat.training.adapter.lora_linear import NF4LoraLinear
from qformat.training.settings import ALL_LINEAR, TrainingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_WRONG_CONFIG = (OSError, ValueError, TypeError, KeyError, AttributeError, json.JSONDecodeError)
"""What PEFT raises for an adapter_config.json with values that it does not expect."""

logger = logging.getLogger(__name__)


def add_adapter(model: PreTrainedModel, settings: TrainingSettings, *, base_name: str) -> PeftModel:
    """Put fresh adapters on a model; everything else is frozen. base_name: what the adapter says it belongs to.

    The random start depends on the seed alone. Raises UsageError for target modules that the model does not have.
    """
    targets = settings.target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        r=settings.rank,
        lora_alpha=settings.alpha or 2 * settings.rank,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=ALL_LINEAR if targets == (ALL_LINEAR,) else list(targets),
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        bias=settings.bias,  # type: ignore[arg-type]
        modules_to_save=list(settings.modules_to_save) or None,
    )
    _fuse(config)
    _check_modules_to_save(model, settings)
    torch.manual_seed(settings.seed)
    try:
        peft_model = get_peft_model(model, config)
    except ValueError as problem:
        first = str(problem).partition("\n")[0]
        raise UsageError(f"target_modules {', '.join(targets)}: {first}") from problem
    assert isinstance(peft_model, PeftModel)
    # PEFT has its own idea of the dtype, which depends on the model and on who calls it.
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(_DTYPES[settings.adapter_dtype])
    return peft_model


def load_adapter(model: PreTrainedModel, adapter: Path, base: BaseRecord, *, force: bool = False) -> PeftModel:
    """Put the adapter of a folder on a model, ready to run.

    force: also if it was trained on other weights, as long as its shapes fit.
    Raises AdapterError: damaged, trained on another artifact, or not made for this model; it names the difference.
    """
    config = _read_config(adapter)
    recorded = read_base_record(adapter)
    if recorded is None:
        logger.warning("%s: does not say which weights it was trained on", adapter)
    elif recorded.digest != base.digest and not force:
        raise AdapterError(
            f"{adapter}: was trained on {recorded.name} ({recorded.digest}), and this is {base.name} ({base.digest}). "
            "Use the artifact that it was trained on, or, if you know that it fits, --force-adapter"
        )
    weights = _read_weights(adapter)
    _fuse(config)
    try:
        peft_model = PeftModel(model, config)
    except _WRONG_CONFIG as problem:
        raise AdapterError(f"{adapter}: does not fit the model: {str(problem).partition(chr(10))[0]}") from problem
    _check_shapes(peft_model, weights, adapter)
    set_peft_model_state_dict(peft_model, weights)
    peft_model.eval()
    return peft_model


def _fuse(config: LoraConfig) -> None:
    config._register_custom_module({NF4Linear: NF4LoraLinear})


def _check_modules_to_save(model: nn.Module, settings: TrainingSettings) -> None:
    for wanted in settings.modules_to_save:
        found = [module for name, module in model.named_modules() if name == wanted or name.endswith(f".{wanted}")]
        if not found:
            raise UsageError(f"modules_to_save: the model has no layer {wanted!r}")
        if any(isinstance(inner, NF4Linear) for module in found for inner in module.modules()):
            raise UsageError(
                f"modules_to_save: {wanted!r} has 4-bit weights, which cannot be trained as a whole. "
                "Convert with --skip for them, or give it an adapter"
            )


def _read_config(adapter: Path) -> LoraConfig:
    path = adapter / ADAPTER_CONFIG_NAME
    if not path.is_file():
        raise AdapterError(f"{adapter}: holds no {ADAPTER_CONFIG_NAME}, so it is no PEFT adapter. Check the path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about fields of other versions and types
            config = PeftConfig.from_pretrained(str(adapter))
    except _WRONG_CONFIG as problem:
        raise AdapterError(f"{path}: cannot be read: {str(problem).partition(chr(10))[0]}") from problem
    if not isinstance(config, LoraConfig):
        raise AdapterError(f"{path}: peft_type is {config.peft_type}, expected LORA. Load it with PEFT itself")
    return config


def _read_weights(adapter: Path) -> dict[str, torch.Tensor]:
    path = adapter / ADAPTER_WEIGHTS_NAME
    if not path.is_file():
        raise AdapterError(f"{path}: is missing. An adapter in another format must be saved anew by PEFT")
    try:
        weights: dict[str, torch.Tensor] = load_peft_weights(str(adapter), device="cpu")
    except (SafetensorError, OSError, ValueError) as problem:
        raise AdapterError(f"{path}: is damaged: {str(problem).partition(chr(10))[0]}. Fetch or train it again") from (
            problem
        )
    return weights


def _check_shapes(peft_model: PeftModel, weights: dict[str, torch.Tensor], adapter: Path) -> None:
    from peft import get_peft_model_state_dict

    expected: dict[str, Any] = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    for name in sorted(expected.keys() | weights.keys()):
        have = list(weights[name].shape) if name in weights else "nothing"
        want = list(expected[name].shape) if name in expected else "nothing"
        if have != want and not (name not in expected and "embed" in name):
            raise AdapterError(
                f"{adapter / ADAPTER_WEIGHTS_NAME}: tensor {name!r}: the adapter has {have}, this model takes {want}. "
                "It was made for another model"
            )
