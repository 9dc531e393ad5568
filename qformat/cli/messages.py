"""Shows errors of the library on the command line: options as flags, and a failure as an object for programs."""

from __future__ import annotations

import shlex

import click

from qformat.errors import (
    AdapterError,
    BackendError,
    DataError,
    DeviceMemoryError,
    DivergenceError,
    HubError,
    Interrupted,
    InvalidFileError,
    Option,
    QformatError,
    TargetError,
    UsageError,
    VerificationError,
    Words,
    spelled,
)
from qformat.printable import one_line
from qformat.secrets import masked

REASONS: dict[type[QformatError], str] = {
    BackendError: "backend",
    UsageError: "usage",
    HubError: "hub",
    TargetError: "target",
    VerificationError: "verification",
    DeviceMemoryError: "device_memory",
    AdapterError: "adapter",
    DivergenceError: "divergence",
    Interrupted: "interrupted",
}
"""Reason of the errors that have no reason code of their own. A subclass comes before its base class."""


def as_flag(option: Option) -> str:
    """Return an option as a flag: `--keep-source` for `keep_source=True`, `--no-x` for `x=False`."""
    flag = ("--no-" if option.value is False else "--") + option.name.replace("_", "-")
    if not isinstance(option.value, (str, tuple)):
        return flag
    values = (option.value,) if isinstance(option.value, str) else option.value
    return one_line(" ".join(f"{flag}={shlex.quote(value)}" for value in values))


def failure_record(problem: BaseException) -> dict[str, object]:
    """Return the object that `--json` prints if a command does not finish.

    Args:
        problem: Error of qformat, of wrong usage or of an interruption.

    Returns:
        An object with the one member `error`, whose members are strings or null.
    """
    if isinstance(problem, QformatError):
        return {"error": _of_qformat(problem)}
    if isinstance(problem, click.ClickException):
        step = None if not isinstance(problem, click.UsageError) or problem.ctx is None else problem.ctx.command_path
        return {"error": _error("usage", problem.format_message(), next_step=step and f"See {step} --help")}
    return {"error": _error(REASONS[Interrupted], "Interrupted")}


def _of_qformat(problem: QformatError) -> dict[str, str | None]:
    message = spelled(problem.words, as_flag)
    if isinstance(problem, (InvalidFileError, DataError, HubError)):
        reason = REASONS[HubError] if isinstance(problem, HubError) else str(problem.reason)
        file = None if isinstance(problem, HubError) else problem.path
        tensor, field = (problem.tensor, problem.field) if isinstance(problem, InvalidFileError) else (None, None)
        return _error(reason, message, file=file, tensor=tensor, field=field, next_step=_next_step(problem.words))
    reason = next(reason for kind, reason in REASONS.items() if isinstance(problem, kind))
    # These errors have one text, whose last sentence says what to do.
    _, _, last = message.rpartition(". ")
    return _error(reason, message, next_step=last if last != message else None)


def _next_step(words: Words) -> str | None:
    """Return the next step of an error whose words are a place, a problem, ". " and the next step."""
    return spelled(words[3:], as_flag) or None


def _error(
    reason: str,
    message: str,
    *,
    file: str | None = None,
    tensor: str | None = None,
    field: str | None = None,
    next_step: str | None = None,
) -> dict[str, str | None]:
    record = {"reason": reason, "file": file, "tensor": tensor, "field": field, "message": message}
    return {name: text and _as_utf_8(text) for name, text in (record | {"next_step": next_step}).items()}


def _as_utf_8(text: str) -> str:
    """Escape the parts of a file name that are not UTF-8, and hide tokens."""
    return masked(text).encode("utf-8", errors="backslashreplace").decode("utf-8")
