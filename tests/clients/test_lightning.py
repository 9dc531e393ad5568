"""Lightning: an adapter trains, its checkpoints hold every trained tensor, and a training resumes from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.clients.peft_methods.sides import packed

lightning = pytest.importorskip("lightning", reason="the extra 'clients' is not installed: make test-slow")

pytestmark = [
    pytest.mark.slow,
    # Lightning's advice on loggers and workers, and names of torch that it has not replaced yet.
    pytest.mark.filterwarnings("ignore"),
]

IDS = [torch.arange(first, first + 12) for first in range(3, 11)]


class Adapter(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """A packed model with a LoRA adapter, as a user of Lightning writes it."""

    def __init__(self, artifact: Path) -> None:
        super().__init__()
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        self.model = get_peft_model(packed(artifact), LoraConfig(r=4, target_modules="all-linear"))
        self.losses: list[float] = []

    def training_step(self, batch: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([weight for weight in self.parameters() if weight.requires_grad], lr=1e-2)


def fit(module: Adapter, out: Path, *, epochs: int, checkpoint: Path | None = None) -> Any:
    trainer = lightning.Trainer(
        max_epochs=epochs, default_root_dir=out, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(IDS, batch_size=2), ckpt_path=checkpoint, weights_only=False)
    return trainer


def test_a_training_resumes_from_a_checkpoint_to_the_same_losses(tiny_llama: Path, tmp_path: Path) -> None:
    whole = Adapter(tiny_llama)
    fit(whole, tmp_path / "whole", epochs=2)
    assert whole.losses[-1] < whole.losses[0]
    trainer = fit(Adapter(tiny_llama), tmp_path / "half", epochs=1)
    resumed = Adapter(tiny_llama)
    fit(resumed, tmp_path / "resumed", epochs=2, checkpoint=Path(trainer.checkpoint_callback.best_model_path))
    assert resumed.losses == whole.losses[len(whole.losses) // 2 :]


def test_a_checkpoint_holds_every_tensor(tiny_llama: Path, tmp_path: Path) -> None:
    module = Adapter(tiny_llama)
    trainer = fit(module, tmp_path, epochs=1)
    saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=False)["state_dict"]
    state = module.state_dict()
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in state.items())
