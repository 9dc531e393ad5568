"""What the default recipe packs of a 16-bit checkpoint, from its headers: for plans of what is not converted yet."""

from __future__ import annotations

from collections.abc import Mapping

from qformat.artifact.components import PackedShape
from qformat.artifact.header import NewTensor
from qformat.codec.floats import FloatFormat
from qformat.converters.rules import recipe
from qformat.converters.rules.rules import TensorInfo


def as_converted(tensors: list[NewTensor], config: Mapping[str, object]) -> dict[str, PackedShape]:
    """Return the layouts of the weights that `qformat convert` packs without options, by name."""
    infos = [TensorInfo(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
    choices = recipe.apply(recipe.load_recipe(None), infos, config)
    return {
        info.name: PackedShape(info.shape, FloatFormat(info.dtype), options.block_size, options.double_quant)
        for info in infos
        if (options := choices[info.name].options) is not None
    }
