"""Rejects what no recipe can convert: quantized or empty tensors, and names that readers cannot handle."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from qformat import strict_json
from qformat.artifact.components import Component, PackedShape
from qformat.artifact.limits import MAX_NAME_NBYTES
from qformat.converters.rules.linear_names import LINEAR_LEAVES
from qformat.converters.rules.rules import module_path
from qformat.converters.sources.source import Source, SourceTensor
from qformat.converters.sources.wrapped.wrappers import of_unmerged_adapter, without, wrapper_parts
from qformat.errors import Option, Reason, SourceError
from qformat.names import CONFIG_NAME

_QUANTIZED_SUFFIXES = {
    ".absmax": "bitsandbytes",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes",
    ".SCB": "bitsandbytes int8",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "compressed-tensors or fp8",
    ".weight_scale_inv": "fp8 with block scales",
    "_blocks": "MXFP4",
}

_REGEX_SYNTAX = re.compile(r"[][\\^$*+?{}|()]")


def refuse_quantized(source: Source, tensor: SourceTensor) -> None:
    """Reject a tensor that is already quantized, or a weight whose dtype cannot be encoded.

    Args:
        source: The source, for messages.
        tensor: The tensor to check.

    Raises:
        SourceError: The tensor is rejected.
    """
    path = source.location / tensor.file
    for suffix, kind in _QUANTIZED_SUFFIXES.items():
        if tensor.name.endswith(suffix):
            raise SourceError(
                Reason.ALREADY_QUANTIZED, path, f"the checkpoint is already quantized ({kind})", tensor=tensor.name,
                next_step="Convert the original 16-bit checkpoint",
            )  # fmt: skip
    if tensor.dtype == "U32" and tensor.name.removesuffix("weight") + "scales" in source.tensors:
        raise SourceError(
            Reason.ALREADY_QUANTIZED, path, "the checkpoint is already quantized (MLX)", tensor=tensor.name,
            next_step="Convert the original 16-bit checkpoint",
        )  # fmt: skip
    if tensor.name.endswith(".weight") and tensor.dtype not in {"BF16", "F16", "F32"}:
        what = "8-bit floats" if tensor.dtype.startswith("F8") else tensor.dtype
        raise SourceError(
            Reason.UNSUPPORTED_DTYPE, path, f"{what} weights cannot be converted", tensor=tensor.name, field="dtype",
            next_step="Save the checkpoint in bfloat16, float16 or float32 first",
        )  # fmt: skip


def refuse_wrapped(source: Source) -> None:
    """Reject names that wrappers of a model put into its state, which no reader looks for.

    Args:
        source: The source.

    Raises:
        SourceError: A name is rejected.
    """
    names = [*source.tensors, *source.packed]
    has_own_adapters = any(key.endswith("_lora") for key in source.config)
    if (name := of_unmerged_adapter(names, has_own_adapters=has_own_adapters)) is not None:
        raise SourceError(
            Reason.UNKNOWN_TENSOR, source.location, "belongs to a PEFT model whose adapter is not merged", tensor=name,
            next_step="Merge it with PEFT (merge_and_unload), save the result with save_pretrained, and convert that",
        )  # fmt: skip
    if parts := wrapper_parts(names):
        name = next(name for name in names if without(name, parts) != name)
        raise SourceError(
            Reason.UNKNOWN_TENSOR, source.location,
            f"its name contains {' and '.join(map(repr, parts))}, which a wrapper of the model put there "
            "(torch.compile, DDP, FSDP), so no reader would find it", tensor=name,
            next_step=("Remove such parts from all names with ", Option("strip_wrappers", True)),
        )  # fmt: skip


def refuse_empty(source: Source) -> None:
    """Reject weights of Linear layers without elements, and a checkpoint in which no tensor has any.

    Args:
        source: The source.

    Raises:
        SourceError: Weights are empty.
    """
    empty = [tensor for tensor in source.tensors.values() if not tensor.n_elements]
    lost = [
        tensor
        for tensor in empty
        if tensor.shape == (0,) and module_path(tensor.name).rpartition(".")[2] in LINEAR_LEAVES
    ]
    if not source.packed and len(empty) == len(source.tensors):
        lost = lost or empty
    if lost:
        raise SourceError(
            Reason.COMPONENT_SHAPE, source.location / lost[0].file,
            f"is empty ({len(empty)} of {len(source.tensors)} tensors are). DeepSpeed ZeRO-3 saves such files if the "
            "weights are not gathered first", tensor=lost[0].name,
            next_step="Save the model again with stage3_gather_16bit_weights_on_model_save, or gather the weights with "
            "zero_to_fp32.py",
        )  # fmt: skip


def refuse_names(source: Source, tensors: Sequence[SourceTensor], layouts: Mapping[str, PackedShape]) -> None:
    """Reject names that collide with a component's name, are too long for a component's suffix or contain regex syntax.

    Args:
        source: The source.
        tensors: All tensors of the source.
        layouts: Layouts of the weights to quantize, keyed by name.

    Raises:
        SourceError: A name is rejected.
    """
    for tensor in tensors:
        path = source.location / tensor.file
        if tensor.name.endswith(".weight") and (found := _REGEX_SYNTAX.search(tensor.name)):
            raise SourceError(
                Reason.SKIP_MODULES,
                path,
                f"the name contains {found[0]!r}, but readers parse the names of 16-bit modules as regular expressions",
                tensor=tensor.name,
                next_step="Rename the module",
            )
        if tensor.name not in layouts:
            continue
        for part in Component:
            name = tensor.name + part.value
            if part is not Component.PACKED and name in source.tensors:
                raise SourceError(
                    Reason.DUPLICATE_TENSOR,
                    path,
                    f"has the name that the {part.label} of {tensor.name!r} would get",
                    tensor=name,
                    next_step=("Keep that weight in 16 bit with ", Option("skip", (module_path(tensor.name),))),
                )
            if len(name.encode("utf-8")) > MAX_NAME_NBYTES:
                raise SourceError(
                    Reason.HEADER_LIMIT,
                    path,
                    f"the name of its {part.label} would be longer than {MAX_NAME_NBYTES} bytes",
                    tensor=tensor.name,
                    next_step=("Keep it in 16 bit with ", Option("skip", (module_path(tensor.name),))),
                )


def refuse_unreadable(source: Source, name: str, data: bytes, *, max_nbytes: int) -> None:
    """Reject a small file that could be written but not read again, because it exceeds the limits of readers.

    Args:
        source: The source, for messages.
        name: Name of the file to write.
        data: Contents of the file.
        max_nbytes: Largest size in bytes that a reader accepts.

    Raises:
        SourceError: The file exceeds a limit.
    """
    path = source.location / f"{name} (as it would be written)"
    python_numbers = name == CONFIG_NAME
    strict_json.loads(data, path=path, max_nbytes=max_nbytes, error=SourceError, python_numbers=python_numbers)
