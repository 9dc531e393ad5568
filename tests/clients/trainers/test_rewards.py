"""trl's GRPOTrainer and RLOOTrainer learn on a packed model: the reward rises, through `generate` with the adapter.

Their reported loss is about 0 by construction: advantages of a group sum to 0, and the ratio of probabilities is 1.
The reward is the share of tokens with an even id. A model that does not learn draws about half of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qformat import load_model, load_tokenizer
from tests.clients.trainers.short_runs import EVERY_RUN

pytestmark = pytest.mark.slow

N_STEPS = 40
N_COMPLETIONS = 32
N_TOKENS = 8
LAST = 10

MARGIN = 6 * (2 * 0.25 / (LAST * N_COMPLETIONS)) ** 0.5
"""Without learning, two means over LAST steps differ by more than this with a probability of 1e-9: 6 standard errors
of a difference of means of independent completions, whose share has a variance of at most 1/4."""


def share_of_even(ids: list[int]) -> float:
    return sum(token % 2 == 0 for token in ids) / len(ids)


def made(name: str, artifact: Path, folder: Path) -> tuple[Any, list[float]]:
    """Return a trainer and the list that receives the mean reward of each step."""
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    rewards: list[float] = []

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        found = [share_of_even(ids) for ids in completion_ids]
        rewards.append(sum(found) / len(found))
        return found

    arguments = getattr(trl, f"{name}Config")(
        output_dir=str(folder),
        max_steps=N_STEPS,
        learning_rate=3e-2,
        num_generations=N_COMPLETIONS,
        per_device_train_batch_size=N_COMPLETIONS,
        max_completion_length=N_TOKENS,
        beta=0.0,
        **EVERY_RUN,
    )
    torch.manual_seed(0)
    trainer = getattr(trl, f"{name}Trainer")(
        model=load_model(artifact, device="cpu", dtype=torch.float32),
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": "the block holds"}] * N_COMPLETIONS),
        processing_class=load_tokenizer(artifact),
        peft_config=LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"),
        args=arguments,
    )
    return trainer, rewards


def mean_share(model: Any, tokenizer: Any) -> float:
    """Return the share of even tokens in as many sampled texts as LAST steps of the training had."""
    torch.manual_seed(1)
    inputs = tokenizer(["the block holds"] * (LAST * N_COMPLETIONS), return_tensors="pt")
    n_prompt = inputs["input_ids"].shape[1]
    with torch.no_grad():
        found = model.eval().generate(
            **inputs, do_sample=True, top_k=0, min_new_tokens=N_TOKENS, max_new_tokens=N_TOKENS
        )
    return share_of_even(found[:, n_prompt:].flatten().tolist())


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_the_reward_rises_and_the_adapter_is_why(name: str, artifact: Path, tmp_path: Path) -> None:
    trainer, rewards = made(name, artifact, tmp_path)
    tokenizer = load_tokenizer(artifact)
    first = mean_share(trainer.model, tokenizer)
    trainer.train()
    assert len(rewards) == N_STEPS
    last = sum(rewards[-LAST:]) / LAST
    assert last > first + MARGIN
    # `generate` of the trainer drew these completions with the adapter: without it, the model is as it was.
    with trainer.model.disable_adapter():
        assert mean_share(trainer.model, tokenizer) == first
    assert mean_share(trainer.model, tokenizer) > first + MARGIN
