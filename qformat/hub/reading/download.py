"""Downloads of files to the local cache by huggingface_hub, in the layout that other programs expect."""

from __future__ import annotations

from collections.abc import Sequence

from qformat.errors import HubError, Option
from qformat.hub.reading.cache import note_ref
from qformat.hub.reading.repository import Repository
from qformat.hub.reading.transfer import Patience
from qformat.hub.reading.transport import RETRIED_STATUSES, Retries


def download(repository: Repository, paths: Sequence[str], *, revision: str, patience: Patience) -> None:
    """Download files to the local cache. Existing files are not fetched again; an interrupted download resumes.

    huggingface_hub does not retry all of its requests, so transient failures are retried here.

    Args:
        repository: Repository to download from.
        paths: Files to download.
        revision: Branch or tag that the cache records for the commit of the repository.
        patience: Number of attempts and the pauses between them.

    Raises:
        HubError: The download failed.
        TargetError: The cache cannot be written.
    """
    import httpx2
    from huggingface_hub import errors, snapshot_download

    retries = Retries(repository.name, "the download", patience)
    while True:
        try:
            snapshot_download(repository.name, revision=repository.commit, allow_patterns=[_literal(p) for p in paths])
            note_ref(repository.name, revision, repository.commit)
            return
        except errors.LocalEntryNotFoundError as problem:  # no connection, or a timeout
            retries.failed(_first_line(problem))
        except errors.HfHubHTTPError as problem:
            status = problem.response.status_code
            if status not in RETRIED_STATUSES:
                raise HubError(
                    repository.name, f"the download: {_first_line(problem)}", status=status,
                    next_step="Check the permissions of the token, or log in with `hf auth login`",
                ) from None  # fmt: skip
            retries.failed(f"the server answers {status}")
        except httpx2.TransportError as problem:
            retries.failed(f"the connection broke ({type(problem).__name__})")
        except OSError as problem:
            raise HubError(
                repository.name, f"the download: {problem.strerror or problem}",
                next_step=("Free disk space for the 16-bit checkpoint, or leave out ", Option("keep_source")),
            ) from None  # fmt: skip


def _literal(path: str) -> str:
    """Return a pattern that matches this path only."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in path)


def _first_line(problem: BaseException) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]
