"""A repository on the Hub at one commit. Small files are read completely, large ones by byte range.

    repository = open_repository("owner/name", revision="main")
    repository.commit                                   # stays the same if the branch moves
    repository.files["model.safetensors"].sha256
    repository.read_small("config.json", max_nbytes=2**20)
    repository.read_range("model.safetensors", 8, memoryview(bytearray(1000)))

All data is checked against the listing of the commit: sizes, and the digests of files that are read completely.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING
from urllib.parse import quote, urljoin

from qformat import strict_json
from qformat.artifact.limits import MAX_SIZE
from qformat.errors import HubError, InvalidFileError, Option, Reason, SourceError
from qformat.hub.names import check_listed_path, check_repository_name, check_revision, is_commit
from qformat.hub.reading.budget import Budget, Unusable
from qformat.hub.reading.repository import ReadBytes, RemoteFile, check_digest
from qformat.hub.reading.transfer import DEFAULT_TRANSFER, Transfer
from qformat.hub.reading.transport import Transport
from qformat.secrets import masked

if TYPE_CHECKING:
    import httpx2

DEFAULT_REVISION = "main"

MAX_PULL_REQUEST_PAGES = 20
"""Most pages of open pull requests that are read. The newest ones come first."""

_CONTENT_RANGE = re.compile(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15}|\*)")
_NEXT_PAGE = re.compile(r'<([^<>]+)>\s*;\s*rel="next"')
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")


class RemoteRepository:
    """A repository on the Hub at one commit. It is thread-safe.

    Args:
        transport: Requests to the repository.
        commit: Hash of the commit.
        files: Listing of the commit.
        error: Type of the errors about files, SourceError or ArtifactError.
    """

    def __init__(
        self, transport: Transport, commit: str, files: Mapping[str, RemoteFile], *, error: type[InvalidFileError]
    ) -> None:
        self.name = transport.repository
        self.commit = commit
        self.files = files
        self._transport = transport
        self._error = error
        self._lock = threading.Lock()
        self._addresses: dict[str, str] = {}
        self._etags: dict[tuple[str, str], str] = {}

    def __str__(self) -> str:
        return f"{self.name}@{self.commit[:12]}"

    def close(self) -> None:
        """End all pauses between attempts: requests in progress end with an error."""
        self._transport.close()

    def read_small(self, path: str, *, max_nbytes: int) -> bytes:
        """Return the content of a file, checked against the digest in the listing.

        Args:
            path: Path in the repository.
            max_nbytes: Largest accepted file in bytes.

        Raises:
            InvalidFileError: The file does not exist (missing_file), is too large (json_limit), or has another digest
                (file_digest).
            HubError: The file cannot be downloaded.
        """
        file = self.file(path)
        if file.nbytes > max_nbytes:
            raise self._error(
                Reason.JSON_LIMIT,
                f"{self}/{path}",
                f"the file has {file.nbytes} bytes, at most {max_nbytes} are allowed",
            )
        data = bytearray(file.nbytes)
        self.read_range(path, 0, memoryview(data))
        check_digest(data, file, shown=f"{self}/{path}", error=self._error)
        return bytes(data)

    def read_range(self, path: str, start: int, out: memoryview, *, on_bytes: ReadBytes = lambda nbytes: None) -> None:
        """Read a range of bytes of a file. A broken transfer resumes where it stopped.

        Args:
            path: Path in the repository.
            start: First byte of the range.
            out: Buffer to fill. Its length is the length of the range.
            on_bytes: Called with the number of bytes that arrived since the last call. An exception that it raises
                ends the transfer.

        Raises:
            InvalidFileError: The file does not exist (missing_file), is too short (truncated), or has changed
                (source_changed).
            HubError: The range cannot be downloaded.
        """
        file = self.file(path)
        if start + len(out) > file.nbytes:
            raise self._error(
                Reason.TRUNCATED, f"{self}/{path}", f"found {file.nbytes} bytes, expected {start + len(out)}"
            )
        budget = self._transport.budget(f"bytes {start} to {start + len(out)} of {path}", nbytes=len(out))
        done = 0

        def take(chunk: bytes) -> None:
            nonlocal done
            out[done : done + len(chunk)] = chunk
            done += len(chunk)
            on_bytes(len(chunk))

        while done < len(out):
            with self._transport.attempt(budget):
                self._receive(file, start + done, start + len(out), take, budget)

    def file(self, path: str) -> RemoteFile:
        """Return the entry of a file in the listing.

        Raises:
            InvalidFileError: The file does not exist (missing_file).
        """
        if path not in self.files:
            raise self._error(Reason.MISSING_FILE, f"{self}/{path}", "does not exist in the repository")
        return self.files[path]

    def _receive(self, file: RemoteFile, start: int, stop: int, take: Callable[[bytes], None], budget: Budget) -> None:
        """Request bytes [start, stop) once and pass them to `take`. Raise errors that `attempt` counts."""
        with self._answer(file, start, stop) as response:
            skipped = self._nbytes_before(response, file, start, stop)
            budget.begin_answer()
            position = start - skipped
            for chunk in response.iter_raw():
                wanted = chunk[max(start - position, 0) : stop - position]
                position += len(chunk)
                if wanted:
                    take(wanted)
                if position >= stop:
                    return
                budget.discard(len(chunk) - len(wanted))
                if wanted:
                    budget.keep(len(wanted))
        raise Unusable(f"the response ended {stop - position} bytes early")

    @contextmanager
    def _answer(self, file: RemoteFile, start: int, stop: int) -> Iterator[httpx2.Response]:
        """Request a range from the last known URL of the file or from the Hub, and check that it is the same file."""
        remembered = self._addresses.get(file.path)
        url = remembered or self._address(file.path)
        asked = {"Range": f"bytes={start}-{stop - 1}"}
        with ExitStack() as stack:
            try:
                answer = stack.enter_context(self._transport.open(url, file.path, asked))
            except HubError as refused:
                if refused.status == 416:
                    raise self._changed(file, f"it no longer has the bytes {start} to {stop}") from None
                raise
            except BaseException:
                self._addresses.pop(file.path, None)  # the URL may have expired: the next attempt asks the Hub again
                raise
            if answer.linked is not None:
                self._check_identity(file, answer.linked)
                self._addresses[file.path] = str(answer.response.url)
            elif remembered is None:
                self._check_identity(file, answer.response.headers)
            self._check_same(file, answer.response)
            yield answer.response

    def _address(self, path: str) -> str:
        return f"{self._transport.endpoint}/{self.name}/resolve/{self.commit}/{quote(path)}"

    def _check_identity(self, file: RemoteFile, headers: Mapping[str, str]) -> None:
        """Check that the commit and the digest in the headers of the Hub are those of the listing."""
        commit = headers.get("X-Repo-Commit", self.commit)
        if commit != self.commit:
            raise self._changed(file, f"the response is from commit {commit[:40]!r}")
        etag = _plain_etag(headers.get("X-Linked-ETag") or headers.get("ETag") or "")
        expected, form = (file.sha256, _SHA256) if file.sha256 is not None else (file.oid, _SHA1)
        if form.fullmatch(etag) and etag != expected:
            raise self._changed(file, f"found ETag {etag}, expected {expected}")

    def _check_same(self, file: RemoteFile, response: httpx2.Response) -> None:
        """Check that the ETag of a storage server is the same in every response."""
        etag = _plain_etag(response.headers.get("ETag", ""))
        if not etag:
            return
        with self._lock:
            before = self._etags.setdefault((file.path, response.url.host), etag)
        if etag != before:
            raise self._changed(file, f"found ETag {etag[:80]!r}, expected {before[:80]!r} as before")

    def _nbytes_before(self, response: httpx2.Response, file: RemoteFile, start: int, stop: int) -> int:
        """Return the number of bytes in the response before byte `start`. Raise an error if it is another range."""
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise Unusable(f"the response has the Content-Encoding {encoding[:40]!r}")
        if response.status_code == 200:  # the complete file
            length = response.headers.get("Content-Length", str(file.nbytes))
            if length != str(file.nbytes):
                raise self._changed(file, f"found {length[:40]} bytes, expected {file.nbytes}")
            if start > self._transport.transfer.max_skipped_nbytes:
                raise Unusable(
                    "the server sends the complete file instead of a range",
                    next_step=("Download the source first with ", Option("keep_source", True)),
                )
            return start
        shown = response.headers.get("Content-Range", "")
        match = _CONTENT_RANGE.fullmatch(shown)
        if match is None or int(match[1]) != start or not start <= int(match[2]) < stop:
            raise Unusable(f"the response has the Content-Range {shown[:80]!r}, expected bytes {start}-{stop - 1}")
        if match[3] not in {"*", str(file.nbytes)}:
            raise self._changed(file, f"found {match[3]} bytes, expected {file.nbytes}")
        return 0

    def _changed(self, file: RemoteFile, problem: str) -> InvalidFileError:
        return self._error(
            Reason.SOURCE_CHANGED,
            f"{self}/{file.path}",
            f"was changed in transit or on the server: {problem}",
            next_step="Run the same command again",
        )


def open_repository(
    name: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    transfer: Transfer = DEFAULT_TRANSFER,
    error: type[InvalidFileError] = SourceError,
) -> RemoteRepository:
    """Request the commit of a revision and its listing from the Hub.

    Args:
        name: Name of the repository, `owner/name`.
        revision: Branch, tag or commit. The default is the main branch. A full commit hash needs no request.
        token: Token for the Hub. None uses the stored token, False sends none.
        transfer: Sizes and retries of requests.
        error: Type of the errors about files.

    Raises:
        UsageError: The name of the repository or the revision is invalid.
        HubError: The repository cannot be read.
        InvalidFileError: The path of a file leaves the repository (path_escapes). The error is of type `error`.
    """
    transport = Transport(check_repository_name(name), token=token, transfer=transfer)
    commit = commit_of(transport, check_revision(revision or DEFAULT_REVISION))
    return RemoteRepository(transport, commit, _list_files(transport, commit, error), error=error)


def commit_of(transport: Transport, revision: str) -> str:
    """Return the commit of a revision. A full commit hash needs no request.

    Args:
        transport: Requests to the repository.
        revision: Branch, tag or commit.

    Raises:
        HubError: The repository or the revision cannot be read.
    """
    if is_commit(revision):
        return revision
    what = f"revision {revision!r}"
    url = f"{transport.endpoint}/api/models/{transport.repository}/revision/{quote(revision, safe='')}"
    record, _, _ = _get_json(transport, url, what)
    commit = record.get("sha") if isinstance(record, dict) else None
    if not isinstance(commit, str) or not is_commit(commit):
        raise _nonsense(transport, what, "it has no commit hash")
    return commit


def is_private(transport: Transport) -> bool:
    """Return whether a repository is private. Raise HubError if it cannot be read."""
    what = "reading its settings"
    record, _, _ = _get_json(transport, f"{transport.endpoint}/api/models/{transport.repository}", what)
    private = record.get("private") if isinstance(record, dict) else None
    if not isinstance(private, bool):
        raise _nonsense(transport, what, "it does not say whether the repository is private")
    return private


def open_pull_requests(transport: Transport) -> list[tuple[int, str]]:
    """Return numbers and titles of the newest open pull requests. Raise HubError if they cannot be read."""
    what = "reading its pull requests"
    url = f"{transport.endpoint}/api/models/{transport.repository}/discussions?type=pull_request&status=open"
    found: list[tuple[int, str]] = []
    budget = transport.budget(what)
    for number in range(MAX_PULL_REQUEST_PAGES):
        record, _, _ = _get_json(transport, f"{url}&p={number}", what, budget)
        entries = record.get("discussions") if isinstance(record, dict) else None
        if not isinstance(record, dict) or not isinstance(entries, list):
            raise _nonsense(transport, what, "it has no list of discussions")
        for entry in entries:
            if isinstance(entry, dict) and type(entry.get("num")) is int and isinstance(entry.get("title"), str):
                found.append((entry["num"], entry["title"]))  # type: ignore[arg-type]
        total = record.get("count")
        if not entries or type(total) is not int or len(found) >= total:
            break
    return found


def _list_files(transport: Transport, commit: str, error: type[InvalidFileError]) -> dict[str, RemoteFile]:
    what, limits = f"the files of {commit[:12]}", transport.patience
    files: dict[str, RemoteFile] = {}
    n_entries = nbytes = 0
    url = f"{transport.endpoint}/api/models/{transport.repository}/tree/{commit}?recursive=true&expand=false"
    budget, seen = transport.budget(what), set[str]()
    while url:
        if url in seen or len(seen) == limits.listing_pages:
            raise _nonsense(transport, what, f"its pages repeat, or are more than {limits.listing_pages}")
        seen.add(url)
        page, headers, page_nbytes = _get_json(transport, url, what, budget)
        if not isinstance(page, list):
            raise _nonsense(transport, what, "it is not a list")
        n_entries, nbytes = n_entries + len(page), nbytes + page_nbytes
        if n_entries > limits.listing_entries or nbytes > limits.listing_nbytes:
            allowed = f"{limits.listing_entries} files and directories and {limits.listing_nbytes} bytes"
            raise _nonsense(transport, what, f"it has more than {allowed}")
        for entry in page:
            if isinstance(entry, dict) and entry.get("type") == "directory":
                continue
            file = _listed(transport, what, entry)
            check_listed_path(file.path, repository=transport.repository, error=error)
            if masked(file.path) != file.path:
                raise _nonsense(transport, what, "the name of a file contains the token")
            if file.path in files:
                raise _nonsense(transport, what, f"it lists {file.path!r} twice")
            files[file.path] = file
        following = _NEXT_PAGE.search(headers.get("Link", "")) if page else None
        url = urljoin(url, following[1]) if following else ""
        if url and not transport.is_hub(url):
            raise _nonsense(transport, what, "its next page is on another host")
    return files


def _listed(transport: Transport, what: str, entry: strict_json.Json) -> RemoteFile:
    if isinstance(entry, dict):
        path, nbytes, oid, lfs = entry.get("path"), entry.get("size"), entry.get("oid"), entry.get("lfs")
        sha256 = lfs.get("oid") if isinstance(lfs, dict) else None
        if (
            isinstance(path, str)
            and type(nbytes) is int
            and 0 <= nbytes <= MAX_SIZE
            and isinstance(oid, str)
            and _SHA1.fullmatch(oid)
            and (lfs is None or (isinstance(sha256, str) and _SHA256.fullmatch(sha256)))
        ):
            return RemoteFile(path, nbytes, oid, sha256 if isinstance(sha256, str) else None)
    raise _nonsense(transport, what, f"it has an entry without a path, size or digest: {masked(str(entry))[:200]}")


def _get_json(
    transport: Transport, url: str, what: str, budget: Budget | None = None
) -> tuple[strict_json.Json, Mapping[str, str], int]:
    """Return the record in an answer, its headers and its size in bytes."""
    data, headers = transport.get_small(url, what, budget=budget)
    limit = transport.patience.answer_nbytes
    try:
        return strict_json.loads(data, path=what, max_nbytes=limit, error=SourceError), headers, len(data)
    except InvalidFileError as problem:
        raise _nonsense(transport, what, problem.problem) from None


def _nonsense(transport: Transport, what: str, problem: str) -> HubError:
    return HubError(transport.repository, f"{what}: the response is invalid: {problem}", next_step="Check HF_ENDPOINT")


def _plain_etag(text: str) -> str:
    return text.strip().removeprefix("W/").strip('"')
