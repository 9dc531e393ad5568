"""`qformat diff`: compares two artifacts by their manifests, and by their bytes if both are local directories."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qformat.artifact.manifest import KeptRecord, Manifest, TensorRecord
from qformat.artifact.manifest_diff import Aspect, ManifestDifference, diff_manifests
from qformat.artifact.reading.reader import open_artifact
from qformat.artifact.reading.structure import read_manifest
from qformat.artifact.value_diff import ValueDifference, diff_values
from qformat.codec.nf4 import packed_nbytes
from qformat.errors import ArtifactError
from qformat.hub.reading.listing import read_published
from qformat.hub.reading.remote import open_repository
from qformat.hub.reading.transfer import DEFAULT_TRANSFER, Transfer
from qformat.names import is_repository_name

_COUNTED = {Aspect.CODES, Aspect.SCALES, Aspect.DATA}


@dataclass(frozen=True, slots=True)
class Difference:
    """Result of `diff`.

    Attributes:
        a: Directory, or repository and commit, of the first artifact.
        b: Directory, or repository and commit, of the second artifact.
        manifests: Differences between the manifests.
        values: Differences between codes, scales and kept values, or None if one of the artifacts is on the Hub.
    """

    a: str
    b: str
    manifests: ManifestDifference
    values: tuple[ValueDifference, ...] | None

    @property
    def equal(self) -> bool:
        """Whether the artifacts are byte-identical."""
        return self.manifests.equal


def diff(
    a: Path | str,
    b: Path | str,
    *,
    revision_a: str | None = None,
    revision_b: str | None = None,
    token: str | bool | None = None,
    transfer: Transfer = DEFAULT_TRANSFER,
    on_plan: Callable[[int], None] = lambda _: None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Difference:
    """Compare two artifacts.

    The manifests are trusted; `verify` checks them. If both artifacts are directories, differing codes and scales are
    counted.

    Args:
        a: Directory, or repository on the Hub if no such directory exists.
        b: Directory, or repository on the Hub if no such directory exists.
        revision_a: Branch, tag or commit of the first repository. The default is the main branch.
        revision_b: Branch, tag or commit of the second repository. The default is the main branch.
        token: Token for the Hub. None uses the stored token, False sends none.
        transfer: Sizes and retries of requests.
        on_plan: Called once with the number of bytes to compare.
        on_progress: Called with the number of bytes compared since the last call.

    Raises:
        ArtifactError: An artifact cannot be read.
        HubError: A repository cannot be read.
        UsageError: A location is neither a directory nor the name of a repository.
    """
    manifest_a, name_a = _manifest(a, revision_a, token, transfer)
    manifest_b, name_b = _manifest(b, revision_b, token, transfer)
    found = diff_manifests(manifest_a, manifest_b)
    values = None
    if Path(a).is_dir() and Path(b).is_dir():
        names = [tensor.name for tensor in found.tensors if _COUNTED & set(tensor.aspects)]
        sizes = {name: _nbytes(manifest_a.tensors[name]) for name in names}
        on_plan(sum(sizes.values()))
        values = _values(Path(a), Path(b), sizes, on_progress)
    return Difference(name_a, name_b, found, values)


def _manifest(
    location: Path | str, revision: str | None, token: str | bool | None, transfer: Transfer
) -> tuple[Manifest, str]:
    if Path(location).exists() or not (isinstance(location, str) and is_repository_name(location)):
        return read_manifest(Path(location)), str(location)
    repository = open_repository(location, revision=revision, token=token, transfer=transfer, error=ArtifactError)
    return read_published(repository).manifest, f"{location}@{repository.commit[:12]}"


def _values(a: Path, b: Path, sizes: dict[str, int], on_progress: Callable[[int], None]) -> tuple[ValueDifference, ...]:
    counted: list[ValueDifference] = []
    if not sizes:
        return ()
    with open_artifact(a) as one, open_artifact(b) as other:
        for name, nbytes in sizes.items():
            found = diff_values(one, other, name)
            on_progress(nbytes)
            if found is not None:
                counted.append(found)
    return tuple(counted)


def _nbytes(record: TensorRecord) -> int:
    """Return the number of bytes of a tensor to compare, without scales."""
    if isinstance(record, KeptRecord):
        return record.nbytes
    return packed_nbytes(record.layout.n_elements)
