"""Tables of a page: cells that carry their sort value, and the formatting of numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from qformat.artifact.verification_facts import ErrorFacts

_ABSENT: Final = "–"


@dataclass(frozen=True, slots=True)
class Column:
    """Column of a table.

    Attributes:
        title: Heading as HTML.
        number: The column holds numbers: it is right-aligned and sorted by value.
    """

    title: str
    number: bool = False


@dataclass(frozen=True, slots=True)
class Cell:
    """Cell of a table.

    Attributes:
        html: What the cell shows.
        value: What a column of numbers is sorted by.
    """

    html: str
    value: float | None = None


ERROR_COLUMNS = tuple(
    Column(title, number=True) for title in ("weights", "rel. RMS error", "SNR (dB)", "max. error", "cosine")
)
"""Errors of decoded weights against the source. `error_cells` fills them."""


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
    """Return a table as HTML, in a box that scrolls sideways on a narrow screen.

    Args:
        columns: Columns from left to right.
        rows: Rows with one cell per column.
        sortable: Let the page's script sort the table by any column.
    """
    head = "".join(f"<th{_number_class(column)}>{column.title}</th>" for column in columns)
    body = "\n".join(
        "<tr>" + "".join(_td(column, cell) for column, cell in zip(columns, row, strict=True)) + "</tr>" for row in rows
    )
    kind = ' class="sortable"' if sortable else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    """Return a table of names and values as HTML.

    Args:
        rows: Each name with its value, unescaped.
    """
    body = "".join(f"<tr><td><code>{escape(name)}</code></td><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<div class="scroll"><table class="pairs">{body}</table></div>'


def _td(column: Column, cell: Cell) -> str:
    if not column.number:
        return f"<td>{cell.html}</td>"
    value = -1 if cell.value is None else cell.value
    return f'<td class="number" data-value="{value!r}">{cell.html}</td>'


def _number_class(column: Column) -> str:
    return ' class="number"' if column.number else ""


def name_cell(name: str) -> Cell:
    """Return a cell with a tensor's name, escaped."""
    return Cell(f"<code>{escape(name)}</code>")


def shape_cell(shape: Sequence[int]) -> Cell:
    """Return a cell with a shape, such as 576 × 1536."""
    return Cell(" × ".join(map(str, shape)) or "scalar")


def number(value: float | None, spec: str) -> str:
    """Return a formatted number, or a dash for None.

    Args:
        value: The number, or None if it does not exist.
        spec: Format specification, such as ".3f".
    """
    return _ABSENT if value is None else format(value, spec)


def percent(value: float | None) -> str:
    """Return a fraction as a percentage with three decimals, or a dash for None."""
    return number(value, ".3%")
