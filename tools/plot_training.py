"""Plots the loss of a training: python -m tools.plot_training ADAPTER/metrics.jsonl PICTURE.png"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    lines = [json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "eval_loss" in line]
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axes.plot(
        [line["step"] for line in steps], [line["loss"] for line in steps], color="#2f6fd0", label="training data"
    )
    axes.plot(
        [line["step"] for line in held_out],
        [line["eval_loss"] for line in held_out],
        "o",
        color="#d9600f",
        label="held-out data",
    )
    for line in held_out:
        axes.annotate(f"{line['eval_loss']:.2f}", (line["step"], line["eval_loss"]), (6, 6), textcoords="offset points")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(sys.argv[2], dpi=130)


if __name__ == "__main__":
    main()
