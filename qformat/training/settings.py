"""Everything that a user can set about a training: one data class, read by the command line and by TOML files.

What each field means stands in its metadata, so that the help, the TOML reader and the checks cannot differ.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from qformat.errors import UsageError
from qformat.sizes import parse_nbytes
from qformat.strict_json import Json

ALL_LINEAR = "all-linear"


def _setting(
    default: Any,
    text: str,
    *,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    free: bool = False,
) -> Any:
    """Describe a field. `free`: may differ when a training is resumed, since no weight depends on it."""
    metadata = {"help": text, "choices": choices, "least": least, "above": above, "most": most, "free": free}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How to train. Raises UsageError for a value that makes no sense."""

    max_steps: int | None = _setting(None, "Optimizer steps; instead of --epochs.", least=1)
    epochs: float = _setting(1.0, "Times that every example is seen.", above=0)
    batch_size: int = _setting(1, "Rows of a micro-batch.", least=1)
    grad_accum: int = _setting(8, "Micro-batches of a step.", least=1)
    seq_len: int = _setting(1024, "Tokens of a row; the limit of an example.", least=2)
    learning_rate: float = _setting(2e-4, "At the end of the warm-up.", above=0)
    schedule: str = _setting("cosine", "Learning rate over the steps.", choices=("cosine", "linear", "constant"))
    warmup: float = _setting(0.03, "Share of the steps, or, from 1 on, their number.", least=0)
    weight_decay: float = _setting(0.0, "Of AdamW, on all trained weights.", least=0)
    max_grad_norm: float = _setting(1.0, "Gradients are clipped to this norm.", above=0)
    rank: int = _setting(16, "Rank of the adapter.", least=1)
    alpha: float | None = _setting(None, "The adapter counts alpha/rank times.  [default: twice the rank]", above=0)
    dropout: float = _setting(0.0, "Of what goes into the adapter.", least=0, most=0.99)
    target_modules: tuple[str, ...] = _setting(
        (ALL_LINEAR,), "Layers with an adapter, by the end of their names; may be repeated. all-linear: every Linear."
    )
    rslora: bool = _setting(False, "Count the adapter alpha/sqrt(rank) times (rank-stabilized LoRA).")
    dora: bool = _setting(False, "Train magnitudes besides directions (DoRA).")
    bias: str = _setting("none", "Biases that are trained, too.", choices=("none", "all", "lora_only"))
    modules_to_save: tuple[str, ...] = _setting((), "Layers that are trained as a whole; may be repeated.")
    adapter_dtype: str = _setting("float32", "Of the adapter's weights.", choices=("float32", "bfloat16"))
    optim: str = _setting("paged_adamw_32bit", "Optimizer.", choices=("paged_adamw_32bit", "paged_adamw_8bit", "adamw"))
    page_budget: str = _setting(
        "auto", "Device memory for optimizer states: 512MiB, 2GB, 0; auto: what is left over.", free=True
    )
    seed: int = _setting(0, "Of adapters, data order and dropout.", least=0)
    device: str | None = _setting(None, "cpu or cuda; by default the GPU if there is one.", free=True)
    gradient_checkpointing: bool = _setting(
        True, "Compute activations again in backward: slower, in much less memory.", free=True
    )
    autocast: bool = _setting(False, "Run under torch's bf16 autocast.")
    packing: bool = _setting(False, "Put several examples in a row, each seeing only itself.")
    group_by_length: bool = _setting(False, "Batches of examples of similar length.")
    too_long: str = _setting("truncate", "What becomes of longer examples.", choices=("truncate", "drop"))
    loss_on: str = _setting(
        "completions", "Train on completions and assistant turns, or on all.", choices=("completions", "all")
    )
    skip_bad_lines: bool = _setting(False, "Count rows that cannot be used instead of stopping at the first.")
    save_every: int = _setting(100, "Steps between checkpoints; one is always written at the end.", least=1, free=True)
    keep_checkpoints: int = _setting(2, "Checkpoints that stay; older ones are removed.", least=1, free=True)
    eval_every: int | None = _setting(None, "Steps between evaluations, besides before and after.", least=1, free=True)
    log_every: int = _setting(1, "Steps between lines of metrics.jsonl.", least=1, free=True)
    report_to: tuple[str, ...] = _setting(
        (), "Trackers of transformers (tensorboard, wandb, ...); may be repeated.", free=True
    )
    trust_remote_code: bool = _setting(False, "Run model code that comes with the artifact.")

    def __post_init__(self) -> None:
        for item in fields(self):
            _check(item, getattr(self, item.name))
        if self.adapter_dtype == "bfloat16" and self.dora:
            raise UsageError("dora: its magnitudes change by less than bfloat16 can tell. Use adapter_dtype float32")
        if self.packing and self.group_by_length:
            raise UsageError("group_by_length: packed rows all have nearly the same length. Leave one of the two out")
        page_budget_nbytes(self.page_budget)

    def to_json(self) -> dict[str, Json]:
        """Return all settings as JSON."""
        return {item.name: _as_json(getattr(self, item.name)) for item in fields(self)}

    def binding(self) -> dict[str, Json]:
        """Return the settings that must be the same when a training is resumed."""
        return {item.name: _as_json(getattr(self, item.name)) for item in fields(self) if not item.metadata["free"]}


def read_toml(path: Path) -> dict[str, Any]:
    """Read settings by name; names may have hyphens, as on the command line. Raises UsageError."""
    try:
        with path.open("rb") as file:
            table = tomllib.load(file)
    except OSError as problem:
        raise UsageError(f"{path}: cannot be read: {problem.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise UsageError(f"{path}: is no TOML: {problem}") from None
    known = {item.name: item for item in fields(TrainingSettings)}
    found = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UsageError(
                f"{path}: {key}: there is no such setting" + (f". Did you mean {near[0]}?" if near else "")
            )
        if name in found:
            raise UsageError(f"{path}: {key}: is set twice")
        found[name] = _from_toml(known[name], value, f"{path}: {key}")
    return found


def page_budget_nbytes(text: str) -> int | None:
    """Return the bytes that a budget names, None for "auto". Raises UsageError."""
    return None if text == "auto" else parse_nbytes("page_budget", text, or_else="auto, or ")


def value_type(item: Field[Any]) -> type:
    """Return the plain type of a setting: bool, int, float, str or tuple (of str)."""
    name = str(item.type).removesuffix(" | None")
    return {"bool": bool, "int": int, "float": float, "str": str, "tuple[str, ...]": tuple}[name]


def _from_toml(item: Field[Any], value: object, where: str) -> Any:
    expected = value_type(item)
    if expected is tuple:
        if isinstance(value, str):
            return (value,)
        if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
            return tuple(value)
        raise UsageError(f"{where}: {value!r}, expected a list of names")
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if item.name == "page_budget" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if type(value) is not expected:
        raise UsageError(f"{where}: {value!r}, expected {_IN_WORDS[expected]}")
    return value


_IN_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _check(item: Field[Any], value: Any) -> None:
    says: Mapping[str, Any] = item.metadata
    if value is None:
        return
    if says["choices"] and value not in says["choices"]:
        raise UsageError(f"{item.name}: {value!r}, expected one of {', '.join(says['choices'])}")
    if says["least"] is not None and not value >= says["least"]:
        raise UsageError(f"{item.name}: {value!r}, expected at least {says['least']}")
    if says["above"] is not None and not value > says["above"]:
        raise UsageError(f"{item.name}: {value!r}, expected more than {says['above']}")
    if says["most"] is not None and not value <= says["most"]:
        raise UsageError(f"{item.name}: {value!r}, expected at most {says['most']}")
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        raise UsageError(f"{item.name}: {value!r}, expected a finite number")


def _as_json(value: Any) -> Json:
    return list(value) if isinstance(value, tuple) else value
