"""Opens any kind of source; two tables determine which kind it is.

File names determine the container of the tensors (safetensors, PyTorch's .bin, GGUF). `quantization_config` in
config.json determines their encoding (16 bit, or blocks that are decoded while they are read). The two are independent:
`decoded` accepts any source.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qformat.artifact.manifest import JsonObject
from qformat.converters.sources.gguf.architectures import ARCHITECTURES
from qformat.converters.sources.source import Source
from qformat.converters.sources.unsuitable import not_a_checkpoint, refuse_address, refuse_mlx
from qformat.errors import Option, Reason, SourceError, UsageError
from qformat.hub.reading.transfer import DEFAULT_TRANSFER, Transfer
from qformat.names import (
    CONFIG_NAME,
    INDEX_NAME,
    SINGLE_SHARD_NAME,
    SINGLE_TORCH_NAME,
    TORCH_INDEX_NAME,
    is_repository_name,
)


@dataclass(frozen=True, slots=True)
class SourceKind:
    """A kind of source, as `qformat info` lists it.

    Attributes:
        name: Name of the kind, as the manifest records it.
        description: Short description for users.
    """

    name: str
    description: str


@dataclass(frozen=True, slots=True)
class _Container(SourceKind):
    """A file format that contains tensors. The first one in the table whose `lies_at` is true opens the location.

    `open` takes the location and whether the index decides which tensors count.
    """

    lies_at: Callable[[Path, list[str]], bool]
    open: Callable[[Path, bool], Source]


@dataclass(frozen=True, slots=True)
class _Encoding(SourceKind):
    """A storage format of tensors: the `quant_method` of config.json and the source that decodes another source."""

    quant_method: str
    open: Callable[[Source], Source]


def open_source(
    location: Path | str,
    *,
    revision: str | None = None,
    offline: bool = False,
    keep_source: bool = False,
    pin: JsonObject | None = None,
    transfer: Transfer = DEFAULT_TRANSFER,
    index_wins: bool = False,
) -> Source:
    """Open the checkpoint at a location: a directory, a GGUF file or a Hub repository. The caller closes the source.

    Args:
        location: Directory or file. A string of the form owner/name that does not exist locally is a Hub repository; a
            Path never is.
        revision: Branch, tag or commit of a Hub repository, see `open_hub_files`.
        offline: Whether a Hub repository is read from the local cache only.
        keep_source: Whether a Hub repository is downloaded into the local cache first.
        pin: Commit recorded by an interrupted run.
        transfer: Connections, timeouts and retries for reading from the Hub.
        index_wins: Whether tensors that the index does not assign to their shard are ignored instead of rejected.

    Raises:
        SourceError: The location is not a checkpoint, or it is damaged or of a kind that cannot be converted.
        HubError: The Hub rejects a request or does not answer.
        UsageError: An option does not apply to the location, or it is an address on the web.
    """
    refuse_address(location)
    if is_repository(location):
        return _open_hub(
            str(location),
            revision=revision,
            offline=offline,
            keep_source=keep_source,
            pin=pin,
            transfer=transfer,
            index_wins=index_wins,
        )
    for name, given in (("revision", revision is not None), ("offline", offline), ("keep_source", keep_source)):
        if given:
            raise UsageError(
                f"{location}: is not a Hub repository (owner/name). Leave out ",
                Option(name),
                ", which applies only to repositories",
            )
    path = Path(location)
    names = sorted(os.listdir(path)) if os.path.isdir(path) else []
    if (container := _container_at(path, names)) is None:
        raise not_a_checkpoint(path, names)
    opened = container.open(path, index_wins)
    try:
        return decoded(opened)
    except BaseException:
        opened.close()
        raise


def _container_at(path: Path, names: list[str]) -> _Container | None:
    return next((kind for kind in _CONTAINERS if kind.lies_at(path, names)), None)


def is_repository(location: Path | str) -> bool:
    """Return whether a location means a Hub repository: it has the form owner/name and does not exist locally."""
    return isinstance(location, str) and not os.path.lexists(location) and is_repository_name(location)


def decoded(source: Source) -> Source:
    """Return a source of 16-bit (or adopted 4-bit) tensors: `source` itself, or one that decodes it and closes it.

    Raises:
        SourceError: The encoding in config.json is not supported.
    """
    encoding = _encoding_of(source)
    return source if encoding is None else encoding.open(source)


def _encoding_of(source: Source) -> _Encoding | None:
    refuse_mlx(source)
    quantization = source.config.get("quantization_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
    for encoding in _ENCODINGS:
        if encoding.quant_method == method:
            return encoding
    raise SourceError(
        Reason.ALREADY_QUANTIZED,
        source.location / CONFIG_NAME,
        f"the checkpoint is already quantized (quant_method {method!r})",
        field="quantization_config",
        next_step="Convert the original 16-bit checkpoint",
    )


def _open_hub(
    name: str,
    *,
    revision: str | None,
    offline: bool,
    keep_source: bool,
    pin: JsonObject | None,
    transfer: Transfer,
    index_wins: bool,
) -> Source:
    from qformat.converters.sources.hub.repository import HubRepository, open_hub_files
    from qformat.converters.sources.hub.snapshot import HubSnapshot

    files = open_hub_files(
        name, revision=revision, offline=offline, keep_source=keep_source, pin=pin, transfer=transfer
    )
    try:
        if (container := _container_at(files.path, files.names())) is None:
            raise not_a_checkpoint(files.path, files.names())
        if container.open is not _open_safetensors:
            return HubSnapshot(files, lambda folder: container.open(folder, index_wins))
        files.index_wins = index_wins
        opened = HubRepository(files)
        if (encoding := _encoding_of(opened)) is None:
            return opened
        opened.check_for_any_order()
        return encoding.open(opened)
    except BaseException:
        files.close()
        raise


def _open_safetensors(path: Path, index_wins: bool) -> Source:
    from qformat.converters.sources.safetensors_shards import SafetensorsShards

    return SafetensorsShards(path, index_wins=index_wins)


def _open_torch_bin(path: Path, index_wins: bool) -> Source:
    from qformat.converters.sources.torch_bin import TorchBin

    return TorchBin(path, index_wins=index_wins)


def _open_gguf(path: Path, index_wins: bool) -> Source:
    from qformat.converters.sources.gguf.file import GgufFile

    return GgufFile(path)


def _open_fp8(stored: Source) -> Source:
    from qformat.converters.sources.encoded.fp8_blocks import Fp8Blocks

    return Fp8Blocks(stored)


def _open_mxfp4(stored: Source) -> Source:
    from qformat.converters.sources.encoded.mxfp4 import Mxfp4

    return Mxfp4(stored)


def _is_safetensors(path: Path, names: list[str]) -> bool:
    return SINGLE_SHARD_NAME in names or INDEX_NAME in names


def _is_torch_bin(path: Path, names: list[str]) -> bool:
    return SINGLE_TORCH_NAME in names or TORCH_INDEX_NAME in names


def _is_gguf(path: Path, names: list[str]) -> bool:
    return any(name.endswith(".gguf") for name in names) or (path.name.endswith(".gguf") and not os.path.isdir(path))


def _open_bitsandbytes(stored: Source) -> Source:
    from qformat.converters.sources.bitsandbytes_4bit import Bitsandbytes4Bit

    return Bitsandbytes4Bit(stored)


_CONTAINERS = (
    _Container(
        "safetensors",
        f"{SINGLE_SHARD_NAME}, or shards and their index, in bf16, fp16 or fp32",
        lies_at=_is_safetensors,
        open=_open_safetensors,
    ),
    _Container(
        "torch_bin",
        f"{SINGLE_TORCH_NAME}, or shards and their index; plain tensors only, CRC-32 checked",
        lies_at=_is_torch_bin,
        open=_open_torch_bin,
    ),
    _Container(
        "gguf",
        f"a .gguf file or its parts, decoded to bf16 (F16 and F32 stay); architectures {', '.join(ARCHITECTURES)}",
        lies_at=_is_gguf,
        open=_open_gguf,
    ),
)

_ENCODINGS = (
    _Encoding("fp8", "8-bit floats with block scales (DeepSeek-V3, Qwen3 FP8), decoded to bf16", "fp8", open=_open_fp8),
    _Encoding(
        "bitsandbytes_4bit",
        "NF4 weights without a manifest (`*-bnb-4bit`), adopted with the same codes and scales",
        "bitsandbytes",
        open=_open_bitsandbytes,
    ),
    _Encoding("mxfp4", "4-bit floats (gpt-oss), decoded to bf16", "mxfp4", open=_open_mxfp4),
)

_HUB = SourceKind(
    "owner/name", "a Hub repository with safetensors, streamed; other files: `qformat convert --keep-source`"
)

KINDS: tuple[SourceKind, ...] = (*_CONTAINERS, *_ENCODINGS, _HUB)
"""Every kind of source, for lists."""
