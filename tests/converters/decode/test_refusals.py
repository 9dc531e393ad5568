"""Damaged artifacts and invalid targets and arguments are rejected and leave no output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qformat.converters.export import export
from qformat.errors import ArtifactError, Reason, TargetError, UsageError
from tests.converters.decode.exports import damage, exported, kill_after
from tests.converters.faulty_disk import place
from tests.small_models import contents, names_beside


@pytest.mark.parametrize("component", ["packed", "absmax", "nested_absmax", "nested_quant_map", "data"])
def test_a_changed_bit_is_rejected_with_tensor_and_file_and_leaves_no_output(
    component: str, tiny: Path, tmp_path: Path
) -> None:
    artifact = place(tmp_path / "artifact", contents(tiny))
    name = damage(artifact, component)
    with pytest.raises(ArtifactError) as refused:
        exported(artifact, tmp_path / "out", "fp32")
    assert refused.value.reason is Reason.COMPONENT_DIGEST
    assert refused.value.tensor == name
    assert f"{component} (bytes" in str(refused.value)
    assert ".safetensors" in refused.value.path
    assert not (tmp_path / "out").exists()
    for path in artifact.iterdir():
        path.write_bytes((tiny / path.name).read_bytes())
    assert exported(artifact, tmp_path / "out", "fp32") == exported(tiny, tmp_path / "undisturbed", "fp32")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_changed_side_file_is_rejected(name: str, tiny: Path, tmp_path: Path) -> None:
    artifact = place(tmp_path / "artifact", contents(tiny))
    data = (artifact / name).read_bytes()
    (artifact / name).write_bytes(data.replace(b"llama", b"mamba") if b"llama" in data else data.swapcase())
    with pytest.raises(ArtifactError) as refused:
        exported(artifact, tmp_path / "out")
    assert refused.value.reason is Reason.FILE_DIGEST
    assert not (tmp_path / "out").exists()


def cut(folder: Path) -> None:
    path = next(iter(sorted(folder.glob("*.safetensors"))))
    path.write_bytes(path.read_bytes()[:-1])


def without_manifest(folder: Path) -> None:
    (folder / "qformat.json").unlink()


@pytest.mark.parametrize(("spoil", "reason"), [(cut, Reason.FILE_SIZE), (without_manifest, Reason.MISSING_FILE)])
def test_an_artifact_that_cannot_be_opened_is_rejected_before_anything_is_written(
    spoil: Callable[[Path], None], reason: Reason, tiny: Path, tmp_path: Path
) -> None:
    artifact = place(tmp_path / "artifact", contents(tiny))
    spoil(artifact)
    with pytest.raises(ArtifactError) as refused:
        exported(artifact, tmp_path / "out")
    assert refused.value.reason is reason
    assert names_beside(artifact) == {"artifact"}


def test_a_checkpoint_is_replaced_with_force_and_an_artifact_never(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = exported(tiny, out, "fp32")
    with pytest.raises(TargetError, match="force=True"):
        exported(tiny, out)
    assert contents(out) == first
    assert exported(tiny, out, force=True) == exported(tiny, tmp_path / "fresh")
    other = place(tmp_path / "artifact", contents(tiny))
    with pytest.raises(TargetError, match="is a 4-bit artifact"):
        exported(tiny, other, force=True)
    assert contents(other) == contents(tiny)
    thesis = place(tmp_path / "thesis", {"thesis.txt": b"years of work"})
    with pytest.raises(TargetError, match="is not a checkpoint"):
        exported(tiny, thesis, force=True)
    assert names_beside(out) == {"out", "fresh", "artifact", "thesis"}


def test_out_inside_the_artifact_is_rejected(tiny: Path) -> None:
    with pytest.raises(TargetError, match="is inside"):
        exported(tiny, tiny / "out")
    with pytest.raises(TargetError, match="contains the source"):
        exported(tiny, tiny.parent)


def test_invalid_arguments_are_usage_errors(tiny: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any]
    for to, arguments in (("int8", {}), ("bf16", {"workers": 0}), ("bf16", {"max_shard_nbytes": 0})):
        with pytest.raises(UsageError):
            export(tiny, tmp_path / "out", to, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_another_artifact_or_format_does_not_resume_a_partial_export(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kill_after(tiny, out, n_done=2)
    with pytest.raises(TargetError, match=r"a different artifact or options.*restart=True"):
        exported(tiny, out, "fp32")
    assert exported(tiny, out, "fp32", restart=True) == exported(tiny, tmp_path / "undisturbed", "fp32")
    assert names_beside(out) == {"out", "undisturbed"}
