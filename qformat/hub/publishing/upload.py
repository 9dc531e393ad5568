"""Uploads to a repository of the Hub in one commit on a known parent, although connections may break.

huggingface_hub uploads the files and skips those that the Hub has. It does not retry the commit. A commit whose
response was lost must not be made twice, so the repository is checked before every further attempt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, TypeVar

from qformat.errors import ArtifactError, HubError, UsageError
from qformat.hub.client import Watch, watched
from qformat.hub.publishing.publication import PublishedFile
from qformat.hub.reading.budget import Budget
from qformat.hub.reading.remote import (
    DEFAULT_REVISION,
    RemoteRepository,
    commit_of,
    is_private,
    open_pull_requests,
    open_repository,
)
from qformat.hub.reading.transfer import DEFAULT_TRANSFER, Transfer
from qformat.hub.reading.transport import RETRIED_STATUSES, Transport
from qformat.secrets import masked
from qformat.version import __version__

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.errors import HfHubHTTPError

ANSWER_TIMEOUT_S = 300.0
"""Time without data after which an upload or a commit fails. huggingface_hub itself has no limit."""

_UPLOAD_ATTEMPTS = 4
"""Number of attempts of a call of huggingface_hub, which retries most of its requests itself."""

_RAISED_BY_BAD_ANSWERS = (ValueError, LookupError, TypeError, AttributeError)
"""What huggingface_hub raises if an answer is not JSON, or lacks members that it expects."""

_XET_STATUS = re.compile(r"HTTP status \w+ error \((\d{3})\b")

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Made:
    """A commit with the published files.

    Attributes:
        commit: Hash of the commit.
        pull_request: URL of the pull request, or None if there is none.
    """

    commit: str
    pull_request: str | None = None


class Uploader:
    """Writes to one repository.

    Args:
        repository: Name of the repository, `owner/name`.
        token: Token for the Hub. None uses HF_TOKEN or the stored token, False sends none.
        transfer: Sizes and retries of requests.
    """

    def __init__(
        self, repository: str, *, token: str | bool | None = None, transfer: Transfer = DEFAULT_TRANSFER
    ) -> None:
        from huggingface_hub import HfApi, constants

        self.repository = repository
        self._transfer, self._patience = transfer, transfer.patience
        self._endpoint = constants.ENDPOINT
        self._transport = Transport(repository, token=token, transfer=transfer)
        self._token: str | bool = self._transport.token or False
        self._api = HfApi(
            endpoint=self._endpoint, token=self._token, library_name="qformat", library_version=__version__
        )

    def open(self, revision: str | None) -> RemoteRepository | None:
        """Return the repository at a revision, or None if it does not exist.

        Raises:
            HubError: The repository cannot be read.
        """
        try:
            return open_repository(
                self.repository, revision=revision, token=self._token, transfer=self._transfer, error=ArtifactError
            )
        except HubError as problem:
            if problem.code in {"RepoNotFound", "RevisionNotFound"}:
                return None
            raise

    def create(self, *, private: bool) -> None:
        """Create the repository if it does not exist."""
        self._attempt(
            "creating the repository",
            lambda: self._api.create_repo(self.repository, private=private, exist_ok=True),
        )

    def is_private(self) -> bool:
        """Return whether the repository is private."""
        return is_private(self._transport)

    def create_branch(self, branch: str) -> None:
        """Create a branch from the main branch if it does not exist."""
        self._attempt(
            f"creating the branch {branch!r}",
            lambda: self._api.create_branch(self.repository, branch=branch, exist_ok=True),
        )

    def commit(
        self,
        files: Mapping[str, PublishedFile],
        *,
        parent: RemoteRepository,
        removed: Sequence[str],
        title: str,
        branch: str = DEFAULT_REVISION,
        create_pr: bool = False,
    ) -> Made:
        """Upload the files that differ from `parent`, and commit them together with the removals.

        Args:
            files: Files that the commit must have.
            parent: The repository at the parent commit.
            removed: Files to remove.
            title: Title of the commit.
            branch: Branch to commit to.
            create_pr: Open a pull request instead.

        Returns:
            The commit.

        Raises:
            HubError: The upload failed, or another commit was made meanwhile.
            UsageError: The Hub rejects the model card.
        """
        from huggingface_hub import CommitOperationDelete

        changed = [file for name, file in files.items() if not file.is_like(parent.files.get(name))]
        additions = [_addition(file) for file in changed]
        self._attempt(
            "uploading",
            lambda: self._api.preupload_lfs_files(
                self.repository, additions, revision=branch, create_pr=create_pr, free_memory=False
            ),
            nbytes=sum(file.nbytes for file in changed),
        )

        def made() -> Made | None:
            return self.pull_request(files, title) if create_pr else self._made_after_all(files, parent, branch)

        def make() -> Made:
            info = self._api.create_commit(
                self.repository,
                [*additions, *(CommitOperationDelete(name) for name in removed)],
                commit_message=title,
                revision=branch,
                create_pr=create_pr,
                parent_commit=parent.commit,
            )
            return Made(info.oid, info.pr_url)

        return self._attempt("committing", make, instead=made)

    def pull_request(self, files: Mapping[str, PublishedFile], title: str) -> Made | None:
        """Return the open pull request with these files, or None.

        Args:
            files: Files that the pull request must have.
            title: Title of the pull request.
        """
        for address, opened in self.pull_requests(title):
            if holds(opened, files):
                return Made(opened.commit, address)
        return None

    def pull_requests(self, title: str) -> Iterator[tuple[str, RemoteRepository]]:
        """Yield URL and content of each open pull request with a title."""
        for number, named in open_pull_requests(self._transport):
            if named == title and (opened := self.open(f"refs/pr/{number}")) is not None:
                yield f"{self._endpoint}/{self.repository}/discussions/{number}", opened

    def _made_after_all(self, files: Mapping[str, PublishedFile], parent: RemoteRepository, branch: str) -> Made | None:
        """Return the commit if it was made although its response was lost. Raise HubError after another commit."""
        head = commit_of(self._transport, branch)
        if head == parent.commit:
            return None
        opened = self.open(branch)
        if opened is not None and holds(opened, files):
            return Made(opened.commit)
        raise HubError(
            self.repository,
            f"another commit was made on {branch!r} meanwhile: {head[:12]}",
            next_step="Check it, then run the same command again, which does not upload files twice",
        )

    def _attempt(
        self,
        what: str,
        call: Callable[[], _Result],
        *,
        nbytes: int = 0,
        instead: Callable[[], _Result | None] = lambda: None,
    ) -> _Result:
        """Repeat a call of huggingface_hub until it succeeds, fails permanently, or has failed too often.

        After a failed commit request, `instead` returns the result if the call has succeeded nevertheless. The `nbytes`
        to upload take time in addition to that of every task.
        """
        import httpx2
        from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

        budget = Budget(self.repository, what, self._patience, nbytes=nbytes)
        attempts = min(_UPLOAD_ATTEMPTS, self._patience.attempts)
        while True:
            try:
                with self._watched():
                    return call()
            except (OfflineModeIsEnabled, LocalTokenNotFoundError) as problem:
                next_step = "Unset HF_HUB_OFFLINE" if isinstance(problem, OfflineModeIsEnabled) else _LOG_IN
                raise HubError(self.repository, f"{what}: {_text(problem)}", next_step=next_step) from None
            except (HfHubHTTPError, httpx2.TransportError, RuntimeError) as problem:
                # A failed upload of a file raises a RuntimeError with the name of the file.
                cause = problem.__cause__ if isinstance(problem, RuntimeError) else problem
                if isinstance(cause, HubError):
                    raise cause from None
                if isinstance(cause, _RAISED_BY_BAD_ANSWERS):
                    raise self._invalid(what, cause) from None
                if not isinstance(cause, HfHubHTTPError | httpx2.TransportError):
                    raise
                if "/commit/" in _address(cause) and (done := instead()) is not None:
                    return done
                if isinstance(cause, HfHubHTTPError) and cause.response.status_code not in RETRIED_STATUSES:
                    raise self._refusal(what, cause) from None
                budget.failed(_text(cause), attempts=attempts)
            except OSError as problem:
                if problem.errno is not None:  # an error of this machine, such as a file that cannot be read
                    raise
                # hf_xet raises ConnectionError, TimeoutError and its own subclasses of OSError, all without a number.
                status = _status_in(problem)
                if status is not None and status not in RETRIED_STATUSES:
                    raise self._xet_refusal(what, problem, status) from None
                budget.failed(_text(problem), attempts=attempts)
            except _RAISED_BY_BAD_ANSWERS as problem:
                if str(problem).startswith("Invalid metadata in README.md"):  # the Hub's validation of the card
                    raise UsageError(f"{self.repository}: {what}: {_text(problem)}") from None
                raise self._invalid(what, problem) from None

    def _watched(self) -> AbstractContextManager[None]:
        max_nbytes, timeout_s = self._patience.answer_nbytes, self._patience.timeout_s or ANSWER_TIMEOUT_S
        return watched(
            Watch(self.repository, self._endpoint, self._transport.token, self._patience, max_nbytes, timeout_s)
        )

    def _invalid(self, what: str, problem: Exception) -> HubError:
        text = f"{what}: the response is invalid: {_text(problem)}"
        return HubError(self.repository, text, next_step="Check HF_ENDPOINT")

    def _refusal(self, what: str, problem: HfHubHTTPError) -> HubError:
        status, code = problem.response.status_code, problem.response.headers.get("X-Error-Code")
        said = masked(problem.server_message or "").strip()
        next_step = _NEXT_STEPS.get(status, "Check the name and HF_ENDPOINT")
        text = f"{what}: the Hub answers {status}" + (f": {said.rstrip('.')}" if said else "")
        return HubError(self.repository, text, next_step=next_step, status=status, code=code)

    def _xet_refusal(self, what: str, problem: OSError, status: int) -> HubError:
        next_step = _WITHOUT_XET if status == HTTPStatus.NOT_FOUND else _NEXT_STEPS.get(status, _WITHOUT_XET)
        return HubError(self.repository, f"{what}: {_text(problem)}", next_step=next_step, status=status)


_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"

_NEXT_STEPS = {
    401: f"The token is missing or invalid: {_LOG_IN}",
    403: f"The token has no permission to write: {_LOG_IN} with a token that has it",
    404: "Check the name and the permissions of the token",
    412: "Another commit was made meanwhile. Run the same command again",
}
"""What the user can do about a permanent failure, keyed by HTTP status."""

_WITHOUT_XET = "If this Hub has no Xet storage, set HF_HUB_DISABLE_XET=1 and run the same command again"


def holds(repository: RemoteRepository, files: Mapping[str, PublishedFile]) -> bool:
    """Return whether a commit has all given files with the same content.

    Args:
        repository: The repository at the commit.
        files: Files to compare with.
    """
    return all(file.is_like(repository.files.get(name)) for name, file in files.items())


def _addition(file: PublishedFile) -> CommitOperationAdd:
    from huggingface_hub import CommitOperationAdd

    content = file.content if isinstance(file.content, bytes) else str(file.content)
    addition = CommitOperationAdd(file.name, content)
    addition.upload_info.sha256 = bytes.fromhex(file.sha256)  # already known, so that a large file is not read again
    return addition


def _address(problem: HfHubHTTPError | httpx2.TransportError) -> str:
    """Return the URL of the failed request."""
    from huggingface_hub.errors import HfHubHTTPError

    return str((problem.response if isinstance(problem, HfHubHTTPError) else problem).request.url)


def _status_in(problem: OSError) -> int | None:
    """Return the HTTP status in a message of hf_xet, whose exceptions have no other record of it."""
    found = _XET_STATUS.search(str(problem))
    return int(found[1]) if found else None


def _text(problem: Exception) -> str:
    """Return the first line of a message without secrets."""
    lines = masked(str(problem)).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(problem).__name__
