"""Replaces the primitives of every disk of this process, and the writers of other libraries, by those of a faulty disk.

Commands make their own `Disk`, so a fault is injected into the class.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest

from qformat.artifact.writing.disk import Disk
from tests.converters.faulty_disk import PRIMITIVES, FaultyDisk, PowerCut

LIBRARY_WRITERS = (
    "torch.save",
    "peft.peft_model.safe_save_file",
    "qformat.quality.tuning.steps.save_file",
)
"""Functions of other libraries that write files of a checkpoint, which `Disk` then syncs and renames."""


class Interceptor(FaultyDisk):
    """A faulty disk that also performs calls to the writers of other libraries."""

    WRITING: ClassVar[frozenset[str]] = FaultyDisk.WRITING | {*LIBRARY_WRITERS}

    def perform(self, name: str, arguments: tuple[object, ...]) -> object:
        if name not in LIBRARY_WRITERS:
            return super().perform(name, arguments)
        (write,) = arguments
        assert callable(write)
        return write()


class PowerCutInterceptor(Interceptor, PowerCut):
    """The same with a power cut, which loses bytes that were not synced."""

    def __init__(self, fail_at: int) -> None:
        PowerCut.__init__(self, fail_at, seed=fail_at)


class ReadOnly(Interceptor):
    """A disk on which nothing below a directory can change. It holds for root, too, whom permissions do not stop."""

    def __init__(self, folder: Path, code: int) -> None:
        super().__init__()
        self._folder = folder
        self._code = code

    def perform(self, name: str, arguments: tuple[object, ...]) -> object:
        paths = [argument for argument in arguments if isinstance(argument, Path)]
        if any(path.absolute().is_relative_to(self._folder) for path in paths):
            raise OSError(self._code, os.strerror(self._code))
        return super().perform(name, arguments)


@contextmanager
def on(disk: Interceptor, *, libraries: bool) -> Iterator[None]:
    """Let every disk of this process do what `disk` does.

    Args:
        disk: The faulty disk.
        libraries: Intercept the writers of other libraries, too. This imports them.
    """
    with pytest.MonkeyPatch.context() as patched:
        for name in PRIMITIVES:
            patched.setattr(Disk, name, _intercepted(disk, name))
        for path in LIBRARY_WRITERS if libraries else ():
            module, _, name = path.rpartition(".")
            patched.setattr(path, _as_call(disk, path, getattr(importlib.import_module(module), name)))
        yield


def _intercepted(disk: Interceptor, name: str) -> Callable[..., object]:
    return lambda _self, *arguments: disk.intercept(name, arguments)


def _as_call(disk: Interceptor, path: str, write: Callable[..., Any]) -> Callable[..., object]:
    def call(*arguments: Any, **named: Any) -> object:
        return disk.intercept(path, (lambda: write(*arguments, **named),))

    return call


class Meanwhile(Interceptor):
    """A disk on which something else happens before the k-th call."""

    def __init__(self, k: int, happens: Callable[[], None]) -> None:
        super().__init__()
        self._k = k
        self._happens = happens

    def intercept(self, name: str, arguments: tuple[object, ...]) -> object:
        if self.n_calls == self._k and threading.current_thread() is threading.main_thread():
            self._k = -1
            self._happens()
        return super().intercept(name, arguments)
