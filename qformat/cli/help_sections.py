"""Headings in the help of commands that have many options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

Sections = Mapping[str, tuple[str, ...]]
"""Names of the options under each heading, in the order of the help."""


class SectionedCommand(click.Command):
    """A command whose help lists its options under headings.

    Attributes:
        sections: Names of the options under each heading. Every option is in one of them, except `--help`.
    """

    def __init__(self, *arguments: Any, sections: Sections, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.sections = sections

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one list of options per heading, with `--help` at the end of the last one.

        Args:
            ctx: Context of the command.
            formatter: Formatter to write to.
        """
        records = {parameter.name: parameter.get_help_record(ctx) for parameter in self.params}
        lists = {heading: [records[name] for name in names] for heading, names in self.sections.items()}
        if (help_option := self.get_help_option(ctx)) is not None:
            [*lists.values()][-1].append(help_option.get_help_record(ctx))
        for heading, shown in lists.items():
            with formatter.section(heading):
                formatter.write_dl([record for record in shown if record is not None])
