"""Shows an example as text with its trained tokens marked, so that a user can check what is trained."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from qformat.training.data.tokenised_data import IGNORED, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Escape control characters: the data must not control the terminal.
_VISIBLE = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in {9, 10}}


def show_example(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """Return an example as text, with its trained tokens between « and ».

    A character that straddles the boundary of marked tokens shows as �.

    Args:
        tokenizer: Tokenizer that decodes the tokens.
        example: Example to show.

    Returns:
        The marked text, with control characters escaped.
    """
    pairs = zip(example["input_ids"].tolist(), example["labels"].tolist(), strict=True)
    parts = []
    for trained, run in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        text = tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        shown = text.translate(_VISIBLE)
        parts.append(f"«{shown}»" if trained else shown)
    return "".join(parts)
