"""Downloads of files to the local cache by huggingface_hub, in the layout that other programs expect."""

from __future__ import annotations

from collections.abc import Sequence

from qformat.errors import HubError, Option, first_line
from qformat.hub.client import Watch, watched
from qformat.hub.reading.budget import Budget
from qformat.hub.reading.cache import note_ref
from qformat.hub.reading.repository import Repository
from qformat.hub.reading.transfer import Patience
from qformat.hub.reading.transport import RETRIED_STATUSES
from qformat.version import __version__


def download(repository: Repository, paths: Sequence[str], *, revision: str, patience: Patience) -> None:
    """Download files to the local cache. Existing files are not fetched again; an interrupted download resumes.

    huggingface_hub does not retry all of its requests, so transient failures are retried here, and its requests are
    watched.

    Args:
        repository: Repository to download from.
        paths: Files to download.
        revision: Branch or tag that the cache records for the commit of the repository.
        patience: Limits of the requests.

    Raises:
        HubError: The download failed.
        TargetError: The cache cannot be written.
    """
    import httpx2
    from huggingface_hub import errors

    sizes = [repository.files[path].nbytes for path in paths]
    largest = max([patience.answer_nbytes, *sizes])
    watch = Watch.for_reading(repository.name, patience=patience, max_nbytes=largest)
    budget = Budget(repository.name, "the download", patience, nbytes=sum(sizes))
    while True:
        try:
            with watched(watch):
                _snapshot(repository, paths)
            note_ref(repository.name, revision, repository.commit)
            return
        except errors.LocalEntryNotFoundError as problem:  # no connection, or a timeout
            budget.failed(first_line(problem))
        except errors.HfHubHTTPError as problem:
            status = problem.response.status_code
            if status not in RETRIED_STATUSES:
                raise HubError(
                    repository.name, f"the download: {first_line(problem)}", status=status,
                    next_step="Check the permissions of the token, or log in with `hf auth login`",
                ) from None  # fmt: skip
            budget.failed(f"the server answers {status}")
        except httpx2.TransportError as problem:
            budget.failed(f"the connection broke ({type(problem).__name__})")
        except OSError as problem:
            raise HubError(
                repository.name, f"the download: {problem.strerror or problem}",
                next_step=("Free disk space for the 16-bit checkpoint, or leave out ", Option("keep_source")),
            ) from None  # fmt: skip


def _snapshot(repository: Repository, paths: Sequence[str]) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download(
        repository.name,
        revision=repository.commit,
        allow_patterns=[_literal(path) for path in paths],
        library_name="qformat",
        library_version=__version__,
    )


def _literal(path: str) -> str:
    """Return a pattern that matches this path only."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in path)
