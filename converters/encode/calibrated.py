"""A conversion that chooses its codes on a text: the only place where `qformat.converters` uses `qformat.quality`.

torch and transformers are imported only when `calibrate` is called: a conversion without calibration needs neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from qformat.artifact.writing.weight_encoder import WeightEncoder
from qformat.converters.encode.plan import Plan
from qformat.converters.encode.small_files import small_json
from qformat.converters.sources.reading import StreamedSource
from qformat.converters.sources.source import Source
from qformat.errors import Option, UsageError
from qformat.names import CONFIG_NAME
from qformat.quality.calibration.settings import CalibrationSettings


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A calibrated conversion, ready to execute.

    Attributes:
        plan: The plan, with the calibration recorded in its recipe.
        encoder: Chooses the codes and scales.
        nbytes: Disk space in bytes that the conversion needs, scratch files included.
    """

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
    """Read the calibration text and build the source's model without weights. Writes nothing.

    Args:
        source: The source. A streamed repository is rejected.
        plan: Plan of the conversion without calibration.
        settings: The text and the options of the calibration.
        workers: Number of threads.
        on_layer: Called with the number of calibrated layers and the total number of layers.

    Raises:
        SourceError: The model cannot be built from the source.
        UsageError: The source is a streamed repository or already in 4 bit, or the settings do not fit it.
        DataError: The text cannot be used.
    """
    if isinstance(source, StreamedSource):
        raise UsageError(
            f"{source.location}: calibration reads the layers repeatedly, which a streamed repository does not allow. "
            "Download it first with ",
            Option("keep_source", True),
            " and convert the directory in the cache",
        )
    if plan.adopted:
        name = plan.adopted[0].source.name
        raise UsageError(f"{source.location}: {name!r} is already in 4 bit. Calibrate the original 16-bit checkpoint")
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
    """Yield a directory with config.json and tokenizer: the source's own, or a temporary one for a GGUF file."""
    if (source.location / CONFIG_NAME).is_file() and source.kind != "gguf":
        yield source.location
        return
    with TemporaryDirectory(prefix="qformat-") as name:
        folder = Path(name)
        for file in source.side_files:
            (folder / file).write_bytes(source.read_side_file(file))
        (folder / CONFIG_NAME).write_bytes(small_json(source.config))
        yield folder
