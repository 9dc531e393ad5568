"""Settings: one description for the command line, TOML files and the checks."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest

from qformat.cli.commands.train.train import command
from qformat.errors import UsageError
from qformat.training.settings import TrainingSettings, page_budget_nbytes, read_toml


def test_every_setting_has_an_option_with_help() -> None:
    options = {parameter.name: parameter for parameter in command.params if isinstance(parameter, click.Option)}
    for item in fields(TrainingSettings):
        help_text = options[item.name].help
        assert help_text is not None
        assert item.metadata["help"].rstrip(".") in help_text


def test_a_file_sets_what_the_command_line_can(tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text(
        'rank = 8\nlearning-rate = 1\ntarget_modules = ["q_proj", "v_proj"]\nmodules_to_save = "lm_head"\n'
        "packing = true\npage_budget = 0\n"
    )
    settings = TrainingSettings(**read_toml(path))
    assert (settings.rank, settings.learning_rate, settings.packing, settings.page_budget) == (8, 1.0, True, "0")
    assert settings.target_modules == ("q_proj", "v_proj")
    assert settings.modules_to_save == ("lm_head",)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rnak = 8", "this setting does not exist. Did you mean rank"),
        ("rank = 8\nr = 3", "r: this setting does not exist"),
        ('rank = "8"', "rank: found '8', expected a whole number"),
        ("rank = true", "expected a whole number"),
        ("packing = 1", "expected true or false"),
        ("schedule = 3", "expected a string"),
        ("target_modules = [1]", "expected a list of names"),
        ("learning-rate = 1.0\nlearning_rate = 2.0", "is set twice"),
        ("rank = ", "is not valid TOML"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_by_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "train.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=says):
        read_toml(path)


def test_a_file_that_is_not_there_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_toml(tmp_path / "no.toml")


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("inf")},
        {"learning_rate": float("nan")},
        {"dropout": 1.0},
        {"seq_len": 1},
        {"schedule": "steps"},
        {"optim": "sgd"},
        {"page_budget": "lots"},
        {"page_budget": "-1"},
        {"adapter_dtype": "bfloat16", "dora": True},
        {"packing": True, "group_by_length": True},
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong)) if len(wrong) == 1 else None):
        TrainingSettings(**wrong)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("auto", None), ("0", 0), ("512MiB", 2**29), ("1.5GB", 1_500_000_000), ("7", 7), ("2GiB", 2**31)],
)
def test_page_budgets_have_units(text: str, nbytes: int | None) -> None:
    assert page_budget_nbytes(text) == nbytes


def test_what_a_resumed_training_may_change_decides_about_no_weight() -> None:
    free = {item.name for item in fields(TrainingSettings) if item.metadata["free"]}
    assert free == {
        "page_budget", "device", "gradient_checkpointing", "save_every", "keep_checkpoints", "eval_every", "log_every",
        "report_to",
    }  # fmt: skip
