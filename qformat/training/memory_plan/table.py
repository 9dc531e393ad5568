"""Formats a memory plan as a table for people."""

from __future__ import annotations

from functools import partial

from qformat.sizes import format_nbytes
from qformat.training.memory_plan.plan import MemoryPlan
from qformat.training.optimizer.page_device import CUDA_RESERVE_NBYTES

_size = partial(format_nbytes, binary=True)


def format_plan(plan: MemoryPlan, *, largest_batch: int | None = None, largest_sequence: int | None = None) -> str:
    """Return the plan as an aligned table, with sizes in binary units, as vendors of devices use them.

    Args:
        plan: Plan to show.
        largest_batch: Largest batch size that fits, if known.
        largest_sequence: Longest sequence that fits, in tokens, if known.

    Returns:
        The lines of the table.
    """
    states = plan.states
    lines: list[tuple[str, str, str]] = [
        ("weights", _size(plan.weights), f"4-bit codes {_size(plan.packed)}, scales {_size(plan.constants)}, "
                                         f"16 bit {_size(plan.kept)}"),
        ("adapters", _size(plan.adapters), ""),
        ("gradients", _size(plan.gradients), ""),
        ("optimizer states", _size(states.on_device), f"of {_size(states.total)}; "
                                                         f"{_size(states.saved)} in host memory"),
        ("activations", _size(plan.activations), f"saved for backward, {plan.batch_size} x {plan.seq_len} tokens"),
        ("loss", _size(plan.loss), "temporary"),
        ("one layer", _size(plan.layer), f"temporary, in backward; largest decoded weight {_size(plan.decoded)}"),
        ("", "", ""),
        ("peak", _size(plan.peak), f"forward {_size(plan.forward)}, loss {_size(plan.loss_peak)}, "
                                   f"backward {_size(plan.backward)}, step {_size(plan.step_peak)}"),
    ]  # fmt: skip
    if plan.device is not None:
        verdict = "fits" if plan.fits else "does not fit"
        lines.append(("device", _size(plan.device), f"{verdict}, with {_size(CUDA_RESERVE_NBYTES)} reserved for CUDA"))
    if largest_batch is not None:
        lines.append(("largest batch", str(largest_batch), f"rows of {plan.seq_len} tokens"))
    if largest_sequence is not None:
        lines.append(("longest sequence", str(largest_sequence), f"tokens at batch size {plan.batch_size}"))
    widths = [max(len(line[column]) for line in lines) for column in range(2)]
    return "\n".join(f"{name:<{widths[0]}}  {size:>{widths[1]}}  {note}".rstrip() for name, size, note in lines)
