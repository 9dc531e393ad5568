"""Checks the numbers in config.json that decide how much transformers builds, before it builds anything.

transformers makes a module for every layer and a list entry for every label, whatever the number in the file. It would
build millions of layers for minutes before anything compares them with the tensors. A number that no model with these
tensors has is therefore rejected first. Smaller contradictions are found when the tensors are attached.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qformat import strict_json
from qformat.artifact.limits import MAX_CONFIG_NBYTES
from qformat.artifact.reading.structure import ShardLayout
from qformat.artifact.sources.source_files import read_source_file
from qformat.errors import ArtifactError, Reason
from qformat.names import CONFIG_NAME

if TYPE_CHECKING:
    from torch import nn

MAX_LAYERS = 1024
"""Largest number of layers of any model: a second and 40 MB on the meta device. Real models have up to 130."""

FEW_LAYERS = 128
"""Number of layers that costs too little to be compared with the tensors. Some models share the tensors of layers."""

MAX_EXPERTS = 2**20
FEW_EXPERTS = 2**14
"""Number of experts in all layers that costs too little to be compared with the tensors."""

MAX_WIDTH = 2**24
"""Largest number of labels, or size of a vocabulary or hidden state. Real vocabularies have up to a million tokens."""

MAX_COMPUTED_NBYTES = 2**28
"""Largest size in bytes of the buffers that no file holds and that a model computes, unless the model is larger. The
causal masks of real models have up to 142 MB."""

_LAYERS = re.compile(r"(?:^|_)(?:layers?|depths?|blocks)$")
_EXPERTS = re.compile(r"(?:^|_)experts$")
_WIDTHS = {
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "ffn_dim", "num_labels", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "n_head", "n_embd", "n_inner", "d_model", "d_ff", "d_kv"),
}
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the tensors of a checkpoint show about its model.

    Attributes:
        n_tensors: Number of tensors.
        n_numbered: One more than the largest number that is a part of a tensor's name.
        dimensions: All dimensions of the tensors.
    """

    n_tensors: int
    n_numbered: int
    dimensions: frozenset[int]

    @classmethod
    def of(cls, shapes: Mapping[str, Shape]) -> Evidence:
        """Return the evidence of tensors with these shapes before packing, by their names."""
        numbers = (int(number[:9]) for name in shapes for number in _NUMBER.findall(name))
        return cls(
            len(shapes), 1 + max(numbers, default=0), frozenset(size for shape in shapes.values() for size in shape)
        )

    @classmethod
    def of_layout(cls, layout: ShardLayout) -> Evidence:
        """Return the evidence of the tensors in shards."""
        shapes = {name: place.entry.shape for name, place in layout.located.items()}
        return cls.of(shapes | {name: state.shape for name, state in layout.states.items()})


def check_numbers(path: Path, evidence: Evidence | None = None) -> None:
    """Check the numbers of layers, experts and labels and the widths in the config.json of a model.

    Args:
        path: Directory of the model. Nothing is checked if it has no config.json.
        evidence: What the tensors show, None if they are not known.

    Raises:
        ArtifactError: A number is implausible (config_field), or the file is too large or not JSON (json_*).
    """
    if not os.path.lexists(path / CONFIG_NAME):
        return
    data = read_source_file(path, CONFIG_NAME, max_nbytes=MAX_CONFIG_NBYTES, error=ArtifactError)
    config = strict_json.loads(
        data, path=path / CONFIG_NAME, max_nbytes=MAX_CONFIG_NBYTES, error=ArtifactError, remarks=[]
    )
    layers, experts = 1, ("", 0)
    for key, value in _numbers(config):
        if _LAYERS.search(key):
            _check(path, key, value, MAX_LAYERS, None if evidence is None else max(FEW_LAYERS, 2 * evidence.n_numbered))
            layers = max(layers, value)
        elif _EXPERTS.search(key):
            _check(path, key, value, MAX_EXPERTS, None)
            experts = max(experts, (key, value), key=lambda item: item[1])
        elif key in _WIDTHS:
            widest = None if evidence is None else 16 * max(evidence.dimensions, default=0)
            _check(path, key, value, MAX_WIDTH, None if widest is None else max(2**16, widest))
    if evidence is not None and experts[1] not in evidence.dimensions:
        _check(path, *experts, MAX_EXPERTS, max(FEW_EXPERTS, evidence.n_tensors) // layers)


def check_computed(model: nn.Module, layout: ShardLayout) -> None:
    """Check the size of the buffers that no file holds, which follows numbers in config.json.

    Args:
        model: Model on the meta device.
        layout: Layout of the shards.

    Raises:
        ArtifactError: The buffers are larger than any model needs (config_field).
    """
    computed = {
        f"{prefix}.{name}": buffer.nbytes
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
        if (buffer := module._buffers.get(name)) is not None
    }
    limit = max(MAX_COMPUTED_NBYTES, sum(layout.shard_nbytes.values()))
    if (total := sum(computed.values())) > limit:
        largest = max(computed, key=lambda name: computed[name])
        raise ArtifactError(
            Reason.CONFIG_FIELD,
            layout.path / CONFIG_NAME,
            f"its model computes {total} bytes that no file holds (the limit is {limit}), most of them in {largest}",
        )


def _numbers(config: strict_json.Json, key: str = "") -> Iterator[tuple[str, int]]:
    """Yield every integer of a JSON value with the key that it, or the list around it, has."""
    if isinstance(config, dict):
        for name, value in config.items():
            yield from _numbers(value, name)
    elif isinstance(config, list):
        for value in config:
            yield from _numbers(value, key)
    elif type(config) is int:
        yield key, config


def _check(path: Path, key: str, value: int, at_most: int, by_tensors: int | None) -> None:
    limit = at_most if by_tensors is None else min(at_most, by_tensors)
    if value <= limit:
        return
    shown = str(value) if value < 10**20 else "more than 10^20"
    shows = "no model has more than" if limit == at_most else "the tensors of this one allow at most"
    raise ArtifactError(
        Reason.CONFIG_FIELD,
        path / CONFIG_NAME,
        f"is {shown}, but {shows} {limit}",
        field=key,
        next_step=f"{CONFIG_NAME} and the shards belong to different models, or the file is damaged",
    )
