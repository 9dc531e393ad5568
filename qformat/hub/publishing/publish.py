"""`qformat publish`: verifies, writes the model card, signs, uploads in one commit, and checks the result."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from qformat.artifact.reading.verify import IntegrityReport, verify_integrity
from qformat.cores import usable_cores
from qformat.errors import HubError, InvalidFileError, Option, Reason, UsageError, VerificationError, on_lines
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
    """Result of `publish`.

    Attributes:
        repository: Repository that the artifact is published as.
        revision: Branch that it is published to.
        publication: Files that are published.
        card: The model card.
        changes: Changes to the repository.
        commit: The commit, or None after a dry run.
        pull_request: URL of the pull request, or None if there is none.
        already_there: The repository already had the same content, so nothing was uploaded.
        unread: Why the repository could not be read in a dry run, so that every file counts as new. None if it was
            read.
    """

    repository: str
    revision: str
    publication: Publication
    card: PreparedCard
    changes: Changes
    commit: str | None = None
    pull_request: str | None = None
    already_there: bool = False
    unread: str | None = None

    @property
    def nbytes_to_send(self) -> int:
        """Size of the files to upload in bytes."""
        return sum(self.publication.files[name].nbytes for name in self.changes.sent)


@dataclass(frozen=True, slots=True)
class PublishOptions:
    """Options of `publish`, except for those of the model card.

    Attributes:
        revision: Branch, which is created if it does not exist. The default is the main branch.
        private: Create the repository as a private one.
        create_pr: Open a pull request instead of committing to the main branch.
        sign_key: Elliptic-curve private key (PEM) to sign the artifact with.
        confirm_license: Publish although the licence is unknown or may forbid it.
        dry_run: Report what would change, without changing anything. If the Hub does not answer, the files and the card
            are reported without a comparison.

    Raises:
        UsageError: The revision is invalid, or `create_pr` is combined with a branch.
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
                Option("create_pr"), " opens a pull request for the main branch. Leave out ", Option("revision")
            )

    @property
    def branch(self) -> str:
        """Branch to publish to."""
        return self.revision or DEFAULT_REVISION

    @property
    def is_main(self) -> bool:
        """Whether `branch` is the main branch."""
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
    on_upload: Callable[[int], None] = lambda _: None,
) -> Published:
    """Publish an artifact with a model card on the Hub. The local artifact is not modified.

    Publishing the same content again changes nothing.

    Args:
        artifact: Directory of the artifact.
        repository: Name of the repository, `owner/name`. It is created if it does not exist.
        card: Options for the model card.
        options: Other options.
        token: Token for the Hub. None uses the stored token, False sends none.
        transfer: Sizes and retries of requests.
        workers: Number of threads that verify the artifact. The default is the number of usable cores.
        on_plan: Called once with the number of bytes to verify.
        on_progress: Called with the number of bytes verified since the last call.
        on_upload: Called with the number of bytes to upload, before the upload begins.

    Returns:
        What was published, or what would be published by a run without `dry_run`.

    Raises:
        VerificationError: The artifact is damaged.
        UsageError: An option is invalid, or the licence must be confirmed.
        HubError: The repository cannot be read or written.
    """
    artifact, options = Path(artifact), options or PublishOptions()
    check_repository_name(repository)
    report = _refuse_damaged(artifact, workers or usable_cores(), on_plan, on_progress)
    if card is None or card.card is None:
        _refuse_lost_card(report)
    signed = options.sign_key is not None
    prepared = prepare_card(artifact, repository, card or CardOptions(), signed=signed, token=token)
    if prepared.concern is not None and not (options.confirm_license or options.dry_run):
        raise UsageError(
            f"{repository}: {prepared.concern}. Check the licence, specify it with ",
            Option("license"),
            ", or publish anyway with ",
            Option("confirm_license", True),
        )
    publication = prepare(artifact, prepared.text)
    uploader = Uploader(repository, token=token, transfer=transfer)
    try:
        main = uploader.open(None)
    except HubError as problem:
        if not options.dry_run or problem.status is not None:
            raise
        return _not_compared(repository, options, publication, prepared, problem)
    if main is not None and options.private and not uploader.is_private():
        raise HubError(repository, "is public, but a private repository was requested", next_step="Choose another name")
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
    on_upload(published.nbytes_to_send)
    return _done(published, _upload(uploader, published, options, main=main, target=target))


def _not_compared(
    repository: str, options: PublishOptions, publication: Publication, card: PreparedCard, problem: HubError
) -> Published:
    """Return what a dry run knows if the Hub does not answer."""
    if options.sign_key is not None:
        publication = publication.signed(_signature(publication, (), repository, options.sign_key))
    changes = find_changes(publication, None, name=repository)
    return Published(repository, options.branch, publication, card, changes, unread=problem.problem)


def _upload(
    uploader: Uploader,
    published: Published,
    options: PublishOptions,
    *,
    main: RemoteRepository | None,
    target: RemoteRepository | None,
) -> Made:
    """Create the repository and the branch if needed, upload in one commit, and check the result.

    `main` is the main branch and `target` the branch to publish to. They are None if they do not exist.
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
) -> IntegrityReport:
    report = verify_integrity(artifact, sha256=True, workers=workers, on_plan=on_plan, on_progress=on_progress)
    if report.passed:
        return report
    shown = [finding.message for finding in report.findings[:_SHOWN_FINDINGS]]
    more = len(report.findings) - len(shown)
    lines = [*shown, *([f"and {more} more findings"] if more else [])]
    raise VerificationError(f"{artifact}: is damaged and is not published:", *on_lines(lines))


def _refuse_lost_card(report: IntegrityReport) -> None:
    """Raise VerificationError if the directory has a model card that a generated one would replace."""
    edited = {notice.file for notice in report.notices if notice.reason is not Reason.MISSING_FILE}
    if CARD_NAME in edited:
        raise VerificationError(
            f"{report.path / CARD_NAME}: was added or edited, but a generated model card would be published. "
            "To publish this one, use ",
            Option("card", "FILE"),
            f". To publish a generated one, move {CARD_NAME} elsewhere",
        )


def _signature(
    publication: Publication, signed_before: Iterable[RemoteRepository], repository: str, key: Path
) -> bytes:
    """Return the signature in the repository if it is by this key and valid for these files, otherwise a new one.

    Every new signature has other bytes, and would make another commit although nothing changed.
    """
    with tempfile.TemporaryDirectory() as folder:
        public = Path(folder) / "key.pub"
        public.write_bytes(public_key_of(key))
        for opened in signed_before:
            if SIGNATURE_NAME in opened.files:
                with suppress(InvalidFileError):  # of other files or by another key: a new one replaces it
                    old = opened.read_small(SIGNATURE_NAME, max_nbytes=MAX_SIGNATURE_NBYTES)
                    check_signature(old, publication.digests, public, where=SIGNATURE_NAME)
                    return old
    return sign(publication.digests, repository.partition("/")[2], key)


def _opened(uploader: Uploader, revision: str) -> RemoteRepository:
    opened = uploader.open(revision)
    if opened is None:
        raise HubError(
            uploader.repository,
            f"{revision!r} cannot be read after it was created",
            next_step="Run the same command again",
        )
    return opened


def _check_arrived(opened: RemoteRepository, publication: Publication) -> None:
    """Check that the commit has the verified files. A file may have changed on disk or be ignored by the repository."""
    if not holds(opened, publication.files):
        wrong = [name for name, file in publication.files.items() if not file.is_like(opened.files.get(name))]
        raise HubError(
            opened.name,
            f"commit {opened.commit[:12]} does not have the files that were published: {', '.join(wrong[:5])}",
            next_step="Check whether a .gitignore of the repository excludes them, then publish again",
        )


def _done(published: Published, made: Made, *, already_there: bool = False) -> Published:
    return replace(published, commit=made.commit, pull_request=made.pull_request, already_there=already_there)
