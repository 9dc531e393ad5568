"""The sizes of a model in a GGUF file, from its metadata."""

from __future__ import annotations

from dataclasses import dataclass

from qformat.converters.sources.gguf.architectures import EMBEDDING_NAME, Architecture
from qformat.converters.sources.gguf.header import GgufHeader
from qformat.converters.sources.gguf.metadata import Metadata

_LARGEST_LAYER_COUNT = 10_000
_LARGEST_EXPERT_COUNT = 4096
_LARGEST_SIZE = 2**24
_LARGEST_HEAD = 2**16


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a model.

    Attributes:
        letters: The sizes that the letters in the shapes of the table stand for: h hidden, v vocabulary, d head, n
            heads, g groups (heads of keys), q and k all rows of query and key, Q those of query, key and value, f
            feed-forward, F twice that, t three times h, c convolution, e experts, m an expert's and s the shared
            expert's feed-forward.
        n_layers: Number of layers.
        has_attention: Whether each layer has attention.
        n_rotated: Number of dimensions of a head that are rotated.
    """

    letters: dict[str, int]
    n_layers: int
    has_attention: tuple[bool, ...]
    n_rotated: int


def read_sizes(metadata: Metadata, header: GgufHeader, architecture: Architecture) -> Sizes:
    """Read the sizes and check that they can be those of the architecture.

    Args:
        metadata: Metadata of the file.
        header: Header of the file.
        architecture: Architecture of the model.

    Raises:
        SourceError: A size is missing, or of a model that is not supported.
    """
    n_layers = metadata.integer("block_count", 1, _LARGEST_LAYER_COUNT)
    hidden = metadata.integer("embedding_length", 1, _LARGEST_SIZE)
    n_heads = metadata.integer("attention.head_count", 1, _LARGEST_HEAD)
    head = metadata.integer("attention.key_length", 1, _LARGEST_HEAD, default=hidden // n_heads)
    groups = _groups_of_layers(metadata, architecture, n_layers, n_heads)
    n_groups = max(groups)
    embedding = header.tensors.get(EMBEDDING_NAME)
    if n_groups < 1 or n_heads % n_groups or head % 2 or not set(groups) <= {0, n_groups}:
        raise metadata.refuse(
            "attention.head_count", f"{n_heads} heads of {head} dimensions in {n_groups} groups are not supported"
        )
    feed_forward = metadata.integer("feed_forward_length", 1, _LARGEST_SIZE, default=0)
    letters = {
        "h": hidden,
        "v": embedding.shape[0] if embedding is not None else 0,
        "n": n_heads,
        "g": n_groups,
        "d": head,
        "q": n_heads * head,
        "k": n_groups * head,
        "Q": (n_heads + 2 * n_groups) * head,
        "f": feed_forward,
        "F": 2 * feed_forward,
        "t": 3 * hidden,
    }
    if "ffn_gate_exps.weight" in architecture.parts:
        letters["e"] = metadata.integer("expert_count", 1, _LARGEST_EXPERT_COUNT)
        letters["m"] = metadata.integer("expert_feed_forward_length", 1, _LARGEST_SIZE)
        letters["s"] = metadata.integer("expert_shared_feed_forward_length", 1, _LARGEST_SIZE, default=feed_forward)
    if architecture.convolution:
        letters["c"] = metadata.integer("shortconv.l_cache", 1, _LARGEST_HEAD)
    return Sizes(letters, n_layers, tuple(n > 0 for n in groups), _rotated(metadata, architecture, head))


def _groups_of_layers(metadata: Metadata, architecture: Architecture, n_layers: int, n_heads: int) -> tuple[int, ...]:
    key = "attention.head_count_kv"
    if architecture.convolution:
        return metadata.per_layer(key, n_layers, n_heads)
    return (metadata.integer(key, 1, _LARGEST_HEAD, default=n_heads),) * n_layers


def _rotated(metadata: Metadata, architecture: Architecture, head: int) -> int:
    rotated = metadata.integer("rope.dimension_count", 1, _LARGEST_HEAD, default=head)
    if architecture.partly_rotated and rotated < head and rotated % 2 == 0:
        return rotated
    if rotated != head:
        raise metadata.refuse(
            "rope.dimension_count", f"{rotated}, expected {head}: every dimension of a head must be rotated"
        )
    return head
