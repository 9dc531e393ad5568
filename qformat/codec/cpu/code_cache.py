"""The cache of machine code on disk. It saves time and may be missing: no kernel fails because of it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numba
from numba.core.caching import FunctionCache
from numba.core.typing.templates import Signature

_UNUSABLE = (OSError, EOFError, pickle.UnpicklingError)
"""What numba raises if a file of the cache cannot be read or written: a full disk, a file of another user, or an index
that a power cut left empty."""


class TolerantCache(FunctionCache):
    """numba's cache of a function, which compiles again instead of failing if its files cannot be used."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the machine code of a signature, None if the cache does not have it.

        Args:
            sig: Signature of the function.
            target_context: numba's description of the CPU.
        """
        try:
            return super().load_overload(sig, target_context)
        except _UNUSABLE:
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Store the machine code of a signature, if that is possible.

        Args:
            sig: Signature of the function.
            data: The compiled function.
        """
        try:
            super().save_overload(sig, data)
        except _UNUSABLE:
            self.disable()


def cached(dispatcher: Any, function: Callable[..., Any]) -> Any:
    """Return a numba dispatcher that keeps its machine code next to the source or in the user's cache directory.

    Args:
        dispatcher: Dispatcher without a cache.
        function: Function that it compiles.
    """
    with suppress(RuntimeError):  # neither directory is writable: every process compiles
        dispatcher._cache = TolerantCache(function)
    return dispatcher


def cached_callback(signature: Signature, function: Callable[..., Any]) -> Any:
    """Return a function as a C callback, with its machine code kept as that of a kernel.

    Args:
        signature: Types of its arguments and of its result.
        function: Function to compile.
    """
    try:
        return numba.cfunc(signature, cache=True, error_model="numpy")(function)
    except (RuntimeError, *_UNUSABLE):
        return numba.cfunc(signature, error_model="numpy")(function)
