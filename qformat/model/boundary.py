"""Translates errors of transformers and tokenizers into errors of qformat that name a file and a next step.

Their libraries raise errors of many types, even plain `Exception`, from code that reads a user's files. Every call that
such files can make fail goes through a function of this module.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedModel

from qformat.errors import ArtifactError, DeviceMemoryError, Option, QformatError, Reason, UsageError, Words, first_line
from qformat.named_files import read_named
from qformat.names import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_MODEL_NAME,
    TOKENIZER_NAME,
)

_MAX_NBYTES = 64 * 2**20

_TOKENIZER_FILES = (
    *(TOKENIZER_NAME, TOKENIZER_CONFIG_NAME, TOKENIZER_MODEL_NAME, "vocab.json", "vocab.txt", "tekken.json"),
    *("spiece.model", "sentencepiece.bpe.model"),
)

_BESIDE_TOKENIZER = (
    *("special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
    *("processor_config.json", "preprocessor_config.json", CONFIG_NAME),
)
"""Files that transformers reads together with a tokenizer."""


def has_tokenizer(path: Path) -> bool:
    """Return whether a directory has files of a tokenizer."""
    return any((path / name).exists() for name in _TOKENIZER_FILES)


@contextmanager
def tokenizer_errors(path: Path | str) -> Iterator[None]:
    """Translate the errors of loading a tokenizer.

    Args:
        path: Directory of the model.

    Raises:
        ArtifactError: The directory has no tokenizer, or one of its files is damaged.
        UsageError: The tokenizer needs a package that is not installed.
    """
    folder = Path(path)
    files = [folder / name for name in _TOKENIZER_FILES if (folder / name).exists()]
    if folder.is_dir() and not files:
        raise ArtifactError(
            Reason.MISSING_FILE,
            folder / TOKENIZER_NAME,
            "the model has no tokenizer",
            next_step=f"Put {TOKENIZER_NAME} and {TOKENIZER_CONFIG_NAME} of the model there, or into its source and "
            "convert it again",
        )
    try:
        yield
    except (QformatError, KeyboardInterrupt, SystemExit):
        raise
    except ImportError as problem:
        raise UsageError(
            f"{folder}: the tokenizer needs a package that is not installed: {first_line(problem)}"
        ) from problem
    except BaseException as problem:  # tokenizers raises plain Exception, and its panics are not even that
        beside = [folder / name for name in _BESIDE_TOKENIZER if (folder / name).is_file()]
        for file in (*files, *beside):
            if (found := _problem_of(file)) is not None:
                raise _damaged(file, found) from problem
        raise ArtifactError(
            Reason.CONFIG_FIELD,
            _to_blame(folder, files),
            f"transformers cannot load the tokenizer: {first_line(problem)}",
            next_step=("Get the tokenizer's files again. If it brings its own code and you trust it, pass ",
                       Option("trust_remote_code", True)),
        ) from problem  # fmt: skip


@contextmanager
def config_errors(path: Path, problem: str, *, next_step: str | Words | None = None) -> Iterator[None]:
    """Translate the errors of reading config.json, and of building the model that it describes.

    Args:
        path: Directory of the model.
        problem: What transformers could not do, for the message.
        next_step: What the user can do.

    Raises:
        ArtifactError: The file is damaged, or has a value that transformers rejects.
        UsageError: The model needs a package that is not installed.
    """
    file = path / CONFIG_NAME
    try:
        yield
    except (QformatError, torch.OutOfMemoryError):
        raise
    except ImportError as failure:
        raise UsageError(f"{path}: the model needs a package that is not installed: {first_line(failure)}") from failure
    except Exception as failure:  # the code of each architecture checks its config in its own way
        if (found := _problem_of(file)) is not None:
            raise _damaged(file, found) from failure
        raise ArtifactError(
            Reason.CONFIG_FIELD, file, f"{problem}: {first_line(failure)}", next_step=next_step
        ) from failure


@contextmanager
def generation_config_errors(path: Path) -> Iterator[None]:
    """Translate the errors of reading generation_config.json.

    Args:
        path: Directory of the model.

    Raises:
        ArtifactError: The file is damaged or has a value that transformers rejects.
    """
    file = path / GENERATION_CONFIG_NAME
    try:
        yield
    except Exception as problem:
        if (found := _problem_of(file)) is not None:
            raise _damaged(file, found) from problem
        raise ArtifactError(
            Reason.CONFIG_FIELD,
            file,
            f"transformers rejects it: {first_line(problem)}",
            next_step="Correct the value. For an artifact, run qformat seal afterwards",
        ) from problem


@contextmanager
def forward_errors(model: nn.Module) -> Iterator[None]:
    """Translate the errors of the first run of a model. What fails then contradicts itself in config.json.

    Args:
        model: Model that runs.

    Raises:
        ArtifactError: The model cannot run.
        torch.OutOfMemoryError: The device has too little memory. It is not translated.
    """
    try:
        yield
    except (QformatError, torch.OutOfMemoryError):
        raise
    except Exception as problem:  # the code of each architecture fails in its own way
        raise ArtifactError(
            Reason.CONFIG_FIELD,
            Path(_name(model)) / CONFIG_NAME,
            f"the model that it describes cannot run: {first_line(problem)}",
            next_step=f"Get {CONFIG_NAME} again from where the weights come from",
        ) from problem


@contextmanager
def generation_errors(model: PreTrainedModel) -> Iterator[None]:
    """Translate the errors of `generate`.

    Args:
        model: Model that generates.

    Raises:
        DeviceMemoryError: The device has too little memory.
        UsageError: transformers cannot generate with these settings.
    """
    try:
        yield
    except torch.OutOfMemoryError as problem:
        raise DeviceMemoryError(
            f"{_name(model)}: the device has too little memory to generate: {first_line(problem)}. Lower ",
            Option("max_new_tokens"),
        ) from problem
    except (QformatError, OSError):  # OSError: the text cannot be written
        raise
    except Exception as problem:  # settings and the model's config are only used here
        raise UsageError(
            f"{_name(model)}: transformers cannot generate text: {first_line(problem)}. Check "
            f"{GENERATION_CONFIG_NAME} and {CONFIG_NAME}"
        ) from problem


def no_token_predictions(model_class: type, path: Path | str) -> UsageError:
    """Return the error for a model that does not predict the next token.

    Args:
        model_class: Class of the model.
        path: Directory of the model.
    """
    return UsageError(
        f"{path}: {model_class.__name__} does not predict the next token, which this needs. Load it with "
        "qformat.load_model, and run or train it in Python. If the weights are those of a language model, correct "
        f"'architectures' in {CONFIG_NAME}"
    )


def check_can_generate(model: PreTrainedModel) -> None:
    """Check that a loaded model predicts the next token.

    Raises:
        UsageError: It does not.
    """
    if not model.can_generate() or model.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
        raise no_token_predictions(type(model), _name(model))


def check_tokens(highest: int, model: PreTrainedModel) -> None:
    """Check that the model has an embedding for every token of a text.

    Args:
        highest: Largest token id of the text.
        model: Model that reads the text.

    Raises:
        UsageError: An embedding is missing.
    """
    n_rows = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    if highest >= n_rows:
        raise UsageError(
            f"{_name(model)}: the tokenizer returns token {highest}, but the model has embeddings "
            f"for {n_rows} tokens. Use the tokenizer that belongs to the model. If tokens were added, resize the "
            "16-bit model's embeddings (resize_token_embeddings) and convert it again"
        )


def _name(model: nn.Module) -> str:
    return getattr(model, "name_or_path", None) or "the model"


def _to_blame(folder: Path, files: Sequence[Path]) -> Path:
    """Return the file of a tokenizer that is most likely at fault, if all of them can be parsed."""
    if not files:
        return folder
    if files[0].name == TOKENIZER_NAME and len(files) > 1:
        try:
            Tokenizer.from_file(str(files[0]))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # noqa: BLE001  a panic of tokenizers is not an Exception
            return files[0]
        return files[1]
    return files[0]


def _problem_of(file: Path) -> str | None:
    """Return why a text file cannot be parsed, or None if it can be. Files of other kinds are not read.

    The files are those of other programs, whose readers accept more than strict JSON.
    """
    if file.suffix not in (".json", ".jinja", ".txt"):
        return None
    try:
        text = read_named(file, max_nbytes=_MAX_NBYTES).decode("utf-8")
        if file.suffix == ".json" and not isinstance(json.JSONDecoder().decode(text), dict):
            return "is not a JSON object"
    except json.JSONDecodeError as problem:
        return f"is not valid JSON: {problem.msg} (line {problem.lineno}, column {problem.colno})"
    except (OSError, ValueError, RecursionError) as problem:  # ValueError: no UTF-8, or a number of 5,000 digits
        return f"cannot be read: {first_line(problem)}"
    return None


def _damaged(file: Path, problem: str) -> ArtifactError:
    return ArtifactError(Reason.JSON_SYNTAX, file, problem, next_step="Get the file again")
