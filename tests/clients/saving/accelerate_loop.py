"""A training loop with accelerate. As a program, it dies in the middle: ARTIFACT LOADER FOLDER STEP."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

from tests.clients.saving.loaders import load_by

N_STEPS = 6


def losses(model: Any, folder: Path, *, resume: bool = False, save_after: int | None = None) -> list[float]:
    """Train for some steps and return the loss of each step that ran.

    Args:
        model: Model to train: all of its parameters that require a gradient.
        folder: Directory of the saved state.
        resume: Whether to continue from the state in `folder`.
        save_after: Number of steps after which the state is saved and the loop ends. Default: neither happens.
    """
    torch.manual_seed(0)
    accelerator = Accelerator()
    rows = torch.arange(12).repeat(2 * N_STEPS, 1)
    optimizer = torch.optim.AdamW((weight for weight in model.parameters() if weight.requires_grad), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=N_STEPS)
    model, optimizer, schedule, batches = accelerator.prepare(
        model.train(), optimizer, schedule, DataLoader(rows, batch_size=2)
    )
    done = 0
    if resume:
        accelerator.load_state(str(folder))
        done = int((folder / "step").read_text())
        batches = accelerator.skip_first_batches(batches, done)
    found = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append(loss.item())
        if len(found) == save_after:
            accelerator.save_state(str(folder))
            (folder / "step").write_text(str(len(found)))
            break
    return found


def with_adapters(model: Any) -> Any:
    """Attach LoRA adapters whose values depend only on the seed."""
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian"))


if __name__ == "__main__":
    artifact, loader, folder, step = sys.argv[1:]
    losses(with_adapters(load_by(loader, Path(artifact))), Path(folder), save_after=int(step))
    os.kill(os.getpid(), signal.SIGKILL)
