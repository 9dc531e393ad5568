"""SHA-256 (FIPS 180-4) whose state can be written down, so that an interrupted download is proved without its start.

hashlib keeps its state to itself: after a crash, every byte of a shard would have to be fetched again to know that the
shard is what the Hub says. Here the state after any number of bytes is 32 bytes and a tail, which go into the journal.
With the SHA instructions of x86 it takes the time of OpenSSL's; elsewhere a plain loop is fast enough for a network.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numpy.typing import NDArray

from qformat.codec.cpu.kernels import Kernel, filled, jit, taken
from qformat.codec.cpu.lanes import I8, I32, I64, Lanes, Memory, cpu_features, steps
from qformat.errors import UsageError

BLOCK_NBYTES = 64

_PRIMES = [n for n in range(2, 312) if all(n % divisor for divisor in range(2, n))]


def _root_bits(number: int, power: int) -> int:
    """Return the first 32 bits of the fraction of a square or cube root, exactly."""
    scaled, low, high = number << (32 * power), 0, 1 << 40
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**power <= scaled else (low, middle)
    return low & 0xFFFFFFFF


_FIRST_STATE = np.array([_root_bits(prime, 2) for prime in _PRIMES[:8]], np.uint32)
_ROUND_CONSTANTS = np.array([_root_bits(prime, 3) for prime in _PRIMES], np.uint32)


class ResumableSha256:
    """A running SHA-256."""

    def __init__(self) -> None:
        self._state = _FIRST_STATE.copy()
        self._tail = b""
        self.nbytes = 0

    @classmethod
    def from_text(cls, text: str) -> ResumableSha256:
        """Continue from what `to_text` returned. Raises UsageError for anything else."""
        try:
            count, state, tail = text.split(":")
            resumed = cls()
            resumed.nbytes, resumed._tail = int(count), bytes.fromhex(tail)
            resumed._state = np.frombuffer(bytes.fromhex(state), ">u4").astype(np.uint32)
        except ValueError:
            raise UsageError("this is no state of a SHA-256") from None
        if resumed._state.size != 8 or resumed.nbytes < 0 or len(resumed._tail) != resumed.nbytes % BLOCK_NBYTES:
            raise UsageError("this is no state of a SHA-256")
        return resumed

    def to_text(self) -> str:
        """Return the state after the bytes so far."""
        return f"{self.nbytes}:{self._state.astype('>u4').tobytes().hex()}:{self._tail.hex()}"

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Add bytes. The GIL is free meanwhile."""
        view = memoryview(data).cast("B")
        self.nbytes += len(view)
        if self._tail:
            missing = BLOCK_NBYTES - len(self._tail)
            self._tail += bytes(view[:missing])
            view = view[missing:]
            if len(self._tail) < BLOCK_NBYTES:
                return
            self._compress(np.frombuffer(self._tail, np.uint8))
            self._tail = b""
        whole = len(view) - len(view) % BLOCK_NBYTES
        if whole:
            self._compress(np.frombuffer(view[:whole], np.uint8))
        self._tail = bytes(view[whole:])

    def hexdigest(self) -> str:
        """Return the SHA-256 of the bytes so far."""
        padding = b"\x80" + bytes(-(self.nbytes + 9) % BLOCK_NBYTES) + struct.pack(">Q", 8 * self.nbytes)
        state = self._state.copy()
        _compressor()(state, np.frombuffer(self._tail + padding, np.uint8), _ROUND_CONSTANTS)
        return state.astype(">u4").tobytes().hex()

    def _compress(self, blocks: NDArray[np.uint8]) -> None:
        _compressor()(self._state, blocks, _ROUND_CONSTANTS)


@cache
def _compressor() -> Kernel:
    return COMPRESS_X86 if "sha" in cpu_features() else COMPRESS_PLAIN


@steps
def _compress_block(_: Any, state: Any, data: Any, start: Any, constants: Any) -> Any:
    """Take the 64 bytes at data[start:] into the state, with the SHA instructions of x86."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kept, blocks, rounds = (Memory(context, builder, signature.args[i], arguments[i]) for i in (0, 1, 3))

        def two_rounds(older: Lanes, newer: Lanes, words: Lanes) -> Lanes:
            return older.call("llvm.x86.sha256rnds2", older.value.type, older.value, newer.value, words.value)

        first, second = (kept.load(ir.Constant(I64, i), I32, 4) for i in (0, 4))  # abcd, efgh
        abef, cdgh = second.pick([1, 0, 5, 4], first), second.pick([3, 2, 7, 6], first)
        abef_before, cdgh_before = abef, cdgh
        message: list[Lanes] = []
        for group in range(16):  # of four rounds
            if group < 4:
                raw = blocks.load(builder.add(arguments[2], ir.Constant(I64, 16 * group)), I8, 16)
                words = raw.pick([lane ^ 3 for lane in range(16)]).reread(I32)  # big endian
            else:
                oldest, old, new, newest = message[-4:]
                sums = oldest.call("llvm.x86.sha256msg1", oldest.value.type, oldest.value, old.value)
                sums = sums + new.pick([1, 2, 3, 4], newest)
                words = sums.call("llvm.x86.sha256msg2", sums.value.type, sums.value, newest.value)
            message.append(words)
            keyed = words + rounds.load(ir.Constant(I64, 4 * group), I32, 4)
            cdgh = two_rounds(cdgh, abef, keyed)
            abef = two_rounds(abef, cdgh, keyed.pick([2, 3, 2, 3]))
        abef, cdgh = abef + abef_before, cdgh + cdgh_before
        kept.store(ir.Constant(I64, 0), abef.pick([3, 2, 7, 6], cdgh))
        kept.store(ir.Constant(I64, 4), abef.pick([1, 0, 5, 4], cdgh))
        return context.get_dummy_value()

    return types.void(state, data, start, constants), generate


@jit
def _compress_x86(state: Any, blocks: Any, constants: Any) -> None:
    for start in range(0, blocks.size, 64):
        _compress_block(state, blocks, start, constants)


@jit
def _compress_plain(state: Any, blocks: Any, constants: Any) -> None:
    words = np.empty(64, np.uint32)
    for start in range(0, blocks.size, 64):
        for i in range(16):
            word = np.uint32(0)
            for j in range(4):
                word = (word << np.uint32(8)) | np.uint32(blocks[start + 4 * i + j])
            words[i] = word
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
        state[0] += a
        state[1] += b
        state[2] += c
        state[3] += d
        state[4] += e
        state[5] += f
        state[6] += g
        state[7] += h


@jit
def _turned(word: Any, n_bits: Any) -> Any:
    return np.uint32((word >> np.uint32(n_bits)) | (word << np.uint32(32 - n_bits)))


_SIGNATURE = types.void(filled(types.uint32), taken(types.uint8), taken(types.uint32))
COMPRESS_X86 = Kernel(_compress_x86, _SIGNATURE)
COMPRESS_PLAIN = Kernel(_compress_plain, _SIGNATURE)
