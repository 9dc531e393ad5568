"""The encoding vectors agree with bitsandbytes: the same packed codes and float32 scales."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from tests.spec import corpus

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
]

ENCODED = [vector for vector in corpus.tensors() if vector["input"] is not None and "reason" not in vector]
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@pytest.mark.parametrize("vector", ENCODED, ids=corpus.name_of)
def test_bitsandbytes_packs_the_same_codes(vector: corpus.Vector) -> None:
    weights = torch.frombuffer(bytearray.fromhex(vector["input"]), dtype=DTYPES[vector["dtype"]])
    packed, state = bnb.quantize_4bit(
        weights.reshape(vector["shape"]), blocksize=vector["block_size"], compress_statistics=False, quant_type="nf4"
    )
    assert packed.numpy().tobytes().hex() == vector["packed"]
    if not vector["double_quant"]:
        assert state.absmax.to(torch.float32).numpy().tobytes().hex() == vector["absmax"]


def test_bitsandbytes_has_the_same_dynamic_map() -> None:
    from qformat.codec.codebooks import DYNAMIC_MAP

    theirs = bnb.create_dynamic_map()  # type: ignore[no-untyped-call]
    assert np.array_equal(theirs.numpy(), DYNAMIC_MAP)
