"""Plan stage: user rules that override the default table of `rules`.

A recipe is a TOML file of ordered rules, each with a `pattern`, an `action` ("nf4" or "keep") and, for "nf4",
an optional `block_size` and `double_quant`:

    [[rule]]
    pattern = "model.layers.0.*"
    action = "keep"

A pattern is a case-sensitive glob (`fnmatch`: `*` matches any characters including dots, `?` one character, `[...]` a
set). It must match the whole path of the module: the tensor's name without its final ".weight". The first rule that
matches a tensor decides; a tensor that no rule matches follows the default table with the default options.
"""

from __future__ import annotations

import difflib
import fnmatch
import glob
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from qformat.artifact.tensor_spec import TensorSpec
from qformat.codec.nf4 import BLOCK_SIZES, DEFAULT_BLOCK_SIZE
from qformat.converters.rules.rules import (
    Decision,
    KeepReason,
    coupled_groups,
    individual_decisions,
    module_path,
)
from qformat.errors import Option, UsageError, Words
from qformat.named_files import MAX_OPTION_FILE_NBYTES, read_named

_RULE_KEYS: Final = ("pattern", "action", "block_size", "double_quant")
_N_NEAREST: Final = 3


@dataclass(frozen=True, slots=True)
class NF4Options:
    """Encoding options of a weight.

    Attributes:
        block_size: Number of elements per block.
        double_quant: Whether the absmax values are quantized too.
    """

    block_size: int = DEFAULT_BLOCK_SIZE
    double_quant: bool = True


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of a recipe.

    Attributes:
        pattern: Glob over module paths.
        action: "nf4" to quantize the weight, "keep" to leave it in 16 bit.
        block_size: Number of elements per block. None means the recipe's default.
        double_quant: Whether absmax values are quantized too. None means the recipe's default.
        origin: Where the rule comes from, for messages ("r.toml: rule 2").
    """

    pattern: str
    action: Literal["nf4", "keep"]
    block_size: int | None = None
    double_quant: bool | None = None
    origin: str | Option = field(default="rule", compare=False)

    def matches(self, tensor_name: str) -> bool:
        """Return whether the pattern matches the tensor's name without ".weight"."""
        return fnmatch.fnmatchcase(module_path(tensor_name), self.pattern)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Ordered rules and the default options.

    Attributes:
        defaults: Options for whatever the rules do not specify.
        rules: Rules in order of precedence, those from skip patterns first.
    """

    defaults: NF4Options
    rules: tuple[Rule, ...]

    def canonical(self) -> dict[str, object]:
        """Return the recipe as plain JSON values for the manifest."""
        rules: list[dict[str, object]] = []
        for rule in self.rules:
            entry: dict[str, object] = {"pattern": rule.pattern, "action": rule.action}
            if rule.block_size is not None:
                entry["block_size"] = rule.block_size
            if rule.double_quant is not None:
                entry["double_quant"] = rule.double_quant
            rules.append(entry)
        defaults = {"block_size": self.defaults.block_size, "double_quant": self.defaults.double_quant}
        return {"defaults": defaults, "rules": rules}

    def keeping(self, tensor_names: Sequence[str]) -> Recipe:
        """Return a recipe that keeps exactly these tensors and otherwise follows this one."""
        rules = tuple(Rule(glob.escape(module_path(name)), "keep") for name in tensor_names)
        return Recipe(self.defaults, rules + self.rules)


@dataclass(frozen=True, slots=True)
class Choice:
    """Final decision about one tensor. Implements `skip_list.Verdict`, so that `skip_modules` accepts it.

    Attributes:
        options: Encoding options, or None for a kept tensor.
        reason: Why the tensor is kept, or None for a quantized one.
        is_linear: Whether the module is, or may be, an `nn.Linear`.
        by_rule: 0-based index in `Recipe.rules` of the deciding rule, or None if the default table or a coupled weight
            decided.
        vouched: Whether a rule quantizes a weight that the table does not know. Such weights must be reported.
    """

    options: NF4Options | None
    reason: KeepReason | None
    is_linear: bool
    by_rule: int | None
    vouched: bool = False

    def __post_init__(self) -> None:
        assert (self.options is None) == (self.reason is not None)

    @property
    def quantize(self) -> bool:
        """Whether the tensor becomes NF4."""
        return self.options is not None


def load_recipe(
    path: Path | None, *, skip: Sequence[str] = (), block_size: int = DEFAULT_BLOCK_SIZE, double_quant: bool = True
) -> Recipe:
    """Read a recipe file and prepend a keep rule for each skip pattern.

    Args:
        path: Recipe file in TOML, or None for a recipe without a file.
        skip: Glob patterns of modules to keep in 16 bit.
        block_size: Default number of elements per block.
        double_quant: Whether absmax values are quantized by default.

    Raises:
        UsageError: The file cannot be read, is not TOML or holds an unknown key or invalid value, or an argument is
            not valid.
    """
    defaults = NF4Options(_checked_block_size(block_size, Option("block_size")), double_quant)
    skips = tuple(
        Rule(_checked_pattern(pattern, Option("skip")), "keep", origin=Option("skip", (pattern,))) for pattern in skip
    )
    return Recipe(defaults, skips + (_read_rules(path) if path is not None else ()))


def apply(recipe: Recipe, tensors: Sequence[TensorSpec], config: Mapping[str, object]) -> dict[str, Choice]:
    """Decide about every tensor by the recipe and the default table. Weights that vLLM fuses get the same decision.

    Args:
        recipe: Rules and default options.
        tensors: All tensors of the source.
        config: Contents of config.json.

    Returns:
        The decision for each tensor, keyed by name.

    Raises:
        UsageError: A pattern matches no tensor, an "nf4" rule matches no tensor that can be quantized, or the members
            of a fused group would get different options.
    """
    decisions = individual_decisions(tensors, config)
    for rule in recipe.rules:
        _check_rule_has_an_effect(rule, decisions)
    choices = {name: _choose(recipe, name, decision) for name, decision in decisions.items()}
    return _couple(recipe, choices)


def _read_rules(path: Path) -> tuple[Rule, ...]:
    try:
        document = tomllib.loads(read_named(path, max_nbytes=MAX_OPTION_FILE_NBYTES).decode("utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot read the recipe: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: the recipe is not valid TOML: {error}") from error
    for key in document:
        if key != "rule":
            raise UsageError(f"{path}: unknown key {key!r}. A recipe contains only [[rule]] tables")
    tables = document.get("rule", [])
    if not isinstance(tables, list):
        raise UsageError(f"{path}: 'rule' must be an array of tables. Write [[rule]], not [rule]")
    return tuple(_parse_rule(table, f"{path}: rule {number}") for number, table in enumerate(tables, start=1))


def _parse_rule(table: object, origin: str) -> Rule:
    if not isinstance(table, dict):
        raise UsageError(f"{origin}: must be a table. Write [[rule]]")
    for key in table:
        if key not in _RULE_KEYS:
            raise UsageError(f"{origin}: unknown key {key!r} (known keys: {', '.join(_RULE_KEYS)})")
    pattern = _checked_pattern(table.get("pattern"), f"{origin}: pattern")
    action = table.get("action")
    if action == "keep":
        for key in ("block_size", "double_quant"):
            if key in table:
                raise UsageError(f'{origin}: {key} has no effect with action "keep"')
        return Rule(pattern, "keep", origin=origin)
    if action != "nf4":
        raise UsageError(f'{origin}: action must be "nf4" or "keep", got {action!r}')
    block_size = table.get("block_size")
    if block_size is not None:
        block_size = _checked_block_size(block_size, f"{origin}: block_size")
    double_quant = table.get("double_quant")
    if double_quant is not None and not isinstance(double_quant, bool):
        raise UsageError(f"{origin}: double_quant must be true or false, got {double_quant!r}")
    return Rule(pattern, "nf4", block_size, double_quant, origin)


def _checked_pattern(value: object, what: str | Option) -> str:
    if not isinstance(value, str) or not value:
        raise UsageError(what, f" must be a glob over module paths such as 'model.layers.0.*', got {value!r}")
    return value


def _checked_block_size(value: object, what: str | Option) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value not in BLOCK_SIZES:
        raise UsageError(what, f" must be one of {', '.join(map(str, BLOCK_SIZES))}, got {value!r}")
    return value


def _may_be_vouched_for(decision: Decision) -> bool:
    return decision.reason is KeepReason.NOT_KNOWN_TO_BE_LINEAR


def _check_rule_has_an_effect(rule: Rule, decisions: Mapping[str, Decision]) -> None:
    matched = {name: decision for name, decision in decisions.items() if rule.matches(name)}
    if not matched:
        nearest = ", ".join(_nearest_modules(rule.pattern, decisions)) or "none, the checkpoint has no tensors"
        raise UsageError(rule.origin, f": the pattern {rule.pattern!r} matches no tensor. Nearest: {nearest}")
    if rule.action == "nf4" and not any(
        decision.quantize or _may_be_vouched_for(decision) for decision in matched.values()
    ):
        name, decision = next(iter(matched.items()))
        phrase = decision.reason.phrase if decision.reason is not None else ""
        raise UsageError(
            rule.origin,
            f": the pattern {rule.pattern!r} matches no tensor that can be quantized ({module_path(name)}: {phrase})",
        )


def _nearest_modules(pattern: str, tensor_names: Mapping[str, object]) -> list[str]:
    """Return the most similar module paths. Looks at one path for all layers, since difflib is slow on 50,000."""
    one_per_kind: dict[str, str] = {}
    for name in tensor_names:
        one_per_kind.setdefault(re.sub(r"\d+", "0", module_path(name)), module_path(name))
    return difflib.get_close_matches(pattern, list(one_per_kind.values()), n=_N_NEAREST, cutoff=0.0)


def _choose(recipe: Recipe, name: str, decision: Decision) -> Choice:
    index = next((i for i, rule in enumerate(recipe.rules) if rule.matches(name)), None)
    if index is None:
        options = recipe.defaults if decision.quantize else None
        return Choice(options, decision.reason, decision.is_linear, None)
    rule = recipe.rules[index]
    if rule.action == "keep" and decision.quantize:
        return Choice(None, KeepReason.SKIPPED_BY_RECIPE, is_linear=True, by_rule=index)
    if rule.action == "nf4" and (decision.quantize or _may_be_vouched_for(decision)):
        vouched = not decision.quantize
        return Choice(_options(rule, recipe.defaults), None, is_linear=True, by_rule=index, vouched=vouched)
    return Choice(None, decision.reason, decision.is_linear, None)


def _options(rule: Rule, defaults: NF4Options) -> NF4Options:
    return NF4Options(
        defaults.block_size if rule.block_size is None else rule.block_size,
        defaults.double_quant if rule.double_quant is None else rule.double_quant,
    )


def _couple(recipe: Recipe, choices: Mapping[str, Choice]) -> dict[str, Choice]:
    coupled = dict(choices)
    for group in coupled_groups(choices):
        members = {name: choices[name] for name in group.tensors}
        if not all(choice.quantize for choice in members.values()):
            for name, choice in members.items():
                if choice.quantize:
                    coupled[name] = Choice(None, KeepReason.COUPLED, is_linear=True, by_rule=None)
        elif len({choice.options for choice in members.values()}) > 1:
            listed = [word for name, choice in members.items() for word in ("; ", *_describe(recipe, name, choice))]
            raise UsageError(f"weights that vLLM fuses into {group.fused_module} need the same options: ", *listed[1:])
    return coupled


def _describe(recipe: Recipe, name: str, choice: Choice) -> Words:
    assert choice.options is not None
    by: Words = ("by default",) if choice.by_rule is None else ("by ", recipe.rules[choice.by_rule].origin)
    double_quant = "true" if choice.options.double_quant else "false"
    options = f"block_size {choice.options.block_size}, double_quant {double_quant}"
    return (f"{module_path(name)}: {options} (", *by, ")")
