"""`load_checkpoint`: a 16-bit checkpoint, mapped, as the model that an artifact is measured against and tuned to."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from qformat.artifact.reading.reader import MappedShards
from qformat.artifact.reading.safetensors_folder import read_headers
from qformat.errors import ArtifactError, SourceError, UsageError
from qformat.model.build import build_on_meta, dtype_of, names_in_model, read_config
from qformat.model.load import chosen_device, load_model, model_of_shards
from qformat.model.shard_tensors import packed_names
from qformat.names import CONFIG_NAME, MANIFEST_NAME, is_repository_name

logger = logging.getLogger(__name__)


def find_folder(model: Path | str) -> Path:
    """Return the folder of a model: a folder, or the snapshot that the Hub's cache has of a repository `owner/name`.

    Raises UsageError where there is neither; nothing is fetched.
    """
    if os.path.lexists(model) or not is_repository_name(str(model)):
        if not os.path.isdir(model):
            raise UsageError(f"{model}: there is no such folder. Give a model's folder, or owner/name of the Hub")
        return Path(model)
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as problem:
        raise UsageError(f"{model}: this needs huggingface_hub: pip install 'qformat[models]' ({problem})") from problem
    try:
        return Path(snapshot_download(str(model), local_files_only=True))
    except LocalEntryNotFoundError:
        raise UsageError(
            f"{model}: there is no such folder, and the Hub's cache does not have it. Fetch it: hf download {model}"
        ) from None


def load_any(
    path: Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load an artifact, a folder of bitsandbytes, or a 16-bit checkpoint. Raises as `load_model`, and SourceError."""
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

    dtype: of the arithmetic, by default that of config.json; another one copies the weights. Weights that transformers
        merges (the experts of most mixtures) cannot be views: such a model is loaded by transformers, into memory.
    Raises SourceError and ArtifactError for damaged files and those that do not fit config.json; UsageError for a
        device that is not there or too small.
    """
    path = Path(path)
    shards = MappedShards(read_headers(path, error=SourceError))
    target = chosen_device(device)
    if _merges_weights(shards, trust_remote_code=trust_remote_code):
        logger.warning("%s: transformers merges its experts, so that it is read into memory, not mapped", path)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype or "auto", trust_remote_code=trust_remote_code
        )
        model.to(target)  # type: ignore[arg-type]
        model.eval()  # type: ignore[no-untyped-call]
        return model
    return model_of_shards(
        shards, device=target, dtype=dtype, verify="structure", trust_remote_code=trust_remote_code, attention=None
    )


def _merges_weights(shards: MappedShards, *, trust_remote_code: bool) -> bool:
    path = shards.path
    config = read_config(path, trust_remote_code=trust_remote_code)
    model = build_on_meta(path, config, dtype=dtype_of(config), trust_remote_code=trust_remote_code, attention=None)
    try:
        names_in_model(model, shards.layout.located, path)
    except ArtifactError:
        return True
    return False
