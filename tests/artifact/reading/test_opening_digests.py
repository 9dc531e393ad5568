"""Opening compares small files and headers with their digests; a program that builds on an artifact compares all."""

from __future__ import annotations

from pathlib import Path

import pytest

from qformat.artifact.limits import MAX_CONFIG_NBYTES, MAX_INDEX_NBYTES, MAX_SMALL_FILE_NBYTES, max_nbytes_of
from qformat.artifact.reading import listed_files, structure
from qformat.artifact.reading.reader import open_artifact
from qformat.artifact.reading.structure import check_structure
from qformat.artifact.reading.verify import check_digests, verify_integrity
from qformat.errors import ArtifactError, Reason
from tests.artifact.damaged import ACCOMPANYING, regions, shards

DATA = "the data of a shard"


@pytest.fixture
def opened_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose SHA-256 was computed, in order."""
    found: list[str] = []
    original = listed_files.sha256_of_file

    def counted(descriptor: int, nbytes: int, *, path: Path, **options: object) -> str:
        found.append(path.name)
        return original(descriptor, nbytes, path=path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(listed_files, "sha256_of_file", counted)
    return found


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_every_byte_but_the_data_of_shards_is_compared_on_opening(artifact: Path) -> None:
    for region in regions(artifact):
        if region.file in {ACCOMPANYING, "qformat.json"} or region.tensor is not None:
            continue
        for at in {region.start + 9, region.stop - 1}:
            flip(artifact / region.file, at)
            with pytest.raises(ArtifactError, match=region.file) as refused:
                open_artifact(artifact)
            assert refused.value.reason is Reason.FILE_DIGEST
            flip(artifact / region.file, at)
    open_artifact(artifact).close()


def test_a_changed_header_is_named_as_verify_names_it(artifact: Path) -> None:
    shard = next(shards(artifact))
    flip(shard, 20)
    with pytest.raises(
        ArtifactError, match=r"header \(bytes 0 to \d+\) was changed: XXH3-128 .*Fetch the file"
    ) as refused:
        open_artifact(artifact)
    (finding,) = verify_integrity(artifact).findings
    assert (finding.reason, finding.component, finding.message) == (
        refused.value.reason,
        refused.value.field,
        str(refused.value),
    )


def test_a_changed_small_file_names_seal(artifact: Path) -> None:
    flip(artifact / "generation_config.json", 3)
    with pytest.raises(ArtifactError, match=r"was changed: SHA-256 .*`qformat seal`"):
        open_artifact(artifact)


def test_opening_hashes_each_small_file_of_the_model_once(artifact: Path, opened_files: list[str]) -> None:
    open_artifact(artifact).close()
    assert sorted(opened_files) == ["config.json", "generation_config.json", "model.safetensors.index.json"]


def test_a_file_that_is_too_large_is_not_read(
    artifact: Path, opened_files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listed_files, "max_nbytes_of", lambda name: 10 if name == "generation_config.json" else 2**20)
    with pytest.raises(ArtifactError, match=r"generation_config.json: the file has \d+ bytes \(the limit is 10\)"):
        open_artifact(artifact)
    assert "generation_config.json" not in opened_files
    assert [finding.reason for finding in verify_integrity(artifact).findings] == [Reason.JSON_LIMIT]


def test_files_of_a_kind_share_a_limit() -> None:
    assert max_nbytes_of("config.json") == max_nbytes_of("generation_config.json") == MAX_CONFIG_NBYTES
    assert max_nbytes_of("model.safetensors.index.json") == MAX_INDEX_NBYTES
    assert max_nbytes_of("tokenizer.json") == max_nbytes_of("merges.txt") == MAX_SMALL_FILE_NBYTES
    assert max_nbytes_of("chat_template.jinja") == max_nbytes_of("other.jinja") < MAX_CONFIG_NBYTES


def test_check_digests_names_the_tensor_and_its_component(artifact: Path) -> None:
    whole = check_structure(artifact)
    check_digests(whole)
    for region in regions(artifact):
        if region.component in {"packed", "absmax", "data"}:
            flip(artifact / region.file, region.start)
            with pytest.raises(ArtifactError, match="was changed: XXH3-128") as refused:
                check_digests(whole)
            assert (refused.value.tensor, refused.value.field) == (region.tensor, region.component)
            assert refused.value.reason is Reason.COMPONENT_DIGEST
            flip(artifact / region.file, region.start)
    check_digests(whole)


def test_check_digests_rejects_files_that_no_digest_covers(artifact: Path) -> None:
    (artifact / "added_tokens.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"added_tokens.json: is not in the manifest"):
        check_digests(check_structure(artifact))


def test_verify_finds_structural_faults_beside_changed_files(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(artifact / "generation_config.json", 3)
    monkeypatch.setattr(structure, "check_tensors", lambda *_: None)
    report = verify_integrity(artifact)
    assert report.structure is not None
    assert [finding.file for finding in report.findings] == ["generation_config.json"]
