"""Renders conversations with chat templates in a process of its own, which limits time and memory.

One process serves all templates and all rows. It starts with the first conversation and ends with this process.
Conversations are sent in batches, because a message there and back takes as long as the rendering of a short one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from qformat.errors import DataError, UsageError
from qformat.model.text.render_client import RenderedText, Rendering, RenderProcess
from qformat.names import CHAT_TEMPLATE_NAME, TOKENIZER_CONFIG_NAME

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

Steps = Generator[Rendering, RenderedText, T]
"""A computation that yields what it needs rendered and receives the text, or the `UsageError` of the template."""


class _Group(Generic[T]):
    """Computations side by side, so that what they need rendered makes a few large batches.

    Args:
        tasks: The computations.
    """

    def __init__(self, tasks: Sequence[Steps[T]]) -> None:
        self._tasks = tasks
        self._outcomes: dict[int, T | DataError] = {}
        self._asked: dict[int, Rendering] = {}
        for index in range(len(tasks)):
            self._go_on_with(index, None)
        self._pending = _submit(list(self._asked.values()))

    @property
    def done(self) -> bool:
        return not self._asked

    def go_on(self) -> None:
        """Take the answers that were asked for, and ask for the next ones."""
        if self._asked:
            asked, self._asked = self._asked, {}
            for index, answer in zip(asked, self._pending(), strict=True):
                self._go_on_with(index, answer)
            self._pending = _submit(list(self._asked.values()))

    def outcomes(self) -> list[T | DataError]:
        return [self._outcomes[index] for index in range(len(self._tasks))]

    def _go_on_with(self, index: int, answer: RenderedText | UsageError | None) -> None:
        task = self._tasks[index]
        try:
            if isinstance(answer, UsageError):
                self._asked[index] = task.throw(answer)
            else:
                self._asked[index] = next(task) if answer is None else task.send(answer)
        except StopIteration as stop:
            self._outcomes[index] = stop.value
        except DataError as refused:
            self._outcomes[index] = refused


def run_together(groups: Iterable[Sequence[Steps[T]]]) -> Iterator[list[T | DataError]]:
    """Run groups of computations. One group is rendered while this process reads and goes on with another one.

    Args:
        groups: The groups, made when they are needed.

    Yields:
        For each group in order: of each computation its result, or the error with which it refused its row. An error
        of the iterator `groups` is raised after the groups before it.

    Raises:
        ArtifactError: A template exceeds a limit.
    """
    running: deque[_Group[T]] = deque()
    source = iter(groups)
    failure: DataError | None = None
    while True:
        try:
            tasks = next(source, None) if failure is None else None
        except DataError as problem:
            failure, tasks = problem, None
        if tasks is not None:
            running.append(_Group(tasks))
        if len(running) == 2 or (running and tasks is None):
            while not running[0].done:
                for group in running:
                    group.go_on()
            yield running.popleft().outcomes()
        elif tasks is None:
            break
    if failure is not None:
        raise failure


def render(wanted: Rendering) -> RenderedText:
    """Render one conversation.

    Raises:
        UsageError: The template fails for this conversation.
        ArtifactError: The template exceeds a limit.
    """
    (answer,) = _submit([wanted])()
    if isinstance(answer, UsageError):
        raise answer
    return answer


def _submit(wanted: Sequence[Rendering]) -> Callable[[], list[RenderedText | UsageError]]:
    """Begin to render conversations, and return a function that waits for the texts or errors of the template."""
    indices_by_template: dict[int, list[int]] = {}
    for index, one in enumerate(wanted):
        indices_by_template.setdefault(id(one.template), []).append(index)
    batches = [
        (indices, _process().submit(wanted[indices[0]].template, [wanted[index] for index in indices]))
        for indices in indices_by_template.values()
    ]

    def wait() -> list[RenderedText | UsageError]:
        answers = {
            index: answer for indices, batch in batches for index, answer in zip(indices, batch.wait(), strict=True)
        }
        return [answers[index] for index in range(len(wanted))]

    return wait


@cache
def _process() -> RenderProcess:
    return RenderProcess()


def file_of_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the file that holds the template of a tokenizer, for messages."""
    folder = Path(tokenizer.name_or_path)
    for name in (CHAT_TEMPLATE_NAME, TOKENIZER_CONFIG_NAME):
        if tokenizer.name_or_path and (folder / name).is_file():
            return str(folder / name)
    return tokenizer.name_or_path or "the tokenizer"
