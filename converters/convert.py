"""The commands `plan` and `convert`: plan, execute and seal in sequence."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qformat.artifact.manifest import JsonObject
from qformat.artifact.writing.disk import Disk
from qformat.artifact.writing.output_kind import ARTIFACT, check_target
from qformat.artifact.writing.staging import Staging, begun_with, refuse_full_disk, refuse_nested, work_folder
from qformat.codec.cpu.blocks import warm_up
from qformat.codec.cpu.compiling import telling_of_compilation
from qformat.codec.nf4 import BLOCK_SIZES, DEFAULT_BLOCK_SIZE
from qformat.converters.encode.calibrated import calibrate
from qformat.converters.encode.execute import execute
from qformat.converters.encode.plan import Plan, make_plan
from qformat.converters.encode.task_writer import has_nonfinite
from qformat.converters.rules.adoption import refuse_options
from qformat.converters.rules.recipe import Recipe, load_recipe
from qformat.converters.sources.open_source import is_repository, open_source
from qformat.converters.sources.reading import StreamedSource, pin_of
from qformat.converters.sources.source import Source
from qformat.converters.sources.wrapped.stripped_names import stripped
from qformat.cores import usable_cores
from qformat.errors import Option, UsageError
from qformat.hub.reading.transfer import DEFAULT_TRANSFER, Transfer
from qformat.quality.calibration.settings import CalibrationSettings

DEFAULT_MAX_SHARD_NBYTES = 5_000_000_000
"""Default shard size in bytes: what the Hub recommends and transformers uses."""


@dataclass(frozen=True, slots=True)
class ConversionOptions:
    """Options of a conversion.

    Attributes:
        recipe: Recipe file in TOML. None applies the default rules.
        skip: Glob patterns of modules to keep in 16 bit. They take precedence over the recipe.
        block_size: Number of elements per block, unless a rule says otherwise. None means 64.
        double_quant: Whether absmax values are quantized too, unless a rule says otherwise. None means True.
        max_shard_nbytes: Largest size of a shard in bytes.
        keep_nonfinite: Whether weights with NaN or Inf are kept in 16 bit instead of raising an error.
        strip_wrappers: Whether to remove what wrappers of the model put into the names of its tensors, such as
            `_orig_mod.` and `module.`.
        index_wins: Whether tensors that the index does not assign to their shard are ignored instead of rejected.
        calibration: Settings for choosing codes and scales on a text, layer by layer. None encodes without calibration.
        revision: Branch, tag or commit of a Hub repository, see `open_source`.
        offline: Whether a Hub repository is read from the local cache only.
        keep_source: Whether a Hub repository is downloaded into the local cache first.
        transfer: Connections, timeouts and retries for reading from the Hub.
    """

    recipe: Path | None = None
    skip: Sequence[str] = ()
    block_size: int | None = None
    double_quant: bool | None = None
    max_shard_nbytes: int = DEFAULT_MAX_SHARD_NBYTES
    keep_nonfinite: bool = False
    strip_wrappers: bool = False
    index_wins: bool = False
    calibration: CalibrationSettings | None = None
    revision: str | None = None
    offline: bool = False
    keep_source: bool = False
    transfer: Transfer = DEFAULT_TRANSFER

    def __post_init__(self) -> None:
        if self.block_size is not None and self.block_size not in BLOCK_SIZES:
            raise UsageError(f"block size {self.block_size}: must be one of {', '.join(map(str, BLOCK_SIZES))}")
        if self.max_shard_nbytes < 1:
            raise UsageError(f"shard size {self.max_shard_nbytes}: must be at least 1 byte")

    def load_recipe(self) -> Recipe:
        """Read the recipe file and prepend the skip patterns to its rules.

        Raises:
            UsageError: The recipe cannot be read or holds an invalid rule.
        """
        return load_recipe(
            self.recipe,
            skip=self.skip,
            block_size=DEFAULT_BLOCK_SIZE if self.block_size is None else self.block_size,
            double_quant=self.double_quant is not False,
        )

    def open(self, source: Path | str, *, pin: JsonObject | None = None) -> tuple[Source, Plan]:
        """Open a source and plan its conversion. The caller closes the source.

        Args:
            source: Directory, GGUF file or Hub repository, see `open_source`.
            pin: Commit recorded by an interrupted run, see `open_source`.

        Returns:
            The open source and the plan.

        Raises:
            SourceError: The source is damaged or cannot be converted.
            HubError: The Hub rejects a request or does not answer.
            UsageError: The options do not fit the source.
        """
        opened = open_source(
            source,
            revision=self.revision,
            offline=self.offline,
            keep_source=self.keep_source,
            pin=pin,
            transfer=self.transfer,
            index_wins=self.index_wins,
        )
        try:
            if self.keep_nonfinite and isinstance(opened, StreamedSource):
                raise UsageError(
                    Option("keep_nonfinite"),
                    " reads the source twice, which a streamed repository does not allow. Download it first with ",
                    Option("keep_source", True),
                    " and convert the directory in the cache",
                )
            if self.strip_wrappers:
                opened = stripped(opened)
            if opened.packed:
                refuse_options(opened, self._quantizing())
            recipe = self.load_recipe()
            planned = make_plan(opened, recipe, max_shard_nbytes=self.max_shard_nbytes)
            if self.keep_nonfinite and (found := find_nonfinite(opened, planned)):
                recipe = recipe.keeping(found)
                planned = make_plan(opened, recipe, max_shard_nbytes=self.max_shard_nbytes)
        except BaseException:
            opened.close()
            raise
        return opened, planned

    def _quantizing(self) -> list[Option]:
        """Return the given options that decide which weights are quantized, and how."""
        given: dict[str, str | bool | None] = {}
        if self.recipe is not None:
            given["recipe"] = None
        if self.skip:
            given["skip"] = None
        if self.block_size is not None:
            given["block_size"] = None
        if self.double_quant is not None:
            given["double_quant"] = self.double_quant
        return [Option(name, value) for name, value in given.items()]


@dataclass(frozen=True, slots=True)
class ConversionSummary:
    """Result of a conversion.

    Attributes:
        out: Directory of the artifact.
        plan: The plan that was executed.
        seconds: Duration in seconds.
        already_complete: Whether an earlier run had already written exactly this output. Nothing was written then.
    """

    out: Path
    plan: Plan
    seconds: float
    already_complete: bool


def plan(source: Path | str, options: ConversionOptions | None = None) -> Plan:
    """Plan a conversion without writing anything. Reads headers only, unless `keep_nonfinite` is set.

    Args:
        source: Directory, GGUF file or Hub repository, see `open_source`.
        options: Options of the conversion. Defaults if omitted.

    Returns:
        Every tensor, shard and offset of the output, and its exact size.

    Raises:
        SourceError: The source is damaged or cannot be converted.
        HubError: The Hub rejects a request or does not answer.
        UsageError: The options do not fit the source.
    """
    options = options or ConversionOptions()
    opened, planned = options.open(source)
    try:
        if options.calibration is not None:
            return calibrate(opened, planned, options.calibration, workers=usable_cores()).plan
    finally:
        opened.close()
    return planned


def convert(
    source: Path | str,
    out: Path | str,
    options: ConversionOptions | None = None,
    *,
    workers: int | None = None,
    force: bool = False,
    restart: bool = False,
    disk: Disk | None = None,
    on_plan: Callable[[Plan], None] = lambda _: None,
    on_progress: Callable[[int], None] = lambda _: None,
    on_compile: Callable[[], None] = lambda: None,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
    before_seal: Callable[[], None] = lambda: None,
) -> ConversionSummary:
    """Convert a checkpoint of any kind that `open_source` supports into a 4-bit artifact.

    If an error occurs, `out` is left as it was, and calling the function again with the same arguments resumes the
    conversion. With `options.calibration`, the output bytes depend on the number of workers, and torch and transformers
    must be installed.

    Args:
        source: Directory, GGUF file, or string of the form owner/name: a Hub repository, which is streamed, not stored.
        out: Directory of the artifact to write.
        options: Options of the conversion. Defaults if omitted.
        workers: Number of threads. Defaults to one per usable core. Does not affect the output bytes.
        force: Whether to replace an artifact that exists at `out`.
        restart: Whether to discard what an interrupted run left behind.
        disk: Interface to the file system. Defaults to the real one.
        on_plan: Called with the plan before anything is written.
        on_progress: Called with the number of source bytes processed since the last call.
        on_compile: Called once if kernels must be compiled.
        on_layer: Called with the number of calibrated layers and the total number of layers.
        before_seal: Called when everything is written, before the artifact appears. If it raises an error, the artifact
            does not appear; a further run continues from there.

    Raises:
        SourceError: The source is damaged, changed during the conversion or cannot be converted.
        TargetError: `out` exists, cannot be written, or the disk is full.
        HubError: The Hub rejects a request or does not answer.
        UsageError: The options do not fit together or do not fit the source.
    """
    started = time.monotonic()
    out = Path(out)
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} workers: at least 1 is needed")
    if not is_repository(source):
        refuse_nested(Path(source), out)
    continuing = os.path.lexists(work_folder(out))
    if not continuing:
        check_target(out, replace=force, kind=ARTIFACT)
    options, workers = options or ConversionOptions(), workers or usable_cores()
    opened, planned = options.open(source, pin=None if restart else _pin_noted(out))
    note: JsonObject = {} if (pin := pin_of(opened)) is None else {"pin": pin}
    try:
        encoder, nbytes = None, planned.nbytes
        if options.calibration is not None:
            calibrated = calibrate(opened, planned, options.calibration, workers=workers, on_layer=on_layer)
            planned, encoder, nbytes = calibrated.plan, calibrated.encoder, calibrated.nbytes
        on_plan(planned)
        disk = disk or Disk()
        disk.needed_nbytes = nbytes
        if not continuing:
            refuse_full_disk(out, nbytes, disk)
        with Staging.begin(out, planned.fingerprint, disk=disk, replace=force, restart=restart, note=note) as staging:
            if not staging.sealed_before:
                refuse_full_disk(out, nbytes, disk)
                with telling_of_compilation(on_compile):
                    for float_format in {task.layout.float_format for task in planned.packed}:
                        warm_up(float_format)
                execute(planned, opened, staging, workers, on_progress, encoder=encoder, before_seal=before_seal)
            done_before = staging.sealed_before
    finally:
        opened.close()
    return ConversionSummary(out, planned, time.monotonic() - started, done_before)


def _pin_noted(out: Path) -> JsonObject | None:
    """Return the pin of the source that an interrupted run recorded."""
    pin = begun_with(out).get("pin")
    return pin if isinstance(pin, dict) else None


def find_nonfinite(source: Source, planned: Plan) -> list[str]:
    """Return the names of the weights to encode that contain NaN or Inf. Reads all of these weights.

    Args:
        source: The open source.
        planned: The plan that lists the weights to encode.
    """
    return [task.source.name for task in planned.packed if has_nonfinite(source, task)]
