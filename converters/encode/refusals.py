"""What no recipe makes an artifact of: tensors that are quantized already, names that readers could not take."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from qformat import strict_json
from qformat.artifact.components import Component, PackedShape
from qformat.artifact.limits import MAX_NAME_NBYTES
from qformat.converters.rules.rules import module_path
from qformat.converters.sources.source import Source, SourceTensor
from qformat.errors import Option, Reason, SourceError

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
    """Refuse a tensor that is quantized already, and a weight in a dtype that is not encoded. Raises SourceError."""
    path = source.location / tensor.file
    for suffix, kind in _QUANTIZED_SUFFIXES.items():
        if tensor.name.endswith(suffix):
            raise SourceError(
                Reason.ALREADY_QUANTIZED, path, f"the checkpoint is quantized already ({kind})", tensor=tensor.name,
                next_step="Convert the 16-bit checkpoint that it was made from",
            )  # fmt: skip
    if tensor.name.endswith(".weight") and tensor.dtype not in {"BF16", "F16", "F32"}:
        what = "8-bit floats" if tensor.dtype.startswith("F8") else tensor.dtype
        raise SourceError(
            Reason.UNSUPPORTED_DTYPE, path, f"{what} weights cannot be converted", tensor=tensor.name, field="dtype",
            next_step="Save the checkpoint in bfloat16, float16 or float32 first",
        )  # fmt: skip


def refuse_names(source: Source, tensors: Sequence[SourceTensor], layouts: Mapping[str, PackedShape]) -> None:
    """Refuse a name that a component must get, one too long for a component's suffix, and one with regex syntax."""
    for tensor in tensors:
        path = source.location / tensor.file
        if tensor.name.endswith(".weight") and (found := _REGEX_SYNTAX.search(tensor.name)):
            raise SourceError(
                Reason.SKIP_MODULES,
                path,
                f"readers take the names of 16-bit modules as regular expressions, and {found[0]!r} is their syntax",
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
                    f"has the name that the {part.label} of {tensor.name!r} must get",
                    tensor=name,
                    next_step=("Keep that one as it is with ", Option("skip", (module_path(tensor.name),))),
                )
            if len(name.encode("utf-8")) > MAX_NAME_NBYTES:
                raise SourceError(
                    Reason.HEADER_LIMIT,
                    path,
                    f"the name of its {part.label} would have more than {MAX_NAME_NBYTES} bytes",
                    tensor=tensor.name,
                    next_step=("Keep it as it is with ", Option("skip", (module_path(tensor.name),))),
                )


def refuse_unreadable(source: Source, name: str, data: bytes, *, max_nbytes: int) -> None:
    """Refuse what would be written but not read again: a file that is larger than a reader takes."""
    path = source.location / f"{name} (as it would be written)"
    strict_json.loads(data, path=path, max_nbytes=max_nbytes, error=SourceError)
