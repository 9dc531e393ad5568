"""Load an artifact as a running transformers model without copying its weights."""

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
from qformat.artifact.reading.verify import check_digests
from qformat.artifact.reading.watch import MappedFileWatch
from qformat.artifact.sources.small_files import check_small_files
from qformat.errors import ArtifactError, DeviceMemoryError, UsageError, first_line
from qformat.model.boundary import generation_config_errors, tokenizer_errors
from qformat.model.build import attach, build_on_meta, dtype_of, names_in_model, read_config
from qformat.model.devices.host_layers import DeviceMap, attach_placed, check_fits_mapped, decide
from qformat.model.devices.placement import DeviceName
from qformat.model.devices.shard_stream import data_starts, stream_shards
from qformat.model.devices.stream_device import TorchDevice
from qformat.model.loaded_model import Origin, adopt
from qformat.model.memory import free_nbytes
from qformat.model.rules.plausible_config import Evidence, check_computed, check_numbers
from qformat.model.shard_tensors import CopiedShard, ShardBytes, map_shards, tensor_names, tensors_of
from qformat.names import CONFIG_NAME, GENERATION_CONFIG_NAME, MANIFEST_NAME
from qformat.sizes import format_nbytes

Verify = Literal["full", "structure", "none"]

logger = logging.getLogger(__name__)


def load_model(
    artifact: Path | str | MappedShards,
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

    If memory is insufficient, loading stops before it reads any weight and reports how much is needed.

    Args:
        artifact: Directory of the artifact, or its shards as `open_shards` returns them.
        device: Device to run on. Default: the GPU if there is one. On the CPU, every tensor lies in the mapped file. On
            a GPU, each shard is read into one allocation, and the tensors lie in it.
        dtype: Dtype of activations and of kept tensors. Default: the dtype in config.json. Any other dtype copies the
            kept tensors.
        verify: What to check. "structure": everything except the data of the shards; small files and headers are
            compared with their digests. "full": also every byte of the shards. "none": ignore the manifest and only
            check headers and small components against each other.
        trust_remote_code: Whether to run Python code that comes with the model.
        attention: Name of a transformers attention implementation. Default: the choice of transformers.
        device_map: For a model that is larger than the GPU's memory. Layers mapped to "cpu" stay in pinned host memory;
            each is copied to the GPU while the layer before it runs. "auto" keeps as few layers in host memory as
            `max_memory` allows. Training then needs gradient checkpointing.
        max_memory: Memory limit by device (the GPU, and "cpu"), in bytes or as text such as "10GiB". Default for the
            GPU: 90 % of its free memory.

    Returns:
        The model in evaluation mode.

    Raises:
        ArtifactError: The artifact is damaged (with the reasons of `qformat verify`), config.json does not fit the
            tensors, or transformers does not know the architecture.
        UsageError: The device cannot be used, or the options do not fit together.
        DeviceMemoryError: The weights do not fit into memory. The message states how much is needed.
    """
    target = chosen_device(device)
    shards = artifact if isinstance(artifact, MappedShards) else _opened(Path(artifact), verify)
    if device_map is not None and target.type == "cpu":
        raise UsageError("device_map is for a GPU. On the CPU, weights are mapped, and pages are read when needed")
    if max_memory is not None and device_map is None:
        raise UsageError("max_memory only applies together with device_map. Add device_map='auto'")
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
    """Build a model around open shards.

    Args:
        shards: Open shards of an artifact or a checkpoint.
        device: Device to run on.
        dtype: Dtype of activations and of kept tensors. None: the dtype in config.json.
        verify: What to check while shards are copied to a device; see `load_model`.
        trust_remote_code: Whether to run Python code that comes with the model.
        attention: Name of a transformers attention implementation, or None for the default.
        device_map: Which layers stay in host memory; see `load_model`.
        max_memory: Memory limit by device; see `load_model`.

    Returns:
        The model in evaluation mode.

    Raises:
        ArtifactError: A file is damaged or does not fit config.json.
        DeviceMemoryError: The weights do not fit into memory.
    """
    path = shards.path
    data = None
    if verify == "full" and device_map is None:  # compare digests before anything uses the bytes
        data = _shard_data(shards, device, verify)
    check_small_files(path, error=ArtifactError)
    check_numbers(path, Evidence.of_layout(shards.layout))
    config = read_config(path, trust_remote_code=trust_remote_code)
    model = build_on_meta(
        path,
        config,
        dtype=dtype or dtype_of(config, shards.layout),
        trust_remote_code=trust_remote_code,
        attention=attention,
    )
    check_computed(model, shards.layout)
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


def _opened(path: Path, verify: Verify) -> MappedShards:
    return MappedShards(read_bitsandbytes_folder(path)) if verify == "none" else open_shards(path)


def open_whole(path: Path) -> MappedShards:
    """Open the shards of a model on which something is built, after comparing every digest that its directory has.

    Raises:
        ArtifactError: A file is missing or damaged.
    """
    shards = open_shards(path)
    if isinstance(shards, Artifact):
        check_digests(shards.structure)
    return shards


def open_shards(path: Path) -> MappedShards:
    """Open the shards of an artifact, or of a directory of NF4 weights that bitsandbytes and transformers wrote.

    The latter has no digests; a warning is logged.

    Raises:
        ArtifactError: A file is missing or damaged.
    """
    if os.path.lexists(path / MANIFEST_NAME) or not os.path.lexists(path / CONFIG_NAME):
        return open_artifact(path)
    shards = MappedShards(read_bitsandbytes_folder(path))
    logger.warning("%s has no %s, so its weights cannot be checked against digests", path, MANIFEST_NAME)
    return shards


def _shard_data(shards: MappedShards, device: torch.device, verify: Verify) -> Mapping[str, ShardBytes]:
    return map_shards(shards) if device.type == "cpu" else shards_on_device(shards.layout, device, verify=verify)


def shards_on_device(layout: ShardLayout, device: torch.device, *, verify: Verify) -> dict[str, CopiedShard]:
    """Copy the shards to a device, one allocation each.

    Args:
        layout: Checked layout of the shards.
        device: Target device.
        verify: "full" compares the digests of the bytes that are copied; any other value compares none.

    Returns:
        The data of each shard by the shard's name.

    Raises:
        DeviceMemoryError: The shards do not fit into the device's free memory. Raised before anything is read.
        ArtifactError: A file was changed, truncated or removed, or a digest differs.
    """
    starts = data_starts(layout)
    needed = sum(layout.shard_nbytes[shard] - start for shard, start in starts.items())
    free = free_nbytes(device)
    if free is not None and needed > free:
        raise DeviceMemoryError(
            f"{layout.path}: not enough memory on {device}: the weights need {format_nbytes(needed, rounding='up')}, "
            f"{format_nbytes(free, rounding='down')} is free. "
            "Free memory there, keep layers in host memory with device_map='auto', or use the CPU"
        )
    data = stream_shards(layout, TorchDevice(device), verify=verify)
    return {shard: CopiedShard(tensor, starts[shard]) for shard, tensor in data.items()}


def _check_digests(shards: MappedShards, *, streamed: bool) -> None:
    """Compare all digests. If shards are streamed, leave them out: they are hashed while they are copied."""
    if not isinstance(shards, Artifact):
        raise UsageError(f"{shards.path}: verify='full' needs the digests of a manifest. This directory has none")
    check_digests(shards.structure, shards=not streamed)


def chosen_device(device: torch.device | str | None) -> torch.device:
    """Return the device to use, by default the GPU if there is one.

    Raises:
        UsageError: The device cannot be used on this machine.
    """
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r} cannot be used on this machine: {first_line(error)}") from error
    return chosen


def _set_generation_config(model: PreTrainedModel, path: Path) -> None:
    from transformers import GenerationConfig

    if model.can_generate() and (path / GENERATION_CONFIG_NAME).is_file():
        with generation_config_errors(path):
            model.generation_config = GenerationConfig.from_pretrained(path)


def load_tokenizer(path: Path | str, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer in a model's directory.

    Args:
        path: Directory of the model.
        trust_remote_code: Whether to run Python code that comes with the model.

    Returns:
        The tokenizer, as `transformers.AutoTokenizer` loads it.

    Raises:
        ArtifactError: The directory has no tokenizer, or one of its files is damaged.
        UsageError: The tokenizer needs a package that is not installed.
    """
    from transformers import AutoTokenizer

    check_small_files(Path(path), error=ArtifactError, count_values=True)
    check_numbers(Path(path))  # transformers reads config.json as well
    with tokenizer_errors(path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        # Most fields of its files are only used here.
        tokenizer.decode(tokenizer(" a").input_ids, skip_special_tokens=True)
        if not isinstance(tokenizer.chat_template, (str, dict, type(None))):
            raise TypeError(f"the chat template is {type(tokenizer.chat_template).__name__}, expected text")
        return tokenizer
