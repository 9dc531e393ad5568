"""From settings and a source's headers to a `Calibration`: text, model, and the weights whose codes it will choose."""

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
from qformat.errors import Reason, SourceError, UsageError
from qformat.model.load import load_tokenizer
from qformat.names import CONFIG_NAME, TOKENIZER_CONFIG_NAME, TOKENIZER_NAME
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
    """Read and tokenise the text, and build the model of the folder `source` without weights.

    tensors: all of the source; layouts: of those that will be packed. workers: threads.
    Raises: SourceError for a model that cannot be calibrated or has no tokenizer; UsageError, DataError for the text.
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
    """Return the windows of the text, chosen by chance if there are more than enough."""
    longest = getattr(decoder.model.config.get_text_config(), "max_position_embeddings", None) or WINDOW_LENGTH
    length = min(WINDOW_LENGTH, int(longest))
    count = settings.tokens // length
    if count == 0:
        raise UsageError(f"{settings.tokens} calibration tokens: a window has {length}. Take at least as many")
    windows = read_windows(settings.data, _tokenizer(source), length=length).sample(count, seed=SEED)
    vocabulary = decoder.model.get_input_embeddings().num_embeddings
    if windows.ids.max() >= vocabulary:
        raise SourceError(
            Reason.CONFIG_FIELD,
            source / CONFIG_NAME,
            f"the tokenizer gives token {windows.ids.max()}, and the model knows {vocabulary}",
            next_step="The tokenizer is that of another model: put the right one there",
        )
    return windows


def _tokenizer(source: Path) -> Any:
    try:
        return load_tokenizer(source)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as problem:
        first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise SourceError(
            Reason.MISSING_FILE,
            source,
            f"has no tokenizer that transformers can load, and calibration needs one: {first}",
            next_step=f"Put {TOKENIZER_NAME} and {TOKENIZER_CONFIG_NAME} of the model there",
        ) from problem
