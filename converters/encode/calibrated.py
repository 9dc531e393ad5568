"""A conversion whose codes are chosen on a text: the one place where converters reach for `qformat.quality`.

torch and transformers are loaded only when this is called: a conversion without calibration needs neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from qformat.artifact.writing.weight_encoder import WeightEncoder
from qformat.converters.encode.plan import Plan, small_json
from qformat.converters.sources.reading import StreamedSource
from qformat.converters.sources.source import Source
from qformat.errors import UsageError
from qformat.names import CONFIG_NAME
from qformat.quality.calibration.settings import CalibrationSettings


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
    if isinstance(source, StreamedSource):
        raise UsageError(f"{source.location}: its layers are read again and again. Store it first, with --keep-source")
    if plan.adopted:
        name = plan.adopted[0].source.name
        raise UsageError(f"{source.location}: {name!r} is in 4 bit already. Calibrate the 16-bit checkpoint")
    from qformat.quality.calibration.prepare import prepare_calibration

    with _as_folder(source) as folder:
        calibration = prepare_calibration(
            folder,
            source.tensors,
            {task.source.name: task.layout for task in plan.packed},
            settings,
            workers=workers,
            on_layer=on_layer,
        )
    planned = plan.calibrated(calibration.record)
    return Calibrated(planned, calibration, planned.nbytes + calibration.scratch_nbytes)


@contextmanager
def _as_folder(source: Source) -> Iterator[Path]:
    """Yield a folder with the source's config.json and tokenizer: its own, or one for a while (of a GGUF file)."""
    if (source.location / CONFIG_NAME).is_file() and source.kind != "gguf":
        yield source.location
        return
    with TemporaryDirectory(prefix="qformat-") as name:
        folder = Path(name)
        for file in source.side_files:
            (folder / file).write_bytes(source.read_side_file(file))
        (folder / CONFIG_NAME).write_bytes(small_json(source.config))
        yield folder
