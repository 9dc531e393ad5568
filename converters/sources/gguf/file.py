"""The GGUF source: a model of llama.cpp in one file or in parts, decoded while it is read.

The model gets the format of its matrices: float16 or float32 if all have it, otherwise bfloat16. The rows of query and
key projections of Llama models are put back into transformers' order, and stacked experts become one matrix each. The
tokenizer comes from the directory, if a directory is given and has one, and otherwise from the file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qformat import strict_json
from qformat.artifact.manifest import JsonObject
from qformat.codec.floats import FloatFormat, narrow
from qformat.codec.foreign.ggml_blocks import round_to_bf16
from qformat.converters.sources.checkpoint_folder import CheckpointFolder
from qformat.converters.sources.file_source import FileSource
from qformat.converters.sources.gguf.header import GgufTensor
from qformat.converters.sources.gguf.names import NamedTensor, name_model
from qformat.converters.sources.gguf.split import only_file, read_all_headers
from qformat.converters.sources.gguf.tokenizer import tokenizer_files
from qformat.converters.sources.source import SourceTensor
from qformat.errors import Reason, SourceError
from qformat.names import TOKENIZER_MODEL_NAME, TOKENIZER_NAME

_TOKENIZER_NAMES = (TOKENIZER_NAME, TOKENIZER_MODEL_NAME)
_MAX_FACTORS = 2**16


class GgufFile(FileSource[CheckpointFolder]):
    """A GGUF file, presented as a transformers checkpoint. Opening reads the header only, not the tokenizer."""

    kind = "gguf"

    def __init__(self, path: Path) -> None:
        folder = path if os.path.isdir(path) else path.parent
        self._name = only_file(path, os.listdir(path)) if os.path.isdir(path) else path.name
        super().__init__(CheckpointFolder(folder))
        self._given_folder = folder == path
        try:
            self._header = read_all_headers(self._files.open, folder, self._name)
            model = name_model(self._header, folder / self._name, self._read_vector)
            self._architecture = model.architecture
            self._format = _float_format(model.tensors)
            self.config: JsonObject = {**model.config, "torch_dtype": self._format.torch_name}
            self._named = {tensor.name: tensor for tensor in model.tensors}
            self.tensors: Mapping[str, SourceTensor] = {
                name: SourceTensor(name, self._format.value, tensor.shape, tensor.stored.file)
                for name, tensor in self._named.items()
            }
        except BaseException:
            self.close()
            raise

    @property
    def side_files(self) -> Mapping[str, int]:
        """Sizes of the files to carry over: those in the given directory, and a tokenizer, converted if necessary."""
        return {name: len(data) for name, data in self._side_files.items()}

    def describe(self) -> JsonObject:
        """Return kind, names and sizes of files, and types of matrices, as the manifest records them."""
        stored = sorted({t.stored.block_type.name for t in self._named.values() if len(t.stored.shape) > 1})
        return {
            "kind": self.kind,
            "files": {name: {"nbytes": nbytes} for name, nbytes in self._header.files.items()},
            "stored_as": list(stored),
        }

    def fingerprint(self) -> str:
        """Return the SHA-256 of config, tensors with their locations, and side files."""
        lines = [f"{self.kind} {strict_json.dumps(self.config, python_numbers=True)}"]
        lines += [f"{name} {nbytes}" for name, nbytes in self._header.files.items()]
        for name, tensor in self._named.items():
            stored = tensor.stored
            place = f"{stored.file} {stored.start} {stored.block_type.name}"
            lines.append(f"{name} {place} {tensor.expert} {tensor.n_heads} {tensor.offset}")
        return self._digest(lines, self.side_files)

    def read_into(self, tensor: SourceTensor, offset: int, out: memoryview) -> None:
        """Fill `out` with bytes of a decoded tensor.

        Args:
            tensor: The tensor to read.
            offset: Offset of the first byte in the decoded tensor, at an element boundary.
            out: Buffer to fill.
        """
        raw = np.frombuffer(out, self._format.raw_dtype)
        named = self._named[tensor.name]
        row = named.stored.shape[-1]
        start = offset // self._format.nbytes
        first, last = start // row, -(-(start + raw.size) // row)
        values = self._rows(named, first, last)[start - first * row :][: raw.size]
        if named.offset:
            values = values - np.float32(named.offset)
        if self._format is FloatFormat.BF16:
            round_to_bf16(values, raw)
        else:
            raw[:] = narrow(values, self._format)

    def read_side_file(self, name: str) -> bytes:
        """Return the bytes of a file to carry over."""
        return self._side_files[name]

    def _weight_files(self) -> list[str]:
        # Beside a file that was given alone lies whatever the user keeps there.
        return list(self._header.files) if self._given_folder else self._files.names()

    def _rows(self, named: NamedTensor, first: int, last: int) -> NDArray[np.float32]:
        """Return the values of rows `first` to `last`, flattened."""
        stored = named.stored
        if named.expert is not None:
            first, last = (row + named.expert * stored.shape[-2] for row in (first, last))
        if named.n_heads and len(stored.shape) > 1:
            return self._unpermuted_rows(named, first, last)
        values = self._decode(stored, first, last)
        return values[_half_split(stored.shape[0], named.n_heads)] if named.n_heads else values

    def _unpermuted_rows(self, named: NamedTensor, first: int, last: int) -> NDArray[np.float32]:
        """Read whole heads and undo llama.cpp's interleaving of the two halves of each head's rows."""
        n_rows, row = named.stored.shape
        head = n_rows // named.n_heads
        first_head, last_head = first // head, -(-last // head)
        values = self._decode(named.stored, first_head * head, last_head * head).reshape(-1, row)
        order = _half_split(values.shape[0], last_head - first_head)
        return values[order[first - first_head * head :][: last - first]].reshape(-1)

    def _decode(self, stored: GgufTensor, first: int, last: int) -> NDArray[np.float32]:
        """Return the values of stored rows `first` to `last`, flattened. A vector is one row."""
        row = stored.shape[-1]
        row_nbytes = row // stored.block_type.block_size * stored.block_type.block_nbytes
        data = np.empty((last - first) * row_nbytes, np.uint8)
        self._files.read_into(stored.file, stored.start + first * row_nbytes, data.data)
        values = np.empty((last - first) * row, np.float32)
        stored.block_type.decode(data, values)
        return values

    def _read_vector(self, name: str) -> NDArray[np.float32] | None:
        stored = self._header.tensors.get(name)
        if stored is None:
            return None
        if len(stored.shape) != 1 or stored.shape[0] > _MAX_FACTORS:
            path = self.location / stored.file
            problem = f"shape {list(stored.shape)}, expected at most {_MAX_FACTORS} factors"
            raise SourceError(Reason.COMPONENT_SHAPE, path, problem, tensor=name)
        return self._decode(stored, 0, 1)

    @cached_property
    def _side_files(self) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        if self._given_folder:
            found = {name: self._files.read_side_file(name) for name in self._files.list_side_files()}
        if not any(name in found for name in _TOKENIZER_NAMES):
            by_architecture = self._architecture.read_by_transformers
            found |= tokenizer_files(self.location / self._name, by_architecture=by_architecture)
        return dict(sorted(found.items()))


def _half_split(n_rows: int, n_heads: int) -> NDArray[np.intp]:
    """Return the row in llama.cpp's order for each row in transformers' order."""
    return np.arange(n_rows).reshape(n_heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _float_format(tensors: tuple[NamedTensor, ...]) -> FloatFormat:
    # Kernels of convolutions, which have three dimensions, are always stored as F32.
    stored = {t.stored.block_type.name for t in tensors if len(t.stored.shape) > 1 and len(t.shape) == 2}
    return FloatFormat(next(iter(stored))) if stored in ({"F16"}, {"F32"}) else FloatFormat.BF16
