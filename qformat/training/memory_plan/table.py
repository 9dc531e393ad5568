"""A memory plan for people."""

from __future__ import annotations

from qformat.training.memory_plan.plan import MemoryPlan
from qformat.training.optimizer.page_device import CUDA_RESERVE_NBYTES


def format_plan(plan: MemoryPlan, *, largest_batch: int | None = None, largest_sequence: int | None = None) -> str:
    """Return the plan as an aligned table, sizes in GiB as devices count them."""
    states = plan.states
    lines: list[tuple[str, str, str]] = [
        ("weights", _gib(plan.weights), f"4-bit codes {_gib(plan.packed)}, scales {_gib(plan.constants)}, "
                                        f"16 bit {_gib(plan.kept)}"),
        ("adapters", _gib(plan.adapters), ""),
        ("gradients", _gib(plan.gradients), ""),
        ("optimizer states", _gib(states.on_device), f"of {_gib(states.total)}; {_gib(states.saved)} in host memory"),
        ("activations", _gib(plan.activations), f"kept for backward, {plan.batch_size} x {plan.seq_len} tokens"),
        ("loss", _gib(plan.loss), "while it is computed"),
        ("one layer", _gib(plan.layer), f"while it runs backward; its largest weight decoded {_gib(plan.decoded)}"),
        ("", "", ""),
        ("peak", _gib(plan.peak), f"forward {_gib(plan.forward)}, loss {_gib(plan.loss_peak)}, "
                                  f"backward {_gib(plan.backward)}, step {_gib(plan.step_peak)}"),
    ]  # fmt: skip
    if plan.device is not None:
        verdict = "fits" if plan.fits else "does not fit"
        lines.append(("device", _gib(plan.device), f"{verdict}, with {_gib(CUDA_RESERVE_NBYTES)} kept free for CUDA"))
    if largest_batch is not None:
        lines.append(("largest batch", str(largest_batch), f"at {plan.seq_len} tokens"))
    if largest_sequence is not None:
        lines.append(("longest sequence", str(largest_sequence), f"at batch size {plan.batch_size}"))
    widths = [max(len(line[column]) for line in lines) for column in range(2)]
    return "\n".join(f"{name:<{widths[0]}}  {size:>{widths[1]}}  {note}".rstrip() for name, size, note in lines)


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
