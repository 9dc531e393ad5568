"""The verb `export`: a 4-bit artifact as a plain 16- or 32-bit checkpoint; plan, execute and seal put together."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qformat.artifact.reading.reader import open_artifact
from qformat.artifact.writing.disk import Disk
from qformat.artifact.writing.output_kind import CHECKPOINT, check_target
from qformat.artifact.writing.staging import Staging, refuse_full_disk, refuse_nested, work_folder
from qformat.codec.cpu.blocks import decode_nested_into
from qformat.codec.cpu.compiling import telling_of_compilation
from qformat.codec.floats import FloatFormat
from qformat.converters.convert import DEFAULT_MAX_SHARD_NBYTES
from qformat.converters.decode.execute import execute_export
from qformat.converters.decode.plan import ExportPlan, make_export_plan
from qformat.converters.sources.chunks import CHUNK_SIZES, ChunkSizes
from qformat.cores import usable_cores
from qformat.errors import UsageError

TARGETS = {"bf16": FloatFormat.BF16, "fp16": FloatFormat.F16, "fp32": FloatFormat.F32}
"""The formats that an artifact can be exported to, by the names that users give them."""


@dataclass(frozen=True, slots=True)
class ExportSummary:
    """What an export did.

    overflowed: by tensor, how many finite values became infinite in the new format; tensors without any are left out.
    already_complete: an earlier run had sealed this very output, nothing was written.
    """

    out: Path
    plan: ExportPlan
    seconds: float
    overflowed: Mapping[str, int]
    already_complete: bool


def plan_export(artifact: Path | str, to: str, *, max_shard_nbytes: int = DEFAULT_MAX_SHARD_NBYTES) -> ExportPlan:
    """Return the plan of an export: every tensor, shard, offset and the exact size. Reads headers and small maps only.

    Raises: ArtifactError, UsageError.
    """
    target = _target(to, max_shard_nbytes)
    with open_artifact(artifact) as opened:
        return make_export_plan(opened, target, max_shard_nbytes=max_shard_nbytes)


def export(
    artifact: Path | str,
    out: Path | str,
    to: str,
    *,
    max_shard_nbytes: int = DEFAULT_MAX_SHARD_NBYTES,
    workers: int | None = None,
    force: bool = False,
    restart: bool = False,
    disk: Disk | None = None,
    sizes: ChunkSizes = CHUNK_SIZES,
    on_plan: Callable[[ExportPlan], None] = lambda _: None,
    on_progress: Callable[[int], None] = lambda _: None,
    on_compile: Callable[[], None] = lambda: None,
) -> ExportSummary:
    """Write a 4-bit artifact as a plain safetensors checkpoint, every weight decoded to `to`: bf16, fp16 or fp32.

    Packed weights, and kept tensors in BF16, F16 and F32, get the new dtype with one rounding; other tensors keep
    their bytes. workers: threads, by default one a core; any number gives the same bytes. force: replace a checkpoint
    of that name. restart: drop what an interrupted run left. sizes: what is in memory at a time; any give the same
    bytes. on_plan, on_progress (bytes of tensors written) and on_compile (once, if kernels must be compiled) are for
    progress displays.
    Raises: ArtifactError, TargetError, UsageError. On any error nothing stands under `out` that was not there before,
    and the same call continues where this one stopped.
    """
    started = time.monotonic()
    artifact, out = Path(artifact), Path(out)
    target = _target(to, max_shard_nbytes)
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} workers: at least 1 is needed")
    refuse_nested(artifact, out)
    continuing = os.path.lexists(work_folder(out))
    if not continuing:
        check_target(out, replace=force, kind=CHECKPOINT)
    with open_artifact(artifact) as opened:
        planned = make_export_plan(opened, target, max_shard_nbytes=max_shard_nbytes)
        on_plan(planned)
        disk = disk or Disk()
        disk.needed_nbytes = planned.nbytes
        if not continuing:
            refuse_full_disk(out, planned.nbytes, disk)
        overflowed: dict[str, int] = {}
        with Staging.begin(
            out, planned.fingerprint, disk=disk, kind=CHECKPOINT, replace=force, restart=restart
        ) as staging:
            if not staging.sealed_before:
                refuse_full_disk(out, planned.nbytes, disk)
                with telling_of_compilation(on_compile):
                    _load_decoders(planned)
                overflowed = execute_export(
                    planned, opened, staging, workers=workers or usable_cores(), progress=on_progress, sizes=sizes
                )
            done_before = staging.sealed_before
    return ExportSummary(out, planned, time.monotonic() - started, overflowed, done_before)


def _target(to: str, max_shard_nbytes: int) -> FloatFormat:
    if to not in TARGETS:
        raise UsageError(f"format {to!r}: must be one of {', '.join(TARGETS)}")
    if max_shard_nbytes < 1:
        raise UsageError(f"shard size {max_shard_nbytes}: must be at least 1 byte")
    return TARGETS[to]


def _load_decoders(planned: ExportPlan) -> None:
    """Load or compile the kernels in one thread, by decoding one block."""
    block_size = 256
    decode_nested_into(
        np.zeros(block_size // 2, np.uint8),
        np.zeros(1, np.uint8),
        np.zeros(1, np.float32),
        np.float32(0),
        n_elements=block_size,
        block_size=block_size,
        float_format=planned.target,
        out=np.empty(block_size, planned.target.raw_dtype),
    )
