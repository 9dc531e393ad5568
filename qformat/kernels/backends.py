"""Choose the backend that runs an operation, report why, and let the user force one.

    numba     CPU tensors: vector instructions on the mapped bytes
    triton    CUDA tensors
    torch     every device: plain torch operations, slow; used if neither of the others can run

The choice is made per device type. The environment variable `QFORMAT_BACKEND` forces one backend for all devices; if
that backend cannot run, an error is raised. `force_backend` sets this variable. The forced backend therefore has a
single source that all threads see, autograd's included, and that anyone can print.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from qformat.errors import BackendError

VARIABLE = "QFORMAT_BACKEND"


@dataclass(frozen=True, slots=True)
class Backend:
    """One backend.

    Attributes:
        name: Name of the backend.
        unavailable: Returns why the backend cannot run on a device type, or None if it can.
    """

    name: str
    unavailable: Callable[[str], str | None]


def _numba_unavailable(device_type: str) -> str | None:
    return None if device_type == "cpu" else f"numba runs on the CPU, not on {device_type}"


def _triton_unavailable(device_type: str) -> str | None:
    from qformat.kernels.triton.launch import interpreting, triton_unavailable

    reason = triton_unavailable()
    if reason is not None:
        return reason
    if device_type == "cuda":
        return None if torch.cuda.is_available() else "no CUDA device is available"
    if device_type == "cpu" and interpreting():
        return None
    return f"triton runs on CUDA devices, not on {device_type} (for tests, TRITON_INTERPRET=1 runs it on the CPU)"


BACKENDS = {
    "numba": Backend("numba", _numba_unavailable),
    "triton": Backend("triton", _triton_unavailable),
    "torch": Backend("torch", lambda _: None),
}
"""Backends by name, in the order in which they are tried."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend for a device type.

    Attributes:
        backend: Name of the backend.
        reason: Why it was chosen, in words.
    """

    backend: str
    reason: str


def force_backend(name: str | None) -> None:
    """Force a backend for all further operations, or return to the automatic choice with None.

    Sets or removes `QFORMAT_BACKEND` in the environment of this process and of the processes that it starts.

    Raises:
        BackendError: No backend has this name.
    """
    if name is None:
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = _known(name, "backend").name


def choose(device_type: str) -> Choice:
    """Return the backend for tensors on a device type ("cpu", "cuda", ...).

    Raises:
        BackendError: The forced backend cannot run on the device type.
    """
    return _choose(device_type, os.environ.get(VARIABLE))


@cache
def _choose(device_type: str, forced: str | None) -> Choice:
    if forced:
        reason = _known(forced, VARIABLE).unavailable(device_type)
        if reason is not None:
            raise BackendError(f"{VARIABLE}: the forced backend {forced!r} cannot run here: {reason}")
        return Choice(forced, f"forced by {VARIABLE}")
    passed_over: list[str] = []
    for name, backend in BACKENDS.items():
        reason = backend.unavailable(device_type)
        if reason is None:
            return Choice(name, "; ".join(passed_over) or "the fastest for this device")
        passed_over.append(reason)
    raise AssertionError("the torch backend runs everywhere")


def _known(name: str, by: str) -> Backend:
    if name not in BACKENDS:
        raise BackendError(f"{by}: unknown backend {name!r}: must be one of {', '.join(BACKENDS)}")
    return BACKENDS[name]
