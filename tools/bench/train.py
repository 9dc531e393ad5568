"""Compares a training step with bitsandbytes + PEFT and with PEFT on the 16-bit model: time and peak memory.

Usage: python -m tools.bench.train [--sizes 100M 300M] [--shapes 1x256 4x256] [--rounds 5] [--threads 2]
                                   [--checkpointing]

The models are random Llamas with LoRA of rank 16 on all linear layers, float32 adapters, no dropout and torch's AdamW.
Each side is a separate process that takes a step on request. The sides take turns, and ratios are medians over rounds:
  bitsandbytes  the artifact in transformers + bitsandbytes, wrapped by PEFT
  bf16          the 16-bit model, wrapped by PEFT
  qformat       load_model, with base layer and adapter as one autograd node
  unfused       load_model, wrapped by PEFT's own layer
  node on bf16  qformat's node on the 16-bit weights; its difference to "qformat" is the cost of decoding
Peak memory is that of the process, minus its memory before it loaded the model.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.bench.timing.interleaved import median_ratio
from tools.bench.timing.stepping import Figures, peak_nbytes, serve_steps, start_side, step_in_turn

SIDES = ("bitsandbytes", "bf16", "qformat", "unfused", "node on bf16")

SIZES = {
    "100M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16},
    "300M": {"hidden_size": 1280, "intermediate_size": 3584, "num_hidden_layers": 16, "num_attention_heads": 20},
}
VOCABULARY = 8000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--shapes", nargs="+", default=["1x256", "4x256"], help="rows x tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true", help="use gradient checkpointing on every side")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": str(arguments.threads)}
    if arguments.side:
        serve(arguments.side, Path(arguments.folder), arguments.shapes[0], arguments.checkpointing)
        return
    print(f"{arguments.threads} threads, medians of {arguments.rounds} interleaved steps")
    print("| model, batch | side | ms | to bitsandbytes | range | peak MB | to bitsandbytes |")
    print("|---|---|---:|---:|---|---:|---:|")
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            # Use a separate process, because a process inherits the peak memory of the one that started it.
            maker = multiprocessing.get_context("spawn").Process(target=make_models, args=(Path(folder), size))
            maker.start()
            maker.join()
            for shape in arguments.shapes:
                print_rows(f"{size}, {shape}", compete(Path(folder), shape, arguments), arguments.sides)


def make_models(folder: Path, size: str) -> None:
    """Write a random Llama as a bf16 checkpoint and as an artifact."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import qformat

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, **SIZES[size])
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "bf16")
    qformat.convert(folder / "bf16", folder / "nf4")


def compete(folder: Path, shape: str, arguments: argparse.Namespace) -> dict[str, Figures]:
    """Return the figures of all sides."""
    options = ["--threads", str(arguments.threads), "--shapes", shape, "--folder", str(folder)]
    options += ["--checkpointing"] if arguments.checkpointing else []
    processes = {
        side: start_side("tools.bench.train", ["--side", side, *options], quiet=True) for side in arguments.sides
    }
    return step_in_turn(processes, rounds=arguments.rounds, warm_up=2)


def print_rows(title: str, figures: dict[str, Figures], sides: Sequence[str]) -> None:
    peer = figures.get("bitsandbytes", figures[sides[0]])
    for side in sides:
        mine = figures[side]
        ratios = [a / b for a, b in zip(mine.seconds, peer.seconds, strict=True)]
        print(
            f"| {title} | {side} | {statistics.median(mine.seconds) * 1e3:.0f} "
            f"| {median_ratio(mine.seconds, peer.seconds):.2f} | {min(ratios):.2f}-{max(ratios):.2f} "
            f"| {mine.peak_nbytes / 1e6:.0f} | {mine.peak_nbytes / peer.peak_nbytes:.2f} |",
            flush=True,
        )


def serve(side: str, folder: Path, shape: str, checkpointing: bool) -> None:
    """Load a side's model and take steps on request."""
    import torch

    import_all()
    before = peak_nbytes()
    model = load(side, folder)
    model.train()
    if checkpointing:
        model.enable_input_require_grads()
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    rows, tokens = (int(number) for number in shape.split("x"))
    batch = torch.randint(0, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    serve_steps(step, nbytes_before=before)


def import_all() -> None:
    """Import the libraries of all sides, so that the peaks compare models rather than libraries."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401

    import qformat.training.adapter.lora_linear  # noqa: F401


def load(side: str, folder: Path) -> Any:
    """Return a side's model with adapters."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    import qformat
    from qformat.model.nf4_linear import NF4Linear
    from qformat.training.adapter.lora_linear import NF4LoraLinear

    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    if side == "bitsandbytes":
        model = AutoModelForCausalLM.from_pretrained(folder / "nf4")
    elif side in {"bf16", "node on bf16"}:
        model = AutoModelForCausalLM.from_pretrained(folder / "bf16", dtype=torch.bfloat16)
        if side == "node on bf16":
            config._register_custom_module({torch.nn.Linear: node_on_bf16()})
    else:
        model = qformat.load_model(folder / "nf4", device="cpu")
        if side == "qformat":
            config._register_custom_module({NF4Linear: NF4LoraLinear})
    torch.manual_seed(0)
    return get_peft_model(model, config)


def node_on_bf16() -> Any:
    """Return a layer class that runs qformat's node on a 16-bit weight."""
    from peft.tuners import lora
    from torch import Tensor

    from qformat.training.adapter.lora_linear import lora_linear

    class Product:
        def __init__(self, weight: Tensor) -> None:
            self.weight = weight

        def linear(self, x: Tensor) -> Tensor:
            return x @ self.weight.t()

        def input_gradient(self, grad: Tensor) -> Tensor:
            return grad @ self.weight

    class Layer(lora.Linear):
        def forward(self, x: Tensor) -> Tensor:
            a, b = self.lora_A["default"].weight, self.lora_B["default"].weight
            return lora_linear(x, None, a, b, self.scaling["default"], Product(self.base_layer.weight.detach()))

    return Layer


if __name__ == "__main__":
    main()
