"""Find mistakes of a page without running it: unknown targets and extras, and commands in blocks that are not run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from tools.docs.examples.page import PROMPT, Checking, Command, Console, Example, File, Other, Script, Setup

SHELL_LANGUAGES = ("bash", "sh", "shell", "shell-session", "zsh")
MAKE = re.compile(r"make(?P<arguments>( +[^\s#]+)*)\s*(#.*)?")
PIP_INSTALL = re.compile(r"(?:python3? -m )?pip install\b")
EXTRAS = re.compile(r"(?:^|[\s'\"/])(?:qformat|\.)\[(?P<extras>[^\]]*)\]")
OWN_SHELL = re.compile(r"(cd|export|source)\b[^&;|]*")


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with a page, and the line."""

    line: int
    text: str


@dataclass(frozen=True, slots=True)
class Repository:
    """What pages may refer to.

    Attributes:
        targets: Targets of the Makefile.
        extras: Extras of the package.
    """

    targets: frozenset[str]
    extras: frozenset[str]


def is_run(command: Command) -> bool:
    """Return whether a command is run; `make` and `pip install` are checked by rules instead."""
    return not MAKE.fullmatch(command.text) and not PIP_INSTALL.match(command.text)


def findings(examples: Sequence[Example], repository: Repository) -> list[Finding]:
    """Return what is wrong with a page's examples before anything is run."""
    found: list[Finding] = []
    for example in examples:
        found.extend(_of_example(example, repository))
    return sorted(found, key=lambda finding: finding.line)


def makefile_targets(text: str) -> frozenset[str]:
    """Return the targets that a Makefile declares as phony."""
    lines = re.findall(r"(?m)^\.PHONY:(.*)$", text)
    return frozenset(target for line in lines for target in line.split())


def _of_example(example: Example, repository: Repository) -> Iterator[Finding]:
    match example:
        case Console():
            yield from _of_checking(example.line, example.checking)
            if not example.commands:
                yield Finding(example.line, "a console block without a command: commands begin with `$ `")
            elif example.stray:
                yield Finding(example.line, f"text before the first command is not compared: {example.stray[0]!r}")
            if example.checking.not_run is None:
                yield from _of_commands(example.commands, repository)
        case Setup():
            if not example.commands:
                yield Finding(example.line, "a setup without a command: commands begin with `$ `")
            yield from _of_commands(example.commands, repository)
        case Script():
            yield from _of_checking(example.line, example.checking)
        case File():
            path = PurePosixPath(example.name)
            if not example.name or path.is_absolute() or ".." in path.parts:
                yield Finding(example.line, f"title {example.name!r}: expected a path inside the working directory")
            if path.suffix == ".py":
                yield Finding(example.line, "a Python block with a title is not run: leave the title out")
        case Other():
            yield from _of_other(example)


def _of_checking(line: int, checking: Checking) -> Iterator[Finding]:
    for comment in checking.unknown:
        yield Finding(line, f"the comment before this block has no meaning here: {comment!r}")
    if checking.not_run == "":
        yield Finding(line, "`not run` needs a reason: why, and which test runs it instead")


def _of_commands(commands: Sequence[Command], repository: Repository) -> Iterator[Finding]:
    for command in commands:
        if command.text.endswith("\\"):
            yield Finding(command.line, "the command ends in a backslash, and no line follows")
        if make := MAKE.fullmatch(command.text):
            goals = [word for word in make["arguments"].split() if "=" not in word and not word.startswith("-")]
            for goal in goals:
                if goal not in repository.targets:
                    yield Finding(command.line, f"the Makefile has no target {goal!r}")
        elif PIP_INSTALL.match(command.text):
            named = [extra for found in EXTRAS.finditer(command.text) for extra in found["extras"].split(",")]
            for extra in named:
                if extra.strip() not in repository.extras:
                    yield Finding(command.line, f"pyproject.toml has no extra {extra.strip()!r}")
        elif OWN_SHELL.fullmatch(command.text):
            yield Finding(command.line, f"{command.text!r} has no effect: each command runs in a shell of its own")


def _of_other(example: Other) -> Iterator[Finding]:
    """Find commands in blocks that nothing runs."""
    if example.language in SHELL_LANGUAGES:
        yield Finding(
            example.line, f"a {example.language} block is not run: use ```console and `$ ` before each command"
        )
    elif example.language in {"console", "python"}:
        yield Finding(example.line, f"a {example.language} block in a list item is not run: do not indent it")
    elif example.language in {None, "", "text"} and any(line.lstrip().startswith(PROMPT) for line in example.lines):
        yield Finding(example.line, "a command in a block that is not run: use ```console")
