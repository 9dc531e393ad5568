"""Accepting deliberate changes of an artifact's small files into its manifest (spec section 7.1, `sealed`)."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qformat.artifact.manifest import FileRecord, JsonObject, Manifest
from qformat.artifact.reading.file_roles import accompanies, can_be_accepted
from qformat.artifact.reading.manifest_parser import parse
from qformat.artifact.reading.regular_files import check_plain_name, read_if_regular
from qformat.artifact.reading.structure import check_structure
from qformat.artifact.reading.verify import Finding, verify_integrity
from qformat.artifact.writing.disk import Disk
from qformat.artifact.writing.locked_manifest import locked_manifest
from qformat.artifact.writing.manifest_edits import with_accepted
from qformat.errors import ArtifactError, Reason
from qformat.names import CONFIG_NAME, MANIFEST_NAME, SIGNATURE_NAME

MAX_DIFF_NBYTES = 2**17
"""Largest file whose changed lines are shown."""

_CHANGES = {Reason.FILE_SIZE, Reason.FILE_DIGEST, Reason.MISSING_FILE, Reason.EXTRA_FILE}


@dataclass(frozen=True, slots=True)
class FileChange:
    """Difference between a small file and the manifest.

    Attributes:
        name: Name of the file.
        before: Entry in the manifest, None if the file was added.
        after: Entry of the present file, None if the file was removed.
        accompanies: The file only accompanies the model (spec section 2.5).
        diff: Changed lines in the form of `diff -u`, None if the former contents are not known or are not text.
    """

    name: str
    before: FileRecord | None
    after: FileRecord | None
    accompanies: bool
    diff: str | None = None

    @property
    def kind(self) -> str:
        """`added`, `removed` or `changed`."""
        return "added" if self.before is None else "removed" if self.after is None else "changed"


@dataclass(frozen=True, slots=True)
class SealResult:
    """Result of `seal`.

    Attributes:
        path: Directory of the artifact.
        changes: Files that differed from the manifest, in the order of their names.
        accepted: The manifest was renewed.
        signature_outdated: The artifact has a signature, which does not cover the changes.
        evaluation_removed: The manifest had an evaluation, which does not describe the changed model.
    """

    path: Path
    changes: tuple[FileChange, ...]
    accepted: bool
    signature_outdated: bool
    evaluation_removed: bool


def seal(
    path: Path | str,
    *,
    accept: bool = False,
    original: Path | str | None = None,
    workers: int = 2,
    disk: Disk | None = None,
    on_plan: Callable[[int], None] = lambda _: None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> SealResult:
    """Find the small files of an artifact that differ from its manifest, and accept these changes on request.

    Tokenizer files, configuration, chat templates, documentation and the like may change. Weights and the index may
    not: every digest of them is compared first. The manifest is replaced atomically, and records what was accepted.

    Args:
        path: Directory of the artifact.
        accept: Renew the manifest. Otherwise nothing is written.
        original: Directory with the unmodified files, such as the source checkpoint, to show which lines changed. Files
            that do not have the digest in the manifest are not used.
        workers: Number of threads that verify the weights.
        disk: File system operations.
        on_plan: Function that is called once, with the total size of the shards in bytes.
        on_progress: Function that is called from the threads, with the number of bytes checked since the last call.

    Returns:
        What differed, and whether it was accepted.

    Raises:
        ArtifactError: The manifest, the weights or the index are damaged, or a change cannot be accepted.
        TargetError: The manifest cannot be written.
    """
    path = Path(path)
    target = path / MANIFEST_NAME
    report = verify_integrity(path, sha256=True, workers=workers, on_plan=on_plan, on_progress=on_progress)
    if report.manifest is None:
        raise report.findings[0].as_error(path)
    old = report.manifest
    _refuse_other_findings(report.findings, old, path)
    differing = {finding.file for finding in (*report.findings, *report.notices)}
    names = sorted(name for name in differing if can_be_accepted(name))
    changes = tuple(change for name in names if (change := _change_of(path, name, old, original)) is not None)
    removes = old.evaluation is not None and any(not change.accompanies for change in changes)
    if not changes:
        return SealResult(path, (), False, False, False)
    with locked_manifest(path) as data:
        if parse(data, target) != old:
            raise ArtifactError(Reason.MANIFEST_DIGEST, target, "was changed by another program. Try again")
        renewed = with_accepted(
            data,
            target,
            {change.name: change.after for change in changes},
            sealed=merged(old.sealed or (), changes),
            evaluated=not removes,
        )
        check_structure(path, parsed=parse(renewed, target))
        if accept:
            (disk or Disk()).replace_file(target, renewed)
    return SealResult(path, changes, accept, (path / SIGNATURE_NAME).exists(), removes)


def merged(sealed: Sequence[JsonObject], changes: Iterable[FileChange]) -> list[JsonObject]:
    """Return the accepted changes of an artifact, one per file, with what its writer recorded as the former state.

    Args:
        sealed: Changes that were accepted before.
        changes: Changes to accept now.
    """
    found = {str(entry["file"]): entry for entry in sealed}
    for change in changes:
        before = None if change.before is None else change.before.sha256
        first = found[change.name]["previous_sha256"] if change.name in found else before
        now = None if change.after is None else change.after.sha256
        found[change.name] = {"file": change.name, "previous_sha256": first, "sha256": now}
    return [entry for _, entry in sorted(found.items()) if entry["previous_sha256"] != entry["sha256"]]


def _refuse_other_findings(findings: Iterable[Finding], manifest: Manifest, path: Path) -> None:
    """Raise ArtifactError for a finding that is not the change of a small file."""
    for finding in findings:
        record = manifest.files.get(finding.file)
        is_shard = record is not None and record.is_shard
        is_change = finding.reason in _CHANGES and finding.tensor is None
        required = finding.file == CONFIG_NAME and finding.reason is Reason.MISSING_FILE
        if is_shard or required or not is_change or not can_be_accepted(finding.file):
            raise finding.as_error(path)


def _change_of(path: Path, name: str, manifest: Manifest, original: Path | str | None) -> FileChange | None:
    """Return the change of a file, None if it cannot be listed: a document that is a directory or a link."""
    before, accompanying = manifest.files.get(name), accompanies(name)
    data = read_if_regular(path, name)
    if data is None and (before is None or os.path.lexists(path / name)):
        if accompanying:
            return None
        check_plain_name(name, path=path, error=ArtifactError)
        raise ArtifactError(
            Reason.NOT_A_REGULAR_FILE, path / name, "is not a regular file", next_step="Move it elsewhere"
        )
    return FileChange(
        name,
        before,
        None if data is None else FileRecord.of(data),
        accompanying,
        None if data is None or before is None or original is None else _diff(Path(original), name, before, data),
    )


def _diff(original: Path, name: str, before: FileRecord, after: bytes) -> str | None:
    if max(before.nbytes, len(after)) > MAX_DIFF_NBYTES:
        return None
    old = read_if_regular(original, name)
    if old is None or FileRecord.of(old) != before:
        return None
    try:
        one, other = (data.decode("utf-8").splitlines() for data in (old, after))
    except UnicodeDecodeError:
        return None
    lines = difflib.unified_diff(one, other, fromfile=f"before/{name}", tofile=f"after/{name}", lineterm="")
    return "\n".join(lines)
