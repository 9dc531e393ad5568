"""Which implementation runs an operation, why, and how to force one.

    numba     CPU tensors: vector instructions over the mapped bytes
    triton    CUDA tensors
    torch     every device: plain torch operations, slow, where neither of the others can run

The choice is made per device. The environment variable `QFORMAT_BACKEND` names one for all devices, and one that cannot
run is an error. `force_backend` sets that variable: there is one place that says what is forced, for every thread, the
threads of autograd included, and anyone can print it.
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
    """One implementation. `unavailable` gives the reason why it cannot run on a device type, or None if it can."""

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
    return f"triton runs on CUDA devices, not on {device_type} (TRITON_INTERPRET=1 runs it on the CPU, for tests)"


BACKENDS = {
    "numba": Backend("numba", _numba_unavailable),
    "triton": Backend("triton", _triton_unavailable),
    "torch": Backend("torch", lambda _: None),
}
"""In the order in which they are tried."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend of a device type, and the reason in words."""

    backend: str
    reason: str


def force_backend(name: str | None) -> None:
    """Use a backend for everything from now on, or with None the best one again.

    Sets or unsets `QFORMAT_BACKEND` for this process and those that it starts. Raises BackendError for a name that is
    none.
    """
    if name is None:
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = _known(name, "backend").name


def choose(device_type: str) -> Choice:
    """Return the backend for tensors of a device type ("cpu", "cuda", ...).

    Raises BackendError if the forced one cannot run there.
    """
    return _choose(device_type, os.environ.get(VARIABLE))


@cache
def _choose(device_type: str, forced: str | None) -> Choice:
    if forced:
        reason = _known(forced, VARIABLE).unavailable(device_type)
        if reason is not None:
            raise BackendError(f"{VARIABLE} asks for the backend {forced!r}, which cannot run here: {reason}")
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
        raise BackendError(f"{by}: {name!r} is no backend: must be one of {', '.join(BACKENDS)}")
    return BACKENDS[name]
