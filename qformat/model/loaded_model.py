"""Let a loaded model write its files back, and detect changes of the mapped files.

`adopt` gives the model a class of its own with the same name, as torch's FSDP2 does. transformers has no hook for
quantizers that writes files in a layout other than its own (`get_state_dict_and_metadata` only renames tensors).
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from qformat import strict_json
from qformat.artifact.components import Component
from qformat.artifact.digests import Buffer
from qformat.artifact.limits import MAX_CONFIG_NBYTES
from qformat.artifact.reading.bitsandbytes_folder import read_bitsandbytes_folder
from qformat.artifact.reading.structure import Located, ShardLayout, Structure, check_structure
from qformat.artifact.reading.watch import MappedFileWatch
from qformat.artifact.writing.disk import Disk
from qformat.artifact.writing.into_folder import FolderStaging
from qformat.artifact.writing.locked_manifest import list_file
from qformat.artifact.writing.output_kind import ARTIFACT, CHECKPOINT, holds_something
from qformat.artifact.writing.rewrite import FETCH_AGAIN, rewrite
from qformat.artifact.writing.staging import Staging
from qformat.errors import ArtifactError, TargetError, UsageError
from qformat.model.adapters.merging import refusing_to_merge
from qformat.model.adapters.methods import check_adapters
from qformat.model.boundary import check_can_generate
from qformat.model.build import read_config
from qformat.model.dequantize import decode_linears
from qformat.model.shard_tensors import TORCH_DTYPES
from qformat.names import CARD_NAME, CONFIG_NAME, GENERATION_CONFIG_NAME, MANIFEST_NAME

logger = logging.getLogger(__name__)

_DEFAULTS = {
    "is_main_process": True, "state_dict": None, "push_to_hub": False, "max_shard_size": "50GB", "variant": None,
    "token": None, "save_peft_format": True, "save_original_format": True, "distributed_checkpoint": False,
}  # fmt: skip
"""Defaults of transformers' `save_pretrained`. Any other value asks for a checkpoint in transformers' own layout."""

_NEXT_STEP = (
    f"{FETCH_AGAIN} and load the model again, or write only its tensors with save_pretrained(..., state_dict=...)"
)
"""Advice if a file has changed since the model was loaded from it."""

_NOT_COMPARED = {"dtype", "torch_dtype", "quantization_config", "transformers_version", "_name_or_path"}
"""Members of a config that loading changes, or that describe how the config was written."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The files that a model was loaded from.

    Attributes:
        layout: Layout of the shards.
        names: The model's name of each tensor in the files.
        watch: Detects changes of the files that tensors are views of.
    """

    layout: ShardLayout
    names: Mapping[str, str]
    watch: MappedFileWatch = field(default_factory=MappedFileWatch)

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        return Origin(self.layout, self.names)


class LoadedModel:
    """Mixin that `adopt` adds to a transformers class."""

    _qformat_origin: Origin
    _qformat_checked: dict[str, Any]
    is_loaded_in_4bit: bool

    def dequantize(self, dtype: torch.dtype | None = None) -> Any:
        """Decode the packed weights in memory and return the model, which is then an ordinary model of transformers.

        Args:
            dtype: Dtype of the whole model. Default: the dtype that it has.

        Returns:
            This model, changed in place.

        Raises:
            UsageError: The model has adapters or layers in host memory, or the dtype is not floating-point.
            DeviceMemoryError: The decoded weights do not fit into free memory.
        """
        model: Any = self
        dtype = dtype or model.dtype
        decode_linears(model, dtype)
        _release(model)
        return model.to(dtype)

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> None:
        """Write the artifact to a directory.

        The files of an unmodified model are byte-identical. If tensors were modified, their digests are computed again.
        Other files of the artifact (tokenizer, licence) are copied.

        A new directory appears when it is complete. In a directory with other contents, such as the checkpoints of a
        training, the files of an older model are replaced and everything else stays. Tokenizer files, chat templates
        and documents that are already there stay as well, and the manifest lists them.

        transformers' own `save_pretrained` runs instead, and writes the components without a manifest, if an argument
        asks for a checkpoint in its layout (state_dict, max_shard_size, ...), or if the model has other tensors than
        the files.

        Args:
            save_directory: Directory to write.
            *args: Positional arguments of transformers' `save_pretrained`.
            **options: Keyword arguments of transformers' `save_pretrained`.

        Raises:
            TargetError: The directory cannot be written.
            UsageError: The dtype in the files would round a tensor.
            ArtifactError: A file was changed or removed since the model was loaded.
        """
        out = Path(os.path.abspath(save_directory))
        plain = not args and all(options[name] == _DEFAULTS.get(name) for name in options if name != "is_main_process")
        others = None if not plain else _other_tensors(self)
        adapters_only = getattr(self, "_hf_peft_config_loaded", False)
        if not plain or others or adapters_only:
            _check_foreign_target(out, self._qformat_origin.layout.path)
            if others and not adapters_only:
                logger.warning("%s: writing a checkpoint without a manifest, because the model %s", out, others)
            super().save_pretrained(save_directory, *args, **options)  # type: ignore[misc]
        elif options.get("is_main_process", True):
            save(self, out)

    def _upload_modified_files(self, working_dir: Any, *args: Any, **options: Any) -> Any:
        """List the model card, which `push_to_hub` writes after the model, in the manifest. Then upload.

        Args:
            working_dir: Directory to upload.
            *args: Positional arguments of transformers' method.
            **options: Keyword arguments of transformers' method.
        """
        list_file(Path(working_dir), CARD_NAME)
        return super()._upload_modified_files(working_dir, *args, **options)  # type: ignore[misc]

    def generate(self, *args: Any, **options: Any) -> Any:
        """Check that the mapped files have not changed, then generate as transformers does.

        Args:
            *args: Positional arguments of transformers' `generate`.
            **options: Keyword arguments of transformers' `generate`.

        Raises:
            ArtifactError: A mapped file was changed or removed since the model was loaded.
            UsageError: The model has another task than to predict the next token.
        """
        check_can_generate(self)  # type: ignore[arg-type]
        self._qformat_origin.watch.check()
        return super().generate(*args, **options)  # type: ignore[misc]

    def named_modules(self, *args: Any, **options: Any) -> Any:
        """Iterate over all modules. PEFT does so after it has added an adapter, and before it merges (see `adapters`).

        Args:
            *args: Positional arguments of torch's `named_modules`.
            **options: Keyword arguments of torch's `named_modules`.

        Raises:
            UsageError: The method of an adapter does not work on packed layers.
        """
        modules = super().named_modules(*args, **options)  # type: ignore[misc]
        if "peft_config" not in self.__dict__ or torch.compiler.is_compiling():
            return modules
        check_adapters(self, self.__dict__["peft_config"], self._qformat_checked)  # type: ignore[arg-type]
        return refusing_to_merge(self, modules)  # type: ignore[arg-type]

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. PEFT sets `peft_config` when it has wrapped the layers, which are then checked.

        Args:
            name: Name of the attribute.
            value: Value of the attribute.

        Raises:
            UsageError: The method of an adapter does not work on packed layers.
        """
        if name == "peft_config":
            check_adapters(self, value, self._qformat_checked)  # type: ignore[arg-type]
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the model under its transformers class; unpickling adopts it again."""
        reduced: Any = super().__reduce_ex__(protocol)
        _, (adopted, *arguments), *rest = reduced
        return _make, (_own_class(adopted), *arguments), *rest


def check_unchanged(model: nn.Module) -> None:
    """Check that the files that a model is mapped from were not written to since, before something is built on it.

    Raises:
        ArtifactError: A file was changed.
    """
    origin: Origin | None = getattr(model, "_qformat_origin", None)
    if origin is not None:
        origin.watch.check()


def adopt(model: PreTrainedModel, origin: Origin) -> None:
    """Let a model write back the files that it was loaded from, and set the traits of a 4-bit model.

    Args:
        model: Model to change in place.
        origin: The files that it was loaded from.
    """
    adopted: Any = model
    own: Any = type(model)
    adopted.__class__ = _adopted(own)
    adopted._qformat_origin = origin
    adopted._qformat_checked = {}
    # PEFT, trl and accelerate ask for this trait. Where it is set, they import bitsandbytes. Without bitsandbytes, PEFT
    # then fails to attach IA3, RandLoRA and AdaLoRA.
    adopted.is_loaded_in_4bit = importlib.util.find_spec("bitsandbytes") is not None
    # `is_quantized` and `quantization_method` stay as they are. transformers sets them in `from_pretrained`, and then
    # refuses `.half()`, `.to(dtype)`, and training without adapters, all of which these layers can do.
    for config in _configs(model.config):
        config._is_quantized = True  # code of some architectures then runs Linear layers instead of using their weights


def _release(model: Any) -> None:
    """Undo `adopt`, and what transformers' `from_pretrained` set, in a model without packed layers."""
    model.__class__ = _own_class(type(model))
    ours = ("_qformat_origin", "_qformat_checked", "is_loaded_in_4bit")
    for name in (*ours, "is_quantized", "quantization_method", "hf_quantizer"):
        model.__dict__.pop(name, None)
    for config in _configs(model.config):
        for name in ("_is_quantized", "quantization_config"):
            config.__dict__.pop(name, None)


def _configs(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """Yield a config and the configs of its parts."""
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            yield from _configs(part)


def _own_class(adopted: type) -> Any:
    """Return the transformers class of an adopted model. Other libraries may have added classes before it, too."""
    return next(
        base for base in adopted.__mro__ if issubclass(base, PreTrainedModel) and not issubclass(base, LoadedModel)
    )


@cache
def _adopted(own: Any) -> Any:
    if issubclass(own, LoadedModel):
        return own
    return type(own.__name__, (LoadedModel, own), {"__module__": own.__module__, "__doc__": own.__doc__})


def _make(own: type, *arguments: Any) -> Any:
    adopted = _adopted(own)
    return adopted.__new__(adopted, *arguments)


def save(model: Any, out: Path, *, disk: Disk | None = None) -> bool:
    """Write the files of a loaded model to a directory.

    Args:
        model: Model that `adopt` has changed.
        out: Directory to write.
        disk: Disk to write through. Default: a new `Disk`.

    Returns:
        Whether all tensors and configs are the same as those that the model was loaded from.

    Raises:
        TargetError: The directory cannot be written.
        UsageError: The dtype in the files would round a tensor.
        ArtifactError: A file was changed or removed since the model was loaded.
    """
    origin: Origin = model._qformat_origin
    origin.watch.check()
    state: dict[str, Tensor] = model.state_dict()

    def held(name: str, located: Located) -> Buffer | None:
        tensor = state.get(_name_in_model(origin, name))
        return None if tensor is None else _bytes_of(tensor, name, located)

    layout = origin.layout
    disk = disk or Disk(sum(layout.shard_nbytes.values()))
    disk.make_folders(out.parent)
    files = _changed_configs(model)
    if not (os.path.isdir(out) and (holds_something(out) or os.path.islink(out) or os.path.ismount(out))):
        kind = ARTIFACT if isinstance(layout, Structure) else CHECKPOINT
        with Staging.begin(out, "the tensors of a model", disk=disk, kind=kind, restart=True) as new:
            return rewrite(layout, new, held, files=files, next_step=_NEXT_STEP)
    with FolderStaging(out, disk) as staging:
        same = rewrite(layout, staging, held, files=files, next_step=_NEXT_STEP)
    if others := [change.name for change in staging.kept if not change.accompanies]:
        logger.warning("%s: kept files that differ from those of the model: %s", out, ", ".join(others))
    if os.path.samefile(out, layout.path):
        model._qformat_origin = replace(origin, layout=_layout_of(layout))
    return same


def _layout_of(old: ShardLayout) -> ShardLayout:
    """Return the layout of a directory whose files were replaced."""
    return check_structure(old.path) if isinstance(old, Structure) else read_bitsandbytes_folder(old.path)


def _name_in_model(origin: Origin, name: str) -> str:
    for part in Component:
        owner = name.removesuffix(part.value)
        if part.value and owner in origin.layout.states and name.endswith(part.value):
            return origin.names.get(owner, owner) + part.value
    return origin.names.get(name, name)


def _other_tensors(model: Any) -> str | None:
    """Return how the model's tensors differ from those in its files in name or shape, or None if they do not."""
    origin: Origin = model._qformat_origin
    state: dict[str, Tensor] = model.state_dict()
    named = {_name_in_model(origin, name): located for name, located in origin.layout.located.items()}
    tied = set(model.all_tied_weights_keys) | set(model.all_tied_weights_keys.values())
    for name in origin.names.values():
        if name not in state:
            return f"no longer has the tensor {name!r}"
    for name, tensor in state.items():
        if name not in named and name not in tied:
            return f"has the tensor {name!r}, which is not in the files"
        padded = tensor.dtype == torch.uint8 and not name.endswith(Component.QUANT_STATE.value)
        if name in named and tensor.numel() != _n_elements(named[name]) and not padded:
            return f"has the tensor {name!r} in another shape"
    return None


def _n_elements(located: Located) -> int:
    count = 1
    for size in located.entry.shape:
        count *= size
    return count


def _bytes_of(tensor: Tensor, name: str, located: Located) -> Buffer:
    wanted = TORCH_DTYPES[located.entry.dtype]
    value = tensor.detach().cpu()
    if value.dtype != wanted and value.is_floating_point():
        value = tensor.detach().to(wanted).cpu()
        if not torch.equal(value.to(tensor.dtype), tensor.detach().cpu()):
            raise UsageError(
                f"tensor {name!r}: saving would round it from {tensor.dtype} to {wanted}, its dtype in the files. "
                "Convert it first, or write a checkpoint without a manifest: save_pretrained(..., state_dict=...)"
            )
    flat = value.contiguous().view(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else b""


def _changed_configs(model: Any) -> dict[str, bytes]:
    """Return the new contents of the config files that no longer match the model's configs."""
    path: Path = model._qformat_origin.layout.path
    stored = read_config(path, trust_remote_code=model.is_remote_code())
    found: dict[str, bytes] = {}
    written = _with_changes(path / CONFIG_NAME, stored.to_dict(), model.config.to_dict())
    if written is not None:
        found[CONFIG_NAME] = written
    if model.can_generate():
        file = path / GENERATION_CONFIG_NAME
        base = GenerationConfig.from_pretrained(path) if file.is_file() else GenerationConfig.from_model_config(stored)
        written = _with_changes(file, base.to_dict(), model.generation_config.to_dict())
        if written is not None:
            found[GENERATION_CONFIG_NAME] = written
    return found


def _with_changes(file: Path, stored: dict[str, Any], now: dict[str, Any]) -> bytes | None:
    changes = {
        name: now.get(name)
        for name in {*stored, *now} - _NOT_COMPARED
        if json.dumps(stored.get(name), default=str) != json.dumps(now.get(name), default=str)
    }
    if not changes:
        return None
    text: Any = {}
    if file.is_file():
        data = file.read_bytes()
        text = strict_json.loads(
            data, path=file, max_nbytes=MAX_CONFIG_NBYTES, error=ArtifactError, python_numbers=True
        )
    return (json.dumps({**text, **changes}, indent=2, sort_keys=True) + "\n").encode("utf-8")


def _check_foreign_target(out: Path, origin: Path) -> None:
    """Raise TargetError if the model is mapped from the files in `out`, or if `out` holds an artifact."""
    if os.path.realpath(out) == os.path.realpath(origin):
        raise TargetError(f"{out}: the model is mapped from files in this directory. Choose another directory")
    if os.path.lexists(out / MANIFEST_NAME):
        raise TargetError(
            f"{out}: contains an artifact; its manifest would no longer match its files. Choose another directory"
        )
