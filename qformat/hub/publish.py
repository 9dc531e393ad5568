"""The verb `publish`: verify, write the card, sign, upload in one commit, and look whether it is all there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from qformat import strict_json
from qformat.artifact.limits import MAX_CONFIG_NBYTES, MAX_MANIFEST_NBYTES
from qformat.artifact.manifest import MANIFEST_NAME, SIGNATURE_NAME, Manifest, parse
from qformat.artifact.regular_files import read_small
from qformat.artifact.structure import CONFIG_NAME
from qformat.artifact.verify import verify_integrity
from qformat.cores import usable_cores
from qformat.errors import ArtifactError, HubError, InvalidFileError, UsageError, VerificationError
from qformat.hub.card import write_card
from qformat.hub.error_figures import ErrorFigures
from qformat.hub.licenses import License
from qformat.hub.names import check_repository_name, check_revision
from qformat.hub.origin import MAX_CARD_NBYTES, Origin, card_metadata, find_origin
from qformat.hub.publication import Publication, prepare
from qformat.hub.remote import DEFAULT_REVISION, RemoteRepository
from qformat.hub.signature import MAX_SIGNATURE_NBYTES, check_signature, public_key_of, sign
from qformat.hub.transport import Patience
from qformat.hub.upload import Made, Uploader, holds

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
"""Files of other weights: some readers would take them along with the artifact's."""

_SHOWN_FINDINGS = 3


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
class Published:
    """What a publish did, or would do (commit is None then).

    new, changed, unchanged, removed: names of files. concern: why the licence needs a look, if it does.
    already_there: an earlier run had published these very bytes, nothing was sent.
    """

    repository: str
    revision: str
    publication: Publication
    card: str
    concern: str | None
    new: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    commit: str | None = None
    pull_request: str | None = None
    already_there: bool = False
    notes: tuple[str, ...] = ()

    @property
    def nbytes_to_send(self) -> int:
        """Bytes of the files that the repository does not have yet."""
        return sum(self.publication.files[name].nbytes for name in (*self.new, *self.changed))


def publish(
    artifact: Path | str,
    repository: str,
    card: CardOptions | None = None,
    *,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    sign_key: Path | None = None,
    confirm_license: bool = False,
    dry_run: bool = False,
    token: str | bool | None = None,
    patience: Patience | None = None,
    workers: int | None = None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Published:
    """Publish an artifact as a repository of the Hub, with a model card; publishing the same bytes again does nothing.

    revision: a branch, made if it is not there. create_pr: ask for the change instead of making it. sign_key: an
    elliptic-curve private key (PEM) for a signature beside the manifest. confirm_license: the user has looked at a
    licence that is missing or forbids derivatives. dry_run: only read. on_progress: bytes verified.
    Raises: VerificationError for an artifact that is not whole; UsageError; HubError. The artifact stays as it is.
    """
    artifact, card = Path(artifact), card or CardOptions()
    check_repository_name(repository)
    branch = check_revision(revision or DEFAULT_REVISION)
    if create_pr and branch != DEFAULT_REVISION:
        raise UsageError("--create-pr asks for a change of the main branch: leave out --revision")
    _refuse_damaged(artifact, workers or usable_cores(), on_progress)
    text, concern, notes = _card(artifact, repository, card, signed=sign_key is not None, token=token)
    if concern is not None and not (confirm_license or dry_run):
        raise UsageError(
            f"{repository}: {concern}. Look at the licence, name it with --license (and --license-link), "
            "or publish all the same with --confirm-license"
        )
    publication = prepare(artifact, text)
    uploader = Uploader(repository, token=token, patience=patience)
    there = uploader.open(None)
    if there is not None and private and not uploader.is_private():
        raise HubError(repository, "is public, and --private was asked for", next_step="Choose another name")
    target = there if branch == DEFAULT_REVISION or there is None else uploader.open(branch)
    if sign_key is not None:
        publication = publication.signed(_signature(publication, target, repository, sign_key))
    planned = _planned(repository, branch, publication, target or there, text, concern, notes)
    if dry_run:
        return planned
    if target is not None and not (planned.new or planned.changed or planned.removed):
        return _done(planned, Made(target.commit), already_there=True)
    if (
        create_pr
        and there is not None
        and (open_request := uploader.pull_request(publication.files, publication.title))
    ):
        return _done(planned, open_request, already_there=True)
    if there is None:
        uploader.create(private=private)
    if branch != DEFAULT_REVISION and target is None:
        uploader.create_branch(branch)
    target = target or _reopened(uploader, branch)
    made = uploader.commit(
        publication.files,
        parent=target,
        removed=planned.removed,
        title=publication.title,
        branch=branch,
        create_pr=create_pr,
    )
    _check_arrived(_reopened(uploader, made.commit), publication)
    return _done(planned, made)


def _refuse_damaged(artifact: Path, workers: int, on_progress: Callable[[int], None]) -> None:
    report = verify_integrity(artifact, sha256=True, workers=workers, on_progress=on_progress)
    if report.good:
        return
    shown = [finding.message for finding in report.findings[:_SHOWN_FINDINGS]]
    more = len(report.findings) - len(shown)
    text = "\n".join([*shown, *([f"and {more} findings more"] if more else [])])
    hint = ""
    if any(finding.file == "README.md" for finding in report.findings):
        hint = "\nA model card of your own is published with --card FILE"
    raise VerificationError(f"{artifact}: is not whole and is not published:\n{text}{hint}")


def _card(
    artifact: Path, repository: str, options: CardOptions, *, signed: bool, token: str | bool | None
) -> tuple[str, str | None, tuple[str, ...]]:
    """Return the card's text, what concerns the licence, and notes."""
    if options.card is not None:
        try:
            text = read_small(
                options.card.parent, options.card.name, max_nbytes=MAX_CARD_NBYTES, error=ArtifactError
            ).decode("utf-8")
        except (ArtifactError, UnicodeDecodeError) as problem:
            raise UsageError(f"--card {options.card}: {problem}") from None
        metadata = card_metadata(text, options.card)
        if not metadata:
            raise UsageError(
                f"--card {options.card}: has no metadata: begin it with --- and lines such as license: mit"
            )
        return text, License.of_metadata(metadata).concern(), ()
    manifest, evaluation = _manifest_and_evaluation(artifact)
    origin = find_origin(
        manifest, base_model=options.base_model, source=options.source, license=options.license, token=token
    )
    data = read_small(artifact, CONFIG_NAME, max_nbytes=MAX_CONFIG_NBYTES, error=ArtifactError)
    config = strict_json.loads(data, path=artifact / CONFIG_NAME, max_nbytes=MAX_CONFIG_NBYTES, error=ArtifactError)
    assert isinstance(config, dict)
    text = write_card(
        repository, manifest, config, origin, figures=options.figures, evaluation=evaluation, signed=signed
    )
    return text, _concern(origin), _notes(origin)


def _manifest_and_evaluation(artifact: Path) -> tuple[Manifest, strict_json.Json]:
    """Return the manifest, and its optional member `evaluation`, which the card shows as it is."""
    path = artifact / MANIFEST_NAME
    data = read_small(artifact, MANIFEST_NAME, max_nbytes=MAX_MANIFEST_NBYTES, error=ArtifactError)
    record = strict_json.loads(data, path=path, max_nbytes=MAX_MANIFEST_NBYTES, error=ArtifactError)
    return parse(data, path), record.get("evaluation") if isinstance(record, dict) else None


def _concern(origin: Origin) -> str | None:
    concern = origin.license.concern()
    if concern is not None and origin.unread is not None:
        return f"the base model's card could not be read ({origin.unread}), so its licence is not known"
    return concern


def _notes(origin: Origin) -> tuple[str, ...]:
    if origin.repository is None:
        return ("The base model is not known: name it with --base-model OWNER/NAME",)
    return ()


def _signature(publication: Publication, target: RemoteRepository | None, repository: str, key: Path) -> bytes:
    """Return the signature that the repository has, if it is this key's of these files, or else a new one.

    A new one has other bytes each time: a second commit for nothing.
    """
    if target is not None and SIGNATURE_NAME in target.files:
        try:
            old = target.read_small(SIGNATURE_NAME, max_nbytes=MAX_SIGNATURE_NBYTES)
            with tempfile.TemporaryDirectory() as folder:
                public = Path(folder) / "key.pub"
                public.write_bytes(public_key_of(key))
                check_signature(old, publication.digests, public, where=SIGNATURE_NAME)
            return old
        except InvalidFileError:
            pass  # of other files or another key: a new one replaces it
    return sign(publication.digests, repository.partition("/")[2], key)


def _planned(
    repository: str,
    branch: str,
    publication: Publication,
    target: RemoteRepository | None,
    card: str,
    concern: str | None,
    notes: tuple[str, ...],
) -> Published:
    """Compare what is to be there with what is there. Raises HubError where other weights lie beside."""
    there = target.files if target is not None else {}
    same = [name for name, file in publication.files.items() if file.is_like(there.get(name))]
    removed = _left_over(target, publication)
    others = [name for name in there if name not in publication.files and name not in removed]
    weights = [name for name in others if "/" not in name and name.endswith(_WEIGHT_SUFFIXES)]
    if weights:
        raise HubError(
            repository,
            f"holds other weights on {branch!r}: {', '.join(weights[:5])}; readers would mix them with the artifact's",
            next_step="Remove them, or publish to another repository or --revision",
        )
    return Published(
        repository=repository,
        revision=branch,
        publication=publication,
        card=card,
        concern=concern,
        new=tuple(name for name in publication.files if name not in there),
        changed=tuple(name for name in publication.files if name in there and name not in same),
        unchanged=tuple(same),
        removed=removed,
        others=tuple(name for name in others if not os.path.basename(name).startswith(".")),
        notes=notes,
    )


def _left_over(target: RemoteRepository | None, publication: Publication) -> tuple[str, ...]:
    """Return the files of an older artifact in the repository that the new one has no more, its signature included."""
    if target is None or MANIFEST_NAME not in target.files:
        return ()
    try:
        data = target.read_small(MANIFEST_NAME, max_nbytes=MAX_MANIFEST_NBYTES)
        older = parse(data, Path(MANIFEST_NAME))
    except InvalidFileError:
        return ()  # what stands there is replaced; other weights beside it are refused
    listed = {*older.files, SIGNATURE_NAME}
    return tuple(name for name in target.files if name in listed and name not in publication.files)


def _reopened(uploader: Uploader, revision: str | None) -> RemoteRepository:
    opened = uploader.open(revision)
    if opened is None:
        raise HubError(
            uploader.repository,
            f"{revision or DEFAULT_REVISION!r} cannot be read after it was made",
            next_step="Run the same command again",
        )
    return opened


def _check_arrived(opened: RemoteRepository, publication: Publication) -> None:
    """The commit must hold what was verified: a file may have changed on the disk, or be ignored by the repository."""
    if not holds(opened, publication.files):
        wrong = [name for name, file in publication.files.items() if not file.is_like(opened.files.get(name))]
        raise HubError(
            opened.name,
            f"commit {opened.commit[:12]} does not hold what was published: {', '.join(wrong[:5])}",
            next_step="If no file was changed meanwhile and no .gitignore there leaves it out, publish again",
        )


def _done(planned: Published, made: Made, *, already_there: bool = False) -> Published:
    return replace(planned, commit=made.commit, pull_request=made.pull_request, already_there=already_there)
