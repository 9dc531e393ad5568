"""Creates a `Calibration` from settings and a source's headers: text, model, and the weights whose codes it chooses."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
import transformers

from qformat.artifact.components import PackedShape
from qformat.artifact.manifest import JsonObject
from qformat.artifact.tensor_spec import TensorSpec
from qformat.errors import ArtifactError, Reason, SourceError, UsageError
from qformat.model.load import load_tokenizer
from qformat.names import CONFIG_NAME
from qformat.quality.calibration.calibrate import Calibration
from qformat.quality.calibration.decoder import Decoder, build_decoder
from qformat.quality.calibration.error_feedback import FeedbackSettings
from qformat.quality.calibration.settings import SEED, WINDOW_LENGTH, CalibrationSettings
from qformat.quality.windows import TokenWindows, read_windows

METHOD = "error_feedback"


def prepare_calibration(
    source: Path,
    tensors: Mapping[str, TensorSpec],
    layouts: Mapping[str, PackedShape],
    settings: CalibrationSettings,
    *,
    workers: int,
    on_layer: Callable[[int, int], None],
) -> Calibration:
    """Read and tokenise the text, and build the source's model without weights.

    Args:
        source: Directory with config.json and tokenizer.
        tensors: All tensors of the source, keyed by name.
        layouts: Layouts of the weights to pack, keyed by name.
        settings: The text and the number of tokens.
        workers: Number of threads.
        on_layer: Called with the number of calibrated layers and the total number of layers.

    Raises:
        SourceError: The model cannot be calibrated or has no tokenizer.
        UsageError: The text does not exist, or the number of tokens is too small.
        DataError: The text cannot be used.
    """
    decoder = build_decoder(source, list(tensors), layouts)
    windows = _windows(source, decoder, settings)
    plain = dict(decoder.elsewhere)
    names = set()
    for targets in decoder.targets:
        for name in targets:
            if layouts[name].shape[-1] % layouts[name].block_size:
                plain[name] = "its blocks run across rows"
            else:
                names.add(name)
    feedback = FeedbackSettings()
    record: JsonObject = {
        "method": METHOD,
        "tokens": int(windows.ids.size),
        "windows": len(windows),
        "window_length": windows.length,
        "data_sha256": windows.sha256,
        "seed": SEED,
        "damping": feedback.damping,
        "scale_factors": list(feedback.factors),
        "plain": {name: plain[name] for name in layouts if name in plain},
        "threads": workers,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numba": numba.__version__,
            "machine": platform.machine(),
        },
    }
    return Calibration(
        decoder=decoder,
        tensors=tensors,
        layouts=layouts,
        names=frozenset(names),
        windows=torch.from_numpy(windows.ids.astype(np.int64)),
        settings=feedback,
        record=record,
        workers=workers,
        on_layer=on_layer,
    )


def _windows(source: Path, decoder: Decoder, settings: CalibrationSettings) -> TokenWindows:
    """Return the windows of the text, a random choice if there are more than needed."""
    longest = getattr(decoder.model.config.get_text_config(), "max_position_embeddings", None) or WINDOW_LENGTH
    length = min(WINDOW_LENGTH, int(longest))
    count = settings.tokens // length
    if count == 0:
        raise UsageError(f"{settings.tokens} calibration tokens: expected at least {length}, the length of one window")
    everything = read_windows(settings.data, _tokenizer(source), length=length, n_needed=count)
    windows = everything.sample(count, seed=SEED)
    vocabulary = decoder.model.get_input_embeddings().num_embeddings
    if windows.ids.max() >= vocabulary:
        raise SourceError(
            Reason.CONFIG_FIELD,
            source / CONFIG_NAME,
            f"the tokenizer returns token {windows.ids.max()}, but the vocabulary has only {vocabulary} tokens",
            next_step="The tokenizer belongs to another model. Replace it",
        )
    return windows


def _tokenizer(source: Path) -> Any:
    try:
        return load_tokenizer(source)
    except ArtifactError as problem:  # the folder is a source here
        raise SourceError(
            problem.reason, problem.path, f"{problem.problem}, which calibration needs", next_step=problem.next_step
        ) from problem
