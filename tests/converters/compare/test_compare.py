"""A fresh conversion passes, and the result of a comparison does not depend on threads or chunks."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from qformat.converters.compare.compare import compare
from qformat.converters.compare.comparison import kind_of, layer_of
from qformat.converters.convert import ConversionOptions, convert
from qformat.converters.sources.chunks import ChunkSizes
from qformat.converters.sources.safetensors_shards import SafetensorsShards
from qformat.errors import Reason, SourceError
from tests.converters.compare.changed_sides import DOWN, NORM, UP, rewrite
from tests.small_models import llama_config, raw_tensor, tensor_of, tiny_tensors, weight, write_checkpoint, write_llama


@pytest.mark.parametrize("options", [ConversionOptions(), ConversionOptions(double_quant=False, block_size=32)])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_fresh_conversion_passes(tmp_path: Path, dtype: str, options: ConversionOptions) -> None:
    source = write_llama(tmp_path / "source", n_shards=3, dtype=dtype)
    convert(source, tmp_path / "out", options)
    comparison = compare(tmp_path / "out", source)
    assert comparison.findings == ()
    assert comparison.n_exact == comparison.n_packed == 14
    assert comparison.n_identical == comparison.n_kept == 7
    assert comparison.n_source_named == comparison.n_source_digests == 21
    assert comparison.source_nbytes == sum(t.nbytes for t in SafetensorsShards(source).tensors.values())


def test_tensors_of_odd_sizes_and_every_kept_dtype_pass(tmp_path: Path) -> None:
    tensors = {
        **tiny_tensors(),
        "model.layers.0.mlp.up_proj.weight": weight((1, 1), "BF16"),
        "model.layers.0.mlp.gate_proj.weight": weight((1, 1), "BF16", seed=8),
        "model.layers.0.self_attn.q_proj.bias": tensor_of(np.array(0.5), "F32"),
        "model.layers.0.positions": raw_tensor("I64", (3,)),
        "model.layers.0.mask": raw_tensor("BOOL", (5,)),
        "model.layers.0.empty": raw_tensor("F32", (0, 4)),
    }
    source = write_checkpoint(tmp_path / "source", tensors, config=llama_config(n_layers=1))
    convert(source, tmp_path / "out")
    comparison = compare(tmp_path / "out", source)
    assert comparison.passed
    assert comparison.n_packed + comparison.n_kept == len(tensors)


def test_weights_that_are_all_zero_pass_and_have_no_relative_error(tmp_path: Path) -> None:
    tensors = {DOWN: tensor_of(np.zeros((8, 40)), "BF16"), NORM: weight((8,))}
    source = write_checkpoint(tmp_path / "source", tensors, config=llama_config(n_layers=1))
    convert(source, tmp_path / "out")
    comparison = compare(tmp_path / "out", source)
    assert comparison.passed
    assert comparison.overall.relative_rms is None
    assert comparison.overall.max_abs_error == 0


def test_a_source_may_be_opened_already_and_stays_open(artifact: Path, source: Path) -> None:
    opened = SafetensorsShards(source)
    assert compare(artifact, opened).passed
    assert compare(artifact, opened).passed
    opened.close()


def test_weights_are_grouped_by_kind_of_module(artifact: Path, source: Path) -> None:
    groups = compare(artifact, source).by_kind()
    assert {kind: len(tensors) for kind, tensors in groups.items()} == dict.fromkeys(
        ["down_proj", "gate_proj", "up_proj", "k_proj", "o_proj", "q_proj", "v_proj"], 2
    )


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("model.layers.17.self_attn.q_proj.weight", "q_proj", 17),
        ("model.layers.3.mlp.experts.12.up_proj.weight", "up_proj", 3),
        ("lm_head.weight", "lm_head", None),
        ("classifier.2.weight", "classifier", 2),
        ("7.weight", "7.weight", 7),
        (f"h.{'9' * 400}.attn.weight", "attn", None),
    ],
)
def test_kind_and_layer_are_derived_from_names(name: str, kind: str, layer: int | None) -> None:
    assert (kind_of(name), layer_of(name)) == (kind, layer)


def test_the_result_does_not_depend_on_the_number_of_threads(large: tuple[Path, Path]) -> None:
    first = compare(*large, workers=1)
    assert first.passed
    assert compare(*large, workers=2) == first
    assert compare(*large, workers=7) == first


def test_progress_counts_every_byte_of_the_source_once(
    large: tuple[Path, Path], artifact: Path, source: Path, tmp_path: Path
) -> None:
    other = rewrite(source, {UP: weight((5,)), "extra": weight((4, 4))}, into=tmp_path / "other")
    for packed, checkpoint in ((*large,), (artifact, other)):
        steps: list[int] = []
        compare(packed, checkpoint, workers=1, on_progress=steps.append)
        opened = SafetensorsShards(checkpoint)
        assert sum(steps) == sum(tensor.nbytes for tensor in opened.tensors.values())
        opened.close()


def test_memory_does_not_grow_with_a_tensor(large: tuple[Path, Path]) -> None:
    """Of 19 MB of weights, only the scales (600 KB) and some chunks are in memory at a time."""
    first = compare(*large, workers=1)
    tracemalloc.start()
    try:
        second = compare(*large, workers=1, sizes=ChunkSizes(nbytes=2**18))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5 * 2**20
    assert second == first


def test_an_error_in_one_tensor_stops_all(large: tuple[Path, Path]) -> None:
    class Failing(SafetensorsShards):
        def read_into(self, tensor: object, offset: int, out: memoryview) -> None:
            raise SourceError(Reason.TRUNCATED, self.location, "ends early")

    opened = Failing(large[1])
    with pytest.raises(SourceError, match="ends early"):
        compare(large[0], opened, workers=2)
    opened.close()


def test_the_conversion_of_a_real_model_passes(smollm2: Path, tmp_path: Path) -> None:
    convert(smollm2, tmp_path / "out")
    comparison = compare(tmp_path / "out", smollm2)
    assert comparison.findings == ()
    assert (comparison.n_exact, comparison.n_identical) == (comparison.n_packed, comparison.n_kept)
    assert 0.08 < (comparison.overall.relative_rms or 0) < 0.10
    assert json.loads(json.dumps(comparison.code_counts)) == list(comparison.code_counts)
