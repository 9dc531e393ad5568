"""Only regular files are opened, also through links. In the Hub's cache, a link leads to a blob of its repository."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qformat.artifact.reading.reader import open_artifact
from qformat.artifact.reading.verify import verify_integrity
from qformat.converters.compare.compare import compare
from qformat.converters.convert import convert, plan
from qformat.errors import Reason, SourceError
from qformat.model.checkpoint import load_checkpoint
from qformat.quality.source_check import check_source
from tests.converters.refused_source import refusal
from tests.converters.sources.decoded_kinds import torch_llama, write_bin
from tests.converters.sources.gguf.gguf_models import write_gguf
from tests.converters.unusual_paths import (
    as_dangling_link,
    as_device,
    as_fifo,
    as_folder,
    as_link_to_an_empty_folder,
    as_link_to_itself,
    as_link_to_zero,
)
from tests.small_models import INDEX, SIDE_FILES, contents, write_llama, write_tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")


def test_a_folder_that_does_not_exist_or_is_a_file_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("missing", "file", "x" * 5000, "file/below"):
        with pytest.raises(SourceError) as refused:
            plan(tmp_path / name)
        assert refused.value.reason is Reason.MISSING_FILE


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "LICENSE", "tokenizer.json", INDEX])
@pytest.mark.parametrize(
    "make",
    [
        as_folder,
        as_fifo,
        as_device,
        as_link_to_an_empty_folder,
        as_link_to_zero,
        as_link_to_itself,
        as_dangling_link,
    ],
)
def test_only_regular_files_are_opened(make: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source", side_files=SIDE_FILES)
    if name == INDEX:
        (source / "model.safetensors").unlink()
    (source / name).unlink(missing_ok=True)
    make(source / name)
    error = refusal(source)
    expected = Reason.MISSING_FILE if make is as_dangling_link else Reason.NOT_A_REGULAR_FILE
    assert error.reason is expected, error
    assert Path(error.path) == source / name


def test_the_error_of_a_dangling_link_names_its_target_and_how_to_fetch_it(single: Path) -> None:
    (single / "NOTICE").symlink_to(".git/annex/objects/SHA256E-s5--0")
    error = refusal(single)
    assert "is a symbolic link to .git/annex/objects/SHA256E-s5--0, which does not exist" in str(error)
    assert "git annex get" in str(error)


def linked(source: Path, folder: Path, *, make: Callable[[Path, Path], None]) -> Path:
    """Return a directory with a link to every file of a checkpoint."""
    folder.mkdir()
    for path in source.iterdir():
        make(folder / path.name, path)
    return folder


def in_two_steps(link: Path, path: Path) -> None:
    between = path.with_name(f"{path.name}-current")
    between.symlink_to(path.name)
    link.symlink_to(between)


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "safetensors": write_llama,
    "torch_bin": lambda folder: write_bin(folder, torch_llama()),
    "gguf": write_gguf,
}

LINKS: dict[str, Callable[[Path, Path], None]] = {
    "absolute": lambda link, path: link.symlink_to(path),
    "relative": lambda link, path: link.symlink_to(os.path.relpath(path, link.parent)),
    "in two steps": in_two_steps,
}


@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize("builder", BUILDERS)
def test_links_of_a_source_are_followed_and_give_the_same_artifact(builder: str, kind: str, tmp_path: Path) -> None:
    source = BUILDERS[builder](tmp_path / "store")
    convert(source, tmp_path / "plain")
    folder = linked(source, tmp_path / "linked", make=LINKS[kind])
    convert(folder, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
    assert compare(tmp_path / "out", folder).passed
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_symlink()]


def test_a_linked_file_that_is_replaced_during_the_conversion_is_noticed(sharded: Path, tmp_path: Path) -> None:
    folder = linked(sharded, tmp_path / "linked", make=LINKS["absolute"])

    def replace_target(_: object) -> None:
        os.utime(sharded / "model-00002-of-00003.safetensors", ns=(0, 0))

    with pytest.raises(SourceError) as refused:
        convert(folder, tmp_path / "out", on_plan=replace_target)
    assert refused.value.reason is Reason.SOURCE_CHANGED


def test_the_links_of_an_artifact_are_not_followed(single: Path, tmp_path: Path) -> None:
    convert(single, tmp_path / "artifact")
    for name in ("config.json", "model-00001-of-00001.safetensors"):
        copy = shutil.copytree(tmp_path / "artifact", tmp_path / f"with-linked-{name}")
        (copy / name).unlink()
        (copy / name).symlink_to(tmp_path / "artifact" / name)
        found = verify_integrity(copy).findings
        assert {finding.reason for finding in found} == {Reason.PATH_ESCAPES}


def test_a_reference_model_and_its_check_read_through_links(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "store", n_shards=2)
    folder = linked(source, tmp_path / "linked", make=LINKS["absolute"])
    convert(source, tmp_path / "artifact")
    with open_artifact(tmp_path / "artifact") as artifact:
        assert check_source({"it": artifact.manifest}, folder) == {"it"}
    with_links, plain = (load_checkpoint(path).state_dict() for path in (folder, source))
    assert with_links.keys() == plain.keys()
    assert all(torch.equal(with_links[name], plain[name]) for name in plain)


def hub_cache(tmp_path: Path, files: dict[str, bytes]) -> Path:
    """Lay files out as huggingface_hub does: snapshots/REVISION/NAME -> ../../blobs/HASH."""
    repository = tmp_path / "models--someone--something"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, (name, data) in enumerate(files.items()):
        (repository / "blobs" / f"{number:040x}").write_bytes(data)
        (snapshot / name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_the_links_of_the_hub_cache_are_followed(single: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path, contents(single))
    convert(single, tmp_path / "from folder")
    convert(snapshot, tmp_path / "from cache")
    assert contents(tmp_path / "from folder") == contents(tmp_path / "from cache")


def test_the_links_of_the_hub_cache_are_followed_through_a_link_to_the_cache(single: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path, contents(single))
    (tmp_path / "linked").symlink_to(snapshot.parents[1])
    convert(tmp_path / "linked" / "snapshots" / snapshot.name, tmp_path / "out")
    (tmp_path / "direct").symlink_to(snapshot)  # hides the cache, so it is read as any other directory
    convert(tmp_path / "direct", tmp_path / "from a link to the snapshot")
    assert contents(tmp_path / "from a link to the snapshot") == contents(tmp_path / "out")


def test_a_folder_named_snapshots_is_not_the_hub_cache_without_blobs(single: Path, tmp_path: Path) -> None:
    (tmp_path / "snapshots").mkdir()
    folder = linked(single, tmp_path / "snapshots" / "monday", make=LINKS["absolute"])
    convert(folder, tmp_path / "out")


@pytest.mark.parametrize(
    "target",
    ["/dev/zero", "../../../outside", "../../blobs/../../outside", "../../blobs/sub/blob", "../../blobs"],
)
def test_a_hub_cache_with_links_that_lead_elsewhere_is_rejected(target: str, single: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"{}")
    snapshot = hub_cache(tmp_path, contents(single))
    (snapshot.parents[1] / "blobs" / "sub").mkdir()
    (snapshot.parents[1] / "blobs" / "sub" / "blob").write_bytes(b"{}")
    (snapshot / "LICENSE").unlink()
    (snapshot / "LICENSE").symlink_to(target)
    assert refusal(snapshot).reason in {Reason.PATH_ESCAPES, Reason.NOT_A_REGULAR_FILE}


def test_a_blob_that_is_itself_a_link_or_a_fifo_is_rejected(single: Path, tmp_path: Path) -> None:
    for number, make in enumerate((as_fifo, as_link_to_zero, as_link_to_itself)):
        folder = tmp_path / str(number)
        folder.mkdir()
        snapshot = hub_cache(folder, contents(single))
        blob = snapshot.parents[1] / "blobs" / os.path.basename(os.readlink(snapshot / "model.safetensors"))
        blob.unlink()
        make(blob)
        assert refusal(snapshot).reason in {Reason.PATH_ESCAPES, Reason.NOT_A_REGULAR_FILE}
