"""The small files of an output, as transformers writes them: config.json and the index of the shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from qformat import strict_json
from qformat.artifact.components import PackedShape
from qformat.artifact.layout import Shard
from qformat.artifact.manifest import JsonObject
from qformat.codec.floats import FloatFormat
from qformat.converters.rules.recipe import Recipe


def config_bytes(config: JsonObject, skip: list[str], recipe: Recipe, layouts: Mapping[str, PackedShape]) -> bytes:
    """Return config.json with the quantization_config that transformers writes for bitsandbytes.

    Args:
        config: Contents of the source's config.json.
        skip: Paths of the modules that stay in 16 bit.
        recipe: The recipe, for its default options.
        layouts: Layouts of the quantized weights, keyed by name. Their most common dtype becomes the compute dtype.
    """
    formats = Counter(layout.float_format for layout in layouts.values())
    compute = formats.most_common(1)[0][0] if formats else FloatFormat.BF16
    quantization: JsonObject = {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": compute.torch_name,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": recipe.defaults.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(skip),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
    return small_json({**config, "quantization_config": quantization}, python_numbers=True)


def index_bytes(shards: tuple[Shard, ...]) -> bytes:
    """Return model.safetensors.index.json, which maps each tensor to its shard."""
    weight_map = {placed.tensor.name: shard.name for shard in shards for placed in shard.tensors}
    total = sum(placed.tensor.nbytes for shard in shards for placed in shard.tensors)
    return small_json({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def small_json(value: object, *, python_numbers: bool = False) -> bytes:
    """Return a value as human-readable JSON: indented, with a final newline.

    Args:
        value: Value to write.
        python_numbers: Whether NaN and Infinity may occur, as in config.json.
    """
    return (strict_json.dumps(value, indent=2, python_numbers=python_numbers) + "\n").encode("utf-8")
