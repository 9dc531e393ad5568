"""Unusual names are converted like any other; names that readers cannot use are rejected."""

from __future__ import annotations

from pathlib import Path

import pytest

from qformat.artifact.reading.reader import open_artifact
from qformat.artifact.reading.verify import verify_integrity
from qformat.converters.convert import ConversionOptions, convert
from qformat.errors import Reason
from tests.converters.refused_source import refusal
from tests.small_models import weight, write_checkpoint

AWKWARD_NAMES = [
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.0.mlp.Down_proj.weight",
    "MODEL.layers.0.mlp.down_proj.weight",
    "model.🦙.mlp.up_proj.weight",
    "model.ａ.mlp.gate_proj.weight",
    "módel.e\u0301.o_proj.weight",
    "model.layers.٣.mlp.c_fc.weight",
    "model.layers.007.mlp.down_proj.weight",
    "model.layers.7.mlp.down_proj.weight",
    "model.layers." + "1" * 400 + ".mlp.down_proj.weight",
    "..weight",
    ".",
    "weight",
    "../../etc/passwd",
    "a b c",
    "__metadata",
    "model.safetensors",
    "qformat.json",
    "x" * 512,
    "🦙" * 128,
]


def test_unusual_tensor_names_are_converted_like_any_other(tmp_path: Path) -> None:
    tensors = {name: weight((8, 16), seed=i) for i, name in enumerate(AWKWARD_NAMES)}
    source = write_checkpoint(tmp_path / "source", tensors, n_shards=2)
    convert(source, tmp_path / "out")
    assert verify_integrity(tmp_path / "out", sha256=True).passed
    with open_artifact(tmp_path / "out") as artifact:
        assert set(artifact) == set(AWKWARD_NAMES)
        assert sum(hasattr(artifact[name], "packed") for name in artifact) >= 5
        for name, tensor in tensors.items():
            decoded = artifact[name].decode()
            assert decoded.shape == tensor.shape


def test_a_name_that_collides_with_a_component_of_another_weight_is_rejected(tmp_path: Path) -> None:
    packed = "model.layers.0.mlp.down_proj.weight"
    for suffix in (".quant_map", ".nested_quant_map"):
        for double_quant in (True, False):
            tensors = {packed: weight((8, 16)), packed + suffix: weight((16,), "F32")}
            source = write_checkpoint(tmp_path / f"source{suffix}{double_quant}", tensors)
            error = refusal(source, ConversionOptions(double_quant=double_quant))
            assert error.reason is Reason.DUPLICATE_TENSOR
            assert error.tensor == packed + suffix
            assert "skip=(" in str(error)
            convert(
                source, tmp_path / f"out{suffix}{double_quant}", ConversionOptions(skip=[packed[: -len(".weight")]])
            )


def test_a_name_that_gets_too_long_with_a_components_suffix_is_rejected(tmp_path: Path) -> None:
    """Such an artifact could be written, but our own reader would not open it."""
    suffix = ".quant_state.bitsandbytes__nf4"
    leaf = ".down_proj.weight"
    for nbytes in (512 - len(suffix), 513 - len(suffix)):
        name = "x" * (nbytes - len(leaf)) + leaf
        source = write_checkpoint(tmp_path / f"source{nbytes}", {name: weight((8, 16))})
        if nbytes + len(suffix) == 512:
            convert(source, tmp_path / "converted")
            assert verify_integrity(tmp_path / "converted").passed
            continue
        error = refusal(source)
        assert error.reason is Reason.HEADER_LIMIT
        assert error.tensor == name


@pytest.mark.parametrize("name", ["(a+)+$", "a{99999999999}", "[[a", "a|b", "\\", "(" * 200, "a(?P<x>b)", "(?i)a", "*"])
def test_a_module_name_with_regex_syntax_is_rejected_before_it_is_compiled(name: str, tmp_path: Path) -> None:
    """transformers matches skip entries as regular expressions: `(a+)+$` would never finish."""
    tensors = {f"model.{name}.weight": weight((8, 16)), "model." + "a" * 40 + ".down_proj.weight": weight((8, 16))}
    error = refusal(write_checkpoint(tmp_path / "source", tensors))
    assert error.reason is Reason.SKIP_MODULES
    assert error.tensor == f"model.{name}.weight"
