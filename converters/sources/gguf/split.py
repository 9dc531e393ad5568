"""Reads the header of a model that is split into several GGUF files, as `llama-gguf-split` writes them.

The parts are named NAME-00001-of-00003.gguf. Each has a header with its own tensors; the first one has the model's
metadata and the number of all tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from qformat.converters.sources.gguf.header import GgufHeader, GgufTensor, read_header
from qformat.errors import Reason, SourceError

SUFFIX = ".gguf"
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_COUNT, _NUMBER, _N_TENSORS = "split.count", "split.no", "split.tensors.count"


def read_all_headers(open_file: Callable[[str], int], folder: Path, name: str) -> GgufHeader:
    """Read the header of a file, and those of the other parts if it is the first part of a split model.

    Args:
        open_file: Opens a file of the folder and returns its descriptor.
        folder: Directory of the files.
        name: Name of the file that was given.

    Raises:
        SourceError: A header is damaged, a part is missing or of another model, or the file is not the first part.
    """
    path = folder / name
    _require_first(path)
    header = read_header(open_file(name), path)
    count = header.metadata.get(_COUNT, 1)
    if not isinstance(count, int) or count <= 1:
        return header
    names = _names_of_parts(path, count)
    if missing := [part for part in names if not (folder / part).exists()]:
        raise SourceError(
            Reason.MISSING_COMPONENT, path, f"is part 1 of {count}, and {', '.join(missing[:5])} is missing",
            next_step="Fetch all parts into one directory",
        )  # fmt: skip
    headers = [header, *(read_header(open_file(part), folder / part) for part in names[1:])]
    return _merged(headers, names, folder)


def only_file(folder: Path, names: list[str]) -> str:
    """Return the file to read in a directory: the only GGUF file, or the first part of the only split model.

    Args:
        folder: The directory, for messages.
        names: Names of its entries.

    Raises:
        SourceError: The directory contains several models.
    """
    found = sorted(name for name in names if name.endswith(SUFFIX))
    parts = [match.groups() for name in found if (match := _PART.fullmatch(name))]
    if len(parts) == len(found) and len({(stem, count) for stem, _, count in parts}) == 1:
        stem, _, count = parts[0]
        first = f"{stem}-00001-of-{count}{SUFFIX}"
        if first not in found:
            raise SourceError(
                Reason.MISSING_COMPONENT, folder / first, f"is missing, but {found[0]} is there",
                next_step="Fetch all parts into one directory",
            )  # fmt: skip
        return first
    if len(found) != 1:
        raise SourceError(
            Reason.UNSUPPORTED_SOURCE,
            folder,
            f"contains {len(found)} GGUF files ({', '.join(found[:5])})",
            next_step="Give the path of one of them",
        )
    return found[0]


def _require_first(path: Path) -> None:
    match = _PART.fullmatch(path.name)
    if match is not None and int(match[2]) != 1:
        first = f"{match[1]}-00001-of-{match[3]}{SUFFIX}"
        raise SourceError(
            Reason.UNSUPPORTED_SOURCE, path, f"is only a part of a split model ({int(match[2])} of {int(match[3])})",
            next_step=f"Give the path of part 1, {path.with_name(first)}. The others are found beside it",
        )  # fmt: skip


def _names_of_parts(path: Path, count: int) -> list[str]:
    match = _PART.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise SourceError(
            Reason.UNSUPPORTED_SOURCE, path, f"is one of {count} parts of a split model, which its name does not tell",
            field=_COUNT,
            next_step=f"Name the parts NAME-00001-of-{count:05}{SUFFIX} to NAME-{count:05}-of-{count:05}{SUFFIX}",
        )  # fmt: skip
    return [f"{match[1]}-{number:05}-of-{count:05}{SUFFIX}" for number in range(1, count + 1)]


def _merged(headers: list[GgufHeader], names: list[str], folder: Path) -> GgufHeader:
    tensors: dict[str, GgufTensor] = {}
    for number, (header, name) in enumerate(zip(headers, names, strict=True)):
        for key, expected in ((_NUMBER, number), (_COUNT, len(headers))):
            if (found := header.metadata.get(key)) != expected:
                raise SourceError(
                    Reason.INDEX_MISMATCH, folder / name, f"{found!r}, expected {expected}", field=key,
                    next_step="Fetch all parts again, from one revision",
                )  # fmt: skip
        for tensor in header.tensors.values():
            if tensor.name in tensors:
                problem = f"is in {tensors[tensor.name].file}, too"
                raise SourceError(Reason.DUPLICATE_TENSOR, folder / name, problem, tensor=tensor.name)
            tensors[tensor.name] = tensor
    n_tensors = headers[0].metadata.get(_N_TENSORS)
    if n_tensors != len(tensors):
        raise SourceError(
            Reason.INDEX_MISMATCH, folder / names[0],
            f"{n_tensors!r}, but the {len(names)} parts have {len(tensors)} tensors", field=_N_TENSORS,
            next_step="Fetch all parts again, from one revision",
        )  # fmt: skip
    files = {name: nbytes for header in headers for name, nbytes in header.files.items()}
    return GgufHeader(headers[0].metadata, tensors, files)
