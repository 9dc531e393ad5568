"""A small source and its artifact, and larger ones of several chunks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qformat.converters.convert import convert
from qformat.converters.sources.chunks import CHUNK_SIZES
from tests.converters.compare.changed_sides import DOWN
from tests.small_models import llama_config, weight, write_checkpoint, write_llama


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("compare") / "source", n_shards=2)


@pytest.fixture(scope="module")
def made(source: Path) -> Path:
    out = source.parent / "out"
    convert(source, out)
    return out


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def write_several_chunks(folder: Path) -> Path:
    """Write a weight of four and a half chunks, one of an odd size, and a kept one of two."""
    n_columns = 2048
    tensors = {
        DOWN: weight((9 * CHUNK_SIZES.nbytes // 2 // 2 // n_columns, n_columns), "BF16", seed=1),
        "model.layers.0.self_attn.o_proj.weight": weight((1021, 1031), "F32", seed=2),
        "model.embed_tokens.weight": weight((2048, n_columns), "BF16", seed=3),
    }
    return write_checkpoint(folder, tensors, config=llama_config(n_layers=1))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("large")
    convert(write_several_chunks(folder / "source"), folder / "out")
    return folder / "out", folder / "source"
