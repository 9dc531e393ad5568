"""`check_small_files`: sizes and kinds of the files that transformers and PEFT read, before anything reads them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qformat.artifact.limits import (
    MAX_CONFIG_NBYTES,
    MAX_SMALL_FILE_NBYTES,
    MAX_TEMPLATE_NBYTES,
    MAX_TOKENIZER_VALUES,
)
from qformat.artifact.sources.small_files import check_small_files
from qformat.errors import ArtifactError, Reason


def sparse(path: Path, nbytes: int) -> None:
    """Create a file of this size that takes no room."""
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.truncate(nbytes)


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("tokenizer.json", MAX_SMALL_FILE_NBYTES),
        ("tokenizer_config.json", MAX_SMALL_FILE_NBYTES),
        ("generation_config.json", MAX_CONFIG_NBYTES),
        ("config.json", MAX_CONFIG_NBYTES),
        ("adapter_config.json", MAX_CONFIG_NBYTES),
        ("chat_template.jinja", MAX_TEMPLATE_NBYTES),
        ("additional_chat_templates/tools.jinja", MAX_TEMPLATE_NBYTES),
    ],
)
def test_a_file_past_its_limit_is_rejected_by_its_size(name: str, limit: int, tmp_path: Path) -> None:
    sparse(tmp_path / name, limit)
    check_small_files(tmp_path, error=ArtifactError)
    sparse(tmp_path / name, limit + 1)
    with pytest.raises(ArtifactError, match=f"the file has {limit + 1} bytes") as refused:
        check_small_files(tmp_path, error=ArtifactError)
    assert refused.value.reason is Reason.JSON_LIMIT
    assert Path(refused.value.path) == tmp_path / name


def test_a_linked_file_counts_with_its_size(tmp_path: Path) -> None:
    sparse(tmp_path / "blob", MAX_SMALL_FILE_NBYTES + 1)
    (tmp_path / "tokenizer.json").symlink_to("blob")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: the file has"):
        check_small_files(tmp_path, error=ArtifactError)


def test_a_fifo_is_rejected_and_nobody_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(ArtifactError, match="is not a regular file"):
        check_small_files(tmp_path, error=ArtifactError)


def test_other_files_may_have_any_size(tmp_path: Path) -> None:
    sparse(tmp_path / "model.safetensors", MAX_SMALL_FILE_NBYTES + 1)
    sparse(tmp_path / "notes.txt", MAX_SMALL_FILE_NBYTES + 1)
    (tmp_path / "tokenizer.json").symlink_to("missing")
    check_small_files(tmp_path, error=ArtifactError)
    check_small_files(tmp_path / "missing", error=ArtifactError)


def test_a_tokenizer_of_more_values_than_any_has_is_rejected_before_it_is_parsed(tmp_path: Path) -> None:
    dense = b'{"x":[' + b"[]," * (MAX_TOKENIZER_VALUES // 2)
    (tmp_path / "tokenizer.json").write_bytes(dense)
    with pytest.raises(ArtifactError, match=rf"tokenizer\.json: has {2 * (MAX_TOKENIZER_VALUES // 2) + 3} JSON values"):
        check_small_files(tmp_path, error=ArtifactError, count_values=True)
    (tmp_path / "tokenizer.json").write_bytes(dense[: -3 * 2])
    check_small_files(tmp_path, error=ArtifactError, count_values=True)
