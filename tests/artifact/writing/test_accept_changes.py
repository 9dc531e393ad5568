"""Deliberate changes of small files are shown, accepted atomically and recorded; changed weights are rejected."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import qformat
from qformat.artifact.writing.accept_changes import SealResult, seal
from qformat.converters.convert import convert
from qformat.errors import ArtifactError, Reason, TargetError
from tests.small_models import contents, write_tiny

TOKENIZER, NEW_TOKENIZER = "tokenizer_config.json", b'{"pad_token": "<pad>"}\n'
MANIFEST = "qformat.json"


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    side_files = ("LICENSE", TOKENIZER, "generation_config.json")
    convert(write_tiny(tmp_path / "source", side_files=side_files), tmp_path / "artifact")
    return tmp_path / "artifact"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def change_everything(artifact: Path) -> None:
    (artifact / TOKENIZER).write_bytes(NEW_TOKENIZER)
    (artifact / "chat_template.jinja").write_bytes(b"{{ messages }}")
    (artifact / "generation_config.json").unlink()
    (artifact / "README.md").write_bytes(b"# A model\n")


def kinds(result: SealResult) -> dict[str, str]:
    return {change.name: change.kind for change in result.changes}


def test_an_unchanged_artifact_has_nothing_to_accept(artifact: Path) -> None:
    before = contents(artifact)
    for accept in (False, True):
        result = seal(artifact, accept=accept)
        assert (result.changes, result.accepted) == ((), False)
    assert contents(artifact) == before


def test_changes_are_shown_and_written_only_on_request(artifact: Path) -> None:
    change_everything(artifact)
    before = contents(artifact)
    result = seal(artifact)
    expected = {
        TOKENIZER: "changed",
        "chat_template.jinja": "added",
        "generation_config.json": "removed",
        "README.md": "added",
    }
    assert kinds(result) == expected
    assert not result.accepted
    assert contents(artifact) == before
    assert not qformat.verify(artifact).passed

    assert kinds(seal(artifact, accept=True)) == expected
    after = contents(artifact)
    assert {name for name in after if after[name] != before.get(name)} == {MANIFEST}
    assert set(after) == set(before)
    report = qformat.verify(artifact, sha256=True)
    assert (report.findings, report.notices) == ((), ())
    assert seal(artifact, accept=True).changes == ()
    assert contents(artifact) == after


def test_the_manifest_records_the_first_and_the_present_digests(artifact: Path) -> None:
    original = contents(artifact)
    change_everything(artifact)
    seal(artifact, accept=True)
    with qformat.open(artifact) as opened:
        sealed = opened.manifest.sealed
        assert opened.manifest.to_bytes() == (artifact / MANIFEST).read_bytes()
    assert sealed == (
        {"file": "README.md", "previous_sha256": None, "sha256": sha256(b"# A model\n")},
        {"file": "chat_template.jinja", "previous_sha256": None, "sha256": sha256(b"{{ messages }}")},
        {
            "file": "generation_config.json",
            "previous_sha256": sha256(original["generation_config.json"]),
            "sha256": None,
        },
        {"file": TOKENIZER, "previous_sha256": sha256(original[TOKENIZER]), "sha256": sha256(NEW_TOKENIZER)},
    )
    (artifact / TOKENIZER).write_bytes(b"{}\n")
    seal(artifact, accept=True)
    with qformat.open(artifact) as opened:
        assert opened.manifest.sealed is not None
        assert opened.manifest.sealed[-1]["previous_sha256"] == sha256(original[TOKENIZER])
        assert opened.manifest.sealed[-1]["sha256"] == sha256(b"{}\n")


def test_after_everything_is_put_back_the_manifest_is_the_first_one(artifact: Path) -> None:
    original = contents(artifact)
    change_everything(artifact)
    seal(artifact, accept=True)
    for name in set(contents(artifact)) - set(original):
        (artifact / name).unlink()
    for name, data in original.items():
        if name != MANIFEST:
            (artifact / name).write_bytes(data)
    seal(artifact, accept=True)
    assert contents(artifact) == original


def flip_weights(artifact: Path) -> None:
    shard = next(artifact.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


def cut_weights(artifact: Path) -> None:
    shard = next(artifact.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])


def replace_text(name: str, old: bytes, new: bytes) -> Callable[[Path], None]:
    def change(artifact: Path) -> None:
        data = (artifact / name).read_bytes()
        assert old in data
        (artifact / name).write_bytes(data.replace(old, new))

    return change


REJECTED: list[tuple[Callable[[Path], object], Reason, str | None]] = [
    (flip_weights, Reason.COMPONENT_DIGEST, "model-00001-of-00001.safetensors"),
    (cut_weights, Reason.TRUNCATED, "model-00001-of-00001.safetensors"),
    (
        replace_text("model.safetensors.index.json", b'"total_size"', b'"total-size"'),
        Reason.FILE_DIGEST,
        "model.safetensors.index.json",
    ),
    (replace_text(MANIFEST, b'"recipe"', b'"Recipe"'), Reason.MANIFEST_DIGEST, MANIFEST),
    (replace_text("config.json", b'"nf4"', b'"fp4"'), Reason.CONFIG_FIELD, "config.json"),
    (replace_text("config.json", b"{", b""), Reason.JSON_SYNTAX, "config.json"),
    (lambda artifact: (artifact / "config.json").unlink(), Reason.MISSING_FILE, "config.json"),
    (lambda artifact: (artifact / "adapter.safetensors").write_bytes(b""), Reason.EXTRA_FILE, "adapter.safetensors"),
    (lambda artifact: (artifact / "pytorch_model.bin").write_bytes(b""), Reason.EXTRA_FILE, "pytorch_model.bin"),
    (lambda artifact: (artifact / "onnx").mkdir(), Reason.NOT_A_REGULAR_FILE, "onnx"),
    (lambda artifact: (artifact / "link.json").symlink_to("config.json"), Reason.NOT_A_REGULAR_FILE, "link.json"),
]


@pytest.mark.parametrize(("change", "reason", "file"), REJECTED)
def test_other_changes_are_rejected_and_nothing_is_written(
    artifact: Path, change: Callable[[Path], object], reason: Reason, file: str
) -> None:
    change_everything(artifact)
    change(artifact)
    before = (artifact / MANIFEST).read_bytes()
    with pytest.raises(ArtifactError) as refused:
        seal(artifact, accept=True)
    assert (refused.value.reason, Path(refused.value.path).name) == (reason, file)
    assert (artifact / MANIFEST).read_bytes() == before


def test_a_changed_config_that_is_valid_can_be_accepted(artifact: Path) -> None:
    replace_text("config.json", b'"model_type": "llama"', b'"model_type": "llama", "bos_token_id": 7')(artifact)
    with pytest.raises(ArtifactError, match="qformat seal"):
        qformat.open(artifact)
    assert kinds(seal(artifact, accept=True)) == {"config.json": "changed"}
    qformat.open(artifact).close()


def test_records_of_a_training_and_directories_of_documents_are_left_out(artifact: Path) -> None:
    (artifact / "training_args.bin").write_bytes(b"x")
    (artifact / "checkpoint-1").mkdir()
    (artifact / "album.png").mkdir()
    (artifact / "LICENSE").unlink()
    (artifact / "LICENSE").symlink_to("/dev/zero")
    assert qformat.verify(artifact).passed
    assert seal(artifact, accept=True).changes == ()


def test_changed_lines_are_shown_if_the_original_has_the_digest_in_the_manifest(artifact: Path, tmp_path: Path) -> None:
    (artifact / TOKENIZER).write_bytes(NEW_TOKENIZER)
    (change,) = seal(artifact, original=tmp_path / "source").changes
    old = (tmp_path / "source" / TOKENIZER).read_text().rstrip()
    assert change.diff is not None
    assert change.diff.splitlines() == [
        f"--- before/{TOKENIZER}",
        f"+++ after/{TOKENIZER}",
        "@@ -1 +1 @@",
        f"-{old}",
        f"+{NEW_TOKENIZER.decode().rstrip()}",
    ]
    (tmp_path / "source" / TOKENIZER).write_bytes(b"another original")
    assert seal(artifact, original=tmp_path / "source").changes[0].diff is None
    assert seal(artifact, original=tmp_path / "missing").changes[0].diff is None


def test_an_evaluation_is_removed_if_the_model_changed_and_kept_if_only_documents_did(artifact: Path) -> None:
    from qformat.artifact.writing.record_evaluation import record_evaluation

    with qformat.open(artifact) as opened:
        manifest = opened.manifest
    record_evaluation(artifact, {"texts": []}, of=manifest)
    (artifact / "README.md").write_bytes(b"x")
    assert not seal(artifact, accept=True).evaluation_removed
    with qformat.open(artifact) as opened:
        assert opened.manifest.evaluation == {"texts": []}
        record_evaluation(artifact, {"texts": [], "dtype": "float32"}, of=opened.manifest)
    with qformat.open(artifact) as opened:
        assert opened.manifest.to_bytes() == (artifact / MANIFEST).read_bytes()
    (artifact / TOKENIZER).write_bytes(NEW_TOKENIZER)
    assert seal(artifact, accept=True).evaluation_removed
    with qformat.open(artifact) as opened:
        assert opened.manifest.evaluation is None


def test_unknown_members_are_kept(artifact: Path) -> None:
    from tests.artifact.damaged import reseal

    record = json.loads((artifact / MANIFEST).read_bytes())
    record["files"]["LICENSE"]["note"] = 7
    reseal(artifact, {"history": [1], **record})
    (artifact / TOKENIZER).write_bytes(NEW_TOKENIZER)
    seal(artifact, accept=True)
    found = json.loads((artifact / MANIFEST).read_bytes())
    assert found["history"] == [1]
    assert found["files"]["LICENSE"]["note"] == 7
    assert qformat.verify(artifact).passed


def test_a_manifest_in_the_hubs_cache_or_in_use_by_another_writer_is_not_replaced(
    artifact: Path, tmp_path: Path
) -> None:
    (artifact / TOKENIZER).write_bytes(NEW_TOKENIZER)
    folder = os.open(artifact, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(TargetError, match="another process is writing"):
        seal(artifact, accept=True)
    os.close(folder)
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "main", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    artifact.rename(blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / path.name)
    with pytest.raises(TargetError, match="link into the Hub's cache"):
        seal(snapshot, accept=True)
