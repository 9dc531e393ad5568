"""The model card that an artifact is published with: a file of the user, or a generated card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qformat import strict_json
from qformat.artifact.limits import MAX_CONFIG_NBYTES
from qformat.artifact.reading.regular_files import read_small
from qformat.artifact.reading.structure import read_manifest
from qformat.errors import ArtifactError, Option, UsageError, Words
from qformat.hub.card.error_figures import ErrorFigures
from qformat.hub.card.licenses import License
from qformat.hub.card.origin import MAX_CARD_NBYTES, Origin, card_metadata, find_origin
from qformat.hub.card.page import write_card
from qformat.named_files import read_named
from qformat.names import CONFIG_NAME


@dataclass(frozen=True, slots=True)
class CardOptions:
    """Options for the model card.

    Attributes:
        card: File to publish unmodified instead of a generated card.
        base_model: Repository of the base model, if the manifest does not record it.
        source: Directory of the source checkpoint, whose model card is read.
        license: Licence, which overrides the one of the base model's card.
        figures: Quantization error against the source checkpoint.
    """

    card: Path | None = None
    base_model: str | None = None
    source: Path | None = None
    license: License | None = None
    figures: ErrorFigures | None = None


@dataclass(frozen=True, slots=True)
class PreparedCard:
    """A model card that is ready to publish.

    Attributes:
        text: Text of the card.
        concern: Why a person must check the licence first, or None.
        note: What the user can add to the card, or None.
    """

    text: str
    concern: str | None
    note: Words | None = None


def prepare_card(
    artifact: Path, repository: str, options: CardOptions, *, signed: bool, token: str | bool | None
) -> PreparedCard:
    """Generate the card of a verified artifact, or read the card that the user wrote.

    Args:
        artifact: Directory of the artifact.
        repository: Name of the repository that it is published as.
        options: Options for the card.
        signed: The artifact is published with a signature.
        token: Token for the Hub. None uses the stored token, False sends none.

    Raises:
        UsageError: The card of the user cannot be published.
    """
    if options.card is not None:
        return _own_card(options.card)
    manifest = read_manifest(artifact)
    origin = find_origin(
        manifest, base_model=options.base_model, source=options.source, license=options.license, token=token
    )
    data = read_small(artifact, CONFIG_NAME, max_nbytes=MAX_CONFIG_NBYTES, error=ArtifactError)
    config = strict_json.loads(
        data, path=artifact / CONFIG_NAME, max_nbytes=MAX_CONFIG_NBYTES, error=ArtifactError, python_numbers=True
    )
    assert isinstance(config, dict)
    text = write_card(repository, manifest, config, origin, figures=options.figures, signed=signed)
    unknown = ("The base model is unknown. Specify it with ", Option("base_model", "OWNER/NAME"))
    return PreparedCard(text, _concern(origin), unknown if origin.repository is None else None)


def _own_card(path: Path) -> PreparedCard:
    try:
        text = read_named(path, max_nbytes=MAX_CARD_NBYTES).decode("utf-8")
    except OSError as problem:
        raise UsageError(Option("card", str(path)), f": cannot be read: {problem.strerror}") from None
    except UnicodeDecodeError as problem:
        raise UsageError(Option("card", str(path)), f": {problem}") from None
    metadata = card_metadata(text, path)
    if not metadata:
        raise UsageError(
            Option("card", str(path)), ": has no metadata. Start the file with ---, lines such as license: mit, and ---"
        )
    return PreparedCard(text, License.of_metadata(metadata).concern())


def _concern(origin: Origin) -> str | None:
    concern = origin.license.concern()
    if concern is not None and origin.unread is not None:
        return f"the base model's card could not be read ({origin.unread}), so its licence is unknown"
    return concern
