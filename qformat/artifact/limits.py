"""The limits of format version 1 (spec section 9). A reader refuses what exceeds them before it allocates anything."""

from __future__ import annotations

MAX_HEADER_NBYTES = 32 * 2**20
"""JSON header of one safetensors file, padding included."""

MAX_MANIFEST_NBYTES = 128 * 2**20
"""`qformat.json`; a model of 270,000 packed tensors needs about 100 MB."""

MAX_INDEX_NBYTES = 64 * 2**20
"""`model.safetensors.index.json`."""

MAX_CONFIG_NBYTES = 4 * 2**20
"""`config.json`."""

MAX_NAME_NBYTES = 512
"""UTF-8 bytes of a tensor's name."""

MAX_DIMENSIONS = 8
"""Dimensions of a tensor."""

MAX_SIZE = 2**48
"""A dimension, an element count, a byte count or an offset."""
