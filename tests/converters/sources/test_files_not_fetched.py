"""Sources in which a pointer or an error page takes the place of a file, whatever the file is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qformat.converters.convert import convert
from qformat.errors import Reason, SourceError
from qformat.model.checkpoint import load_checkpoint
from tests.artifact.not_fetched import POINTER, STAND_INS
from tests.converters.refused_source import refusal
from tests.converters.sources.decoded_kinds import bnb_llama, fp8_source, torch_llama, write_bin, write_bnb
from tests.converters.sources.gguf.gguf_models import write_gguf
from tests.converters.sources.hub.serving import NAME, serving
from tests.converters.sources.hub.serving import plan as plan_from_hub
from tests.hub_stand_in.repositories import StoredFile
from tests.small_models import INDEX, SIDE_FILES, write_llama, write_tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")

WEIGHTS: dict[str, Callable[[Path], Path]] = {
    "safetensors": write_llama,
    "torch_bin": lambda folder: write_bin(folder, torch_llama()),
    "gguf": write_gguf,
    "fp8": fp8_source,
    "bitsandbytes_4bit": lambda folder: write_bnb(folder, bnb_llama()),
}


def named(error: SourceError, path: Path, kind: str) -> bool:
    _, problem, next_step = STAND_INS[kind]
    where = error.reason is Reason.MISSING_FILE and Path(error.path) == path
    return where and problem in error.problem and next_step in str(error.next_step)


@pytest.mark.parametrize("kind", ["LFS", "git-annex", "HTML", "an answer of the Hub"])
@pytest.mark.parametrize("builder", WEIGHTS)
def test_weights_that_were_not_fetched_are_named(builder: str, kind: str, tmp_path: Path) -> None:
    source = WEIGHTS[builder](tmp_path / "source")
    (path,) = (path for path in source.iterdir() if path.suffix in {".safetensors", ".bin", ".gguf"})
    path.write_bytes(STAND_INS[kind][0])
    assert named(refusal(source), path, kind)


@pytest.mark.parametrize("kind", ["LFS", "HTML"])
@pytest.mark.parametrize("name", ["config.json", INDEX, "modeling_mine.py", *sorted(SIDE_FILES.keys() - {"LICENSE"})])
def test_every_other_file_that_was_not_fetched_is_named(name: str, kind: str, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source", side_files=SIDE_FILES)
    (source / name).write_bytes(STAND_INS[kind][0])
    assert named(refusal(source), source / name, kind)


def test_one_shard_of_many_that_was_not_fetched_is_named(sharded: Path) -> None:
    path = sharded / "model-00002-of-00003.safetensors"
    path.write_bytes(POINTER)
    assert named(refusal(sharded), path, "LFS")
    with pytest.raises(SourceError) as refused:
        load_checkpoint(sharded)
    assert named(refused.value, path, "LFS")


def test_files_that_are_not_read_may_be_pointers(sharded: Path, tmp_path: Path) -> None:
    for name in ("optimizer.pt", "original.pth", "consolidated.safetensors"):
        (sharded / name).write_bytes(POINTER)
    convert(sharded, tmp_path / "out")


def test_a_pointer_that_somebody_committed_to_the_hub_as_a_text_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tiny(tmp_path / "source")
    for name in ("config.json", "model.safetensors"):
        with serving(monkeypatch, tmp_path / name) as hub:
            hub.add_folder(NAME, source)
            hub.repositories.commit(NAME, {name: StoredFile(POINTER, lfs=False)})
            with pytest.raises(SourceError, match=f"{name}: is a Git LFS pointer") as refused:
                plan_from_hub(NAME)
            assert refused.value.reason is Reason.MISSING_FILE
