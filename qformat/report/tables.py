"""Tables of a page: cells that carry what to sort by, and how figures are shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from qformat.artifact.verification_facts import ErrorFacts

_ABSENT: Final = "–"


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table."""

    title: str
    number: bool = False


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell: HTML to show and, for numbers, what to sort by."""

    html: str
    value: float | None = None


ERROR_COLUMNS = tuple(Column(title, number=True) for title in ("weights", "rel. RMS", "SNR dB", "max error", "cosine"))
"""How far decoded weights are from the source's; `error_cells` fills them."""


def error_cells(errors: ErrorFacts) -> list[Cell]:
    """Return the cells of ERROR_COLUMNS."""
    return [
        Cell(f"{errors['n_weights']:,}", errors["n_weights"]),
        Cell(percent(errors["relative_rms"]), errors["relative_rms"]),
        Cell(number(errors["snr_db"], ".2f"), errors["snr_db"]),
        Cell(number(errors["max_abs_error"], ".4g"), errors["max_abs_error"]),
        Cell(number(errors["cosine"], ".5f"), errors["cosine"]),
    ]


def table(columns: Sequence[Column], rows: Iterable[Sequence[Cell]], *, sortable: bool = False) -> str:
    """Return a table as HTML; the page's script can sort it by any column."""
    head = "".join(f"<th{_number_class(column)}>{column.title}</th>" for column in columns)
    body = "\n".join(
        "<tr>" + "".join(_td(column, cell) for column, cell in zip(columns, row, strict=True)) + "</tr>" for row in rows
    )
    kind = ' class="sortable"' if sortable else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _td(column: Column, cell: Cell) -> str:
    if not column.number:
        return f"<td>{cell.html}</td>"
    value = -1 if cell.value is None else cell.value
    return f'<td class="number" data-value="{value!r}">{cell.html}</td>'


def _number_class(column: Column) -> str:
    return ' class="number"' if column.number else ""


def name_cell(name: str) -> Cell:
    """Return a tensor's name, escaped."""
    return Cell(f"<code>{escape(name)}</code>")


def shape_cell(shape: Sequence[int]) -> Cell:
    """Return a shape."""
    return Cell(" × ".join(map(str, shape)) or "scalar")


def number(value: float | None, spec: str) -> str:
    """Return a figure, or a dash where it does not exist."""
    return _ABSENT if value is None else format(value, spec)


def percent(value: float | None) -> str:
    """Return a share or a relative error."""
    return number(value, ".3%")
