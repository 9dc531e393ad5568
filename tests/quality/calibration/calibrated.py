"""Tiny calibrated conversions, and helpers for tests of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

import qformat
from qformat.artifact.manifest import JsonObject
from qformat.artifact.reading.reader import PackedTensor
from qformat.converters.convert import ConversionOptions, convert
from qformat.quality.calibration.settings import CalibrationSettings

TOKENS = 2048


def calibrate(source: Path, out: Path, text: Path, *, tokens: int = TOKENS, **options: Any) -> Path:
    """Convert with calibration; options are those of `ConversionOptions`, and `workers`, `disk`, `on_layer`."""
    how = {name: options.pop(name) for name in ("workers", "disk", "on_layer", "force") if name in options}
    convert(source, out, ConversionOptions(calibration=CalibrationSettings(text, tokens), **options), **how)
    return out


def record_of(artifact: Path) -> JsonObject:
    with qformat.open(artifact) as opened:
        record = opened.manifest.recipe["calibration"]
    assert isinstance(record, dict)
    return record


def weights_of(artifact: Path) -> dict[str, torch.Tensor]:
    """Return the packed weights as a reader decodes them, float32."""
    found = {}
    with qformat.open(artifact) as opened:
        for name, tensor in opened.items():
            if isinstance(tensor, PackedTensor):
                raw = tensor.decode()
                bf16 = raw.dtype == np.uint16
                value = torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16) if bf16 else torch.from_numpy(raw)
                found[name] = value.float().view(tensor.shape)
    return found


def inputs_of(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the input of each Linear of a model, float32 [rows, k], keyed by the name of its weight."""
    found: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda module, given, name=name: found.__setitem__(f"{name}.weight", given[0].flatten(0, -2).float())
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return found
