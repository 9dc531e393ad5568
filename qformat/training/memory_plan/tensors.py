"""Reads the names, dtypes and shapes of a model's tensors for the memory plan, without reading any weight.

The manifest of an artifact, or the headers of a bitsandbytes folder, show which weights are packed. For a 16-bit
checkpoint, the caller passes the rules of the converter, because this package must not import `qformat.converters`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qformat import strict_json
from qformat.artifact.components import Component, PackedShape
from qformat.artifact.limits import MAX_CONFIG_NBYTES, MAX_SIZE
from qformat.artifact.manifest import JsonObject, KeptRecord
from qformat.artifact.reading.bitsandbytes_folder import read_bitsandbytes_folder
from qformat.artifact.reading.safetensors_folder import read_headers
from qformat.artifact.reading.structure import read_manifest
from qformat.artifact.sources.source_files import read_source_file
from qformat.artifact.tensor_spec import ELEMENT_NBYTES, TensorSpec
from qformat.errors import ArtifactError, Reason, SourceError, UsageError, first_line
from qformat.hub.client import Watch, watched
from qformat.names import CONFIG_NAME, MANIFEST_NAME, is_repository_name
from qformat.version import __version__

Conversion = Callable[[list[TensorSpec], JsonObject], Mapping[str, PackedShape]]
"""Maps the tensors of a 16-bit checkpoint and its config.json to the layouts of the tensors that a conversion packs."""


@dataclass(frozen=True, slots=True)
class ModelTensors:
    """The tensors of a model.

    Attributes:
        folder: Directory that holds config.json.
        packed: Components of each packed weight. The key is the name of the weight.
        kept: All other tensors. The key is their name.
    """

    folder: Path
    packed: Mapping[str, Mapping[Component, TensorSpec]]
    kept: Mapping[str, TensorSpec]


def read_model_tensors(
    source: Path | str, *, conversion: Conversion | None = None, revision: str | None = None
) -> ModelTensors:
    """Read the manifest or headers of an artifact, a bitsandbytes folder or a 16-bit checkpoint.

    Args:
        source: Folder, or id of a repository on the Hub. Only headers and config.json of a repository are downloaded.
        conversion: Decides which weights of a 16-bit checkpoint a conversion would pack.
        revision: Revision of the repository, or None for the default.

    Returns:
        The tensors of the model.

    Raises:
        ArtifactError: A file of the artifact is damaged.
        SourceError: A file of the checkpoint is damaged or not supported.
        UsageError: The source does not exist or cannot be used for training.
    """
    folder = Path(source)
    if not os.path.lexists(folder) and isinstance(source, str) and _is_on_the_hub(source):
        folder, tensors = _hub_headers(source, revision)
    elif revision is not None:
        raise UsageError(f"{source}: is a folder; only repositories on the Hub have revisions")
    elif os.path.lexists(folder / MANIFEST_NAME):
        return _of_artifact(folder)
    else:
        tensors = _folder_headers(folder)
    if any(tensor.name.endswith(Component.QUANT_STATE) for tensor in tensors):
        return _of_components(folder, tensors)
    if conversion is None:
        raise UsageError(f"{source}: is not quantized, but training needs 4-bit weights. Convert it first")
    return _as_converted(folder, tensors, conversion)


def _is_on_the_hub(source: str) -> bool:
    """Return whether a text is the id of a repository: owner/name, or name alone for the Hub's oldest repositories."""
    return is_repository_name(source if "/" in source else f"owner/{source}")


def _of_artifact(folder: Path) -> ModelTensors:
    records = read_manifest(folder).tensors
    return ModelTensors(
        folder,
        {name: r.layout.components(name) for name, r in records.items() if not isinstance(r, KeptRecord)},
        {name: TensorSpec(name, r.dtype, r.shape) for name, r in records.items() if isinstance(r, KeptRecord)},
    )


def _of_components(folder: Path, tensors: Iterable[TensorSpec]) -> ModelTensors:
    by_name = {tensor.name: tensor for tensor in tensors}
    packed = {}
    for state_name in [name for name in by_name if name.endswith(Component.QUANT_STATE)]:
        name = state_name.removesuffix(Component.QUANT_STATE)
        parts = {part: by_name.pop(name + part.value) for part in Component if name + part.value in by_name}
        if missing := [part for part in (Component.PACKED, Component.ABSMAX) if part not in parts]:
            raise ArtifactError(Reason.MISSING_COMPONENT, folder, f"no shard has its {missing[0].label}", tensor=name)
        packed[name] = parts
    return ModelTensors(folder, packed, by_name)


def _as_converted(folder: Path, tensors: list[TensorSpec], conversion: Conversion) -> ModelTensors:
    path = folder / CONFIG_NAME
    data = read_source_file(folder, CONFIG_NAME, max_nbytes=MAX_CONFIG_NBYTES, error=SourceError)
    config = strict_json.loads(data, path=path, max_nbytes=MAX_CONFIG_NBYTES, error=SourceError, remarks=[])
    if not isinstance(config, dict):
        raise SourceError(Reason.CONFIG_FIELD, path, "not a JSON object")
    if config.get("quantization_config") is not None:
        raise SourceError(
            Reason.ALREADY_QUANTIZED, path, "is already quantized in a format other than bitsandbytes NF4",
            field="quantization_config", next_step="Use the original 16-bit checkpoint",
        )  # fmt: skip
    layouts = conversion(tensors, config)
    return ModelTensors(
        folder,
        {name: layout.components(name) for name, layout in layouts.items()},
        {tensor.name: tensor for tensor in tensors if tensor.name not in layouts},
    )


def _folder_headers(folder: Path) -> list[TensorSpec]:
    if not folder.is_dir():
        raise UsageError(f"{folder}: directory does not exist. Give a folder, or the id of a repository on the Hub")
    located = read_headers(folder, error=SourceError).located.values()
    found = [TensorSpec(place.entry.name, place.entry.dtype, place.entry.shape) for place in located]
    if any(tensor.name.endswith(Component.QUANT_STATE) for tensor in found):
        read_bitsandbytes_folder(folder)  # raises for weights that cannot be used for training
    return found


def _hub_headers(repository: str, revision: str | None) -> tuple[Path, list[TensorSpec]]:
    """Download config.json into the cache of the Hub client, and read only the headers of the shards."""
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub_errors

    api = HfApi(library_name="qformat", library_version=__version__)
    try:
        with watched(Watch.for_reading(repository)):
            config = Path(api.hf_hub_download(repository, CONFIG_NAME, revision=revision))
            metadata = api.get_safetensors_metadata(repository, revision=revision)
    except (hub_errors.NotASafetensorsRepoError, hub_errors.SafetensorsParsingError) as problem:
        raise SourceError(Reason.UNSUPPORTED_SOURCE, repository, first_line(problem)) from problem
    except (OSError, httpx2.HTTPError, hub_errors.HfHubHTTPError, hub_errors.HFValidationError, ValueError) as problem:
        raise UsageError(
            f"{repository}: does not exist as a local folder, and cannot be read from the Hub: {first_line(problem)}. "
            "Check the name and the network connection, or log in"
        ) from problem
    return config.parent, [
        _checked(name, entry.dtype, entry.shape, f"{repository}/{file}")
        for file, of_file in sorted(metadata.files_metadata.items())
        for name, entry in of_file.tensors.items()
    ]


def _checked(name: str, dtype: object, shape: object, path: str) -> TensorSpec:
    if not isinstance(dtype, str) or dtype not in ELEMENT_NBYTES:
        raise SourceError(Reason.UNSUPPORTED_DTYPE, path, f"{dtype!r} is not supported", tensor=name, field="dtype")
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size <= MAX_SIZE for size in shape):
        raise SourceError(
            Reason.HEADER_FIELD, path, f"expected a list of sizes up to {MAX_SIZE}", tensor=name, field="shape"
        )
    new = TensorSpec(name, dtype, tuple(shape))
    if new.nbytes > MAX_SIZE:
        raise SourceError(
            Reason.HEADER_FIELD,
            path,
            f"is too large (found {new.nbytes} bytes, expected at most {MAX_SIZE})",
            tensor=name,
            field="shape",
        )
    return new
