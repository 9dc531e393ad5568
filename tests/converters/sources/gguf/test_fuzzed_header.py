"""Any GGUF file is read or refused with its name, and gguf-py reads the same from every file that is accepted."""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from random import Random

import gguf

from qformat.converters.sources.gguf.header import GgufHeader, read_header
from qformat.errors import SourceError
from tests.corpus.fuzzing import RANDOM, edited_bytes, fuzz, lengths

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
TYPES = [gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0")]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(random: Random, kind: int) -> bytes:
    """Return a value of the metadata without its type."""
    if kind == STRING:
        return text(random.choice(["", "llama", "🦙", "a" * 40]))
    if kind == ARRAY:
        inner = random.choice([*SCALARS, STRING])
        length = random.randint(0, 3)
        return struct.pack("<IQ", inner, length) + b"".join(value(random, inner) for _ in range(length))
    return struct.pack("<" + SCALARS[kind], random.choice([0, 1]))


def gguf_bytes(random: Random) -> bytes:
    """Return a valid file of random keys and tensors."""
    keys = random.sample(
        ["general.name", "a", "llama.block_count", "tokenizer.ggml.tokens", "🦙"], random.randint(0, 3)
    )
    body = b""
    for key in keys:
        kind = random.choice([*SCALARS, STRING, ARRAY])
        body += text(key) + struct.pack("<I", kind) + value(random, kind)
    alignment = random.choice([None, None, 8, 64])
    if alignment is not None:
        body += text("general.alignment") + struct.pack("<II", 4, alignment)
    names = random.sample(["token_embd.weight", "a", "blk.0.attn_q.weight", "x" * 60], random.randint(0, 3))
    unit, offset, data = alignment or 32, 0, b""
    for name in names:
        kind = random.choice(TYPES)
        block_size, block_nbytes = gguf.GGML_QUANT_SIZES[kind]
        shape = [block_size * random.randint(1, 2), *[random.randint(1, 2) for _ in range(random.randint(0, 2))]]
        nbytes = math.prod(shape) // block_size * block_nbytes
        body += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        body += struct.pack("<IQ", int(kind), offset)
        data += bytes(nbytes).ljust(-(-nbytes // unit) * unit, b"\1")
        offset = len(data)
    head = b"GGUF" + struct.pack("<IQQ", random.choice([2, 3]), len(names), len(keys) + (alignment is not None)) + body
    return head.ljust(-(-len(head) // unit) * unit, b"\0") + data


def read(path: Path) -> GgufHeader | None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return read_header(descriptor, path)
    except SourceError as error:
        assert path.name in str(error)
        return None
    finally:
        os.close(descriptor)


def check_against_gguf_py(path: Path, header: GgufHeader) -> None:
    theirs = {str(tensor.name): tensor for tensor in gguf.GGUFReader(path).tensors}
    assert theirs.keys() == header.tensors.keys()
    for name, tensor in header.tensors.items():
        assert [*reversed(tensor.shape)] == theirs[name].shape.tolist()
        assert tensor.block_type.name == theirs[name].tensor_type.name
        assert (tensor.start, tensor.nbytes) == (theirs[name].data_offset, theirs[name].n_bytes)


@lengths(80, 5_000)
def test_a_valid_file_is_read_as_gguf_py_reads_it(n_examples: int, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"

    def check(random: Random) -> None:
        path.write_bytes(gguf_bytes(random))
        header = read(path)
        assert header is not None
        check_against_gguf_py(path, header)

    fuzz(n_examples, check, RANDOM)


@lengths(120, 15_000)
def test_gguf_py_accepts_every_damaged_file_that_is_accepted(n_examples: int, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"

    def check(random: Random) -> None:
        path.write_bytes(edited_bytes(random, gguf_bytes(random)))
        header = read(path)
        if header is not None:
            check_against_gguf_py(path, header)

    fuzz(n_examples, check, RANDOM)
