"""AdamW updates on 8-bit states, in float32 arithmetic for parameters of any dtype.

The states of a chunk are decoded into the workspace, where the update is computed. The parameter and the states are
written afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qformat.training.optimizer.adamw_updates import CHUNK_SIZE, AdamSettings, Piece, in_memory_order
from qformat.training.optimizer.block_states import EncodingScratch, decode_blocks, encode_blocks
from qformat.training.optimizer.page_layout import BLOCK_SIZE

MIN_BLOCK_STATES_SIZE = 4096
"""Parameters with fewer elements keep float32 states, as in bitsandbytes, because norms and biases are small and
sensitive."""

N_ROWS = 4
"""Number of float32 rows in the workspace: first moment, second moment, gradient and parameter of a chunk."""


class EightBitUpdate:
    """Updates 8-bit states. A step is the same as with 32-bit states; between steps each moment is rounded to 8 bits.

    One rounding changes an element by at most `dynamic_map.HALF_STEP_SIGNED` (first moment) or `HALF_STEP_UNSIGNED`
    (second moment) times the absmax of its block. The first moment decays by beta1 per step. Its distance to that of
    32-bit states therefore never exceeds this bound, at the largest absmax so far, times 1 / (1 - beta1).
    """

    steps_on_device = False

    def workspace_nbytes(self, dtypes: set[torch.dtype]) -> int:
        """Return the bytes for the values of one chunk and for the scratch memory to encode them."""
        return N_ROWS * 4 * CHUNK_SIZE + EncodingScratch.nbytes(CHUNK_SIZE // BLOCK_SIZE)

    def apply(self, pieces: Sequence[Piece], settings: AdamSettings, workspace: Tensor | None) -> None:
        """Update piece by piece and chunk by chunk.

        Args:
            pieces: Pieces to update. Their states are 8-bit blocks, or float32 for small parameters.
            settings: Hyperparameters of the group.
            workspace: Temporary memory on the device, uint8 [workspace_nbytes].
        """
        assert workspace is not None
        rows = workspace[: N_ROWS * 4 * CHUNK_SIZE].view(torch.float32).view(N_ROWS, CHUNK_SIZE)
        scratch = EncodingScratch.take(workspace[N_ROWS * 4 * CHUNK_SIZE :], CHUNK_SIZE // BLOCK_SIZE)
        for piece in pieces:
            states = (piece.exp_avg, piece.exp_avg_sq)
            if in_blocks(piece.exp_avg):
                moments = [torch.split(state, CHUNK_SIZE // BLOCK_SIZE) for state in states]
            else:
                moments = [torch.split(in_memory_order(state), CHUNK_SIZE) for state in states]
            params = torch.split(in_memory_order(piece.param), CHUNK_SIZE)
            grads = torch.split(in_memory_order(piece.grad), CHUNK_SIZE)
            t = piece.step.item()
            for param, grad, *chunk in zip(params, grads, *moments, strict=True):
                _update_chunk(param, grad, (chunk[0], chunk[1]), settings, t, rows, scratch)


def in_blocks(state: Tensor) -> bool:
    """Return whether a state is in 8-bit blocks, uint8 [n_blocks, 260], rather than in float32."""
    return state.dtype == torch.uint8


def _update_chunk(
    param: Tensor,
    grad: Tensor,
    states: tuple[Tensor, Tensor],
    settings: AdamSettings,
    t: float,
    rows: Tensor,
    scratch: EncodingScratch,
) -> None:
    """Update `param` [n] and its states, which are float32 [n] or uint8 [n_blocks, 260]."""
    n = param.numel()
    n_blocks = -(-n // BLOCK_SIZE)
    blocks = rows[:2, : n_blocks * BLOCK_SIZE].view(2, n_blocks, BLOCK_SIZE)
    for state, decoded, row, signed in zip(states, blocks, rows[:2], (True, False), strict=True):
        if in_blocks(state):
            decode_blocks(state, decoded, scratch.indices[:n_blocks], signed=signed)
        else:
            row[:n].copy_(state)
    m, v, g, p = rows[:, :n]
    g.copy_(grad)
    p.copy_(param)
    m.lerp_(g, 1 - settings.beta1)
    v.mul_(settings.beta2).addcmul_(g, g, value=1 - settings.beta2)
    denominator = torch.sqrt(v, out=g)  # the gradient is no longer needed
    denominator.div_((1 - settings.beta2**t) ** 0.5).add_(settings.eps)
    p.mul_(1 - settings.lr * settings.weight_decay)
    p.addcdiv_(m, denominator, value=-settings.lr / (1 - settings.beta1**t))
    param.copy_(p)
    for state, decoded, row, signed in zip(states, blocks, rows[:2], (True, False), strict=True):
        if in_blocks(state):
            encode_blocks(decoded, state, scratch, signed=signed)
        else:
            state.copy_(row[:n])
