"""Origin of an artifact: the base model, its commit, and the licence and task that its model card states."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qformat.artifact.manifest import JsonObject, Manifest
from qformat.artifact.reading.regular_files import read_small
from qformat.errors import ArtifactError, HubError, InvalidFileError, UsageError
from qformat.hub.card.licenses import License
from qformat.hub.names import check_repository_name, is_commit
from qformat.hub.reading.remote import open_repository
from qformat.names import CARD_NAME, is_repository_name
from qformat.strict_json import Json

MAX_CARD_NBYTES = 4 * 2**20

_CACHE_FOLDER = re.compile(r"models--(.+?)--(.+)")


@dataclass(frozen=True, slots=True)
class Origin:
    """The base model, as far as it is known.

    Attributes:
        repository: Repository of the base model on the Hub.
        commit: Commit of that repository that the artifact was made from.
        license: Licence of the base model.
        pipeline_tag: Task of the model, as its card states it.
        language: Languages of the model, as its card states them.
        unread: Why the card of the base model could not be read, or None.
    """

    repository: str | None = None
    commit: str | None = None
    license: License = field(default_factory=License)
    pipeline_tag: str | None = None
    language: Json = None
    unread: str | None = None


def find_origin(
    manifest: Manifest,
    *,
    base_model: str | None = None,
    source: Path | None = None,
    license: License | None = None,
    token: str | bool | None = None,
) -> Origin:
    """Return the origin of an artifact.

    The base model is `base_model`, or the repository that the manifest records, or the one whose folder in the Hub's
    cache is `source`. Its model card is read from `source` if that folder has one, otherwise from the Hub.

    Args:
        manifest: Manifest of the artifact.
        base_model: Repository of the base model, `owner/name`.
        source: Directory of the source checkpoint.
        license: Licence, which overrides the one that the model card states.
        token: Token for the Hub. None uses the stored token, False sends none.

    Raises:
        UsageError: `base_model` is not the name of a repository, or the card in `source` cannot be read.
    """
    repository, commit = _named_by(manifest)
    if repository is None and source is not None:
        repository, commit = _named_by_cache(source)
    if base_model is not None and base_model != repository:
        repository, commit = check_repository_name(base_model), None
    origin = Origin(repository, commit)
    if source is not None and (source / CARD_NAME).is_file():
        origin = _with_card(origin, _read_local(source))
    elif repository is not None and license is None:
        try:
            opened = open_repository(repository, revision=commit, token=token)
            origin = _with_card(origin, opened.read_small(CARD_NAME, max_nbytes=MAX_CARD_NBYTES).decode("utf-8"))
        except (HubError, InvalidFileError, UsageError) as problem:
            origin = replace(origin, unread=str(problem))
        except UnicodeDecodeError:
            origin = replace(origin, unread=f"{repository}/{CARD_NAME}: is not valid UTF-8")
    if license is not None:
        return replace(origin, license=license)
    return replace(origin, license=_with_complete_link(origin, manifest))


def card_metadata(text: str, where: Path | str) -> JsonObject:
    """Return the metadata of a model card.

    Args:
        text: Text of the card.
        where: File or repository of the card, for messages.

    Raises:
        UsageError: huggingface_hub rejects the metadata.
    """
    import yaml
    from huggingface_hub import ModelCard

    try:
        data: Any = ModelCard(text).data
        found: JsonObject = data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError) as problem:
        raise UsageError(f"{where}: its metadata cannot be read: {problem}") from None
    return found


def _named_by(manifest: Manifest) -> tuple[str | None, str | None]:
    """Return repository and commit of the source, if the manifest records them."""
    repository, commit = manifest.source.get("repository"), manifest.source.get("commit")
    if not isinstance(repository, str) or not is_repository_name(repository):
        return None, None
    return repository, commit if isinstance(commit, str) and is_commit(commit) else None


def _named_by_cache(source: Path) -> tuple[str | None, str | None]:
    """Return repository and commit of a directory in the Hub's cache, `models--OWNER--NAME/snapshots/COMMIT`."""
    folder = source.absolute()
    found = _CACHE_FOLDER.fullmatch(folder.parent.parent.name)
    if found is None or folder.parent.name != "snapshots":
        return None, None
    repository = f"{found[1]}/{found[2]}"
    if not is_repository_name(repository):
        return None, None
    return repository, folder.name if is_commit(folder.name) else None


def _read_local(source: Path) -> str:
    try:
        return read_small(source, CARD_NAME, max_nbytes=MAX_CARD_NBYTES, error=ArtifactError).decode("utf-8")
    except (ArtifactError, UnicodeDecodeError) as problem:
        raise UsageError(f"{source / CARD_NAME}: {problem}") from None


def _with_complete_link(origin: Origin, manifest: Manifest) -> License:
    """Return the licence with a link to the base model's file if the artifact does not contain the linked file."""
    link = origin.license.link
    if link is None or "://" in link or link in manifest.files or origin.repository is None:
        return origin.license
    file = link.removeprefix("./").lstrip("/")
    address = f"https://huggingface.co/{origin.repository}/blob/{origin.commit or 'main'}/{file}"
    return replace(origin.license, link=address)


def _with_card(origin: Origin, text: str) -> Origin:
    metadata = card_metadata(text, origin.repository or CARD_NAME)
    tag = metadata.get("pipeline_tag")
    return replace(
        origin,
        license=License.of_metadata(metadata),
        pipeline_tag=tag if isinstance(tag, str) else None,
        language=metadata.get("language"),
    )
