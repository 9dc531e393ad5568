"""Shows an example as text with its trained tokens marked, so that a user can check what is trained."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from qformat.printable import printable
from qformat.training.data.tokenised_data import IGNORED, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        shown = printable(text)
        parts.append(f"«{shown}»" if trained else shown)
    return "".join(parts)
