"""One example in words, with the trained tokens marked: the quickest way to see that the right ones are."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from qformat.training.data.tokenised_data import IGNORED, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What the data says must not steer the terminal: an escape sequence in it would.
_VISIBLE = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in {9, 10}}


def show_example(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """Return an example as text, its trained tokens between « and ».

    A character that is cut by the boundary of marked tokens shows as �.
    """
    pairs = zip(example["input_ids"].tolist(), example["labels"].tolist(), strict=True)
    parts = []
    for trained, run in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        text = tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        shown = text.translate(_VISIBLE)
        parts.append(f"«{shown}»" if trained else shown)
    return "".join(parts)
