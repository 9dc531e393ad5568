"""A model in several files is read whole; a missing, foreign or later part is rejected with its name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from qformat.converters.convert import convert, plan
from qformat.converters.sources.open_source import open_source
from qformat.errors import Reason, SourceError
from tests.converters.sources.decoded_kinds import read
from tests.converters.sources.gguf.family_models import FAMILIES, write_family
from tests.small_models import contents

PARTS = [f"model-{number:05}-of-00003.gguf" for number in (1, 2, 3)]


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Return a folder with a model of 27 tensors in three parts."""
    folder = write_family(tmp_path / "parts", "starcoder2", FAMILIES["starcoder2"], split_max_tensors=12)
    assert sorted(path.name for path in folder.glob("*.gguf")) == PARTS
    return folder


@pytest.mark.parametrize("place", ["", PARTS[0]])
def test_a_split_model_is_that_of_the_whole_file(place: str, parts: Path, tmp_path: Path) -> None:
    whole = open_source(write_family(tmp_path / "whole", "starcoder2", FAMILIES["starcoder2"]))
    split = open_source(parts / place if place else parts)
    assert split.config == whole.config
    assert split.tensors.keys() == whole.tensors.keys()
    for name in whole.tensors:
        assert np.array_equal(read(split, name, chunk_nbytes=1000), read(whole, name, chunk_nbytes=1000)), name
    assert list(split.describe()["files"]) == PARTS
    assert split.left_out == {}
    whole.close()
    split.close()


def test_the_artifact_of_a_split_model_has_the_same_weights(parts: Path, tmp_path: Path) -> None:
    convert(write_family(tmp_path / "whole", "starcoder2", FAMILIES["starcoder2"]), tmp_path / "a")
    convert(parts, tmp_path / "b")
    found, expected = contents(tmp_path / "b"), contents(tmp_path / "a")
    name = "model-00001-of-00001.safetensors"
    assert found[name] == expected[name]
    assert found["config.json"] == expected["config.json"]


@pytest.mark.parametrize("missing", PARTS)
def test_a_missing_part_is_named(missing: str, parts: Path) -> None:
    (parts / missing).unlink()
    with pytest.raises(SourceError, match=missing) as refused:
        plan(parts)
    assert refused.value.reason is Reason.MISSING_COMPONENT


def test_a_later_part_says_to_give_the_first(parts: Path) -> None:
    with pytest.raises(SourceError, match=r"is only a part of a split model \(2 of 3\)") as refused:
        plan(parts / PARTS[1])
    assert str(parts / PARTS[0]) in str(refused.value)
    assert refused.value.reason is Reason.UNSUPPORTED_SOURCE


def set_scalar(path: Path, key: str, value: int) -> None:
    """Set an integer in the metadata of a file."""
    reader = gguf.GGUFReader(path, "r+")
    field = reader.get_field(key)
    assert field is not None
    field.parts[field.data[0]][0] = value


def rename_one(folder: Path) -> None:
    (folder / PARTS[0]).rename(folder / "renamed.gguf")
    for name in PARTS[1:]:
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "reason", "said"),
    [
        (lambda f: set_scalar(f / PARTS[0], "split.tensors.count", 30), Reason.INDEX_MISMATCH, "30, but the 3 parts"),
        (lambda f: set_scalar(f / PARTS[2], "split.count", 4), Reason.INDEX_MISMATCH, PARTS[2]),
        (lambda f: shutil.copy(f / PARTS[1], f / PARTS[2]), Reason.INDEX_MISMATCH, "split.no"),
        (rename_one, Reason.UNSUPPORTED_SOURCE, "Name the parts NAME-00001-of-00003.gguf"),
        (lambda f: shutil.copy(f / PARTS[0], f / "other.gguf"), Reason.UNSUPPORTED_SOURCE, "contains 4 GGUF files"),
    ],
)
def test_parts_that_do_not_make_up_a_model_are_rejected(
    damage: Callable[[Path], object], reason: Reason, said: str, parts: Path
) -> None:
    damage(parts)
    with pytest.raises(SourceError, match=said) as refused:
        plan(parts)
    assert refused.value.reason is reason


def test_a_tensor_in_two_parts_is_rejected(parts: Path) -> None:
    shutil.copy(parts / PARTS[1], parts / PARTS[2])
    set_scalar(parts / PARTS[2], "split.no", 2)
    with pytest.raises(SourceError, match=f"is in {PARTS[1]}, too") as refused:
        plan(parts)
    assert refused.value.reason is Reason.DUPLICATE_TENSOR
