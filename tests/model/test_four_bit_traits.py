"""What PEFT, trl, accelerate and transformers read to recognise a 4-bit model, with and without bitsandbytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import prepare_model_for_kbit_training

import qformat
from qformat.training.adapter.attach import add_adapter
from qformat.training.settings import TrainingSettings
from tests.clients.saving.loaders import load_by
from tests.repository import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.mark.parametrize("loader", ["load_model", "register"])
def test_peft_turns_gradient_checkpointing_on(random_llama: Path, loader: str) -> None:
    model = load_by(loader, random_llama)
    assert model.is_loaded_in_4bit
    assert model.config._is_quantized
    assert prepare_model_for_kbit_training(model).is_gradient_checkpointing


def test_the_dtype_can_still_be_changed(random_llama: Path) -> None:
    model = qformat.load_model(random_llama, device="cpu")
    assert model.half().dtype == torch.float16
    assert model.to(torch.float32).dtype == torch.float32


def test_trl_leaves_the_dtype_of_our_adapters_alone(random_llama: Path) -> None:
    wrapped = add_adapter(
        qformat.load_model(random_llama, device="cpu"), TrainingSettings(), base_name=str(random_llama)
    )
    assert not wrapped.is_loaded_in_4bit


WITHOUT_BITSANDBYTES = """
import sys
class Hidden:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "bitsandbytes":
            raise ModuleNotFoundError(name)
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest)
sys.meta_path.insert(0, Hidden())
import peft, torch
from tests.clients.saving.loaders import load_by
targets = {"target_modules": ["q_proj", "down_proj"]}
configs = [
    peft.LoraConfig(**targets), peft.IA3Config(**targets, feedforward_modules=["down_proj"]),
    peft.VeraConfig(**targets), peft.RandLoraConfig(**targets), peft.AdaLoraConfig(**targets, total_step=10),
]
for loader in ("load_model", "register"):
    for config in configs:
        model = peft.get_peft_model(load_by(loader, sys.argv[1]), config)
        with torch.no_grad():
            assert model(torch.arange(9)[None]).logits.isfinite().all()
        print(model.num_parameters() > 0, type(config).__name__)
"""


@pytest.mark.slow
def test_peft_attaches_every_method_without_bitsandbytes(random_llama: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_BITSANDBYTES, str(random_llama)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.count("True") == 10, done.stderr[-3000:]
