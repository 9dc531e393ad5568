"""The process that renders chat templates, seen from the process that asks (`qformat.model.text.render_process`)."""

from __future__ import annotations

import marshal
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from qformat.errors import ArtifactError, Reason, UsageError
from qformat.model.text import render_process
from qformat.model.text.render_process import Limits, read_message, write_message
from qformat.model.text.template_language import plain

_NEXT_STEP = "Get the tokenizer's files again, or use the chat template of an author whom you trust"

Span = tuple[int, int]
"""Range [start, stop) of characters in a text."""


@dataclass(frozen=True, slots=True)
class Template:
    """A chat template and what it needs besides conversations.

    Attributes:
        source: The template.
        file: File or other origin of the template, for messages.
        variables: Variables by name for every conversation, such as the special tokens.
        reads_parts: Whether it reads content as a list of parts, as templates of multimodal models do, and not as a
            string.
    """

    source: str
    file: str
    variables: dict[str, Any]
    reads_parts: bool


class Rendering(NamedTuple):
    """A conversation to render.

    Attributes:
        template: Template to apply.
        messages: Messages with `role` and, if they have content, a string as `content`.
        tools: Tools that the assistant may call, or None.
        variables: Further variables of the template by name.
        ask: Whether to end with the header of an answer.
    """

    template: Template
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None
    variables: dict[str, Any]
    ask: bool


class RenderedText(NamedTuple):
    """A rendered conversation.

    Attributes:
        text: The text.
        spans: Ranges of characters between `{% generation %}` markers, in ascending order.
    """

    text: str
    spans: list[Span]


class Batch:
    """Conversations that the process renders.

    Args:
        process: The process.
        template: Template of the conversations.
        n: Number of conversations.
    """

    def __init__(self, process: RenderProcess, template: Template, n: int) -> None:
        self._process = process
        self.template = template
        self.n = n
        self.answers: list[RenderedText | UsageError] | ArtifactError | None = None

    def wait(self) -> list[RenderedText | UsageError]:
        """Return the answers.

        Raises:
            ArtifactError: The template exceeds a limit.
        """
        self._process.complete(self)
        assert self.answers is not None
        if isinstance(self.answers, ArtifactError):
            raise self.answers
        return self.answers


class RenderProcess:
    """The process that renders. It is started when it is needed, and again after a template ended it.

    Args:
        limits: Limits of time and memory.
    """

    def __init__(self, limits: Limits = Limits()) -> None:  # noqa: B008  a frozen record
        self._limits = limits
        self._lock = threading.RLock()
        self._running: subprocess.Popen[bytes] | None = None
        self._end_it: weakref.finalize[..., RenderProcess] | None = None
        self._owner = 0
        self._unread: Batch | None = None

    def submit(self, template: Template, wanted: Sequence[Rendering]) -> Batch:
        """Send conversations with one template. The answers of the last batch are read first.

        Args:
            template: Template of the conversations.
            wanted: The conversations.

        Returns:
            The batch, whose answers are read when they are needed.
        """
        conversations = [_marshalled((list(one.messages), one.tools, one.variables, one.ask)) for one in wanted]
        batch = {"source": template.source, "variables": template.variables, "reads_parts": template.reads_parts,
                 "conversations": conversations}  # fmt: skip
        message = marshal.dumps(batch)
        with self._lock:
            if self._unread is not None and self._owner == os.getpid():
                self.complete(self._unread)
            requests = self._started().stdin
            assert requests is not None
            self._unread = Batch(self, template, len(wanted))
            try:
                write_message(requests, message)
                requests.flush()
            except BrokenPipeError:
                pass  # the process ended, which the missing answer tells
            except BaseException:
                self._end()
                raise
            return self._unread

    def complete(self, batch: Batch) -> None:
        """Read the answers of a batch, unless they have been read."""
        with self._lock:
            if batch.answers is not None:
                return
            assert batch is self._unread
            try:
                batch.answers = [self._answer(batch.template) for _ in range(batch.n)]
            except ArtifactError as problem:
                batch.answers = problem
                self._end()
            except BaseException:
                self._end()  # the rest of the answers must not reach the next batch
                raise
            self._unread = None

    def _started(self) -> subprocess.Popen[bytes]:
        """Return the process, after starting it if none runs or if another process owns it."""
        if self._running is None or self._owner != os.getpid() or self._running.poll() is not None:
            self._owner = os.getpid()
            self._running = subprocess.Popen(
                [sys.executable, "-P", "-m", render_process.__name__, *self._limits.as_arguments()],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            self._end_it = weakref.finalize(self, _end, self._running, self._owner)
            if self._message() != render_process.READY:
                status = self._running.wait()
                raise RuntimeError(f"the process that renders chat templates does not start (status {status})")
        return self._running

    def _message(self) -> Any:
        assert self._running is not None
        assert self._running.stdout is not None
        message = read_message(self._running.stdout)
        return None if message is None else marshal.loads(message)

    def _answer(self, template: Template) -> RenderedText | UsageError:
        """Read one answer.

        Raises:
            ArtifactError: The template exceeds a limit.
        """
        answer = self._message()
        if answer is None:
            assert self._running is not None
            raise _limit_error(template, self._ending(self._running.wait()))
        kind, *facts = answer
        if kind == render_process.TEXT:
            return RenderedText(*facts)
        if kind == render_process.FAILED:
            return UsageError(f"the chat template fails: {facts[0]}")
        if kind == render_process.TOO_LONG:
            raise _limit_error(template, f"makes a text of more than {facts[0]:,} characters for one conversation")
        mebibytes = self._limits.memory_nbytes // 2**20
        raise _limit_error(template, f"needs more than {mebibytes} MiB of memory for one conversation")

    def _ending(self, status: int) -> str:
        """Return in words why the process ended."""
        if status == -signal.SIGPROF:
            return f"takes more than {self._limits.cpu_seconds:g} s of CPU time"
        return f"ends the process that renders it (status {status})"

    def _end(self) -> None:
        self._unread = None
        if self._end_it is not None:
            self._end_it()
        self._running = self._end_it = None


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """End the process, unless this is a fork of the one that started it."""
    if owner == os.getpid():
        process.kill()
        process.communicate()


def _limit_error(template: Template, problem: str) -> ArtifactError:
    return ArtifactError(Reason.CONFIG_FIELD, template.file, f"the chat template {problem}", next_step=_NEXT_STEP)


def _marshalled(values: Any) -> bytes:
    try:
        return marshal.dumps(values)
    except ValueError:  # a type that JSON does not have
        return marshal.dumps(plain(values))
