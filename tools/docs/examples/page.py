"""Parse a Markdown page into the examples that it shows. Pure: no files, no processes.

The syntax:

- ```` ```console ```` holds commands (`$ …`) and, after each, the output that it is expected to print.
- ```` ```python ```` is a script; a ```` ```text ```` block directly after it is its expected output.
- ```` ```toml title="recipe.toml" ```` is a file that the page needs.
- `<!-- setup` … `-->` holds commands that are run and not shown.
- `<!-- figures vary -->`, `<!-- exits with 1 -->` and `<!-- not run: REASON -->` directly before a block say how to
  check it.

Blocks inside list items are no examples: GitHub and the site's generator need different indents for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})\s*(?P<language>[\w+-]*)(?P<rest>[^`]*)$")
TITLE = re.compile(r'title="(?P<title>[^"]*)"')
COMMENT = re.compile(r"^\s*<!--\s*(?P<text>.*?)\s*-->\s*$")
FIGURES_VARY = "figures vary"
EXITS_WITH = re.compile(r"exits with (?P<code>\d+)")
NOT_RUN = re.compile(r"not run\b:?\s*(?P<reason>.*)")
PROMPT = "$ "


@dataclass(frozen=True, slots=True)
class Command:
    """A command and the output that the page shows.

    Attributes:
        line: Line of the page that the command begins on, from 1.
        text: The command as bash reads it, continuation lines included.
        output: Lines of the expected output, without blank lines at the end.
        output_line: Line of the page that the output begins on, or would begin on.
    """

    line: int
    text: str
    output: tuple[str, ...] = ()
    output_line: int = 0


@dataclass(frozen=True, slots=True)
class Checking:
    """How a block is to be checked, from the comments directly before it.

    Attributes:
        figures_vary: Whether every number is masked.
        exit_code: Exit code of the last command.
        not_run: Why nothing is run; None if the block is run. An empty reason is an error.
        unknown: Comments before the block that have no meaning here.
    """

    figures_vary: bool = False
    exit_code: int = 0
    not_run: str | None = None
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Console:
    """A block of shell commands with their outputs."""

    line: int
    commands: tuple[Command, ...]
    checking: Checking
    stray: tuple[str, ...] = ()
    """Lines before the first command: they would not be compared."""


@dataclass(frozen=True, slots=True)
class Setup:
    """Hidden commands; their output is not compared."""

    line: int
    commands: tuple[Command, ...]


@dataclass(frozen=True, slots=True)
class Script:
    """A Python script; `output` is None if the page shows no output of it."""

    line: int
    text: str
    checking: Checking
    output: tuple[str, ...] | None = None
    output_line: int = 0


@dataclass(frozen=True, slots=True)
class File:
    """A file that the page shows and that later commands read."""

    line: int
    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Other:
    """A fenced block of another language, a fenced block in a list item, or an indented block (no language: None)."""

    line: int
    language: str | None
    lines: tuple[str, ...]


Example = Console | Setup | Script | File | Other


@dataclass(slots=True)
class _Reader:
    """Position in a page, and the comments that wait for the next block."""

    lines: Sequence[str]
    at: int = 0
    waiting: list[str] = field(default_factory=list)

    def take_checking(self) -> Checking:
        waiting, self.waiting = self.waiting, []
        return checking_of(waiting)


def parse(text: str) -> list[Example]:
    """Return the examples of a page in their order, blocks without commands included."""
    return list(_examples(_Reader(text.splitlines())))


def checking_of(comments: Sequence[str]) -> Checking:
    """Return what the comments before a block ask for."""
    figures_vary, exit_code, not_run, unknown = False, 0, None, []
    for comment in comments:
        if comment == FIGURES_VARY:
            figures_vary = True
        elif exits := EXITS_WITH.fullmatch(comment):
            exit_code = int(exits["code"])
        elif left_out := NOT_RUN.fullmatch(comment):
            not_run = left_out["reason"]
        else:
            unknown.append(comment)
    return Checking(figures_vary, exit_code, not_run, tuple(unknown))


def commands_of(lines: Sequence[str], first_line: int) -> tuple[tuple[Command, ...], tuple[str, ...]]:
    """Split the lines of a block into commands with their outputs, and the lines before the first command."""
    starts = [index for index, line in enumerate(lines) if line.startswith(PROMPT)]
    stray = tuple(line for line in lines[: starts[0] if starts else len(lines)] if line.strip())
    commands = []
    for start, stop in zip(starts, [*starts, len(lines)][1:], strict=True):
        last = start
        while lines[last].endswith("\\") and last + 1 < stop:
            last += 1
        text = "\n".join([lines[start][len(PROMPT) :], *lines[start + 1 : last + 1]])
        output = without_blank_end(lines[last + 1 : stop])
        commands.append(Command(first_line + start, text, tuple(output), first_line + last + 1))
    return tuple(commands), stray


def without_blank_end(lines: Sequence[str]) -> list[str]:
    """Return the lines without spaces at their ends and without blank lines at the end."""
    kept = [line.rstrip() for line in lines]
    while kept and not kept[-1]:
        kept.pop()
    return kept


def _examples(reader: _Reader) -> Iterator[Example]:
    while reader.at < len(reader.lines):
        line = reader.lines[reader.at]
        if FENCE.match(line):
            yield _fenced(reader)
        elif line.lstrip().startswith("<!--"):
            setup = _comment(reader)
            if setup is not None:
                yield setup
        elif line.startswith("    ") and line.strip():
            reader.waiting.clear()
            yield _indented(reader)
        else:
            reader.waiting.clear()
            reader.at += 1


def _fenced(reader: _Reader) -> Example:
    """Read a fenced block; the reader stands after its closing fence then."""
    opening = reader.at
    match = FENCE.match(reader.lines[opening])
    assert match is not None
    indent, fence, language = len(match["indent"]), match["fence"], match["language"]
    closing = re.compile(rf"^ *{re.escape(fence[0])}{{{len(fence)},}}\s*$")
    stop = opening + 1
    while stop < len(reader.lines) and not closing.match(reader.lines[stop]):
        stop += 1
    inside = [line[min(indent, len(line) - len(line.lstrip(" "))) :] for line in reader.lines[opening + 1 : stop]]
    reader.at = stop + 1
    title = TITLE.search(match["rest"])
    if language == "console" and not indent:
        commands, stray = commands_of(inside, opening + 2)
        return Console(opening + 1, commands, reader.take_checking(), stray)
    if language == "python" and title is None and not indent:
        return _script(reader, opening, inside)
    reader.waiting.clear()
    if title is not None:
        return File(opening + 1, title["title"], "".join(f"{line}\n" for line in inside))
    return Other(opening + 1, language, tuple(inside))


def _script(reader: _Reader, opening: int, inside: Sequence[str]) -> Script:
    """Return a script, with the output block that follows directly."""
    checking = reader.take_checking()
    script = Script(opening + 1, "".join(f"{line}\n" for line in inside), checking)
    next_line = reader.at
    while next_line < len(reader.lines) and not reader.lines[next_line].strip():
        next_line += 1
    match = FENCE.match(reader.lines[next_line]) if next_line < len(reader.lines) else None
    if match is None or match["language"] != "text" or TITLE.search(match["rest"]):
        return script
    reader.at = next_line
    block = _fenced(reader)
    assert isinstance(block, Other)
    return Script(script.line, script.text, checking, tuple(without_blank_end(block.lines)), block.line + 1)


def _comment(reader: _Reader) -> Setup | None:
    """Read an HTML comment: hidden commands, or a word on how to check the next block."""
    opening = reader.at
    stop = opening
    while stop < len(reader.lines) - 1 and "-->" not in reader.lines[stop]:
        stop += 1
    reader.at = stop + 1
    if reader.lines[opening].strip() == "<!-- setup":
        commands, _ = commands_of(reader.lines[opening + 1 : stop], opening + 2)
        return Setup(opening + 1, commands)
    match = COMMENT.match(reader.lines[opening])
    if match is not None:
        reader.waiting.append(match["text"])
    return None


def _indented(reader: _Reader) -> Other:
    """Read lines that are indented by four spaces: a code block, or the text of a list item."""
    opening = reader.at
    while reader.at < len(reader.lines) and reader.lines[reader.at].startswith("    "):
        if FENCE.match(reader.lines[reader.at]) and reader.at > opening:
            break
        reader.at += 1
    return Other(opening + 1, None, tuple(line[4:] for line in reader.lines[opening : reader.at]))
