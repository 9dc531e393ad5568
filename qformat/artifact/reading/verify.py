"""Verification of an artifact's integrity: its structure and the digests of every byte (spec section 7.3).

Two digests cover every byte of a shard. The XXH3-128 of a component or header is as fast as memory and detects
accidental damage. The SHA-256 of the file also detects deliberate tampering, if the manifest is authentic.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from qformat.artifact.digests import xxh3_of_range
from qformat.artifact.manifest import FileRecord, KeptRecord, Manifest
from qformat.artifact.reading.file_roles import UNSIGNED_NAMES, accompanies, can_be_accepted
from qformat.artifact.reading.listed_files import check_size, check_small_file, compare_sha256, read_header, size_error
from qformat.artifact.reading.regular_files import open_regular
from qformat.artifact.reading.structure import Structure, check_structure, expected_tensors, read_manifest
from qformat.artifact.sources.stand_ins import stand_in_of
from qformat.cores import run_tasks, usable_cores
from qformat.errors import ArtifactError, Reason
from qformat.names import MANIFEST_NAME, SIGNATURE_NAME

_Check = TypeVar("_Check")

_UNCOVERED = ", so the signature does not cover it. Move it elsewhere"
_ONLY_ACCOMPANIES = ", but it only accompanies the model"


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem of an artifact.

    Attributes:
        reason: Stable reason code.
        file: Name of the file.
        message: Description of the problem.
        tensor: Name of the tensor, None if the problem concerns no single tensor.
        component: Component of the tensor, or field; None if the problem concerns no single one.
    """

    reason: Reason
    file: str
    message: str
    tensor: str | None = None
    component: str | None = None

    def as_error(self, folder: Path) -> ArtifactError:
        """Return the finding as an error.

        Args:
            folder: Directory of the artifact.
        """
        file = folder / self.file
        error = ArtifactError(self.reason, file, self.message.removeprefix(f"{file}: "))
        error.tensor, error.field = self.tensor, self.component
        return error


@dataclass(frozen=True, slots=True)
class IntegrityReport:
    """Result of `verify_integrity`.

    Attributes:
        path: Directory of the artifact.
        findings: All problems.
        notices: Changed, missing and additional files that only accompany the model (spec section 2.5).
        n_files: Number of files, including the manifest.
        nbytes: Total size of the files that the manifest lists, in bytes.
        sha256_checked: Whether the SHA-256 of every shard was checked.
        manifest: Manifest, None if it is damaged.
        structure: Checked structure, None if it is damaged.
    """

    path: Path
    findings: tuple[Finding, ...]
    n_files: int
    nbytes: int
    sha256_checked: bool
    notices: tuple[Finding, ...] = ()
    manifest: Manifest | None = field(default=None, repr=False)
    structure: Structure | None = field(default=None, repr=False)

    @property
    def passed(self) -> bool:
        """Whether no problem was found."""
        return not self.findings


@dataclass(frozen=True, slots=True)
class RangeCheck:
    """Check of the XXH3-128 of one byte range.

    Attributes:
        descriptor: File descriptor.
        file: Path of the file, for messages.
        start: Offset of the first byte.
        stop: Offset after the last byte.
        expected: Expected XXH3-128.
        tensor: Name of the tensor.
        component: Label of the component.
    """

    descriptor: int
    file: Path
    start: int
    stop: int
    expected: str
    tensor: str
    component: str

    def run(self) -> Finding | None:
        """Hash the range; return a finding if the digest differs or the bytes cannot be read."""
        try:
            found = xxh3_of_range(self.descriptor, self.start, self.stop, path=self.file, error=ArtifactError)
        except ArtifactError as error:
            return finding_of(error)
        if found == self.expected:
            return None
        what = f"tensor {self.tensor!r}: {self.component} (bytes {self.start} to {self.stop})"
        message = f"{self.file}: {what} was changed: XXH3-128 {found}, expected {self.expected}. Fetch the file again"
        return Finding(Reason.COMPONENT_DIGEST, self.file.name, message, self.tensor, self.component)


def verify_integrity(
    path: Path | str,
    *,
    manifest: Manifest | None = None,
    sha256: bool = False,
    workers: int = 2,
    on_plan: Callable[[int], None] = lambda _: None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> IntegrityReport:
    """Check the structure and every digest of an artifact.

    Every problem of the artifact becomes a finding in the report, not an exception.

    Args:
        path: Directory of the artifact.
        manifest: Manifest of the artifact, if the caller has already read it.
        sha256: Also check the SHA-256 of every shard. The SHA-256 of every other file is always checked.
        workers: Number of threads.
        on_plan: Function that is called once, with the total size of the shards in bytes.
        on_progress: Function that is called from the threads, with the number of bytes checked since the last call.
    """
    path = Path(path)
    try:
        manifest = manifest or read_manifest(path)
    except ArtifactError as error:
        return IntegrityReport(path, (finding_of(error),), 0, 0, sha256)
    on_plan(sum(record.nbytes for record in manifest.files.values() if record.is_shard))
    findings: list[Finding] = []
    with ExitStack() as stack:
        notices = _notices(path, manifest)
        descriptors = _open_files(path, manifest, stack, findings)
        checks = list(range_checks(path, manifest, descriptors, findings))
        whole = [
            (name, record)
            for name, record in manifest.files.items()
            if name in descriptors and (sha256 or not record.is_shard)
        ]

        def run(check: RangeCheck) -> Finding | None:
            finding = check.run()
            on_progress(check.stop - check.start)
            return finding

        def run_whole(item: tuple[str, FileRecord]) -> Finding | None:
            return _check_whole(path / item[0], descriptors[item[0]], item[1])

        findings += _found(checks, run, workers)
        findings += _found(whole, run_whole, workers)
    findings += [finding for finding in _extra_files(path, manifest) if not accompanies(finding.file)]
    structure: Structure | None = None
    try:
        structure = check_structure(path, parsed=manifest, compare_digests=False)
    except ArtifactError as error:
        # A structural problem is often the consequence of a wrong digest that was already found in the same file.
        found = finding_of(error)
        findings += [found] if all(found.file != earlier.file for earlier in findings) else []
    nbytes = sum(record.nbytes for record in manifest.files.values())
    return IntegrityReport(
        path,
        tuple(findings),
        len(manifest.files) + 1,
        nbytes,
        sha256,
        notices=notices,
        manifest=manifest,
        structure=structure,
    )


def _found(checks: Sequence[_Check], run: Callable[[_Check], Finding | None], workers: int) -> list[Finding]:
    """Run checks on threads and return their findings in the order of the checks."""
    found = run_tasks(dict(enumerate(checks)), run, workers=workers, thread_name="qformat-verify")
    return [finding for finding in found.values() if finding is not None]


def check_digests(artifact: Structure, *, shards: bool = True) -> None:
    """Check that an artifact is whole: that a verification finds nothing.

    Call this before writing something derived from the artifact, because the result has digests of its own that hide
    the damage.

    Args:
        artifact: Checked structure of the artifact.
        shards: Whether to compare the digests of the shards. A caller that compares them itself leaves this out.

    Raises:
        ArtifactError: The first finding of `qformat verify`, with file, tensor and component.
    """
    path, manifest = artifact.path, artifact.manifest
    if shards:
        findings = verify_integrity(path, manifest=manifest, workers=usable_cores()).findings
    else:
        findings = _verify_other_files(path, manifest)
    if findings:
        raise findings[0].as_error(path)


def _verify_other_files(path: Path, manifest: Manifest) -> tuple[Finding, ...]:
    """Compare the SHA-256 of each listed file of the model except shards, and find files that are not listed."""
    names = [name for name, record in manifest.files.items() if not record.is_shard and not accompanies(name, record)]
    extra = [finding for finding in _extra_files(path, manifest) if not accompanies(finding.file)]
    return (*_check_files(path, manifest, names), *extra)


def _notices(path: Path, manifest: Manifest) -> tuple[Finding, ...]:
    """Return what differs from the manifest among the files that only accompany the model."""
    names = [name for name, record in manifest.files.items() if accompanies(name, record)]
    extra = [finding for finding in _extra_files(path, manifest) if accompanies(finding.file)]
    return tuple(notice_of(found, path) for found in (*_check_files(path, manifest, names), *extra))


def notice_of(finding: Finding, folder: Path) -> Finding:
    """Return the notice about a file that only accompanies the model.

    Args:
        finding: How the file differs from the manifest.
        folder: Directory of the artifact, or its repository and commit.
    """
    what = {Reason.MISSING_FILE: "does not exist", Reason.EXTRA_FILE: "is not in the manifest"}
    how = what.get(finding.reason, "differs from the manifest")
    return replace(finding, message=f"{folder / finding.file}: {how}{_ONLY_ACCOMPANIES}")


def _check_files(path: Path, manifest: Manifest, names: Iterable[str]) -> Iterator[Finding]:
    for name in names:
        try:
            with open_regular(path, name, error=ArtifactError) as descriptor:
                finding = _check_whole(path / name, descriptor, manifest.files[name])
        except ArtifactError as error:
            finding = finding_of(error)
        if finding is not None:
            yield finding


def signed_differences(notices: Iterable[Finding], names: Iterable[str], folder: Path) -> list[Finding]:
    """Return what a signature turns into findings (spec section 7.5): all notices, and hidden entries.

    Args:
        notices: How files that only accompany the model differ from the manifest.
        names: Names of all entries in the directory or repository.
        folder: Directory of the artifact, or its repository and commit.
    """
    found = []
    for one in notices:
        why = _UNCOVERED if one.reason is Reason.EXTRA_FILE else ", but the signature covers it"
        found.append(replace(one, message=one.message.replace(_ONLY_ACCOMPANIES, why)))
    hidden = sorted(name for name in names if name.startswith(".") and name not in UNSIGNED_NAMES)
    for name in (os.fsencode(name).decode("utf-8", "backslashreplace") for name in hidden):
        found.append(Finding(Reason.EXTRA_FILE, name, f"{folder / name}: is not in the manifest{_UNCOVERED}"))
    return found


def finding_of(error: ArtifactError) -> Finding:
    """Return a finding with the contents of an error."""
    return Finding(error.reason, Path(error.path).name, str(error), error.tensor, error.field)


def _open_files(path: Path, manifest: Manifest, stack: ExitStack, findings: list[Finding]) -> dict[str, int]:
    """Open the files of the model."""
    descriptors: dict[str, int] = {}
    for name, record in manifest.files.items():
        if accompanies(name, record):
            continue
        try:
            descriptors[name] = stack.enter_context(open_regular(path, name, error=ArtifactError))
        except ArtifactError as error:
            findings.append(finding_of(error))
    return descriptors


def range_checks(
    path: Path, manifest: Manifest, descriptors: Mapping[str, int], findings: list[Finding]
) -> Iterator[RangeCheck]:
    """Yield the checks of every shard with an intact header, in the order of their bytes.

    Args:
        path: Directory of the artifact.
        manifest: Manifest of the artifact.
        descriptors: File descriptors by name of the file. Shards without one are skipped.
        findings: List to which problems of the headers are appended.
    """
    expected = expected_tensors(manifest)
    for name, record in manifest.files.items():
        if record.header_xxh3 is None or name not in descriptors:
            continue
        descriptor = descriptors[name]
        try:
            read = read_header(descriptor, path / name, record.header_xxh3)
        except ArtifactError as error:
            unfetched = stand_in_of(path / name) is not None
            of_size = size_error(path / name, os.fstat(descriptor).st_size, record.nbytes) if unfetched else error
            findings.append(finding_of(of_size))
            continue
        for entry in read.tensors.values():
            if entry.name in expected:
                tensor, part, _ = expected[entry.name]
                tensor_record = manifest.tensors[tensor]
                kept = isinstance(tensor_record, KeptRecord)
                digest = tensor_record.xxh3 if isinstance(tensor_record, KeptRecord) else tensor_record.components[part]
                label = "data" if kept else part.label
                yield RangeCheck(descriptor, path / name, entry.start, entry.stop, digest, tensor, label)


def _check_whole(path: Path, descriptor: int, record: FileRecord) -> Finding | None:
    """Compare the size and the SHA-256 of a file. The size of shards, and of what only accompanies, has no limit."""
    try:
        if record.is_shard or accompanies(path.name, record):
            check_size(descriptor, path, record)
            compare_sha256(descriptor, path, record)
        else:
            check_small_file(descriptor, path, record)
    except ArtifactError as error:
        return finding_of(error)
    return None


def _extra_files(path: Path, manifest: Manifest) -> Iterable[Finding]:
    known = {*manifest.files, MANIFEST_NAME, SIGNATURE_NAME}
    for entry in sorted(path.iterdir()):
        # Names that begin with a dot belong to git or to clients of the Hub. No reader opens them.
        if entry.name not in known and not entry.name.startswith("."):
            name = os.fsencode(entry.name).decode("utf-8", "backslashreplace")  # the name may be invalid UTF-8
            accept = ", or accept it with `qformat seal`" if can_be_accepted(entry.name) and entry.is_file() else ""
            yield Finding(Reason.EXTRA_FILE, name, f"{path / name}: is not in the manifest. Move it elsewhere{accept}")
