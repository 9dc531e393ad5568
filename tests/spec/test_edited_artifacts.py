"""spec/vectors/edited.json: artifacts with a single fault are rejected with the reason, the file and the tensor."""

from __future__ import annotations

from pathlib import Path

import pytest

from qformat.artifact.reading.reader import open_artifact
from qformat.artifact.reading.verify import verify_integrity
from qformat.errors import ArtifactError
from tests.spec import corpus, edits
from tests.spec.edited_artifacts import ALL, make, refused_by


def test_there_are_enough_vectors_of_each_kind() -> None:
    assert {vector["refused_by"] for vector in ALL} == {"open", "verify", None}
    assert len(refused_by("open")) >= 260
    assert len(refused_by("verify")) >= 20
    assert len(refused_by(None)) >= 15


def test_every_edit_operation_is_used() -> None:
    assert {edit["op"] for vector in ALL for edit in vector["edits"]} == set(edits.OPERATIONS)


@pytest.mark.parametrize("vector", refused_by("open"), ids=corpus.name_of)
def test_reader_rejects_with_the_reason_the_file_and_the_tensor(vector: corpus.Vector, tmp_path: Path) -> None:
    folder = make(vector, tmp_path)
    with pytest.raises(ArtifactError) as refusal:
        open_artifact(folder)
    error = refusal.value
    file = None if Path(error.path) == folder else Path(error.path).name
    assert (error.reason.value, file, error.tensor) == (vector["reason"], vector["file"], vector["tensor"])
    findings = verify_integrity(folder, sha256=True).findings
    assert error.reason in {finding.reason for finding in findings}
    assert "component" not in vector or vector["component"] in {finding.component for finding in findings}


@pytest.mark.parametrize("vector", refused_by("verify"), ids=corpus.name_of)
def test_verify_finds_faults_that_the_reader_cannot_detect(vector: corpus.Vector, tmp_path: Path) -> None:
    folder = make(vector, tmp_path)
    open_artifact(folder).close()
    findings = verify_integrity(folder, sha256=True).findings
    found = [(finding.reason.value, finding.file, finding.tensor, finding.component) for finding in findings]
    assert (vector["reason"], vector["file"], vector["tensor"], vector.get("component")) in found


@pytest.mark.parametrize("vector", refused_by(None), ids=corpus.name_of)
def test_unusual_artifacts_that_are_valid_are_accepted(vector: corpus.Vector, tmp_path: Path) -> None:
    folder = make(vector, tmp_path)
    open_artifact(folder).close()
    report = verify_integrity(folder, sha256=True)
    assert report.findings == ()
    notices = sorted([finding.reason.value, finding.file] for finding in report.notices)
    assert notices == sorted(vector.get("notices", []))
