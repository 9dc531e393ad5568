"""The process that renders chat templates, within limits of time and memory: `python -m` of this module.

A template is a program of the author of the tokenizer. The sandbox of Jinja keeps it from files and from Python's
internals, but not from loops without end and from texts of many gigabytes. Limits inside the interpreter would have
holes: one multiplication of long numbers takes minutes and cannot be interrupted. So the operating system sets them:

    CPU time        a timer whose signal ends the process, set anew for each conversation
    memory          a limit on the address space, above what the process needs by itself (only on Linux)
    text            a limit on its length

Both directions carry messages of `marshal` behind their length in 8 bytes. A request is a batch: a template with its
settings, and conversations. It is read as a whole before the answers follow, one message for each conversation, so that
neither side waits for the other.
"""

from __future__ import annotations

import gc
import marshal
import resource
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qformat.model.text.template_language import CompiledTemplate, plain, with_arguments_as_text


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of the process.

    Attributes:
        cpu_seconds: CPU time of all conversations together, beyond what each one is allowed for itself.
        memory_nbytes: Memory above what the process needs by itself and what the conversation may need for its size.
    """

    cpu_seconds: float = 1.5
    memory_nbytes: int = 192 * 2**20

    def as_arguments(self) -> tuple[str, ...]:
        """Return the limits as arguments of this module."""
        return str(self.cpu_seconds), str(self.memory_nbytes)

    @classmethod
    def of(cls, arguments: Sequence[str]) -> Limits:
        """Return the limits that arguments of this module set."""
        cpu_seconds, memory_nbytes = arguments
        return cls(float(cpu_seconds), int(memory_nbytes))


CPU_SECONDS_PER_CONVERSATION = 0.05
"""A usual template takes less than a thousandth of a second."""

CPU_SECONDS_PER_MIB = 1.0
MEMORY_PER_BYTE = 32
"""Memory for each byte of a conversation: a text of 4 bytes per character exists several times."""

MAX_CHARACTERS = 2**20
MAX_CHARACTERS_PER_BYTE = 16

READY = "ready"
TEXT = "text"
FAILED = "failed"
TOO_MUCH_MEMORY = "memory"
TOO_LONG = "length"

_MAX_TEMPLATES = 16


def write_message(stream: IO[bytes], message: bytes) -> None:
    """Write a message behind its length, without flushing the stream.

    Args:
        stream: Stream to the other side.
        message: The message.
    """
    stream.write(len(message).to_bytes(8, "little"))
    stream.write(message)


def read_message(stream: IO[bytes]) -> bytes | None:
    """Read a message, or return None if the other side has ended."""
    length = stream.read(8)
    if len(length) < 8:
        return None
    nbytes = int.from_bytes(length, "little")
    message = stream.read(nbytes)
    return message if len(message) == nbytes else None


class _CpuTime:
    """Ends this process when templates have used up their time. The rest is kept from one conversation to the next."""

    def __init__(self, seconds: float) -> None:
        self._seconds = self._left = seconds
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})

    def start(self, nbytes: int) -> None:
        own = CPU_SECONDS_PER_CONVERSATION + CPU_SECONDS_PER_MIB * nbytes / 2**20
        signal.setitimer(signal.ITIMER_PROF, min(self._seconds, self._left) + own)

    def stop(self) -> None:
        self._left, _ = signal.setitimer(signal.ITIMER_PROF, 0)


class _Memory:
    """Limits the address space to what the process has now and what a conversation may need."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        facts = Path("/proc/self/statm")  # absent on macOS, which does not enforce the limit
        self._own_nbytes = int(facts.read_text().split()[0]) * resource.getpagesize() if facts.exists() else None
        self._hard = resource.getrlimit(resource.RLIMIT_AS)[1]

    def allow(self, nbytes: int) -> None:
        if self._own_nbytes is None:
            return
        limit = self._own_nbytes + self._nbytes + MEMORY_PER_BYTE * nbytes
        if self._hard != resource.RLIM_INFINITY:
            limit = min(limit, self._hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, self._hard))


class _Templates:
    """Compiled templates by their source."""

    def __init__(self) -> None:
        self._compiled: dict[str, CompiledTemplate] = {}

    def get(self, source: str) -> CompiledTemplate:
        if source not in self._compiled:
            if len(self._compiled) >= _MAX_TEMPLATES:
                self._compiled.clear()
            self._compiled[source] = CompiledTemplate(source)
        return self._compiled[source]


def _answer(templates: _Templates, batch: dict[str, Any], conversation: bytes) -> tuple[Any, ...]:
    messages, tools, variables, ask = plain(marshal.loads(conversation))
    variables = {**batch["variables"], **variables}
    if batch["reads_parts"]:
        messages = [_with_parts(message) for message in messages]
    max_characters = MAX_CHARACTERS + MAX_CHARACTERS_PER_BYTE * len(conversation)
    failure: Exception | None = None
    # Some templates take the arguments of a tool call as JSON text and fail for an object.
    for form in (messages, *with_arguments_as_text(messages)):
        try:
            template = templates.get(batch["source"])
            text, spans = template.render(form, tools, variables, ask=ask)
        except MemoryError:
            return (TOO_MUCH_MEMORY,)
        except Exception as problem:  # noqa: BLE001  besides raise_exception(), templates raise most of Python's errors
            failure = failure or problem
        else:
            return (TEXT, text, spans) if len(text) <= max_characters else (TOO_LONG, max_characters)
    return FAILED, str(failure).partition("\n")[0][:1000] or type(failure).__name__


def _with_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks is interrupted, and ends this one
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    limits = Limits.of(sys.argv[1:])
    templates, memory, time = _Templates(), _Memory(limits.memory_nbytes), _CpuTime(limits.cpu_seconds)
    gc.freeze()
    write_message(answers, marshal.dumps(READY))
    answers.flush()
    while (message := read_message(requests)) is not None:
        memory.allow(len(message))
        batch = marshal.loads(message)
        for conversation in batch["conversations"]:
            time.start(len(conversation))
            answer = _answer(templates, batch, conversation)
            time.stop()
            write_message(answers, marshal.dumps(answer))
        answers.flush()


if __name__ == "__main__":
    _main()
