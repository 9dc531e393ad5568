"""The card that an artifact is published with: the user's own, or one that is written from what is known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qformat import strict_json
from qformat.artifact.limits import MAX_CONFIG_NBYTES
from qformat.artifact.reading.regular_files import read_small
from qformat.artifact.reading.structure import read_manifest
from qformat.errors import ArtifactError, UsageError
from qformat.hub.card.card import write_card
from qformat.hub.card.error_figures import ErrorFigures
from qformat.hub.card.licenses import License
from qformat.hub.card.origin import MAX_CARD_NBYTES, Origin, card_metadata, find_origin
from qformat.names import CONFIG_NAME


@dataclass(frozen=True, slots=True)
class CardOptions:
    """What the model card is made from. card: a file that is taken as it is, instead.

    base_model, license: where the manifest and the source do not tell. source: the source's folder, whose own card is
    read. figures: how far the artifact is from it.
    """

    card: Path | None = None
    base_model: str | None = None
    source: Path | None = None
    license: License | None = None
    figures: ErrorFigures | None = None


@dataclass(frozen=True, slots=True)
class PreparedCard:
    """A card's text. concern: why the licence needs a look, if it does. note: what the user could add."""

    text: str
    concern: str | None
    note: str | None = None


def prepare_card(
    artifact: Path, repository: str, options: CardOptions, *, signed: bool, token: str | bool | None
) -> PreparedCard:
    """Write the card of a verified artifact, or read the user's. Raises UsageError for one that cannot be published."""
    if options.card is not None:
        return _own_card(options.card)
    manifest = read_manifest(artifact)
    origin = find_origin(
        manifest, base_model=options.base_model, source=options.source, license=options.license, token=token
    )
    data = read_small(artifact, CONFIG_NAME, max_nbytes=MAX_CONFIG_NBYTES, error=ArtifactError)
    config = strict_json.loads(data, path=artifact / CONFIG_NAME, max_nbytes=MAX_CONFIG_NBYTES, error=ArtifactError)
    assert isinstance(config, dict)
    text = write_card(repository, manifest, config, origin, figures=options.figures, signed=signed)
    unknown = "The base model is not known: name it with --base-model OWNER/NAME"
    return PreparedCard(text, _concern(origin), unknown if origin.repository is None else None)


def _own_card(path: Path) -> PreparedCard:
    try:
        text = read_small(path.parent, path.name, max_nbytes=MAX_CARD_NBYTES, error=ArtifactError).decode("utf-8")
    except (ArtifactError, UnicodeDecodeError) as problem:
        raise UsageError(f"--card {path}: {problem}") from None
    metadata = card_metadata(text, path)
    if not metadata:
        raise UsageError(f"--card {path}: has no metadata: begin it with --- and lines such as license: mit")
    return PreparedCard(text, License.of_metadata(metadata).concern())


def _concern(origin: Origin) -> str | None:
    concern = origin.license.concern()
    if concern is not None and origin.unread is not None:
        return f"the base model's card could not be read ({origin.unread}), so its licence is not known"
    return concern
