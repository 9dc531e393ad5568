"""The Hub source: a safetensors checkpoint in a repository at one commit, streamed or read from the local cache."""

from __future__ import annotations

import hashlib
import re

from qformat.artifact.manifest import JsonObject
from qformat.artifact.reading.side_files import is_side_file
from qformat.converters.sources.hub.files import HubFiles
from qformat.converters.sources.hub.reading import HubReading
from qformat.converters.sources.reading import Reading
from qformat.converters.sources.safetensors_shards import SafetensorsShards
from qformat.converters.sources.source import SourceTensor
from qformat.errors import HubError, Option, Reason, SourceError
from qformat.hub.reading.cache import CachedRepository, find_in_cache
from qformat.hub.reading.download import download
from qformat.hub.reading.remote import DEFAULT_REVISION, open_repository
from qformat.hub.reading.repository import Repository
from qformat.hub.reading.transfer import DEFAULT_TRANSFER, Transfer
from qformat.names import CONFIG_NAME, INDEX_NAME, SINGLE_SHARD_NAME

_TORCH_BIN = re.compile(r"pytorch_model.*\.bin(\.index\.json)?")


class HubRepository(SafetensorsShards):
    """A checkpoint in a Hub repository. Opening fetches config.json, the index and every header, but no weights."""

    def __init__(self, files: HubFiles) -> None:
        self.files = files
        super().__init__(files)

    def describe(self) -> JsonObject:
        """Return kind, repository, commit, and the size and SHA-256 of each shard, as the manifest records them."""
        files: JsonObject = {**self.files.described_shards()}
        repository = self.files.repository
        where: JsonObject = {"repository": repository.name, "commit": repository.commit}
        return {"kind": self.kind, **where, "files": files, **self._how_read()}

    def fingerprint(self) -> str:
        """Return the SHA-256 of the commit and of the digests of all files that are used."""
        used = sorted({CONFIG_NAME, *self.files.shards, *self.side_files})
        lines = [str(self.files.repository.commit), *(f"{name} {self.files.digest(name)}" for name in used)]
        return hashlib.sha256("\n".join(lines).encode("utf-8")).hexdigest()

    def read_into(self, tensor: SourceTensor, offset: int, out: memoryview) -> None:
        """Fill `out` with bytes of a tensor: from the stream while a conversion runs, otherwise by a separate request.

        Args:
            tensor: The tensor to read.
            offset: Offset of the first byte in the tensor.
            out: Buffer to fill.
        """
        shard, entry = self._entries[tensor.name]
        if self.files.stream is not None and self.files.shards[shard].whole is None:
            self.files.stream.read_into(tensor.name, offset, out)
        else:
            self.files.read_into(shard, entry.start + offset, out)

    def new_reading(self) -> Reading:
        """Return a reading in the order of the shards' bytes."""
        ignored = [
            (shard, entry)
            for shard, parsed in self._headers.items()
            for name, entry in parsed.tensors.items()
            if self._entries.get(name, (None, entry))[0] != shard
        ]
        return HubReading(self.files, self._entries, ignored)

    def check_for_any_order(self) -> None:
        """Check all shards in advance, so that tensors can be read in any order and more than once.

        Raises:
            SourceError: A shard is damaged or not in the local cache.
        """
        repository = self.files.repository
        if not isinstance(repository, CachedRepository):
            raise SourceError(
                Reason.UNSUPPORTED_SOURCE, self.location / CONFIG_NAME, "this encoding cannot be streamed",
                field="quantization_config", next_step=("Download it first with ", Option("keep_source", True)),
            )  # fmt: skip
        repository.check(self.files.shards)

    @property
    def pin(self) -> JsonObject:
        """What a later run needs to resume with this commit, even if the branch has moved on."""
        return self.files.pin


def open_hub_files(
    name: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    keep_source: bool = False,
    pin: JsonObject | None = None,
    transfer: Transfer = DEFAULT_TRANSFER,
) -> HubFiles:
    """Find a checkpoint on the Hub at the commit that the revision currently refers to. The caller closes the files.

    A snapshot in the local cache is used if it has every file that is needed.

    Args:
        name: Name of the repository, owner/name.
        revision: Branch, tag or commit. Defaults to the main branch.
        offline: Whether to send no requests and read the local cache only. HF_HUB_OFFLINE has the same effect.
        keep_source: Whether to download the files into the local cache first.
        pin: Commit recorded by an interrupted run. It is used if that run asked for the same repository and revision.
        transfer: Connections, timeouts and retries.

    Raises:
        HubError: The Hub rejects a request or does not answer.
        SourceError: The repository is not in the local cache and no request may be sent, or a file is damaged.
        UsageError: The name or the revision is not valid.
    """
    from huggingface_hub import constants

    revision = revision or DEFAULT_REVISION
    pinned = pin is not None and (pin.get("repository"), pin.get("revision")) == (name, revision)
    asked = str(pin["commit"]) if pin is not None and pinned else revision
    if offline or constants.is_offline_mode():
        files = HubFiles(_cached(name, asked), revision=revision, transfer=transfer)
    else:
        repository = _at_the_hub(name, asked, is_pinned=pinned, transfer=transfer)
        files = HubFiles(repository, revision=revision, transfer=transfer)
        needed = _needed_files(files)
        if keep_source:
            download(files.repository, needed, revision=revision, patience=transfer.patience)
        if (cached := _whole_in_cache(files.repository, needed)) is not None:
            files.close()
            files = HubFiles(cached, revision=revision, transfer=transfer)
    return files


def _at_the_hub(name: str, revision: str, *, is_pinned: bool, transfer: Transfer) -> Repository:
    try:
        return open_repository(name, revision=revision, transfer=transfer)
    except HubError as refused:
        if is_pinned and refused.code == "RevisionNotFound":
            raise HubError(
                name, f"commit {revision}, which the interrupted conversion started from, no longer exists",
                next_step=("Start over with ", Option("restart", True)), status=refused.status, code=refused.code,
            ) from None  # fmt: skip
        raise


def _cached(name: str, revision: str) -> CachedRepository:
    cached = find_in_cache(name, revision)
    if cached is None:
        raise SourceError(
            Reason.MISSING_FILE, f"{name}@{revision}", "is not in the local Hub cache, and offline mode is on",
            next_step=("Fetch it first: leave out ", Option("offline"), ", or unset HF_HUB_OFFLINE"),
        )  # fmt: skip
    return cached


def _whole_in_cache(repository: Repository, needed: list[str]) -> CachedRepository | None:
    """Return the snapshot in the local cache if it has every needed file with the digest from the commit."""
    try:
        cached = find_in_cache(repository.name, repository.commit)
    except SourceError:  # the cache does not have the layout of the Hub's client
        return None
    if cached is None:
        return None
    for name in needed:
        there, listed = cached.files.get(name), repository.files[name]
        digest = listed.sha256 or listed.oid
        if there is None or there.nbytes != listed.nbytes or (there.sha256 or there.oid) != digest:
            cached.close()
            return None
    return cached


def _needed_files(files: HubFiles) -> list[str]:
    """Return the files of a repository that exist and that a conversion reads."""
    shards = (files.read_weight_map(INDEX_NAME) or {SINGLE_SHARD_NAME: SINGLE_SHARD_NAME}).values()
    named = {CONFIG_NAME, INDEX_NAME, *shards}
    if not any(files.has(shard) for shard in shards):
        named |= {name for name in files.names() if _TORCH_BIN.fullmatch(name)}
    return [name for name in files.names() if name in named or is_side_file(name)]
