"""`evaluate`: how close artifacts are to their 16-bit model on texts, token by token.

All models are mapped. Of one window at a time there are the logits of the 16-bit model and of one other; what is kept
of each token are its scores.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from qformat.artifact.manifest import Manifest
from qformat.artifact.reading.structure import read_manifest
from qformat.errors import UsageError, VerificationError
from qformat.model.checkpoint import find_folder, load_any
from qformat.model.load import load_tokenizer
from qformat.names import MANIFEST_NAME, TOKENIZER_CONFIG_NAME, TOKENIZER_MODEL_NAME, TOKENIZER_NAME
from qformat.quality.evaluation.scores import Scores, first_non_finite, score_window, stack
from qformat.quality.source_check import check_source
from qformat.quality.windows import TokenWindows, read_windows
from qformat.training.data.reading.sources import Source
from qformat.training.data.tokenise import own_tokenizer

_TOKENIZER_FILES = (TOKENIZER_NAME, TOKENIZER_CONFIG_NAME, TOKENIZER_MODEL_NAME)


@dataclass(frozen=True, slots=True)
class TextScores:
    """One text: its windows, the scores of the 16-bit model if there is one, and those of each model beside it."""

    windows: TokenWindows
    source: Scores | None
    models: list[Scores]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured. source_checked: the 16-bit model has the bytes that the first model's manifest names.

    manifest: the first model's as it was measured, None where it has none. dtype: of the arithmetic. seconds: of the
    forward passes and scores.
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
        """Tokens that all models together went through, a second."""
        n_models = len(self.models) + (self.source is not None)
        return n_models * sum(text.windows.ids.size for text in self.texts) / self.seconds


@dataclass(frozen=True, slots=True)
class _Model:
    name: str
    model: PreTrainedModel

    def logits(self, ids: Tensor) -> Tensor:
        """Return [L, vocabulary] of one window, int64 [L]."""
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
    """Measure an artifact, and others beside it, on each text.

    artifact, source, against: folders, or repositories that the Hub's cache has; any of them may be in 4 or 16 bit.
    texts: see `read_windows`. n_windows: of each text, at even distances; all where it has fewer.
    any_source: allow a source other than the one that the artifacts were made from.
    device, dtype: see `load_model`. on_window: called with the number of windows that are done, and of all.

    Raises UsageError for what does not fit together: tokenizers, vocabularies, windows longer than the model's context;
        DataError for a text that is too short or cannot be read; SourceError for another source;
        VerificationError for logits that are not finite numbers, naming the window.
    """
    folders = [find_folder(model) for model in (artifact, *against)]
    source_folder = None if source is None else find_folder(source)
    manifests = {str(folder): read_manifest(folder) for folder in folders if os.path.lexists(folder / MANIFEST_NAME)}
    checked: set[str] = set()
    if source_folder is not None and not any_source:
        checked = check_source(manifests, source_folder)
    everyone = folders if source_folder is None else [source_folder, *folders]
    windows = _read_texts(texts, everyone, folders[0], window_length, n_windows, trust_remote_code=trust_remote_code)

    def load(name: Path | str, folder: Path) -> _Model:
        model = load_any(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        return _Model(str(name), model)

    teacher = None if source is None or source_folder is None else load(source, source_folder)
    models = [load(name, folder) for name, folder in zip((artifact, *against), folders, strict=True)]
    _check_vocabularies(models if teacher is None else [teacher, *models], windows)
    total = sum(len(text) for text in windows)
    done = 0

    def one_more() -> None:
        nonlocal done
        done += 1
        on_window(done, total)

    started = monotonic()
    with torch.inference_mode():
        scored = [_score_text(text, teacher, models, one_more) for text in windows]
    return Evaluation(
        models=[model.name for model in models],
        source=None if teacher is None else teacher.name,
        source_checked=str(folders[0]) in checked,
        manifest=manifests.get(str(folders[0])),
        dtype=models[0].model.dtype,
        texts=scored,
        seconds=monotonic() - started,
    )


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
    return ids, model.logits(ids)


def _checked(scores: Scores, model: _Model, windows: TokenWindows, number: int) -> Scores:
    position = first_non_finite(scores)
    if position is not None:
        raise VerificationError(
            f"{model.name}: its logits are no finite numbers in window {number} of {windows.name}, token {position}. "
            "Check its weights (qformat verify), or compute in another format (--dtype float32)"
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
    """Read the texts with the first model's tokenizer, after a look whether the others' cut them the same way."""
    if n_windows < 1:
        raise UsageError(f"{n_windows} windows: at least one is needed")
    tokenizers = {
        folder: load_tokenizer(folder, trust_remote_code=trust_remote_code)
        for folder in dict.fromkeys(everyone)
        if any((folder / name).exists() for name in _TOKENIZER_FILES)
    }
    if first not in tokenizers:
        raise UsageError(
            f"{first}: has no tokenizer, neither {' nor '.join(_TOKENIZER_FILES)}. Copy its source's there"
        )
    read = [read_windows(text, tokenizers[first], length=length) for text in texts]
    spelled = own_tokenizer(tokenizers[first]).to_str()
    for folder, tokenizer in tokenizers.items():
        if own_tokenizer(tokenizer).to_str() == spelled:
            continue
        for text, windows in zip(texts, read, strict=True):
            other = read_windows(text, tokenizer, length=length)
            if other.ids.shape != windows.ids.shape or (other.ids != windows.ids).any():
                raise UsageError(
                    f"{folder}: its tokenizer cuts {windows.name} into other tokens than that of {first}, so that the "
                    "two cannot be compared token by token"
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
                f"{model.name}: has a vocabulary of {n_vocabulary} tokens, but {first.name} one of {expected}. "
                "Give models of one family"
            )
        if largest >= n_vocabulary:
            raise UsageError(
                f"{model.name}: has a vocabulary of {n_vocabulary} tokens, and its tokenizer gives token {largest}. "
                "The tokenizer is another model's"
            )
        if context is not None and length > context:
            raise UsageError(f"{model.name}: takes at most {context} tokens, and windows have {length}. Shorten them")
