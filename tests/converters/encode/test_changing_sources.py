"""Sources that change before a resumption or during a conversion are detected."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qformat.converters.convert import convert
from qformat.errors import Reason, SourceError, TargetError
from tests.converters.encode.resumption import resume
from tests.converters.faulty_disk import N_TENSORS, OPTIONS, FaultyDisk, interrupt, place
from tests.small_models import contents


def copy_of(source: Path, folder: Path) -> Path:
    return place(folder, contents(source))


def change_weight(folder: Path, *, keep_times: bool) -> Path:
    """Change one byte of each shard's data in place."""
    for path in folder.glob("*.safetensors"):
        status = path.stat()
        with path.open("r+b") as file:
            file.seek(-3, os.SEEK_END)
            byte = file.read(1)
            file.seek(-3, os.SEEK_END)
            file.write(bytes([byte[0] ^ 1]))
        if keep_times:
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return folder


@pytest.mark.parametrize("keep_times", [False, True], ids=["new mtime", "mtime put back"])
def test_a_source_that_changed_before_resumption_is_rejected_and_accepted_with_restart(
    keep_times: bool, source: Path, tmp_path: Path
) -> None:
    mine = copy_of(source, tmp_path / "source")
    out = tmp_path / "target" / "out"
    out.parent.mkdir()
    interrupt(mine, out, n_done=N_TENSORS - 1)
    change_weight(mine, keep_times=keep_times)
    with pytest.raises(SourceError, match="restart=True") as refused:
        resume(mine, out)
    assert refused.value.reason is Reason.SOURCE_CHANGED
    assert refused.value.tensor is not None
    assert not out.exists()
    resume(mine, out, restart=True)
    convert(mine, tmp_path / "again", OPTIONS)
    assert contents(out) == contents(tmp_path / "again")


def test_a_copied_source_is_recognised_by_its_bytes(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    mine = copy_of(source, tmp_path / "source")
    out = tmp_path / "target" / "out"
    out.parent.mkdir()
    interrupt(mine, out, n_done=3)
    _, n_encoded = resume(copy_of(source, tmp_path / "elsewhere"), out)
    assert n_encoded == N_TENSORS - 3
    assert contents(out) == whole


@pytest.mark.parametrize("name", ["LICENSE", "config.json", "model.safetensors.index.json"])
def test_a_changed_small_file_of_the_source_changes_the_plan(name: str, source: Path, tmp_path: Path) -> None:
    mine = copy_of(source, tmp_path / "source")
    out = tmp_path / "target" / "out"
    out.parent.mkdir()
    interrupt(mine, out, n_done=3)
    path = mine / name
    if name == "config.json":
        path.write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False, "extra": 1}))
    elif name == "LICENSE":
        path.write_text("You may not.")
    else:
        path.write_text(path.read_text().replace('"total_size": 0', '"total_size": 1'))
        resume(mine, out)  # what the index says besides the map is not read: nothing has changed
        return
    with pytest.raises(TargetError, match="restart=True"):
        resume(mine, out)


@pytest.mark.parametrize("name", ["LICENSE", "config.json", "model.safetensors.index.json", "a shard"])
def test_a_source_that_changes_during_conversion_is_detected(name: str, source: Path, tmp_path: Path) -> None:
    mine = copy_of(source, tmp_path / "source")
    out = tmp_path / "target" / "out"
    out.parent.mkdir()
    changed: list[Path] = []

    def change_once(_: int) -> None:
        if not changed:
            path = sorted(mine.glob("*.safetensors"))[0] if name == "a shard" else mine / name
            changed.append(path)
            with path.open("r+b") as file:
                data = file.read()
                file.seek(0)
                file.write(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])

    with pytest.raises(SourceError, match="was changed during the conversion") as refused:
        convert(mine, out, OPTIONS, workers=1, on_progress=change_once, disk=FaultyDisk())
    assert refused.value.reason is Reason.SOURCE_CHANGED
    assert Path(refused.value.path) == changed[0]
    assert not out.exists()


def test_a_source_that_changes_between_plan_and_conversion_is_detected(source: Path, tmp_path: Path) -> None:
    """The search for NaN and Inf reads all weights after the headers, so a change before the conversion is possible."""
    mine = copy_of(source, tmp_path / "source")
    out = tmp_path / "target" / "out"
    out.parent.mkdir()
    with pytest.raises(SourceError) as refused:
        convert(mine, out, OPTIONS, on_plan=lambda _: (mine / "LICENSE").write_text("other"))  # type: ignore[arg-type, return-value]
    assert refused.value.reason is Reason.SOURCE_CHANGED


def test_a_source_that_is_truncated_during_conversion_raises_an_error(source: Path, tmp_path: Path) -> None:
    mine = copy_of(source, tmp_path / "source")
    out = tmp_path / "target" / "out"
    out.parent.mkdir()

    def cut(_: object) -> None:
        for path in mine.glob("*.safetensors"):
            os.truncate(path, 700)

    with pytest.raises(SourceError) as refused:
        convert(mine, out, OPTIONS, on_plan=cut)
    assert refused.value.reason in {Reason.TRUNCATED, Reason.SOURCE_CHANGED}
    assert not out.exists()
