"""Shared by the tests of `publish`: name and card of an artifact, and its state in the stand-in."""

from __future__ import annotations

from pathlib import Path

from qformat.hub.card.licenses import License
from qformat.hub.card.prepared_card import CardOptions
from qformat.hub.publishing.publish import Published, PublishOptions, publish
from qformat.hub.reading.transfer import Transfer
from tests.hub.conftest import PATIENT
from tests.hub_stand_in import Hub, Repository

APACHE = CardOptions(license=License("apache-2.0"), base_model="base/small")


NAME = "me/small-nf4"


def do_publish(
    artifact: Path, card: CardOptions = APACHE, *, transfer: Transfer = PATIENT, **options: object
) -> Published:
    """Publish with short pauses. `options` are those of `PublishOptions`."""
    return publish(artifact, NAME, card, PublishOptions(**options), transfer=transfer)  # type: ignore[arg-type]


def stored(hub: Hub, name: str = NAME) -> Repository:
    """Return a repository of the stand-in."""
    return hub.repositories.by_name[name]


def folder_of(repository: Repository, folder: Path, ref: str = "main") -> Path:
    """Write the files of a commit to a directory."""
    folder.mkdir()
    commit = repository.at(ref)
    assert commit is not None
    for name, file in commit.files.items():
        (folder / name).write_bytes(file.read())
    return folder


def n_commits(hub: Hub) -> int:
    """Return the number of commits after the first one, which the Hub makes with the repository."""
    return len(stored(hub).commits) - 1
