"""`model.dequantize()` compared with an export of the same artifact that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import qformat
from qformat.errors import DeviceMemoryError, UsageError
from qformat.model import dequantize
from qformat.model.nf4_linear import NF4Linear
from tests.clients.saving.loaders import load_by
from tests.model.sides import with_lora

IDS = torch.arange(20)[None]


@pytest.mark.parametrize("loader", ["load_model", "register"])
@pytest.mark.parametrize(("dtype", "to"), [(None, "bf16"), (torch.float32, "fp32")])
def test_the_decoded_model_equals_the_export(
    random_llama: Path, tmp_path: Path, loader: str, dtype: torch.dtype | None, to: Any
) -> None:
    qformat.export(random_llama, tmp_path / "exported", to)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype="auto")
    model = load_by(loader, random_llama)
    decoded = model.dequantize() if dtype is None else model.dequantize(dtype)
    assert decoded is model
    assert type(decoded) is type(expected)
    assert not any(isinstance(module, NF4Linear) for module in decoded.modules())
    assert decoded.dtype == expected.dtype
    with torch.no_grad():
        assert torch.equal(decoded(IDS).logits, expected(IDS).logits)
    decoded.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, expected(IDS).logits)
    decoded.half().to(torch.float32)  # transformers refuses both for a quantized model


def test_what_cannot_be_decoded_is_refused_and_unchanged(random_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = qformat.load_model(random_llama, device="cpu")
    with pytest.raises(UsageError, match="expected a floating-point dtype"):
        model.dequantize(torch.int8)
    with monkeypatch.context() as patch:
        patch.setattr(dequantize, "free_nbytes", lambda _: 1000)
        with pytest.raises(DeviceMemoryError, match="qformat export"):
            model.dequantize()
    wrapped = with_lora(model)
    with pytest.raises(UsageError, match="first, then attach the adapters"):
        wrapped.dequantize()
    assert sum(isinstance(module, NF4Linear) for module in model.modules()) == 14
    wrapped.unload().dequantize()
    assert not any(isinstance(module, NF4Linear) for module in model.modules())


def test_layers_in_host_memory_are_refused(random_llama: Path) -> None:
    model = qformat.load_model(random_llama, device="cpu")
    model.layer_stream = object()
    with pytest.raises(UsageError, match="qformat export"):
        model.dequantize()
