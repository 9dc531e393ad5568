"""Limits of format version 1 (spec section 9). A reader checks them before it allocates memory."""

from __future__ import annotations

from qformat.names import ADAPTER_CONFIG_NAME, CONFIG_NAME, GENERATION_CONFIG_NAME, INDEX_NAME

MAX_HEADER_NBYTES = 32 * 2**20
"""Largest JSON header of a safetensors file in bytes, including its padding."""

MAX_MANIFEST_NBYTES = 64 * 2**20
"""Largest `qformat.json` in bytes. A model of 70,000 packed tensors needs about 35 MB."""

MAX_INDEX_NBYTES = 64 * 2**20
"""Largest `model.safetensors.index.json` in bytes."""

MAX_CONFIG_NBYTES = 4 * 2**20
"""Largest `config.json`, `generation_config.json` or `adapter_config.json` in bytes."""

MAX_SMALL_FILE_NBYTES = 64 * 2**20
"""Largest file of a model that is neither a shard nor one of those with a limit of their own, in bytes. The largest
tokenizer.json of a model on the Hub has 35 MB; reading one takes several times its size in memory."""

MAX_TOKENIZER_VALUES = 3 * 2**20
"""Largest number of JSON values of a tokenizer's file: 450 MB of memory in transformers. The largest tokenizer of a
model on the Hub, with 900,000 tokens and their scores, has 2.7 million."""

MAX_TEMPLATE_NBYTES = 2**20
"""Largest chat template in bytes. The longest of known models have 50 kB."""

_TEMPLATE_SUFFIX = ".jinja"

MAX_NAME_NBYTES = 512
"""Largest name of a tensor in bytes of UTF-8."""

MAX_DIMENSIONS = 8
"""Largest number of dimensions of a tensor."""

MAX_SIZE = 2**48
"""Largest dimension, number of elements, number of bytes or offset."""


def max_nbytes_of(name: str) -> int:
    """Return the largest size of a file of the model in bytes.

    Args:
        name: Name of a file of a model or an adapter, which is neither a shard nor the manifest.
    """
    if name.endswith(_TEMPLATE_SUFFIX):
        return MAX_TEMPLATE_NBYTES
    return {
        INDEX_NAME: MAX_INDEX_NBYTES,
        CONFIG_NAME: MAX_CONFIG_NBYTES,
        GENERATION_CONFIG_NAME: MAX_CONFIG_NBYTES,
        ADAPTER_CONFIG_NAME: MAX_CONFIG_NBYTES,
    }.get(name, MAX_SMALL_FILE_NBYTES)
