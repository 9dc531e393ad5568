"""Sizes of the files that transformers and PEFT read from a directory, checked before anything parses them.

Opening an artifact checks what its manifest lists. A directory without a manifest, an adapter, and files that no
manifest lists are checked here.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from qformat.artifact.limits import MAX_TOKENIZER_VALUES, max_nbytes_of
from qformat.artifact.reading.side_files import is_side_file
from qformat.errors import InvalidFileError, Reason
from qformat.named_files import read_named
from qformat.names import ADAPTER_CONFIG_NAME, CONFIG_NAME

_MORE_TEMPLATES = "additional_chat_templates"
"""Directory of further chat templates, which transformers reads with the tokenizer."""


def check_small_files(folder: Path, *, error: type[InvalidFileError], count_values: bool = False) -> None:
    """Check that every small file of a model or an adapter is a regular file within its limits.

    Args:
        folder: Directory of the model or the adapter.
        error: Class of the error to raise.
        count_values: Whether to count the values of large JSON files, which takes 2 ms for each MB. Loading a tokenizer
            needs it: nothing else has such files.

    Raises:
        InvalidFileError: A file is a FIFO or the like, is too large or has too many JSON values (not_a_regular_file,
            json_limit). The class is `error`.
    """
    for path in _small_files(folder):
        try:
            status = os.stat(path)
        except OSError:
            continue  # a broken link, which reading it reports
        if stat.S_ISDIR(status.st_mode):
            continue
        if not stat.S_ISREG(status.st_mode):
            raise error(Reason.NOT_A_REGULAR_FILE, path, "is not a regular file")
        if status.st_size > (limit := max_nbytes_of(path.name)):
            raise error(
                Reason.JSON_LIMIT, path, f"the file has {status.st_size} bytes (the limit is {limit})",
                next_step="Check that it is the right file: those of ordinary models are far smaller",
            )  # fmt: skip
        if count_values and status.st_size > MAX_TOKENIZER_VALUES and path.suffix == ".json":
            _check_values(path, error)


def _check_values(path: Path, error: type[InvalidFileError]) -> None:
    """Check the number of JSON values of a file, of which each takes far more memory than its text."""
    try:
        data = read_named(path, max_nbytes=max_nbytes_of(path.name))
    except OSError:
        return  # reading it reports the problem
    n_values = 1 + sum(data.count(mark) for mark in (b",", b"[", b"{"))
    if n_values > MAX_TOKENIZER_VALUES:
        raise error(Reason.JSON_LIMIT, path, f"has {n_values} JSON values (the limit is {MAX_TOKENIZER_VALUES})")


def _small_files(folder: Path) -> Iterator[Path]:
    for inside in (folder, folder / _MORE_TEMPLATES):
        try:
            names = sorted(os.listdir(inside))
        except OSError:
            continue
        for name in names:
            if inside != folder or is_side_file(name) or name in {CONFIG_NAME, ADAPTER_CONFIG_NAME}:
                yield inside / name
