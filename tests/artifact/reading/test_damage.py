"""Accidental damage: every flipped bit, truncation and lost sector of an artifact is found and attributed.

Most of these kinds of damage go unnoticed in other readers.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from qformat.artifact.reading.reader import open_artifact
from qformat.artifact.reading.verify import IntegrityReport, verify_integrity
from qformat.errors import ArtifactError, Reason
from tests.artifact.damaged import ACCOMPANYING, Region, regions, shard_of, shards, verify
from tests.artifact.not_fetched import STAND_INS
from tests.small_models import contents

N_PARTS = 16
"""Number of tests into which an exhaustive run is divided, for several processes."""

DATA_REASONS = {Reason.COMPONENT_DIGEST}
SAMPLE_EVERY = 127  # bits in a normal run; a prime, so that every bit of a byte is tested


@pytest.fixture(scope="module")
def scratch(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy for tests that restore every byte."""
    return shutil.copytree(pristine, tmp_path_factory.mktemp("scratch") / "artifact")


def differing(report: IntegrityReport) -> set[str]:
    """Return the files that differ from the manifest. The one that accompanies the model is a notice only."""
    found, noticed = ({finding.file for finding in listed} for listed in (report.findings, report.notices))
    assert ACCOMPANYING not in found
    assert noticed <= {ACCOMPANYING}
    assert report.passed == (not found)
    return found | noticed


def check_open(folder: Path, name: str, *reasons: Reason) -> None:
    """Check that opening rejects an artifact because of a file, unless the file only accompanies the model."""
    if name == ACCOMPANYING:
        open_artifact(folder).close()
        return
    with pytest.raises(ArtifactError) as refused:
        open_artifact(folder)
    assert Path(refused.value.path).name == name
    assert not reasons or refused.value.reason in reasons


def check_attribution(report: IntegrityReport, region: Region, what: str) -> None:
    """Check that the damage is found in this file only, and for tensor data in this component."""
    assert differing(report) == {region.file}, (what, region, report.findings)
    if region.tensor is not None:
        assert {(finding.tensor, finding.component) for finding in report.findings} == {
            (region.tensor, region.component)
        }, (what, region, report.findings)
        assert report.findings[0].reason is Reason.COMPONENT_DIGEST
    assert all(finding.file in finding.message for finding in (*report.findings, *report.notices))


def bits(folder: Path) -> Iterator[tuple[Region, int]]:
    """Yield every bit of an artifact."""
    for region in regions(folder):
        for bit in range(8 * region.start, 8 * region.stop):
            yield region, bit


def check_flip(folder: Path, region: Region, bit: int) -> None:
    descriptor = os.open(folder / region.file, os.O_RDWR)
    try:
        byte = os.pread(descriptor, 1, bit // 8)
        os.pwrite(descriptor, bytes([byte[0] ^ 1 << bit % 8]), bit // 8)
        try:
            check_attribution(verify(folder), region, f"flip of bit {bit}")
        finally:
            os.pwrite(descriptor, byte, bit // 8)
    finally:
        os.close(descriptor)


def test_the_tiny_artifact_is_intact_and_its_regions_cover_all_bytes(pristine: Path) -> None:
    assert verify(pristine).passed
    for path in pristine.iterdir():
        position = 0
        for region in sorted((r for r in regions(pristine) if r.file == path.name), key=lambda r: r.start):
            assert region.start == position
            position = region.stop
        assert position == path.stat().st_size
    assert len(list(shards(pristine))) == 2
    components = {region.component for region in regions(pristine)} - {None}
    assert components == {"packed", "absmax", "nested_absmax", "nested_quant_map", "quant_map", "quant_state", "data"}


def test_a_sample_of_flipped_bits_is_found_and_attributed(scratch: Path) -> None:
    checked = 0
    for region, bit in list(bits(scratch))[::SAMPLE_EVERY]:
        check_flip(scratch, region, bit)
        checked += 1
    assert checked > 900
    assert verify(scratch).passed


@pytest.mark.slow
@pytest.mark.parametrize("part", range(N_PARTS))
def test_every_flipped_bit_is_found_and_attributed(part: int, scratch: Path) -> None:
    for region, bit in list(bits(scratch))[part::N_PARTS]:
        check_flip(scratch, region, bit)
    assert verify(scratch).passed


def check_cut(folder: Path, file: str, nbytes: int) -> None:
    path = folder / file
    data = path.read_bytes()
    path.write_bytes(data[:nbytes])
    try:
        check_attribution(verify(folder), Region(file, 0, len(data)), f"cut to {nbytes}")
        check_open(folder, file)
    finally:
        path.write_bytes(data)


def cuts(folder: Path) -> list[tuple[str, int]]:
    return [(path.name, nbytes) for path in sorted(folder.iterdir()) for nbytes in range(path.stat().st_size)]


def test_a_truncated_file_is_found_by_open_and_by_verify(scratch: Path) -> None:
    """Tests a sample of the lengths, including the first and last few of every file."""
    for number, (file, nbytes) in enumerate(cuts(scratch)):
        size = (scratch / file).stat().st_size
        if number % 41 == 0 or nbytes < 9 or size - nbytes < 3:
            check_cut(scratch, file, nbytes)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(N_PARTS))
def test_a_file_truncated_to_any_length_is_found_by_open_and_by_verify(part: int, scratch: Path) -> None:
    for file, nbytes in cuts(scratch)[part::N_PARTS]:
        check_cut(scratch, file, nbytes)


@pytest.mark.parametrize("tail", [b"\0", b" ", b"\n", b"{}", bytes(64), bytes(4096), b"x" * 5000])
def test_bytes_appended_to_any_file_are_found_by_open_and_by_verify(tail: bytes, artifact: Path) -> None:
    for path in artifact.iterdir():
        data = path.read_bytes()
        path.write_bytes(data + tail)
        check_attribution(verify(artifact), Region(path.name, 0, len(data)), "appended bytes")
        check_open(artifact, path.name)
        path.write_bytes(data)


def test_every_damaged_file_is_reported_not_only_the_first(artifact: Path) -> None:
    for path in artifact.iterdir():
        if path.name != "qformat.json":
            path.write_bytes(path.read_bytes() + b" ")
    assert differing(verify(artifact)) == set(contents(artifact)) - {"qformat.json"}


def test_every_damaged_component_is_reported(artifact: Path) -> None:
    expected = set()
    for region in regions(artifact):
        if region.tensor is not None:
            data = bytearray((artifact / region.file).read_bytes())
            data[region.start] ^= 0x10
            (artifact / region.file).write_bytes(data)
            expected.add((region.file, region.tensor, region.component))
    found = {(finding.file, finding.tensor, finding.component) for finding in verify(artifact).findings}
    assert found == expected


@pytest.mark.parametrize("nbytes", [512, 4096])
def test_a_zeroed_sector_is_found_at_every_position(nbytes: int, artifact: Path) -> None:
    for path in sorted(artifact.iterdir()):
        data = path.read_bytes()
        for start in range(0, len(data), nbytes):
            stop = min(start + nbytes, len(data))
            path.write_bytes(data[:start] + bytes(stop - start) + data[stop:])
            report = verify(artifact)
            if data[start:stop].strip(b"\0"):
                assert differing(report) == {path.name}
        path.write_bytes(data)


def test_two_shards_with_swapped_names_are_found(artifact: Path) -> None:
    first, second = shards(artifact)
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    assert {finding.file for finding in verify(artifact).findings} >= {first.name, second.name}
    with pytest.raises(ArtifactError):
        open_artifact(artifact)


def test_a_shard_of_another_artifact_of_the_same_layout_is_found(artifact: Path, tmp_path: Path) -> None:
    """Other programs leave such a mixture of two models after an interrupted save. Sizes and headers are the same."""
    shard = shard_of(artifact, "model.norm.weight")
    data = bytearray(shard.read_bytes())
    data[4096:] = bytes(byte ^ 0x55 for byte in data[4096:])
    shard.write_bytes(data)
    report = verify(artifact)
    assert len(report.findings) == sum(
        region.file == shard.name and region.tensor is not None for region in regions(artifact)
    )


@pytest.mark.parametrize("link", [False, True], ids=["missing", "dangling link"])
def test_a_missing_file_is_reported_by_open_and_by_verify(link: bool, artifact: Path) -> None:
    for path in sorted(artifact.iterdir()):
        data = path.read_bytes()
        path.unlink()
        if link:
            path.symlink_to("nowhere")
        assert differing(verify(artifact)) == {path.name}
        check_open(artifact, path.name, Reason.MISSING_FILE, Reason.PATH_ESCAPES)
        path.unlink(missing_ok=True)
        path.write_bytes(data)


def test_an_extra_file_or_directory_is_found(artifact: Path) -> None:
    (artifact / "model-00003-of-00002.safetensors").write_bytes(b"x")
    (artifact / ".gitattributes").write_bytes(b"")  # created by git or a client of the Hub; no reader opens it
    (artifact / "folder").mkdir()
    (artifact / "link").symlink_to("config.json")
    report = verify(artifact)
    assert {(finding.reason, finding.file) for finding in report.findings} == {
        (Reason.EXTRA_FILE, name) for name in ("model-00003-of-00002.safetensors", "folder", "link")
    }
    open_artifact(artifact).close()


def test_a_file_name_that_is_not_utf8_is_found_and_can_be_printed(artifact: Path) -> None:
    try:
        Path(os.fsdecode(os.fsencode(artifact) + b"/\xff\xfe")).write_bytes(b"")
    except OSError:
        pytest.skip("the file system takes no such name")
    (finding,) = verify(artifact).findings
    assert finding.reason is Reason.EXTRA_FILE
    finding.message.encode("utf-8")
    finding.file.encode("utf-8")


def test_a_required_file_that_is_not_a_regular_file_is_found(artifact: Path) -> None:
    for path in sorted(artifact.iterdir()):
        data = path.read_bytes()
        for make in (lambda path: path.mkdir(), os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
            path.unlink()
            make(path)
            assert differing(verify(artifact)) == {path.name}
            check_open(artifact, path.name, Reason.NOT_A_REGULAR_FILE, Reason.PATH_ESCAPES)
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            path.write_bytes(data)
    assert verify(artifact).passed


def test_swapped_bytes_of_two_components_are_found(artifact: Path) -> None:
    """Correct bytes in the wrong place. The nested_quant_maps are the same, the quant_states differ."""
    states = [region for region in regions(artifact) if region.component == "quant_state"]
    assert len(states) == 2
    texts = [(artifact / state.file).read_bytes()[state.start : state.stop] for state in states]
    for state, text in zip(states, reversed(texts), strict=True):
        data = bytearray((artifact / state.file).read_bytes())
        data[state.start : state.stop] = text
        (artifact / state.file).write_bytes(data)
    found = {(finding.tensor, finding.component) for finding in verify(artifact).findings}
    assert found == {(state.tensor, "quant_state") for state in states}
    with pytest.raises(ArtifactError) as refused:
        open_artifact(artifact)
    assert refused.value.reason is Reason.QUANT_STATE


def test_sha256_finds_the_same_damage_as_the_fast_digests(artifact: Path) -> None:
    from qformat.artifact.reading.verify import verify_integrity

    shard = next(shards(artifact))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    report = verify_integrity(artifact, sha256=True)
    assert {finding.reason for finding in report.findings} == {Reason.COMPONENT_DIGEST, Reason.FILE_DIGEST}
    assert report.sha256_checked


def test_verify_reports_progress_for_all_bytes(artifact: Path) -> None:
    from qformat.artifact.reading.verify import verify_integrity

    done: list[int] = []
    report = verify_integrity(artifact, on_progress=done.append)
    data = sum(region.stop - region.start for region in regions(artifact) if region.tensor is not None)
    assert sum(done) == data
    assert report.n_files == len(contents(artifact))


def test_a_path_that_is_not_a_directory_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for name in ("missing", "file", "empty", "x" * 5000, "file/below", "a\0b"):
        (finding,) = verify(tmp_path / name).findings
        assert finding.reason is Reason.MISSING_FILE


@pytest.mark.parametrize("kind", ["LFS", "git-annex", "HTML"])
@pytest.mark.parametrize("pattern", ["model-*.safetensors", "config.json"])
def test_an_artifact_whose_files_were_not_fetched_says_so(kind: str, pattern: str, artifact: Path) -> None:
    data, problem, next_step = STAND_INS[kind]
    path = min(artifact.glob(pattern))
    path.write_bytes(data)
    found = [finding for finding in verify_integrity(artifact).findings if finding.reason is Reason.FILE_SIZE]
    assert [finding.file for finding in found] == [path.name]
    assert problem in found[0].message
    assert next_step in found[0].message
