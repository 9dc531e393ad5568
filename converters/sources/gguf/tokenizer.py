"""The tokenizer of a GGUF file, converted by transformers to files that every reader understands."""

from __future__ import annotations

import tempfile
from pathlib import Path

from qformat.artifact.reading.side_files import is_side_file
from qformat.errors import Reason, SourceError, install_extra
from qformat.named_files import read_named
from qformat.names import TOKENIZER_NAME

_MAX_NBYTES = 64 * 2**20

_CIRCUMSTANCES = ("is_local", "local_files_only")
"""Keys that transformers writes about this machine (whether the Hub was reachable), not about the tokenizer."""

_CONVERSION_ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError, OSError)
"""Exceptions that transformers and tokenizers raise for a vocabulary that they cannot use."""


def tokenizer_files(path: Path, *, by_architecture: bool = True) -> dict[str, bytes]:
    """Return the tokenizer's files, keyed by name. Imports transformers.

    Args:
        path: Path of the file.
        by_architecture: Whether transformers reads the architecture, and chooses the class of the tokenizer by it.
            Otherwise it is the class for every `tokenizer.json`.

    Raises:
        SourceError: transformers or gguf is not installed, or transformers cannot convert this tokenizer.
    """
    instead = f"or put the model's own {TOKENIZER_NAME} next to the file and give the directory"
    try:
        import gguf  # noqa: F401
        import transformers
    except ImportError as error:
        raise SourceError(
            Reason.UNSUPPORTED_SOURCE,
            path,
            f"transformers is needed to convert its tokenizer, and {error.name} is not installed",
            next_step=f"{install_extra('gguf')}, {instead}",
        ) from None
    with tempfile.TemporaryDirectory() as folder:
        try:
            chosen = transformers.AutoTokenizer if by_architecture else transformers.PreTrainedTokenizerFast
            tokenizer = chosen.from_pretrained(str(path.absolute().parent), gguf_file=path.name)
            for name in _CIRCUMSTANCES:
                tokenizer.init_kwargs.pop(name, None)
            tokenizer.save_pretrained(folder)
        except _CONVERSION_ERRORS as error:
            raise SourceError(
                Reason.UNSUPPORTED_SOURCE,
                path,
                f"transformers cannot convert its tokenizer ({type(error).__name__}: {str(error)[:200]})",
                next_step=f"Update transformers, {instead}",
            ) from None
        found = sorted(entry for entry in Path(folder).iterdir() if is_side_file(entry.name))
        return {entry.name: read_named(entry, max_nbytes=_MAX_NBYTES) for entry in found}
