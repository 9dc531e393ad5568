"""Attaches LoRA adapters to a loaded model: new ones for training, or saved ones for inference.

    base model                            model with adapters

    q_proj   NF4Linear  (frozen)   ──►    q_proj   NF4LoraLinear ─┬─ base_layer   the same NF4Linear, frozen
                                                                  ├─ lora_A       r × in_features, random, trained
                                                                  └─ lora_B       out_features × r, zeros, trained
    norm     kept in 16 bit        ──►    norm     unchanged, frozen

B starts at zero, so a new adapter does not change the output of the model. PEFT replaces the layers and defines the
files: adapter_config.json and adapter_model.safetensors. A third file, qformat_base.json, identifies the base model.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from torch import nn

from qformat.artifact.sources.stand_ins import stand_in_of
from qformat.errors import AdapterError, Option, QformatError, UsageError, first_line
from qformat.model.nf4_linear import NF4Linear
from qformat.names import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, BASE_RECORD_NAME
from qformat.training.adapter.base_record import BaseRecord, read_base_record
from qformat.training.adapter.lora_linear import NF4LoraLinear
from qformat.training.adapter.saved_config import fix_layers, read_saved_config, wrong_shape
from qformat.training.adapter.saved_embeddings import resize_embeddings
from qformat.training.settings import ALL_LINEAR, TrainingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

logger = logging.getLogger(__name__)


def add_adapter(model: PreTrainedModel, settings: TrainingSettings, *, base_name: str) -> PeftModel:
    """Attach new adapters to a model and freeze everything else. The initial weights depend only on the seed.

    Args:
        model: Model to attach to, changed in place.
        settings: Rank, target modules, seed and other settings of the adapters.
        base_name: Name or path of the base model, recorded in the adapter's configuration.

    Returns:
        The model with adapters, ready to train.

    Raises:
        UsageError: The model does not have a target module or a module to save.
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
        raise UsageError(Option("target_modules"), f" {', '.join(targets)}: {first_line(problem)}") from problem
    assert isinstance(peft_model, PeftModel)
    # The dtype that PEFT chooses depends on the model and on the caller, so set it here.
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(_DTYPES[settings.adapter_dtype])
    # trl casts the adapters of models with this trait to bf16. The wrapper's attribute hides that of the base model.
    peft_model.is_loaded_in_4bit = False  # type: ignore[assignment]
    return peft_model


def load_adapter(model: PreTrainedModel, adapter: Path, base: BaseRecord, *, force_adapter: bool = False) -> PeftModel:
    """Load a saved adapter onto a model for inference.

    Args:
        model: Model to attach to, changed in place.
        adapter: Directory of the adapter.
        base: Identity of the model.
        force_adapter: Whether to accept an adapter that was trained on other weights, as long as its shapes fit.

    Returns:
        The model with the adapter, in evaluation mode.

    Raises:
        AdapterError: The adapter was not fetched, is damaged, was trained on other weights, or does not fit the model.
    """
    for name in (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, BASE_RECORD_NAME):
        if (found := stand_in_of(adapter / name)) is not None:
            raise AdapterError(f"{adapter / name}: {found.problem}. {found.next_step}")
    config = read_saved_config(adapter)
    recorded = read_base_record(adapter)
    if recorded is None:
        logger.warning("%s: does not record which weights it was trained on", adapter)
    elif recorded.digest != base.digest and not force_adapter:
        raise AdapterError(
            f"{adapter}: was trained on other weights: {recorded.name} ({recorded.digest}), but this model is "
            f"{base.name} ({base.digest}). Use the artifact that the adapter was trained on, or, if you know that it "
            "fits, ",
            Option("force_adapter", True),
        )
    weights = _read_weights(adapter)
    with _peft_errors(adapter), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about merging an adapter of a tied layer
        resize_embeddings(model, weights, adapter)
        fix_layers(config, model, weights, adapter)
        _fuse(config)
        peft_model = PeftModel(model, config)
        check_shapes(peft_model, weights, adapter)
        set_peft_model_state_dict(peft_model, weights)
    peft_model.eval()
    return peft_model


@contextmanager
def _peft_errors(adapter: Path) -> Iterator[None]:
    """Translate the errors of attaching a saved adapter: PEFT checks most fields only where it uses them."""
    try:
        yield
    except QformatError:
        raise
    except Exception as problem:
        raise AdapterError(
            f"{adapter}: does not fit the model: {first_line(problem)}. Use the model that the adapter was trained on"
        ) from problem


def _fuse(config: LoraConfig) -> None:
    config._register_custom_module({NF4Linear: NF4LoraLinear})


def _check_modules_to_save(model: nn.Module, settings: TrainingSettings) -> None:
    for wanted in settings.modules_to_save:
        found = [module for name, module in model.named_modules() if name == wanted or name.endswith(f".{wanted}")]
        if not found:
            raise UsageError(Option("modules_to_save"), f": the model has no layer {wanted!r}")
        if any(isinstance(inner, NF4Linear) for module in found for inner in module.modules()):
            raise UsageError(
                Option("modules_to_save"),
                f": {wanted!r} has 4-bit weights, which cannot be trained directly. Keep them in 16 bit with ",
                Option("skip"),
                " during conversion, or train an adapter for them",
            )


def _read_weights(adapter: Path) -> dict[str, torch.Tensor]:
    path = adapter / ADAPTER_WEIGHTS_NAME
    if not path.is_file():
        raise AdapterError(f"{path}: does not exist. If the adapter has another format, save it again with PEFT")
    try:
        weights: dict[str, torch.Tensor] = load_peft_weights(str(adapter), device="cpu")
    except Exception as problem:  # PEFT and safetensors raise errors of many types
        raise AdapterError(
            f"{path}: is damaged: {first_line(problem)}. Download or train the adapter again"
        ) from problem
    return weights


def check_shapes(peft_model: PeftModel, weights: dict[str, torch.Tensor], adapter: Path) -> None:
    """Check that the tensors of an adapter are those of a model. PEFT ignores tensors with other names.

    Args:
        peft_model: Model with the adapter.
        weights: Tensors of the adapter by name.
        adapter: Directory of the adapter, for messages.

    Raises:
        AdapterError: A tensor is missing, has another shape, or has no place in the model.
    """
    from peft import get_peft_model_state_dict

    needed: dict[str, Any] = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    expected: dict[str, Any] = get_peft_model_state_dict(peft_model, save_embedding_layers=True)
    for name in sorted(needed.keys() | weights.keys()):
        have = list(weights[name].shape) if name in weights else None
        want = list(expected[name].shape) if name in expected else None
        if have != want:
            raise wrong_shape(name, have, want, adapter)
