"""MXFP4 checkpoints (gpt-oss): experts decoded as transformers does it, with its names and shapes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from qformat.artifact.reading.reader import open_artifact
from qformat.artifact.reading.verify import verify_integrity
from qformat.converters.compare.compare import compare
from qformat.converters.convert import convert, plan
from qformat.converters.sources.open_source import open_source
from qformat.errors import Reason, SourceError
from tests.converters.sources.decoded_kinds import EXPERTS, experts, read, write_mxfp4
from tests.small_models import Tensor, raw_tensor, weight


def decoded_by_transformers(tensors: dict[str, Tensor], name: str) -> np.ndarray:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = (
        torch.frombuffer(bytearray(tensor.data), dtype=torch.uint8).reshape(tensor.shape)
        for tensor in (tensors[EXPERTS + name + "_blocks"], tensors[EXPERTS + name + "_scales"])
    )
    return convert_moe_packed_tensors(blocks, scales).flatten().clone().view(torch.uint8).numpy()


@pytest.mark.parametrize(("n_experts", "n_rows", "n_groups"), [(1, 1, 1), (3, 10, 2), (2, 300, 3)])
def test_every_value_is_the_one_that_transformers_decodes(
    n_experts: int, n_rows: int, n_groups: int, tmp_path: Path
) -> None:
    tensors = experts("gate_up_proj", n_experts=n_experts, n_rows=n_rows, n_groups=n_groups)
    opened = open_source(write_mxfp4(tmp_path / "source", tensors))
    found = opened.tensors[EXPERTS + "gate_up_proj"]
    assert (found.dtype, found.shape) == ("BF16", (n_experts, 32 * n_groups, n_rows))
    assert not [name for name in opened.tensors if name.endswith(("_blocks", "_scales"))]
    expected = decoded_by_transformers(tensors, "gate_up_proj")
    for chunk_nbytes in (26, 1000, 1 << 20):
        assert np.array_equal(read(opened, found.name, chunk_nbytes=chunk_nbytes), expected)
    opened.close()


def test_a_converted_checkpoint_keeps_the_decoded_experts_and_packs_the_attention(tmp_path: Path) -> None:
    tensors = experts("gate_up_proj", n_experts=2, n_rows=12, n_groups=1)
    tensors |= experts("down_proj", n_experts=2, n_rows=32, n_groups=2, seed=1)
    tensors[EXPERTS + "down_proj_bias"] = weight((2, 32))
    source = write_mxfp4(tmp_path / "source", tensors)
    convert(source, tmp_path / "out")
    assert verify_integrity(tmp_path / "out", sha256=True).passed
    assert compare(tmp_path / "out", source).passed
    with open_artifact(tmp_path / "out") as artifact:
        for name in ("gate_up_proj", "down_proj"):
            assert artifact[EXPERTS + name].data.tobytes() == decoded_by_transformers(tensors, name).tobytes()  # type: ignore[union-attr]
    manifest = json.loads((tmp_path / "out" / "qformat.json").read_text())
    assert manifest["source"]["kind"] == "mxfp4"
    assert manifest["tensors"]["model.layers.0.self_attn.q_proj.weight"]["encoding"] == "nf4"


def without(tensors: dict[str, Tensor], suffix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(suffix)}


GOOD = experts("gate_up_proj", n_experts=2, n_rows=12, n_groups=1)


@pytest.mark.parametrize(
    ("tensors", "reason", "said"),
    [
        (without(GOOD, "_scales"), Reason.MISSING_COMPONENT, "has no scales"),
        (without(GOOD, "_blocks"), Reason.CONFIG_FIELD, "no tensor's name ends in _blocks"),
        ({**GOOD, EXPERTS + "gate_up_proj_scales": raw_tensor("U8", (2, 12, 2))}, Reason.COMPONENT_SHAPE, "[2, 12, 1]"),
        ({**GOOD, EXPERTS + "gate_up_proj_scales": raw_tensor("I8", (2, 12, 1))}, Reason.COMPONENT_DTYPE, "I8"),
        (
            {**GOOD, EXPERTS + "gate_up_proj_blocks": raw_tensor("U8", (2, 12, 16))},
            Reason.COMPONENT_SHAPE,
            "groups, 16",
        ),
        ({**GOOD, EXPERTS + "gate_up_proj": weight((2, 32, 12))}, Reason.DUPLICATE_TENSOR, "MXFP4"),
    ],
)
def test_inconsistent_tensors_are_rejected_with_a_reason(
    tensors: dict[str, Tensor], reason: Reason, said: str, tmp_path: Path
) -> None:
    source = write_mxfp4(tmp_path / "source", tensors)
    with pytest.raises(SourceError) as refused:
        plan(source)
    assert refused.value.reason is reason
    assert said in str(refused.value)
    assert str(source) in str(refused.value)
