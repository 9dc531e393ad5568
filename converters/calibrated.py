"""A conversion whose codes are chosen on a text: the one place where converters reach for `qformat.quality`.

torch and transformers are loaded only when this is called: a conversion without calibration needs neither.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qformat.artifact.weight_encoder import WeightEncoder
from qformat.converters.plan import Plan
from qformat.converters.source import Source
from qformat.errors import UsageError
from qformat.quality.calibration_settings import CalibrationSettings


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A plan with the calibration in its recipe, the encoder that carries it out, and the bytes of disk it takes."""

    plan: Plan
    encoder: WeightEncoder
    nbytes: int


def calibrate(
    source: Source,
    plan: Plan,
    settings: CalibrationSettings,
    *,
    workers: int,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> Calibrated:
    """Read the text and build the source's model without weights; nothing is written.

    Raises: SourceError, UsageError, DataError.
    """
    from qformat.quality.calibrate import SourceTensorFacts
    from qformat.quality.prepare_calibration import prepare_calibration

    if not source.location.is_dir():
        raise UsageError(f"{source.location}: calibration needs a folder with config.json and a tokenizer")
    calibration = prepare_calibration(
        source.location,
        {name: SourceTensorFacts(tensor.dtype, tensor.shape) for name, tensor in source.tensors.items()},
        {task.source.name: task.layout for task in plan.packed},
        settings,
        workers=workers,
        on_layer=on_layer,
    )
    planned = plan.calibrated(calibration.record)
    return Calibrated(planned, calibration, planned.nbytes + calibration.scratch_nbytes)
