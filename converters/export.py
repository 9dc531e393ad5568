"""The command `export`: writes a 4-bit artifact as a plain 16- or 32-bit checkpoint: plan, execute, seal."""

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
"""Formats that an artifact can be exported to, by their names on the command line."""


@dataclass(frozen=True, slots=True)
class ExportSummary:
    """Result of an export.

    Attributes:
        out: Directory of the checkpoint.
        plan: The plan that was executed.
        seconds: Duration in seconds.
        overflowed: Number of finite values that became infinite in the new format, by tensor. Tensors without any are
            left out.
        already_complete: Whether an earlier run had already written exactly this output. Nothing was written then.
    """

    out: Path
    plan: ExportPlan
    seconds: float
    overflowed: Mapping[str, int]
    already_complete: bool


def plan_export(artifact: Path | str, to: str, *, max_shard_nbytes: int = DEFAULT_MAX_SHARD_NBYTES) -> ExportPlan:
    """Plan an export without writing anything. Reads headers and small files only.

    Args:
        artifact: Directory of the artifact.
        to: Target format: "bf16", "fp16" or "fp32".
        max_shard_nbytes: Largest size of a shard in bytes.

    Returns:
        Every tensor, shard and offset of the output, and its exact size.

    Raises:
        ArtifactError: The artifact is damaged.
        UsageError: The format or the shard size is not valid.
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
    """Write a 4-bit artifact as a plain safetensors checkpoint, with every weight decoded to `to`.

    Packed weights, and kept tensors in BF16, F16 and F32, get the new dtype with a single rounding. Other tensors keep
    their bytes. If an error occurs, `out` is left as it was, and calling the function again with the same arguments
    resumes the export.

    Args:
        artifact: Directory of the artifact.
        out: Directory of the checkpoint to write.
        to: Target format: "bf16", "fp16" or "fp32".
        max_shard_nbytes: Largest size of a shard in bytes.
        workers: Number of threads. Defaults to one per usable core. Does not affect the output bytes.
        force: Whether to replace a checkpoint that exists at `out`.
        restart: Whether to discard what an interrupted run left behind.
        disk: Interface to the file system. Defaults to the real one.
        sizes: Sizes of the chunks held in memory. They do not affect the output bytes.
        on_plan: Called with the plan before anything is written.
        on_progress: Called with the number of tensor bytes written since the last call.
        on_compile: Called once if kernels must be compiled.

    Raises:
        ArtifactError: The artifact is damaged.
        TargetError: `out` exists, cannot be written, or the disk is full.
        UsageError: An argument is not valid.
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
    """Load or compile the kernels in one thread by decoding one block."""
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
