"""The verb `diff`: two artifacts, in folders or on the Hub, compared by their manifests, and by their bytes if here."""

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
from qformat.hub.reading.transport import Patience
from qformat.names import is_repository_name

_COUNTED = {Aspect.CODES, Aspect.SCALES, Aspect.DATA}


@dataclass(frozen=True, slots=True)
class Difference:
    """The result of `diff`. a, b: what was compared. values: of folders only, None where a repository was compared."""

    a: str
    b: str
    manifests: ManifestDifference
    values: tuple[ValueDifference, ...] | None

    @property
    def equal(self) -> bool:
        """Whether the artifacts are the same, byte for byte."""
        return self.manifests.equal


def diff(
    a: Path | str,
    b: Path | str,
    *,
    revision_a: str | None = None,
    revision_b: str | None = None,
    token: str | bool | None = None,
    patience: Patience | None = None,
    on_plan: Callable[[int], None] = lambda _: None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Difference:
    """Compare two artifacts: folders, or repositories of the Hub where no folder of that name is here.

    Manifests are taken at their word (`verify` proves them); between two folders, differing codes and scales are
    counted. revision_a, revision_b: of repositories. on_plan, on_progress: bytes that are counted, in all and so far.
    Raises: ArtifactError, HubError, UsageError.
    """
    manifest_a, name_a = _manifest(a, revision_a, token, patience)
    manifest_b, name_b = _manifest(b, revision_b, token, patience)
    found = diff_manifests(manifest_a, manifest_b)
    values = None
    if Path(a).is_dir() and Path(b).is_dir():
        names = [tensor.name for tensor in found.tensors if _COUNTED & set(tensor.aspects)]
        sizes = {name: _nbytes(manifest_a.tensors[name]) for name in names}
        on_plan(sum(sizes.values()))
        values = _values(Path(a), Path(b), sizes, on_progress)
    return Difference(name_a, name_b, found, values)


def _manifest(
    location: Path | str, revision: str | None, token: str | bool | None, patience: Patience | None
) -> tuple[Manifest, str]:
    if Path(location).exists() or not (isinstance(location, str) and is_repository_name(location)):
        return read_manifest(Path(location)), str(location)
    repository = open_repository(location, revision=revision, token=token, patience=patience, error=ArtifactError)
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
    """Return how many bytes of a tensor are compared, scales left out."""
    if isinstance(record, KeptRecord):
        return record.nbytes
    return packed_nbytes(record.layout.n_elements)
