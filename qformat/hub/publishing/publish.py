"""The verb `publish`: verify, write the card, sign, upload in one commit, and look whether it is all there."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from qformat.artifact.reading.verify import verify_integrity
from qformat.cores import usable_cores
from qformat.errors import HubError, InvalidFileError, Option, UsageError, VerificationError, Words
from qformat.hub.card.prepared_card import CardOptions, PreparedCard, prepare_card
from qformat.hub.names import check_repository_name, check_revision
from qformat.hub.publishing.changes import Changes, find_changes
from qformat.hub.publishing.publication import Publication, prepare
from qformat.hub.publishing.upload import Made, Uploader, holds
from qformat.hub.reading.remote import DEFAULT_REVISION, RemoteRepository
from qformat.hub.reading.transfer import DEFAULT_TRANSFER, Transfer
from qformat.hub.signature import MAX_SIGNATURE_NBYTES, check_signature, public_key_of, sign
from qformat.names import CARD_NAME, SIGNATURE_NAME

_SHOWN_FINDINGS = 3


@dataclass(frozen=True, slots=True)
class Published:
    """What a publish did, or would do (commit is None then).

    already_there: an earlier run had published these very bytes, nothing was sent.
    """

    repository: str
    revision: str
    publication: Publication
    card: PreparedCard
    changes: Changes
    commit: str | None = None
    pull_request: str | None = None
    already_there: bool = False

    @property
    def nbytes_to_send(self) -> int:
        """Bytes of the files that the repository does not have yet."""
        return sum(self.publication.files[name].nbytes for name in self.changes.sent)


@dataclass(frozen=True, slots=True)
class PublishOptions:
    """What a user may choose about a publication, the card left out.

    revision: a branch, made if it is not there, by default the main one. create_pr: ask for the change instead of
    making it. sign_key: an elliptic-curve private key (PEM) for a signature beside the manifest. confirm_license: the
    user has looked at a licence that is missing or forbids derivatives. dry_run: only read.
    """

    revision: str | None = None
    private: bool = False
    create_pr: bool = False
    sign_key: Path | None = None
    confirm_license: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        check_revision(self.branch)
        if self.create_pr and not self.is_main:
            raise UsageError(
                Option("create_pr"), " asks for a change of the main branch: leave out ", Option("revision")
            )

    @property
    def branch(self) -> str:
        """The branch that is published to."""
        return self.revision or DEFAULT_REVISION

    @property
    def is_main(self) -> bool:
        """Whether that is the main branch."""
        return self.branch == DEFAULT_REVISION


def publish(
    artifact: Path | str,
    repository: str,
    card: CardOptions | None = None,
    options: PublishOptions | None = None,
    *,
    token: str | bool | None = None,
    transfer: Transfer = DEFAULT_TRANSFER,
    workers: int | None = None,
    on_plan: Callable[[int], None] = lambda _: None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Published:
    """Publish an artifact as a repository of the Hub, with a model card; publishing the same bytes again does nothing.

    on_plan: bytes to verify. on_progress: bytes verified.
    Raises: VerificationError for an artifact that is not whole; UsageError; HubError. The artifact stays as it is.
    """
    artifact, options = Path(artifact), options or PublishOptions()
    check_repository_name(repository)
    _refuse_damaged(artifact, workers or usable_cores(), on_plan, on_progress)
    signed = options.sign_key is not None
    prepared = prepare_card(artifact, repository, card or CardOptions(), signed=signed, token=token)
    if prepared.concern is not None and not (options.confirm_license or options.dry_run):
        raise UsageError(
            f"{repository}: {prepared.concern}. Look at the licence, name it with ",
            Option("license"),
            ", or publish all the same with ",
            Option("confirm_license", True),
        )
    publication = prepare(artifact, prepared.text)
    uploader = Uploader(repository, token=token, transfer=transfer)
    main = uploader.open(None)
    if main is not None and options.private and not uploader.is_private():
        raise HubError(repository, "is public, and was to be private", next_step="Choose another name")
    target = main if options.is_main or main is None else uploader.open(options.branch)
    if options.sign_key is not None:
        requests = uploader.pull_requests(publication.title) if options.create_pr and main is not None else ()
        signed_before = [opened for opened in (target, *(opened for _, opened in requests)) if opened is not None]
        publication = publication.signed(_signature(publication, signed_before, repository, options.sign_key))
    changes = find_changes(publication, target or main, name=f"{repository} ({options.branch})")
    published = Published(repository, options.branch, publication, prepared, changes)
    if options.dry_run:
        return published
    if target is not None and not changes.any:
        return _done(published, Made(target.commit), already_there=True)
    if options.create_pr and main is not None:
        open_request = uploader.pull_request(publication.files, publication.title)
        if open_request is not None:
            return _done(published, open_request, already_there=True)
    return _done(published, _upload(uploader, published, options, main=main, target=target))


def _upload(
    uploader: Uploader,
    published: Published,
    options: PublishOptions,
    *,
    main: RemoteRepository | None,
    target: RemoteRepository | None,
) -> Made:
    """Make the repository and the branch where they are missing, upload in one commit, and look whether it is there.

    main, target: the main branch, and the branch that is published to, as they are; None where they are missing.
    """
    if main is None:
        uploader.create(private=options.private)
    if not options.is_main and target is None:
        uploader.create_branch(options.branch)
    made = uploader.commit(
        published.publication.files,
        parent=target or _opened(uploader, options.branch),
        removed=published.changes.removed,
        title=published.publication.title,
        branch=options.branch,
        create_pr=options.create_pr,
    )
    _check_arrived(_opened(uploader, made.commit), published.publication)
    return made


def _refuse_damaged(
    artifact: Path, workers: int, on_plan: Callable[[int], None], on_progress: Callable[[int], None]
) -> None:
    report = verify_integrity(artifact, sha256=True, workers=workers, on_plan=on_plan, on_progress=on_progress)
    if report.passed:
        return
    shown = [finding.message for finding in report.findings[:_SHOWN_FINDINGS]]
    more = len(report.findings) - len(shown)
    text = "\n".join([*shown, *([f"and {more} findings more"] if more else [])])
    hint: Words = ()
    if any(finding.file == CARD_NAME for finding in report.findings):
        hint = ("\nA model card of your own is published with ", Option("card", "FILE"))
    raise VerificationError(f"{artifact}: is not whole and is not published:\n{text}", *hint)


def _signature(
    publication: Publication, signed_before: Iterable[RemoteRepository], repository: str, key: Path
) -> bytes:
    """Return the signature that the repository has, if it is this key's of these files, or else a new one.

    A new one has other bytes each time: a second commit for nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        public = Path(folder) / "key.pub"
        public.write_bytes(public_key_of(key))
        for opened in signed_before:
            if SIGNATURE_NAME in opened.files:
                with suppress(InvalidFileError):  # of other files or another key: a new one replaces it
                    old = opened.read_small(SIGNATURE_NAME, max_nbytes=MAX_SIGNATURE_NBYTES)
                    check_signature(old, publication.digests, public, where=SIGNATURE_NAME)
                    return old
    return sign(publication.digests, repository.partition("/")[2], key)


def _opened(uploader: Uploader, revision: str) -> RemoteRepository:
    opened = uploader.open(revision)
    if opened is None:
        raise HubError(
            uploader.repository,
            f"{revision!r} cannot be read after it was made",
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


def _done(published: Published, made: Made, *, already_there: bool = False) -> Published:
    return replace(published, commit=made.commit, pull_request=made.pull_request, already_there=already_there)
