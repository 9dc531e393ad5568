"""Compare training with qformat to bitsandbytes + PEFT: the same adapters on the same text, step by step.

Usage: python -m tools.quality.parity_training ARTIFACT [--text FILE] [--steps 50] [--seeds 3] [--rows 2] [--tokens 128]

For each seed, every side trains the same random adapters (fp32, rank 16, all linear layers) with AdamW at lr 5e-4:
  unfused  PEFT's layer around NF4Linear, which adds as PEFT's bitsandbytes layer does: must be bit-identical
  fused    base and adapter as one autograd node, which multiplies the adapter in bf16: shows how much losses differ
  again    bitsandbytes a second time, to show whether it is deterministic
Exits with 1 if unfused or again differs anywhere. Needs a CPU with instructions for products of bf16.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from types import MethodType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SIDES = ("bitsandbytes", "again", "unfused", "fused")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="directory of the artifact")
    parser.add_argument("--text", type=Path, default=ROOT / "spec" / "README.md", help="training text [spec/README.md]")
    parser.add_argument("--steps", type=int, default=50, help="training steps [%(default)s]")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds [%(default)s]")
    parser.add_argument("--rows", type=int, default=2, help="rows per batch [%(default)s]")
    parser.add_argument("--tokens", type=int, default=128, help="tokens per row [%(default)s]")
    arguments = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    batches = batches_of(arguments.artifact, arguments.text, arguments.rows, arguments.tokens, arguments.steps)
    print(f"{arguments.steps} steps of {arguments.rows} x {arguments.tokens} tokens of {arguments.text.name}")
    print("| seed | side | loss, first and last step | largest relative difference of a loss | adapters |")
    print("|---:|---|---|---:|---|")
    equal = True
    for seed in range(arguments.seeds):
        peer: tuple[list[float], list[Any]] | None = None
        for side in SIDES:
            losses, adapters = train(load(side, arguments.artifact), batches, seed)
            peer = peer or (losses, adapters)
            apart = max(abs(a - b) / b for a, b in zip(losses, peer[0], strict=True))
            same = losses == peer[0] and all(a.equal(b) for a, b in zip(adapters, peer[1], strict=True))
            equal &= same or side == "fused"
            told = "bit-identical" if same else "differ"
            print(f"| {seed} | {side} | {losses[0]:.6f} {losses[-1]:.6f} | {apart:.1e} | {told} |", flush=True)
    if not equal:
        sys.exit("NOT EQUAL")


def batches_of(artifact: Path, text: Path, rows: int, tokens: int, steps: int) -> list[Any]:
    """Return int64 [rows, tokens] for each step. A short text is repeated."""
    import torch
    from transformers import AutoTokenizer

    ids = torch.tensor(AutoTokenizer.from_pretrained(artifact)(text.read_text(encoding="utf-8")).input_ids)
    size = rows * tokens
    ids = ids.repeat(-(-size * steps // len(ids)))
    return [ids[step * size : (step + 1) * size].view(rows, tokens) for step in range(steps)]


def load(side: str, artifact: Path) -> Any:
    """Return the model of a side with adapters. The side "fp32" computes everything in float32."""
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.bnb import Linear4bit
    from transformers import AutoModelForCausalLM

    import qformat
    from qformat.model.nf4_linear import NF4Linear
    from qformat.training.adapter.lora_linear import NF4LoraLinear

    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    if side in {"bitsandbytes", "again"}:
        return get_peft_model(AutoModelForCausalLM.from_pretrained(artifact), config)
    if side == "fused":
        config._register_custom_module({NF4Linear: NF4LoraLinear})
    dtype = torch.float32 if side == "fp32" else None
    model = get_peft_model(qformat.load_model(artifact, device="cpu", dtype=dtype), config)
    if side == "unfused":
        for module in model.modules():
            if isinstance(getattr(module, "base_layer", None), NF4Linear):
                # This forward rounds the adapter's output to bf16 before adding; PEFT's plain layer adds in fp32.
                module.forward = MethodType(Linear4bit.forward, module)
    return model


def train(model: Any, batches: list[Any], seed: int) -> tuple[list[float], list[Any]]:
    """Return the loss before each step and the adapters after the last one."""
    import torch

    model.train()
    random = torch.Generator().manual_seed(seed)
    adapters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    for name, weight in adapters.items():  # PEFT draws a different number of values for each kind of layer
        if "lora_A" in name:
            torch.nn.init.kaiming_uniform_(weight, a=5**0.5, generator=random)
    optimizer = torch.optim.AdamW(adapters.values(), lr=5e-4, fused=True)
    losses = []
    for batch in batches:
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, [weight.detach() for weight in adapters.values()]


if __name__ == "__main__":
    main()
