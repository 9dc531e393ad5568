"""Weights of a 16-bit checkpoint that the default recipe packs, for memory plans before the conversion."""

from __future__ import annotations

from collections.abc import Mapping

from qformat.artifact.components import PackedShape
from qformat.artifact.tensor_spec import TensorSpec
from qformat.codec.floats import FloatFormat
from qformat.converters.rules import recipe


def as_converted(tensors: list[TensorSpec], config: Mapping[str, object]) -> dict[str, PackedShape]:
    """Return the layouts of the weights that `qformat convert` packs by default, by tensor name.

    Args:
        tensors: Tensors of the checkpoint, from its headers.
        config: The checkpoint's `config.json`.

    Returns:
        One layout per packed weight.
    """
    choices = recipe.apply(recipe.load_recipe(None), tensors, config)
    return {
        tensor.name: PackedShape(tensor.shape, FloatFormat(tensor.dtype), options.block_size, options.double_quant)
        for tensor in tensors
        if (options := choices[tensor.name].options) is not None
    }
