"""Predictions of the 16-bit model for each window: computed on demand, or read from a cache on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from qformat import strict_json
from qformat.artifact.digests import xxh3
from qformat.artifact.manifest import JsonObject
from qformat.artifact.writing.disk import Disk
from qformat.errors import DivergenceError, TargetError, UsageError
from qformat.named_files import read_named
from qformat.quality.output_head import SplitModel, split_head
from qformat.quality.tuning.distillation import DenseTarget, Target, TopKTarget

_DIGEST_NBYTES = 32


class Teacher(Protocol):
    """Provides the targets of tuning."""

    def target(self, numbers: NDArray[np.int64], ids: Tensor) -> Target:
        """Return the 16-bit model's predictions.

        Args:
            numbers: Numbers of the windows in their text, int64 [B].
            ids: Token ids of the windows, [B, L].

        Raises:
            DivergenceError: The predictions contain NaN or Inf.
        """


class LiveTeacher:
    """The 16-bit model itself."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.requires_grad_(False)
        self._split: SplitModel = split_head(model)

    @torch.no_grad()
    def target(self, numbers: NDArray[np.int64], ids: Tensor) -> DenseTarget:
        """Return the whole distribution.

        Args:
            numbers: Numbers of the windows in their text, int64 [B].
            ids: Token ids of the windows, [B, L].

        Raises:
            DivergenceError: The predictions contain NaN or Inf.
        """
        target = DenseTarget(self._split.body(ids).flatten(0, 1), self._split.head)
        refuse_nonfinite(target, numbers)
        return target

    @torch.no_grad()
    def top_k(self, numbers: NDArray[np.int64], ids: Tensor, k: int) -> TopKTarget:
        """Return the k largest probabilities at each position.

        Args:
            numbers: Numbers of the windows in their text, int64 [B].
            ids: Token ids of the windows, [B, L].
            k: Number of probabilities per position.

        Raises:
            UsageError: `k` is larger than the vocabulary.
            DivergenceError: The predictions contain NaN or Inf.
        """
        if k > self._split.vocabulary:
            raise UsageError(f"top_k: {k}, but the vocabulary of the 16-bit model has {self._split.vocabulary} tokens")
        dense = self.target(numbers, ids)
        parts = []
        for positions in self._split.chunks(len(dense.hidden)):
            log_p = torch.log_softmax(dense.head(dense.hidden[positions]), -1, dtype=torch.float32)
            parts.append(log_p.topk(k, -1))
        target = TopKTarget(torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts]))
        refuse_nonfinite(target, numbers)
        return target


def refuse_nonfinite(target: Target, numbers: NDArray[np.int64]) -> None:
    """Raise DivergenceError if the predictions of the 16-bit model contain NaN or Inf.

    Args:
        target: Predictions of the 16-bit model.
        numbers: Numbers of the windows, for the message.
    """
    if not target.finite():
        raise DivergenceError(
            f"the 16-bit model computes NaN or Inf for a window among {numbers.tolist()} of the data, so there is "
            "nothing to tune towards. Check the model with qformat eval"
        )


class TeacherCache:
    """The k largest log-probabilities of windows in a directory, with one file per window.

    A file contains float32 [L, k], int32 [L, k] and a digest. It is written atomically, and the digest is checked when
    it is read.

    Args:
        parent: Directory that may hold the caches of several models, texts and settings.
        facts: Everything that the predictions depend on. Its digest is the name of the cache's directory in `parent`.
        length: Number of tokens per window, L.
        k: Number of log-probabilities per position.
        disk: Interface to the file system. Defaults to the real one.
    """

    def __init__(self, parent: Path, facts: JsonObject, *, length: int, k: int, disk: Disk | None = None) -> None:
        self.key = xxh3(strict_json.dumps(facts).encode())
        self.folder = parent / self.key
        self._facts = facts
        self._length, self._k = length, k
        self._disk = disk or Disk()

    def missing(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the numbers of the windows that are not in the cache."""
        return np.array([number for number in numbers if not self._path(number).is_file()], np.int64)

    def begin(self) -> None:
        """Create the directory.

        Raises:
            TargetError: The directory cannot be created.
        """
        self._disk.make_folder(self.folder.parent)
        self._disk.make_folder(self.folder)
        self._disk.write_file(self.folder / "about.json", strict_json.dumps(self._facts, indent=2).encode() + b"\n")

    def write(self, numbers: NDArray[np.int64], target: TopKTarget) -> None:
        """Store the predictions for windows.

        Args:
            numbers: Numbers of the windows in their text, int64 [B].
            target: Their predictions.

        Raises:
            TargetError: A file cannot be written.
        """
        log_p = target.log_p.view(len(numbers), self._length, self._k).cpu().numpy().astype("<f4")
        tokens = target.tokens.view(len(numbers), self._length, self._k).cpu().numpy().astype("<i4")
        for number, values, indices in zip(numbers, log_p, tokens, strict=True):
            data = values.tobytes() + indices.tobytes()
            self._disk.replace_file(self._path(number), data + self._digest(number, data))

    def target(self, numbers: NDArray[np.int64], ids: Tensor) -> TopKTarget:
        """Read the predictions for windows.

        Args:
            numbers: Numbers of the windows in their text, int64 [B].
            ids: Token ids of the windows, [B, L]. Only their device is used.

        Raises:
            TargetError: A file is missing or damaged.
        """
        read = [self._read(number) for number in numbers]
        log_p = torch.from_numpy(np.concatenate([values for values, _ in read])).to(ids.device)
        tokens = torch.from_numpy(np.concatenate([indices for _, indices in read])).to(ids.device, torch.int64)
        return TopKTarget(log_p, tokens)

    def _read(self, number: np.int64) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        path = self._path(number)
        half = 4 * self._length * self._k
        try:
            data = read_named(path, max_nbytes=2 * half + _DIGEST_NBYTES)
        except OSError as problem:
            raise TargetError(
                f"{path}: cannot be read: {problem.strerror}. Delete it; the same command then computes it again"
            ) from None
        body = data[:-_DIGEST_NBYTES]
        if len(body) != 2 * half or data[-_DIGEST_NBYTES:] != self._digest(number, body):
            raise TargetError(f"{path}: is damaged. Delete it; the same command then computes it again")
        shape = (self._length, self._k)
        return (
            np.frombuffer(body, "<f4", half // 4).reshape(shape),
            np.frombuffer(body, "<i4", half // 4, half).reshape(shape),
        )

    def _digest(self, number: np.int64, data: bytes) -> bytes:
        return xxh3(f"{self.key} {number} ".encode() + data).encode()

    def _path(self, number: np.int64) -> Path:
        return self.folder / f"window-{number:08d}"
