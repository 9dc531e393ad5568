"""Limits of format version 1 (spec section 9). A reader checks them before it allocates memory."""

from __future__ import annotations

MAX_HEADER_NBYTES = 32 * 2**20
"""Largest JSON header of a safetensors file in bytes, including its padding."""

MAX_MANIFEST_NBYTES = 128 * 2**20
"""Largest `qformat.json` in bytes. A model of 270,000 packed tensors needs about 100 MB."""

MAX_INDEX_NBYTES = 64 * 2**20
"""Largest `model.safetensors.index.json` in bytes."""

MAX_CONFIG_NBYTES = 4 * 2**20
"""Largest `config.json` in bytes."""

MAX_NAME_NBYTES = 512
"""Largest name of a tensor in bytes of UTF-8."""

MAX_DIMENSIONS = 8
"""Largest number of dimensions of a tensor."""

MAX_SIZE = 2**48
"""Largest dimension, number of elements, number of bytes or offset."""
