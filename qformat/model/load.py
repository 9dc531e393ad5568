"""`load_model`: from an artifact's folder to a running transformers model, without a copy of its weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from qformat.artifact.reading.bitsandbytes_folder import read_bitsandbytes_folder
from qformat.artifact.reading.reader import Artifact, MappedShards, open_artifact
from qformat.artifact.reading.structure import ShardLayout
from qformat.artifact.reading.verify import verify_integrity, verify_other_files
from qformat.artifact.reading.watch import MappedFileWatch
from qformat.errors import DeviceMemoryError, UsageError
from qformat.model.build import attach, build_on_meta, dtype_of, names_in_model, read_config
from qformat.model.devices.host_layers import DeviceMap, attach_placed, check_fits_mapped, decide
from qformat.model.devices.placement import DeviceName
from qformat.model.devices.shard_stream import TorchDevice, data_starts, stream_shards
from qformat.model.loaded_model import Origin, adopt
from qformat.model.memory import free_nbytes
from qformat.model.shard_tensors import ShardData, map_shards, tensor_names, tensors_of
from qformat.names import CONFIG_NAME, GENERATION_CONFIG_NAME, MANIFEST_NAME
from qformat.sizes import format_nbytes

Verify = Literal["full", "structure", "none"]

logger = logging.getLogger(__name__)


def load_model(
    path: Path | str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    verify: Verify = "structure",
    trust_remote_code: bool = False,
    attention: str | None = None,
    device_map: DeviceMap | None = None,
    max_memory: Mapping[DeviceName, int | str] | None = None,
) -> PreTrainedModel:
    """Load an artifact as a transformers model whose 4-bit weights stay packed.

    device: where it runs, by default the GPU if there is one. On the CPU every tensor is a view of the mapped file, on
        a GPU one of its shard, which is read into a single allocation.
    dtype: of activations and of what was kept in 16 bit, by default that of config.json; another one copies the latter.
    verify: "structure" checks all but the weights' bytes; "full" reads every byte and compares its digest; "none" reads
        no manifest, as of a folder that has none: headers and small maps are checked against one another.
    attention: transformers' name of an attention implementation.
    device_map: for a model larger than a GPU. Layers that it maps to "cpu" stay in pinned host memory and are copied to
        the GPU one after the other, each while the one before it runs. "auto": as few as `max_memory` of the device
        asks for, by default nine tenths of what is free. Training needs gradient checkpointing.
    max_memory: bytes, or "10GiB", by device: the GPU, and "cpu".

    Raises: ArtifactError for a damaged artifact (the reasons of `qformat verify`), for a config.json that does not fit
    the tensors and for an architecture that transformers does not know; UsageError for a device that is not
    there; DeviceMemoryError, before anything is read, where memory does not suffice, with what is needed.
    """
    target = chosen_device(device)
    path = Path(path)
    shards = MappedShards(read_bitsandbytes_folder(path)) if verify == "none" else open_shards(path)
    if device_map is not None and target.type == "cpu":
        raise UsageError("device_map: is for a GPU. On the CPU weights are mapped: pages are read when they are needed")
    if max_memory is not None and device_map is None:
        raise UsageError("max_memory: says what device_map='auto' may use, and there is no device_map")
    if verify == "full":
        _check_digests(shards, streamed=target.type != "cpu" and device_map is None)
    return model_of_shards(
        shards,
        device=target,
        dtype=dtype,
        verify=verify,
        trust_remote_code=trust_remote_code,
        attention=attention,
        device_map=device_map,
        max_memory=max_memory,
    )


def model_of_shards(
    shards: MappedShards,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    verify: Verify,
    trust_remote_code: bool,
    attention: str | None,
    device_map: DeviceMap | None = None,
    max_memory: Mapping[DeviceName, int | str] | None = None,
) -> PreTrainedModel:
    """Build the model of opened shards around them; see `load_model`."""
    path = shards.path
    data = None
    if verify == "full" and device_map is None:  # digests are compared before anything is made of the bytes
        data = _shard_data(shards, device, verify)
    config = read_config(path, trust_remote_code=trust_remote_code)
    model = build_on_meta(
        path,
        config,
        dtype=dtype or dtype_of(config),
        trust_remote_code=trust_remote_code,
        attention=attention,
    )
    names = names_in_model(model, tensor_names(shards.layout), path)
    if device_map is not None:
        placed = decide(model, shards.layout, names, device, device_map, max_memory)
        names = attach_placed(model, shards, names, device, placed)
    else:
        if device.type == "cpu":
            check_fits_mapped(model, shards.layout, names)
        names = attach(model, tensors_of(shards, data or _shard_data(shards, device, verify)), names, path)
    _set_generation_config(model, path)
    model.eval()  # type: ignore[no-untyped-call]
    shards.watch.check()
    if shards.layout.states:
        adopt(model, Origin(shards.layout, names, shards.watch if device.type == "cpu" else MappedFileWatch()))
    return model


def open_shards(path: Path) -> MappedShards:
    """Open an artifact, or a folder of NF4 weights that bitsandbytes + transformers wrote, which has no digests.

    Raises: ArtifactError for a damaged one.
    """
    if os.path.lexists(path / MANIFEST_NAME) or not os.path.lexists(path / CONFIG_NAME):
        return open_artifact(path)
    shards = MappedShards(read_bitsandbytes_folder(path))
    logger.warning("%s has no %s: no digests tell whether its weights are whole", path, MANIFEST_NAME)
    return shards


def _shard_data(shards: MappedShards, device: torch.device, verify: Verify) -> dict[str, ShardData]:
    return map_shards(shards) if device.type == "cpu" else shards_on_device(shards.layout, device, verify=verify)


def shards_on_device(layout: ShardLayout, device: torch.device, *, verify: Verify) -> dict[str, ShardData]:
    """Copy the shards to a device, one allocation each. Raises DeviceMemoryError, before reading, if it is small."""
    starts = data_starts(layout)
    needed = sum(layout.shard_nbytes[shard] - start for shard, start in starts.items())
    free = free_nbytes(device)
    if free is not None and needed > free:
        raise DeviceMemoryError(
            f"{layout.path}: the weights need {format_nbytes(needed, rounding='up')}, "
            f"and {device} has {format_nbytes(free, rounding='down')} free. "
            "Free memory there, keep layers in host memory with device_map='auto', or use the CPU"
        )
    data = stream_shards(layout, TorchDevice(device), verify=verify)
    return {shard: ShardData(tensor, starts[shard]) for shard, tensor in data.items()}


def _check_digests(shards: MappedShards, *, streamed: bool) -> None:
    """Compare all digests, or those of the files beside the shards: streamed shards are hashed on their way."""
    if not isinstance(shards, Artifact):
        raise UsageError(f"{shards.path}: has no manifest, so there are no digests that verify='full' could compare")
    path = shards.path
    findings = verify_other_files(path, shards.manifest) if streamed else verify_integrity(path).findings
    if findings:
        raise findings[0].as_error(shards.path)


def chosen_device(device: torch.device | str | None) -> torch.device:
    """Return a device, by default the GPU if there is one. Raises UsageError where it cannot be used."""
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UsageError(f"device {device!r} cannot be used here: {first}") from error
    return chosen


def _set_generation_config(model: PreTrainedModel, path: Path) -> None:
    from transformers import GenerationConfig

    if model.can_generate() and (path / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)


def load_tokenizer(path: Path | str, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer that lies beside the weights."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
