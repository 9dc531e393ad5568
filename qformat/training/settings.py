"""Settings of a training: one data class for the command line, TOML files and Python.

The metadata of each field holds its help text and its limits, so that the help, the TOML reader and the checks agree.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from qformat.errors import Option, UsageError
from qformat.named_files import MAX_OPTION_FILE_NBYTES, read_named
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
    """Return a field with its help text and limits. A `free` setting may change when a training is resumed."""
    metadata = {"help": text, "choices": choices, "least": least, "above": above, "most": most, "free": free}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings of a training. The metadata of each field describes it.

    Raises:
        UsageError: A value is outside its limits, or two settings exclude each other.
    """

    max_steps: int | None = _setting(None, "Number of optimizer steps, instead of epochs.", least=1)
    epochs: float = _setting(1.0, "Number of passes over the data.", above=0)
    batch_size: int = _setting(1, "Number of rows in a micro-batch.", least=1)
    grad_accum: int = _setting(8, "Number of micro-batches per optimizer step.", least=1)
    seq_len: int = _setting(1024, "Number of tokens in a row, and in the longest example.", least=2)
    learning_rate: float = _setting(2e-4, "Learning rate at the end of the warm-up.", above=0)
    schedule: str = _setting(
        "cosine", "Schedule of the learning rate after the warm-up.", choices=("cosine", "linear", "constant")
    )
    warmup: float = _setting(
        0.03, "Length of the warm-up: below 1 a fraction of all steps, otherwise a number of steps.", least=0
    )
    weight_decay: float = _setting(0.0, "Weight decay of AdamW for all trained weights.", least=0)
    max_grad_norm: float = _setting(1.0, "Largest norm of the gradients; larger gradients are clipped.", above=0)
    rank: int = _setting(16, "Rank of the adapter.", least=1)
    alpha: float | None = _setting(None, "Scale of the adapter: alpha / rank.  [default: twice the rank]", above=0)
    dropout: float = _setting(0.0, "Dropout probability of the adapter's input.", least=0, most=0.99)
    target_modules: tuple[str, ...] = _setting(
        (ALL_LINEAR,),
        "Layers with an adapter, by the end of their names, or all-linear for every Linear layer. May be repeated.",
    )
    rslora: bool = _setting(False, "Scale the adapter by alpha / sqrt(rank) (rank-stabilized LoRA).")
    dora: bool = _setting(False, "Train magnitudes separately from directions (DoRA).")
    bias: str = _setting("none", "Biases to train along with the adapter.", choices=("none", "all", "lora_only"))
    modules_to_save: tuple[str, ...] = _setting(
        (), "16-bit layers to train in full and to save with the adapter. May be repeated."
    )
    adapter_dtype: str = _setting("float32", "Dtype of the adapter's weights.", choices=("float32", "bfloat16"))
    optim: str = _setting("paged_adamw_32bit", "Optimizer.", choices=("paged_adamw_32bit", "paged_adamw_8bit", "adamw"))
    page_budget: str = _setting(
        "auto",
        "Device memory for optimizer states, such as 512MiB, 2GB or 0; auto uses the memory that is left.",
        free=True,
    )
    seed: int = _setting(0, "Seed of the adapter's weights, the order of the data and dropout.", least=0)
    device: str | None = _setting(None, "Device: cpu or cuda.  [default: the GPU if there is one]", free=True)
    gradient_checkpointing: bool = _setting(
        True, "Recompute activations in the backward pass: slower, but much less memory.", free=True
    )
    autocast: bool = _setting(False, "Run the model under torch's bf16 autocast.")
    packing: bool = _setting(False, "Pack several examples into a row, each attending only to itself.")
    group_by_length: bool = _setting(False, "Form batches of examples of similar length.")
    too_long: str = _setting("truncate", "Handling of examples longer than a row.", choices=("truncate", "drop"))
    loss_on: str = _setting(
        "completions",
        "Tokens that count for the loss: completions and assistant turns, or all.",
        choices=("completions", "all"),
    )
    skip_bad_lines: bool = _setting(False, "Skip and count invalid examples instead of stopping at the first.")
    save_every: int = _setting(
        100, "Number of steps between checkpoints. The last step always writes one.", least=1, free=True
    )
    keep_checkpoints: int = _setting(2, "Number of checkpoints to keep. Older ones are deleted.", least=1, free=True)
    eval_every: int | None = _setting(
        None, "Number of steps between evaluations, besides those before and after training.", least=1, free=True
    )
    log_every: int = _setting(1, "Number of steps between lines of metrics.jsonl.", least=1, free=True)
    report_to: tuple[str, ...] = _setting(
        (), "Experiment tracker of transformers, such as tensorboard or wandb. May be repeated.", free=True
    )
    trust_remote_code: bool = _setting(False, "Run model code that comes with the artifact.")

    def __post_init__(self) -> None:
        for item in fields(self):
            _check(item, getattr(self, item.name))
        if self.adapter_dtype == "bfloat16" and self.dora:
            raise UsageError(
                Option("dora"),
                ": bfloat16 is too coarse for the changes of its magnitudes. Use ",
                Option("adapter_dtype", "float32"),
            )
        if self.packing and self.group_by_length:
            raise UsageError(
                Option("group_by_length"),
                " and ",
                Option("packing"),
                ": packed rows already have nearly the same length. Remove one of the two",
            )
        page_budget_nbytes(self.page_budget)

    def to_json(self) -> dict[str, Json]:
        """Return all settings as JSON."""
        return {item.name: _as_json(getattr(self, item.name)) for item in fields(self)}

    def binding(self) -> dict[str, Json]:
        """Return the settings that must not change when a training is resumed."""
        return {item.name: _as_json(getattr(self, item.name)) for item in fields(self) if not item.metadata["free"]}


def read_toml(path: Path) -> dict[str, Any]:
    """Read settings by name from a TOML file. Names may have hyphens, as on the command line.

    Raises:
        UsageError: The file cannot be read, or holds an unknown setting or a value of the wrong type.
    """
    try:
        table = tomllib.loads(read_named(path, max_nbytes=MAX_OPTION_FILE_NBYTES).decode("utf-8"))
    except OSError as problem:
        raise UsageError(f"{path}: cannot be read: {problem.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as problem:
        raise UsageError(f"{path}: is not valid TOML: {problem}") from None
    known = {item.name: item for item in fields(TrainingSettings)}
    found = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UsageError(
                f"{path}: {key}: this setting does not exist" + (f". Did you mean {near[0]}?" if near else "")
            )
        if name in found:
            raise UsageError(f"{path}: {key}: is set twice")
        found[name] = _from_toml(known[name], value, f"{path}: {key}")
    return found


def page_budget_nbytes(text: str) -> int | None:
    """Return a page budget in bytes, None for "auto".

    Raises:
        UsageError: The text is not a size.
    """
    return None if text == "auto" else parse_nbytes(Option("page_budget"), text, or_else="auto, or ")


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
        raise UsageError(f"{where}: found {value!r}, expected a list of names")
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if item.name == "page_budget" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if type(value) is not expected:
        raise UsageError(f"{where}: found {value!r}, expected {_IN_WORDS[expected]}")
    return value


_IN_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def _check(item: Field[Any], value: Any) -> None:
    says: Mapping[str, Any] = item.metadata
    if value is None:
        return
    if says["choices"] and value not in says["choices"]:
        raise UsageError(Option(item.name), f": {value!r}, expected one of {', '.join(says['choices'])}")
    if says["least"] is not None and not value >= says["least"]:
        raise UsageError(Option(item.name), f": {value!r}, expected at least {says['least']}")
    if says["above"] is not None and not value > says["above"]:
        raise UsageError(Option(item.name), f": {value!r}, expected more than {says['above']}")
    if says["most"] is not None and not value <= says["most"]:
        raise UsageError(Option(item.name), f": {value!r}, expected at most {says['most']}")
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        raise UsageError(Option(item.name), f": {value!r}, expected a finite number")


def _as_json(value: Any) -> Json:
    return list(value) if isinstance(value, tuple) else value
