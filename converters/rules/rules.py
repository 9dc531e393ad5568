"""Plan stage: which tensors of a source checkpoint become NF4, and which modules stay in 16 bit.

One table (`linear_names`) decides, based only on names, shapes, dtypes and config.json. A weight is quantized if it
certainly belongs to an `nn.Linear` that every reader replaces; everything else is kept and reported.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from qformat.artifact.tensor_spec import TensorSpec
from qformat.converters.rules import linear_names as names

QUANTIZABLE_DTYPES: Final = frozenset({"BF16", "F16", "F32"})


class KeepReason(StrEnum):
    """Reason for keeping a tensor in 16 bit. The values are stable, because the manifest and `--json` contain them."""

    NOT_A_WEIGHT = "not_a_weight"
    NOT_A_MATRIX = "not_a_matrix"
    EMPTY = "empty"
    NOT_FLOAT = "not_float"
    OUTPUT_EMBEDDING = "output_embedding"
    TIED_EMBEDDING = "tied_embedding"
    EMBEDDING = "embedding"
    ROUTER = "router"
    EXPERT = "expert"
    MAMBA_KERNEL = "mamba_kernel"
    RECURRENT_GATE = "recurrent_gate"
    VISION_OR_AUDIO = "vision_or_audio"
    PROJECTOR = "projector"
    SHARED_BLOCK = "shared_block"
    TRANSPOSED_CONV1D = "transposed_conv1d"
    LINEAR_SUBCLASS = "linear_subclass"
    REWRITTEN_ON_LOAD = "rewritten_on_load"
    NOT_KNOWN_TO_BE_LINEAR = "not_known_to_be_linear"
    COUPLED = "coupled"
    SKIPPED_BY_RECIPE = "skipped_by_recipe"
    NOT_PACKED_IN_SOURCE = "not_packed_in_source"

    @property
    def phrase(self) -> str:
        """The reason in words, for reports."""
        return _PHRASES[self]


_PHRASES: Final[dict[KeepReason, str]] = {
    KeepReason.NOT_A_WEIGHT: "not the weight of a module",
    KeepReason.NOT_A_MATRIX: "not a matrix",
    KeepReason.EMPTY: "has no elements",
    KeepReason.NOT_FLOAT: "not BF16, F16 or F32",
    KeepReason.OUTPUT_EMBEDDING: "output embedding or head",
    KeepReason.TIED_EMBEDDING: "embedding tied to the output",
    KeepReason.EMBEDDING: "embedding",
    KeepReason.ROUTER: "router or gate",
    KeepReason.EXPERT: "expert matrix: stays in 16 bit in this version",
    KeepReason.MAMBA_KERNEL: "read directly by the Mamba kernels",
    KeepReason.RECURRENT_GATE: "gate of a linear-attention layer, one row per head",
    KeepReason.VISION_OR_AUDIO: "part of a vision or audio tower",
    KeepReason.PROJECTOR: "projector between modalities",
    KeepReason.SHARED_BLOCK: "block shared by several layers",
    KeepReason.TRANSPOSED_CONV1D: "Conv1D, stored transposed",
    KeepReason.LINEAR_SUBCLASS: "subclass of Linear that bitsandbytes readers do not replace",
    KeepReason.REWRITTEN_ON_LOAD: "split or joined by transformers while loading",
    KeepReason.NOT_KNOWN_TO_BE_LINEAR: "not known to be a Linear",
    KeepReason.COUPLED: "vLLM fuses it with a weight that is kept",
    KeepReason.SKIPPED_BY_RECIPE: "kept by the recipe",
    KeepReason.NOT_PACKED_IN_SOURCE: "in 16 bit in the adopted checkpoint",
}


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to one tensor.

    Attributes:
        quantize: Whether the tensor becomes NF4.
        reason: Why the tensor is kept. None exactly if `quantize`.
        is_linear: Whether the module is, or may be, an `nn.Linear`. A kept one is put on the skip list, because a
            reader that replaced it would fail.
    """

    quantize: bool
    reason: KeepReason | None
    is_linear: bool

    def __post_init__(self) -> None:
        assert self.quantize == (self.reason is None)


QUANTIZE: Final = Decision(quantize=True, reason=None, is_linear=True)


def module_path(tensor_name: str) -> str:
    """Return the path of the module that owns this weight. Other tensors keep their full name."""
    return tensor_name.removesuffix(".weight")


def individual_decisions(tensors: Sequence[TensorSpec], config: Mapping[str, object]) -> dict[str, Decision]:
    """Decide about every tensor individually, before fused weights are coupled.

    Args:
        tensors: All tensors of the source.
        config: Contents of config.json.
    """
    types = model_types(config)
    tied = _is_tied(config, tensors)
    return {tensor.name: _decide(tensor, types, tied=tied) for tensor in tensors}


def default_decisions(tensors: Sequence[TensorSpec], config: Mapping[str, object]) -> dict[str, Decision]:
    """Decide about every tensor by the default table: name, shape, dtype and config.json.

    Args:
        tensors: All tensors of the source.
        config: Contents of config.json.
    """
    return couple(individual_decisions(tensors, config))


def model_types(config: Mapping[str, object]) -> frozenset[str]:
    """Return the model types in a config: its own and those of the configs nested in it."""
    found = {config["model_type"]} if isinstance(config.get("model_type"), str) else set()
    for value in config.values():
        if isinstance(value, Mapping) and isinstance(value.get("model_type"), str):
            found.add(value["model_type"])
    return frozenset(str(name) for name in found)


def _is_tied(config: Mapping[str, object], tensors: Sequence[TensorSpec]) -> bool:
    text = config.get("text_config")
    for holder in (config, text if isinstance(text, Mapping) else {}):
        value = holder.get("tie_word_embeddings")
        if isinstance(value, bool):
            return value
    return not any(_is_output(module_path(tensor.name).split(".")) for tensor in tensors)


def _is_output(parts: Sequence[str]) -> bool:
    return (
        not names.OUTPUT_COMPONENTS.isdisjoint(parts)
        or parts[-1] in names.OUTPUT_LEAVES
        or (len(parts) == 1 and parts[0] in names.OUTPUT_ROOTS)
    )


def _decide(tensor: TensorSpec, types: frozenset[str], *, tied: bool) -> Decision:
    reason = _keep_reason(tensor, types, tied=tied)
    if reason is None:
        return QUANTIZE
    return Decision(quantize=False, reason=reason, is_linear=_may_be_linear(tensor, reason))


def _may_be_linear(tensor: TensorSpec, reason: KeepReason) -> bool:
    if reason in (KeepReason.EMBEDDING, KeepReason.EXPERT):
        return False
    parts = module_path(tensor.name).split(".")
    if parts[-1] in names.EMBEDDING_LEAVES:
        return False
    return tensor.name.endswith(".weight") and len(tensor.shape) == 2


def _keep_reason(tensor: TensorSpec, types: frozenset[str], *, tied: bool) -> KeepReason | None:
    parts = module_path(tensor.name).split(".")
    if _is_expert(parts, n_dims=len(tensor.shape)):
        return KeepReason.EXPERT
    if not tensor.name.endswith(".weight"):
        return KeepReason.NOT_A_WEIGHT
    if len(tensor.shape) != 2:
        return KeepReason.NOT_A_MATRIX
    if 0 in tensor.shape:
        return KeepReason.EMPTY
    if tensor.dtype not in QUANTIZABLE_DTYPES:
        return KeepReason.NOT_FLOAT
    return _reason_by_role(parts, tied=tied) or _reason_by_type(parts, types)


def _is_expert(parts: Sequence[str], *, n_dims: int) -> bool:
    if not names.EXPERT_COMPONENTS.isdisjoint(parts):
        return True
    return n_dims == 3 and any(names.MOE_PATTERN.search(part) for part in parts)


def _reason_by_role(parts: Sequence[str], *, tied: bool) -> KeepReason | None:
    if not names.ROUTER_COMPONENTS.isdisjoint(parts):
        return KeepReason.ROUTER
    if _is_output(parts):
        return KeepReason.TIED_EMBEDDING if tied else KeepReason.OUTPUT_EMBEDDING
    if any(names.PROJECTOR_PATTERN.search(part) for part in parts):
        return KeepReason.PROJECTOR
    if any(names.VISION_OR_AUDIO_PATTERN.search(part) for part in parts):
        return KeepReason.VISION_OR_AUDIO
    if parts[-1] in names.EMBEDDING_LEAVES:
        is_tied = tied and parts[-1] in names.TOKEN_EMBEDDING_LEAVES
        return KeepReason.TIED_EMBEDDING if is_tied else KeepReason.EMBEDDING
    if not names.SHARED_BLOCK_COMPONENTS.isdisjoint(parts):
        return KeepReason.SHARED_BLOCK
    if parts[-1] in names.MAMBA_KERNEL_LEAVES and parts[-2:-1] and parts[-2] in names.MAMBA_COMPONENTS:
        return KeepReason.MAMBA_KERNEL
    if ".".join(parts[-2:]) in names.RECURRENT_GATE_NAMES:
        return KeepReason.RECURRENT_GATE
    return None


def _reason_by_type(parts: Sequence[str], types: frozenset[str]) -> KeepReason | None:
    leaf, with_parent = parts[-1], ".".join(parts[-2:])
    if types & names.CONV1D_TYPES and with_parent in names.CONV1D_NAMES:
        return KeepReason.TRANSPOSED_CONV1D
    if any(with_parent in names.REWRITTEN_BY_TYPE.get(model_type, ()) for model_type in types):
        return KeepReason.REWRITTEN_ON_LOAD
    if not (
        leaf in names.LINEAR_LEAVES
        or with_parent in names.LINEAR_WITH_PARENT
        or any(with_parent in names.LINEAR_BY_TYPE.get(model_type, ()) for model_type in types)
    ):
        return KeepReason.NOT_KNOWN_TO_BE_LINEAR
    return KeepReason.LINEAR_SUBCLASS if types & names.LINEAR_SUBCLASS_TYPES else None


@dataclass(frozen=True, slots=True)
class CoupledGroup:
    """Weights that vLLM computes as one product and that therefore share one precision.

    Attributes:
        tensors: Names of two or more weights, in the order of the fused product.
        fused_module: Path of the fused module in vLLM.
    """

    tensors: tuple[str, ...]
    fused_module: str


def coupled_groups(tensor_names: Iterable[str]) -> list[CoupledGroup]:
    """Return the groups of two or more weights that vLLM fuses, sorted by their parent's path."""
    leaves: defaultdict[str, set[str]] = defaultdict(set)
    for name in tensor_names:
        if name.endswith(".weight"):
            head, dot, leaf = module_path(name).rpartition(".")
            leaves[head + dot].add(leaf)
    groups = []
    for parent in sorted(leaves):
        for fusion in names.FUSIONS:
            parts = tuple(f"{parent}{part}.weight" for part in fusion.parts if part in leaves[parent])
            if len(parts) > 1:
                groups.append(CoupledGroup(parts, parent + fusion.fused))
    return groups


def couple(decisions: Mapping[str, Decision]) -> dict[str, Decision]:
    """Keep every weight that vLLM fuses with a kept one, with the reason `coupled`."""
    coupled = dict(decisions)
    for group in coupled_groups(decisions):
        if all(decisions[name].quantize for name in group.tensors):
            continue
        for name in group.tensors:
            if decisions[name].quantize:
                coupled[name] = Decision(quantize=False, reason=KeepReason.COUPLED, is_linear=True)
    return coupled
