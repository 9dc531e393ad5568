"""Measures how close artifacts are to their 16-bit model on texts, token by token.

All models are mapped. At any time, memory holds one window's logits of the 16-bit model and of one other model; only
the scores of each token are kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from qformat.artifact.manifest import Manifest
from qformat.artifact.reading.structure import check_structure
from qformat.artifact.reading.verify import check_digests
from qformat.errors import Option, UsageError, VerificationError
from qformat.model.boundary import forward_errors
from qformat.model.build import check_predicts_tokens
from qformat.model.checkpoint import find_folder, load_any
from qformat.model.load import load_tokenizer
from qformat.model.loaded_model import check_unchanged
from qformat.names import MANIFEST_NAME, TOKENIZER_CONFIG_NAME, TOKENIZER_MODEL_NAME, TOKENIZER_NAME
from qformat.quality.evaluation.scores import Scores, first_non_finite, score_window, stack
from qformat.quality.source_check import check_source
from qformat.quality.windows import TokenWindows, read_windows
from qformat.training.data.reading.sources import Source
from qformat.training.data.tokenise import own_tokenizer

_TOKENIZER_FILES = (TOKENIZER_NAME, TOKENIZER_CONFIG_NAME, TOKENIZER_MODEL_NAME)


@dataclass(frozen=True, slots=True)
class TextScores:
    """Scores on one text.

    Attributes:
        windows: The windows that were scored.
        source: Scores of the 16-bit model, or None without one.
        models: Scores of each of the other models.
    """

    windows: TokenWindows
    source: Scores | None
    models: list[Scores]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Result of `evaluate`.

    Attributes:
        models: Names of the models, as the user gave them.
        source: Name of the 16-bit model, or None without one.
        source_checked: Whether the 16-bit model has the digests in the first model's manifest.
        manifest: Manifest of the first model before the evaluation, or None if it has none.
        dtype: Dtype of the arithmetic.
        texts: Scores on each text.
        seconds: Duration in seconds of forward passes and scoring.
    """

    models: list[str]
    source: str | None
    source_checked: bool
    manifest: Manifest | None
    dtype: torch.dtype
    texts: list[TextScores]
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second, counting each token once per model."""
        n_models = len(self.models) + (self.source is not None)
        return n_models * sum(text.windows.ids.size for text in self.texts) / self.seconds


@dataclass(frozen=True, slots=True)
class _Model:
    name: str
    model: PreTrainedModel

    def logits(self, ids: Tensor) -> Tensor:
        """Return the logits [L, vocabulary] of one window, int64 [L]."""
        found = self.model(input_ids=ids[None], use_cache=False).logits[0]
        assert isinstance(found, Tensor)
        return found


def evaluate(
    artifact: Path | str,
    texts: Sequence[Source],
    *,
    source: Path | str | None = None,
    against: Sequence[Path | str] = (),
    n_windows: int = 16,
    window_length: int = 512,
    any_source: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    on_window: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Measure an artifact, and optionally other models, on each text.

    Args:
        artifact: Directory, or Hub repository in the local cache. The model may be in 4 or 16 bit.
        texts: Texts to measure on, see `read_windows`.
        source: The 16-bit model to compare with. Without it, only loss and perplexity are measured.
        against: Further models to measure, like `artifact`.
        n_windows: Number of evenly spaced windows to score per text, or all if there are fewer.
        window_length: Number of tokens per window.
        any_source: Whether to accept a 16-bit model that is not the source of the artifacts.
        device: Device to run on, see `load_model`.
        dtype: Dtype of the arithmetic, see `load_model`.
        trust_remote_code: Whether to run model code from the directories.
        on_window: Called with the number of scored windows and the total number of windows.

    Raises:
        UsageError: A model does not predict tokens, tokenizers or vocabularies differ, or windows are longer than the
            model's context.
        ArtifactError: An artifact is damaged, or was changed during the evaluation.
        DataError: A text is too short or cannot be read.
        SourceError: `source` is not the source of the artifacts.
        VerificationError: A window has non-finite logits.
    """
    folders = [find_folder(model) for model in (artifact, *against)]
    source_folder = None if source is None else find_folder(source)
    manifests = {str(folder): manifest for folder in folders if (manifest := _whole(folder)) is not None}
    checked: set[str] = set()
    if source_folder is not None and not any_source:
        checked = check_source(manifests, source_folder)
    everyone = folders if source_folder is None else [source_folder, *folders]
    windows = _read_texts(texts, everyone, folders[0], window_length, n_windows, trust_remote_code=trust_remote_code)

    def load(name: Path | str, folder: Path) -> _Model:
        check_predicts_tokens(folder, trust_remote_code=trust_remote_code)
        model = load_any(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        return _Model(str(name), model)

    teacher = None if source is None or source_folder is None else load(source, source_folder)
    models = [load(name, folder) for name, folder in zip((artifact, *against), folders, strict=True)]
    _check_vocabularies(models if teacher is None else [teacher, *models], windows)
    total, done = sum(len(text) for text in windows), count(1)
    started = monotonic()
    with torch.inference_mode():
        scored = [_score_text(text, teacher, models, lambda: on_window(next(done), total)) for text in windows]
    for one in models:
        check_unchanged(one.model)
    return Evaluation(
        models=[model.name for model in models],
        source=None if teacher is None else teacher.name,
        source_checked=str(folders[0]) in checked,
        manifest=manifests.get(str(folders[0])),
        dtype=models[0].model.dtype,
        texts=scored,
        seconds=monotonic() - started,
    )


def _whole(folder: Path) -> Manifest | None:
    """Return the manifest of an artifact after comparing every digest, None for a folder without one."""
    if not os.path.lexists(folder / MANIFEST_NAME):
        return None
    structure = check_structure(folder)
    check_digests(structure)
    return structure.manifest


def _score_text(
    windows: TokenWindows, teacher: _Model | None, models: list[_Model], one_more: Callable[[], None]
) -> TextScores:
    of_teacher: list[Scores] = []
    of_models: list[list[Scores]] = [[] for _ in models]
    for window, number in zip(windows.ids, windows.numbers.tolist(), strict=True):
        reference = None
        if teacher is not None:
            ids, reference = _forward(teacher, window)
            of_teacher.append(_checked(score_window(reference, ids), teacher, windows, number))
        for model, scores in zip(models, of_models, strict=True):
            ids, logits = _forward(model, window)
            scores.append(_checked(score_window(logits, ids, reference=reference), model, windows, number))
            del logits
        one_more()
    return TextScores(windows, stack(of_teacher) if of_teacher else None, [stack(scores) for scores in of_models])


def _forward(model: _Model, window: NDArray[Any]) -> tuple[Tensor, Tensor]:
    ids = torch.from_numpy(window).to(model.model.device, torch.int64)
    with forward_errors(model.model):
        return ids, model.logits(ids)


def _checked(scores: Scores, model: _Model, windows: TokenWindows, number: int) -> Scores:
    position = first_non_finite(scores)
    if position is not None:
        raise VerificationError(
            f"{model.name}: non-finite logits in window {number} of {windows.name}, token {position}. "
            "Check the weights with qformat verify, or use another dtype (",
            Option("dtype", "float32"),
            ")",
        )
    return scores


def _read_texts(
    texts: Sequence[Source],
    everyone: Sequence[Path],
    first: Path,
    length: int,
    n_windows: int,
    *,
    trust_remote_code: bool,
) -> list[TokenWindows]:
    """Read the texts with the first model's tokenizer, and check that the other tokenizers give the same tokens."""
    if n_windows < 1:
        raise UsageError(f"{n_windows} windows: expected at least 1")
    tokenizers = {
        folder: load_tokenizer(folder, trust_remote_code=trust_remote_code)
        for folder in dict.fromkeys(everyone)
        if any((folder / name).exists() for name in _TOKENIZER_FILES)
    }
    if first not in tokenizers:
        raise UsageError(
            f"{first}: has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}). Copy these files from its source"
        )
    read = [read_windows(text, tokenizers[first], length=length, n_needed=n_windows) for text in texts]
    spelled = own_tokenizer(tokenizers[first]).to_str()
    for folder, tokenizer in tokenizers.items():
        if own_tokenizer(tokenizer).to_str() == spelled:
            continue
        for text, windows in zip(texts, read, strict=True):
            other = read_windows(text, tokenizer, length=length, n_needed=n_windows)
            if other.ids.shape != windows.ids.shape or (other.ids != windows.ids).any():
                raise UsageError(
                    f"{folder}: its tokenizer splits {windows.name} into other tokens than the tokenizer of {first}, "
                    "so the two models cannot be compared token by token"
                )
    return [windows.spread(n_windows) for windows in read]


def _check_vocabularies(models: Sequence[_Model], texts: Sequence[TokenWindows]) -> None:
    largest = max(int(windows.ids.max()) for windows in texts)
    length = max(windows.length for windows in texts)
    first = models[0]
    for model in models:
        config = model.model.config.get_text_config()
        n_vocabulary, context = config.vocab_size, getattr(config, "max_position_embeddings", None)
        expected = first.model.config.get_text_config().vocab_size
        if n_vocabulary != expected:
            raise UsageError(
                f"{model.name}: has a vocabulary of {n_vocabulary} tokens, but {first.name} has {expected}. "
                "Compare models of one family"
            )
        if largest >= n_vocabulary:
            raise UsageError(
                f"{model.name}: has a vocabulary of {n_vocabulary} tokens, but its tokenizer returns token {largest}. "
                "The tokenizer belongs to another model"
            )
        if context is not None and length > context:
            raise UsageError(
                f"{model.name}: has a context of {context} tokens, but windows have {length}. Use shorter windows"
            )
