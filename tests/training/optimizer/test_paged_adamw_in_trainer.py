"""PagedAdamW in transformers' Trainer, compared with torch's fused AdamW, the default of the Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from qformat.training.optimizer.page_layout import PAGE_GRAIN_NBYTES
from qformat.training.optimizer.paged_adamw import PagedAdamW
from tests.training.optimizer.artificial_device import ArtificialDevice


class Regression(nn.Module):
    """A model that learns the sum of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = self.layers(x)
        return {"loss": nn.functional.mse_loss(y, labels), "logits": y}


def rows() -> list[dict[str, Tensor]]:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    return [{"x": row, "labels": row.sum(dim=0, keepdim=True)} for row in x]


def trainer_of(folder: Path, optimizer: Any = None, **settings: Any) -> Trainer:
    model = Regression()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=12,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        save_steps=5,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    if optimizer is None:
        return Trainer(model=model, args=arguments, train_dataset=rows())  # type: ignore[arg-type]
    decayed = [p for name, p in model.named_parameters() if not name.endswith("bias")]
    others = [p for name, p in model.named_parameters() if name.endswith("bias")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=rows(),  # type: ignore[arg-type]
        optimizers=(optimizer(groups, lr=1e-2), None),
    )


def paged(groups: list[dict[str, Any]], lr: float) -> PagedAdamW:
    page = PAGE_GRAIN_NBYTES
    return PagedAdamW(groups, lr=lr, page_nbytes=page, page_budget=page, device=ArtificialDevice())


def weights(trainer: Trainer) -> list[bytes]:
    assert trainer.model is not None
    return [p.detach().numpy().tobytes() for p in trainer.model.parameters()]


@pytest.fixture
def default(tmp_path: Path) -> Trainer:
    trainer = trainer_of(tmp_path / "default")
    trainer.train()
    return trainer


def test_the_result_is_byte_identical_to_the_trainers_default(default: Trainer, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "paged", paged)
    trainer.train()
    assert weights(trainer) == weights(default)
    optimizer: Any = trainer.optimizer
    assert optimizer.optimizer.paging_statistics().misses > 0


@pytest.mark.parametrize(
    ("first", "second"),
    [(paged, paged), (paged, None), (None, paged)],
    ids=["paged-paged", "paged-torch", "torch-paged"],
)
def test_a_checkpoint_of_either_optimizer_continues_in_the_other(
    default: Trainer, tmp_path: Path, first: Any, second: Any
) -> None:
    trainer_of(tmp_path / "out", first).train()
    trainer = trainer_of(tmp_path / "out", second)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))
    assert weights(trainer) == weights(default)
