"""SHA-256 (FIPS 180-4) with a state that can be saved, so that an interrupted download can be checked when it resumes.

hashlib does not expose its state. After a crash, every byte of a shard would have to be fetched again to compute its
SHA-256. Here the state after any number of bytes is 32 bytes and an incomplete block, which the journal records.

The blocks are compressed by functions of OpenSSL with an accessible state, which exist beside those that hashlib calls
(1,800 MB/s on a CPU with SHA instructions). If they are not available, a plain loop is used (300 MB/s on that CPU).
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import struct
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from qformat.codec.cpu.kernels import Kernel, filled, jit, taken
from qformat.errors import UsageError

BLOCK_NBYTES = 64

Compress = Callable[[NDArray[np.uint32], NDArray[np.uint8]], None]
"""Compresses complete blocks, flat uint8, into a state, uint32 [8]."""

_PRIMES = [n for n in range(2, 312) if all(n % divisor for divisor in range(2, n))]


def _root_bits(number: int, power: int) -> int:
    """Return the first 32 bits of the fractional part of a square or cube root, exactly."""
    scaled, low, high = number << (32 * power), 0, 1 << 40
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**power <= scaled else (low, middle)
    return low & 0xFFFFFFFF


_FIRST_STATE = np.array([_root_bits(prime, 2) for prime in _PRIMES[:8]], np.uint32)
_ROUND_CONSTANTS = np.array([_root_bits(prime, 3) for prime in _PRIMES], np.uint32)


class ResumableSha256:
    """SHA-256 of data that arrives in parts.

    Args:
        compress: Function that compresses blocks. The default is that of OpenSSL, or the plain loop without OpenSSL.
    """

    def __init__(self, compress: Compress | None = None) -> None:
        self._compress = compress or find_openssl() or compress_plain
        self._state = _FIRST_STATE.copy()
        self._tail = b""
        self.nbytes = 0

    @classmethod
    def from_text(cls, text: str) -> ResumableSha256:
        """Restore a state that `to_text` returned.

        Raises:
            UsageError: The text is not such a state.
        """
        try:
            count, state, tail = text.split(":")
            resumed = cls()
            resumed.nbytes, resumed._tail = int(count), bytes.fromhex(tail)
            resumed._state = np.frombuffer(bytes.fromhex(state), ">u4").astype(np.uint32)
        except ValueError:
            raise UsageError("invalid state of a SHA-256") from None
        if resumed._state.size != 8 or resumed.nbytes < 0 or len(resumed._tail) != resumed.nbytes % BLOCK_NBYTES:
            raise UsageError("invalid state of a SHA-256")
        return resumed

    def to_text(self) -> str:
        """Return the current state as text."""
        return f"{self.nbytes}:{self._state.astype('>u4').tobytes().hex()}:{self._tail.hex()}"

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Add bytes. The GIL is released meanwhile."""
        view = memoryview(data).cast("B")
        self.nbytes += len(view)
        if self._tail:
            missing = BLOCK_NBYTES - len(self._tail)
            self._tail += bytes(view[:missing])
            view = view[missing:]
            if len(self._tail) < BLOCK_NBYTES:
                return
            self._compress(self._state, np.frombuffer(self._tail, np.uint8))
            self._tail = b""
        whole = len(view) - len(view) % BLOCK_NBYTES
        if whole:
            self._compress(self._state, np.frombuffer(view[:whole], np.uint8))
        self._tail = bytes(view[whole:])

    def hexdigest(self) -> str:
        """Return the SHA-256 of all bytes added so far."""
        padding = b"\x80" + bytes(-(self.nbytes + 9) % BLOCK_NBYTES) + struct.pack(">Q", 8 * self.nbytes)
        state = self._state.copy()
        self._compress(state, np.frombuffer(self._tail + padding, np.uint8))
        return state.astype(">u4").tobytes().hex()


class _OpensslContext(ctypes.Structure):
    """SHA256_CTX, unchanged since OpenSSL 0.9.8. `n_tail` is the number of bytes in the incomplete block."""

    _fields_ = (
        ("state", ctypes.c_uint32 * 8),
        ("n_bits", ctypes.c_uint32 * 2),
        ("tail", ctypes.c_uint32 * 16),
        ("n_tail", ctypes.c_uint),
        ("digest_nbytes", ctypes.c_uint),
    )


@cache
def find_openssl() -> Compress | None:
    """Return the compression function of the OpenSSL below hashlib or of the system, or None if there is neither."""
    below_hashlib = importlib.util.find_spec("_hashlib")
    for name in (below_hashlib.origin if below_hashlib else None, "libcrypto.so.3", "libcrypto.so.1.1"):
        try:
            update = ctypes.CDLL(name).SHA256_Update
        except (OSError, AttributeError):  # the library does not exist or does not export the function
            continue
        update.argtypes = (ctypes.POINTER(_OpensslContext), ctypes.c_void_p, ctypes.c_size_t)
        compress = partial(_compress_by_openssl, update)
        if ResumableSha256(compress).hexdigest() == hashlib.sha256().hexdigest():
            return compress
    return None


def _compress_by_openssl(update: Callable[..., object], state: NDArray[np.uint32], blocks: NDArray[np.uint8]) -> None:
    context = _OpensslContext()
    context.state[:] = state.tolist()
    update(context, blocks.ctypes.data, blocks.size)
    state[:] = context.state


def compress_plain(state: NDArray[np.uint32], blocks: NDArray[np.uint8]) -> None:
    """Compress complete blocks into a state with a plain loop, for systems without OpenSSL.

    Args:
        state: State, uint32 [8], updated in place.
        blocks: Complete blocks of 64 bytes, flat uint8.
    """
    _COMPRESS(state, blocks.view(">u4").astype(np.uint32), _ROUND_CONSTANTS)


@jit
def _compress_words(state: Any, blocks: Any, constants: Any) -> None:
    words = np.empty(64, np.uint32)
    for start in range(0, blocks.size, 16):
        words[:16] = blocks[start : start + 16]
        for i in range(16, 64):
            near, far = words[i - 2], words[i - 15]
            mixed = _turned(far, 7) ^ _turned(far, 18) ^ (far >> np.uint32(3))
            words[i] = words[i - 16] + mixed + words[i - 7]
            words[i] += _turned(near, 17) ^ _turned(near, 19) ^ (near >> np.uint32(10))
        a, b, c, d, e, f, g, h = state[0], state[1], state[2], state[3], state[4], state[5], state[6], state[7]
        for i in range(64):
            chosen = g ^ (e & (f ^ g))
            one = np.uint32(h + (_turned(e, 6) ^ _turned(e, 11) ^ _turned(e, 25)) + chosen + constants[i] + words[i])
            majority = (a & b) | (c & (a | b))
            two = np.uint32((_turned(a, 2) ^ _turned(a, 13) ^ _turned(a, 22)) + majority)
            h, g, f, e, d, c, b, a = g, f, e, np.uint32(d + one), c, b, a, np.uint32(one + two)
        for i, word in enumerate((a, b, c, d, e, f, g, h)):
            state[i] += word


@jit
def _turned(word: Any, n_bits: Any) -> Any:
    return np.uint32((word >> np.uint32(n_bits)) | (word << np.uint32(32 - n_bits)))


_COMPRESS = Kernel(_compress_words, types.void(filled(types.uint32), taken(types.uint32), taken(types.uint32)))
