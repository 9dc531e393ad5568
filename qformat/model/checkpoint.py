"""Load a 16-bit checkpoint by mapping its files: the reference that an artifact is measured against and tuned to."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from qformat.artifact.reading.reader import MappedShards
from qformat.artifact.reading.safetensors_folder import read_headers
from qformat.artifact.sources.small_files import check_small_files
from qformat.errors import ArtifactError, SourceError, UsageError
from qformat.model.boundary import config_errors
from qformat.model.build import build_on_meta, dtype_of, names_in_model, read_config
from qformat.model.load import chosen_device, load_model, model_of_shards
from qformat.model.rules.plausible_config import Evidence, check_numbers
from qformat.model.shard_tensors import packed_names
from qformat.names import CONFIG_NAME, MANIFEST_NAME, is_repository_name

logger = logging.getLogger(__name__)


def find_folder(model: Path | str) -> Path:
    """Return the directory of a model: a local directory, or the cached snapshot of a Hub repository `owner/name`.

    Nothing is downloaded.

    Raises:
        UsageError: The directory does not exist and the Hub's cache has no snapshot of the repository.
    """
    if os.path.lexists(model) or not is_repository_name(str(model)):
        if not os.path.isdir(model):
            problem = "is not a directory" if os.path.lexists(model) else "does not exist"
            raise UsageError(f"{model}: {problem}. Pass a model's directory, or owner/name of a Hub repository")
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), local_files_only=True))
    except LocalEntryNotFoundError:
        raise UsageError(
            f"{model}: does not exist, and the Hub's cache has no such repository. To download it: hf download {model}"
        ) from None


def load_any(
    path: Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load an artifact, a directory that bitsandbytes wrote, or a 16-bit checkpoint.

    Args:
        path: Directory of the model.
        device: Device to run on. Default: the GPU if there is one.
        dtype: Dtype of activations and of kept tensors. Default: the dtype in config.json.
        trust_remote_code: Whether to run Python code that comes with the model.

    Returns:
        The model in evaluation mode.

    Raises:
        ArtifactError: A file of an artifact is damaged or does not fit config.json.
        SourceError: A file of a 16-bit checkpoint is damaged.
        UsageError: The device cannot be used.
        DeviceMemoryError: The weights do not fit into free memory.
    """
    packed = os.path.lexists(path / MANIFEST_NAME)
    if not packed and os.path.lexists(path / CONFIG_NAME):
        packed = bool(packed_names(read_headers(path, error=SourceError).located))
    load = load_model if packed else load_checkpoint
    return load(path, device=device, dtype=dtype, trust_remote_code=trust_remote_code)


def load_checkpoint(
    path: Path | str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a 16-bit checkpoint in safetensors files as a transformers model whose weights are views of the files.

    Weights that transformers merges (the experts of most mixture-of-experts models) cannot be views. transformers loads
    such a model into memory.

    Args:
        path: Directory of the checkpoint.
        device: Device to run on. Default: the GPU if there is one.
        dtype: Dtype of weights and activations. Default: the dtype in config.json. Any other dtype copies the weights.
        trust_remote_code: Whether to run Python code that comes with the model.

    Returns:
        The model in evaluation mode.

    Raises:
        SourceError: A file of the checkpoint is damaged.
        ArtifactError: The tensors do not fit config.json.
        UsageError: The device cannot be used.
        DeviceMemoryError: The weights do not fit into free memory.
    """
    path = Path(path)
    check_small_files(path, error=SourceError)
    shards = MappedShards(read_headers(path, error=SourceError))
    target = chosen_device(device)
    if _merges_weights(shards, trust_remote_code=trust_remote_code):
        logger.warning("%s: transformers merges the experts' weights, so they are read into memory, not mapped", path)
        with config_errors(path, f"transformers {transformers.__version__} cannot load the model"):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype or "auto", trust_remote_code=trust_remote_code, use_safetensors=True
            )
        model.to(target)  # type: ignore[arg-type]
        model.eval()  # type: ignore[no-untyped-call]
        return model
    return model_of_shards(
        shards, device=target, dtype=dtype, verify="structure", trust_remote_code=trust_remote_code, attention=None
    )


def _merges_weights(shards: MappedShards, *, trust_remote_code: bool) -> bool:
    path = shards.path
    check_numbers(path, Evidence.of_layout(shards.layout))
    config = read_config(path, trust_remote_code=trust_remote_code)
    dtype = dtype_of(config, shards.layout)
    model = build_on_meta(path, config, dtype=dtype, trust_remote_code=trust_remote_code, attention=None)
    try:
        names_in_model(model, shards.layout.located, path)
    except ArtifactError:
        return True
    return False
