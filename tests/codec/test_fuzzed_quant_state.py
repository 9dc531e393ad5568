"""Any bytes of a quant_state are parsed or refused, and bitsandbytes reads the same from each that is accepted."""

from __future__ import annotations

import json
from random import Random

import numpy as np
import torch
from bitsandbytes.utils import unpack_tensor_to_dict

from qformat.codec.quant_state import parse
from qformat.errors import ArtifactError
from tests.corpus.damage.odd_json import odd_edit, odd_text
from tests.corpus.fuzzing import RANDOM, edited_bytes, fuzz, lengths

RECORD = {
    "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 64],
    "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.125,
}  # fmt: skip


@lengths(250, 30_000)
def test_any_record_is_refused_or_read_as_bitsandbytes_reads_it(n_examples: int) -> None:
    def check(random: Random) -> None:
        record = dict(random.choice([RECORD, dict(list(RECORD.items())[:4])]), shape=[4, 64])
        for _ in range(random.randint(0, 2)):
            if record:
                odd_edit(random, record)
        text = json.dumps(record)
        if record and random.random() < 0.2:
            text, _ = odd_text(random, text)
        data = edited_bytes(random, text.encode("utf-8", "surrogatepass")) if random.random() < 0.5 else text.encode()
        try:
            state = parse(data, path="shard.safetensors", tensor="w")
        except ArtifactError as error:
            assert "shard.safetensors" in str(error)
            return
        theirs = unpack_tensor_to_dict(torch.from_numpy(np.frombuffer(data, np.uint8).copy()))
        assert (state.block_size, list(state.shape)) == (theirs["blocksize"], theirs["shape"])
        assert state.nested_offset == theirs.get("nested_offset")

    fuzz(n_examples, check, RANDOM)
