"""Plan stage: the list of modules that stay in 16 bit, which every reader of the artifact takes from config.json.

The list contains every name by which a reader may know a module: on disk, in memory, and fused (spec section 10, B2).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from qformat.converters.rules import linear_names as names
from qformat.converters.rules.rules import KeepReason, coupled_groups, model_types, module_path
from qformat.errors import Option, Reason, SourceError, Words
from qformat.names import CONFIG_NAME


class Verdict(Protocol):
    """Decision about a tensor, as `skip_modules` needs it. `Decision` and a recipe's `Choice` both implement it."""

    @property
    def quantize(self) -> bool:
        """Whether the tensor becomes NF4."""

    @property
    def reason(self) -> KeepReason | None:
        """Why it is kept. None if it is quantized."""

    @property
    def is_linear(self) -> bool:
        """Whether its module is, or may be, an `nn.Linear`."""


def skip_modules(decisions: Mapping[str, Verdict], config: Mapping[str, object]) -> list[str]:
    """Return `llm_int8_skip_modules`: the full path of every Linear that stays in 16 bit, sorted.

    The list contains the names on disk, the names that transformers 5 gives the modules in memory, the names of the
    modules that vLLM fuses them into, and the output embedding even if it is tied and absent on disk.

    Args:
        decisions: The decision for each tensor, keyed by name.
        config: Contents of config.json.

    Raises:
        SourceError: An entry would also match a quantized module, so that no skip list can be correct.
    """
    types = model_types(config)
    kept = {module_path(name) for name, verdict in decisions.items() if _is_listed(verdict)}
    kept |= {
        group.fused_module
        for group in coupled_groups(decisions)
        if all(_is_listed(decisions[name]) for name in group.tensors)
    }
    kept |= {_container_of_experts(name) for name in decisions} - {""}
    kept |= {"lm_head"}
    kept |= {module for name, module in names.OUTPUT_MODULE_BY_TYPE.items() if name in types}
    kept |= {tower for name in types for tower in names.TOWERS_IN_MEMORY_BY_TYPE.get(name, ())}
    entries = sorted({alias for module in kept for alias in memory_names(module, types)})
    quantized = {module_path(name) for name, verdict in decisions.items() if verdict.quantize}
    _check_no_entry_matches(entries, {alias for module in quantized for alias in memory_names(module, types)})
    return entries


def _is_listed(verdict: Verdict) -> bool:
    return not verdict.quantize and verdict.is_linear


def _container_of_experts(tensor_name: str) -> str:
    """Return the path up to `experts`, whose members older readers see as Linear modules, or "" if there is none."""
    head, found, _ = tensor_name.partition(".experts.")
    return f"{head}.experts" if found else ""


def memory_names(module: str, types: frozenset[str]) -> set[str]:
    """Return every name that a reader may use for a module: the one on disk and those in memory.

    Args:
        module: Path of the module on disk.
        types: Model types from config.json, see `model_types`.
    """
    current = {module}
    for renaming in names.RENAMINGS:
        if renaming.model_types is None or renaming.model_types & types:
            current = {renaming.pattern.sub(target, name, count=1) for name in current for target in renaming.targets}
    return current | {module}


def skip_matcher(entry: str) -> Callable[[str], bool]:
    """Return a function that tests whether a skip entry matches a module's path, as transformers does it.

    An entry matches as a regular expression from the start to a module boundary, and as a plain suffix (transformers'
    `should_convert_module`).

    Raises:
        SourceError: The entry is not a regular expression, so transformers cannot read it.
    """
    try:
        pattern = re.compile(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))")
    except re.error as error:
        raise _skip_list_error(
            f"the entry {entry!r} is not a regular expression ({error})", "Rename the module."
        ) from error
    return lambda module: pattern.match(module) is not None or module.endswith(entry)


def _check_no_entry_matches(entries: Iterable[str], quantized_modules: Iterable[str]) -> None:
    modules = sorted(quantized_modules)
    for entry in entries:
        matches = skip_matcher(entry)
        for module in modules:
            if matches(module):
                raise _skip_list_error(
                    f"the entry {entry!r} of a 16-bit module also matches {module!r}, which is quantized",
                    ("Keep that one as well: ", Option("skip", (module,))),
                )


def _skip_list_error(problem: str, next_step: str | Words) -> SourceError:
    return SourceError(
        Reason.SKIP_MODULES,
        CONFIG_NAME,
        problem,
        field="quantization_config.llm_int8_skip_modules",
        next_step=next_step,
    )
