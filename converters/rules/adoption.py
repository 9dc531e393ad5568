"""Plan stage for a source that is already in 4 bit: the artifact gets what the file has, so nothing is decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qformat.artifact.manifest import JsonObject
from qformat.artifact.tensor_spec import TensorSpec
from qformat.codec.floats import FloatFormat
from qformat.converters.rules.recipe import Choice, NF4Options
from qformat.converters.rules.rules import KeepReason, individual_decisions, module_path
from qformat.converters.rules.skip_list import skip_modules
from qformat.converters.sources.source import Source
from qformat.errors import Option, Reason, SourceError, UsageError
from qformat.names import CONFIG_NAME

_SKIP_LIST = "llm_int8_skip_modules"
_COMPUTE_DTYPE = "bnb_4bit_compute_dtype"


def refuse_options(source: Source, given: Sequence[Option]) -> None:
    """Reject options that decide how weights are quantized, because the weights of this source stay as they are.

    Args:
        source: The source, which has packed weights.
        given: The options of this kind that the caller gave.

    Raises:
        UsageError: At least one was given.
    """
    if not given:
        return
    words: list[str | Option] = [given[0]]
    for option in given[1:-1]:
        words += [", ", option]
    if len(given) > 1:
        words += [" and ", given[-1]]
    raise UsageError(
        f"{source.location}: the checkpoint is already in 4 bit and is adopted unmodified. Leave out ", *words
    )


def choose(tensors: Sequence[TensorSpec], source: Source) -> dict[str, Choice]:
    """Return what happens to each tensor: packed ones are adopted, others kept for the reason of the default rules.

    Args:
        tensors: All tensors of the source, adopted weights included.
        source: The source, which lists its packed weights.
    """
    decisions = individual_decisions(tensors, source.config)
    choices: dict[str, Choice] = {}
    for name, decision in decisions.items():
        weight = source.packed.get(name)
        if weight is not None:
            options = NF4Options(weight.layout.block_size, weight.layout.double_quant)
            choices[name] = Choice(options, None, is_linear=True, by_rule=None)
        else:
            reason = decision.reason or KeepReason.NOT_PACKED_IN_SOURCE
            choices[name] = Choice(None, reason, decision.is_linear, by_rule=None)
    return choices


def quantization_config(choices: Mapping[str, Choice], source: Source) -> JsonObject:
    """Return the source's quantization_config, completed with what an artifact requires (spec section 10).

    Args:
        choices: What happens to each tensor, from `choose`.
        source: The source, whose config.json has a quantization_config.

    Raises:
        SourceError: The source's skip list contains a module that is packed.
    """
    stored = source.config["quantization_config"]
    assert isinstance(stored, dict)
    formats = [weight.layout.float_format for weight in source.packed.values()]
    compute = stored.get(_COMPUTE_DTYPE)
    if compute not in {float_format.torch_name for float_format in FloatFormat}:
        compute = formats[0].torch_name
    return {
        **stored,
        _COMPUTE_DTYPE: compute,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": any(weight.layout.double_quant for weight in source.packed.values()),
        _SKIP_LIST: list(_skip_list(choices, source, stored.get(_SKIP_LIST))),
        "load_in_4bit": True,
        "load_in_8bit": False,
    }


def _skip_list(choices: Mapping[str, Choice], source: Source, stored: object) -> list[str]:
    """Return the entries of the source's skip list, which its readers rely on, and every Linear that is in 16 bit."""
    entries = stored if isinstance(stored, list) else []
    packed = {module_path(name) for name in source.packed}
    parents = {
        module[:end] for module in packed for end in range(len(module) + 1) if module[end : end + 1] in {"", "."}
    }
    for entry in entries:
        if not isinstance(entry, str) or entry in parents:
            raise SourceError(
                Reason.SKIP_MODULES,
                source.location / CONFIG_NAME,
                f"{entry!r} is on the list of 16-bit modules, but its weight is packed",
                field=f"quantization_config.{_SKIP_LIST}",
            )
    # Experts that are packed one by one must not be skipped as a group.
    without_experts = {
        name: choice for name, choice in choices.items() if not (choice.quantize and ".experts." in name)
    }
    return sorted({*entries, *skip_modules(without_experts, source.config)})
