"""Warnings and log records of libraries, which print them by themselves, in the form in which commands print."""

from __future__ import annotations

import logging
import warnings
from typing import TextIO

from qformat.cli.display import echo_layout
from qformat.printable import printable


class _PrintableRecord(logging.LogRecord):
    def getMessage(self) -> str:
        return printable(super().getMessage())


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    echo_layout(warnings.formatwarning(str(message), category, filename, lineno, line).rstrip("\n"), err=True)


def filter_messages_of_libraries() -> None:
    """Show control characters in all warnings and log records of this process as escapes."""
    logging.setLogRecordFactory(_PrintableRecord)
    warnings.showwarning = _show_warning
