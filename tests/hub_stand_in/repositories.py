"""Storage of the stand-in: repositories, commits, branches, pull requests and uploaded objects."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".model", ".pt", ".msgpack")
LFS_MIN_NBYTES = 10_000_000
GIT_ATTRIBUTES = b"".join(b"*%s filter=lfs diff=lfs merge=lfs -text\n" % suffix.encode() for suffix in LFS_SUFFIXES)
PIECE_NBYTES = 1 << 20


@dataclass(frozen=True)
class StoredFile:
    """Content of a file, in memory or on disk, and how the Hub stores it."""

    content: bytes | Path
    lfs: bool

    @cached_property
    def nbytes(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def pieces(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes [start, stop)."""
        if isinstance(self.content, bytes):
            yield self.content[start:stop]
            return
        with self.content.open("rb") as file:
            file.seek(start)
            while start < stop and (piece := file.read(min(PIECE_NBYTES, stop - start))):
                start += len(piece)
                yield piece

    def read(self) -> bytes:
        return b"".join(self.pieces(0, self.nbytes))

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for piece in self.pieces(0, self.nbytes):
            digest.update(piece)
        return digest.hexdigest()

    @cached_property
    def oid(self) -> str:
        """The SHA-1 of the git blob: of the pointer, for an LFS file."""
        data = self.pointer if self.lfs else self.read()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def pointer(self) -> bytes:
        return b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (
            self.sha256.encode(),
            self.nbytes,
        )

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


def is_lfs(name: str, nbytes: int) -> bool:
    return name.endswith(LFS_SUFFIXES) or nbytes > LFS_MIN_NBYTES


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    message: str
    files: Mapping[str, StoredFile]


@dataclass
class Repository:
    """One model repository. `readers` may read it if it is private or gated."""

    name: str
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pull_requests: list[str] = field(default_factory=list)
    """Titles of the pull requests, from number 1."""

    def __post_init__(self) -> None:
        self.commit("main", {".gitattributes": StoredFile(GIT_ATTRIBUTES, lfs=False)}, "initial commit")

    def commit(self, ref: str, files: Mapping[str, StoredFile], message: str) -> Commit:
        """Commit `files` as the complete content of a branch."""
        parent = self.refs.get(ref)
        listing = "".join(f"{name} {files[name].oid}\n" for name in sorted(files))
        oid = hashlib.sha1(f"{self.name}\n{parent}\n{message}\n{len(self.commits)}\n{listing}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, message, dict(files))
        self.refs[ref] = oid
        return self.commits[oid]

    def at(self, revision: str) -> Commit | None:
        """Return the commit of a branch, a pull request, or a full or shortened hash."""
        if revision in self.refs:
            return self.commits[self.refs[revision]]
        if revision.startswith("refs/heads/") and revision[11:] in self.refs:
            return self.commits[self.refs[revision[11:]]]
        if len(revision) >= 7:
            return next((commit for oid, commit in self.commits.items() if oid.startswith(revision)), None)
        return None

    @property
    def head(self) -> Commit:
        return self.commits[self.refs["main"]]

    def history(self, revision: str) -> list[Commit]:
        """Return the commits of a revision, newest first."""
        found, commit = [], self.at(revision)
        while commit is not None:
            found.append(commit)
            commit = None if commit.parent is None else self.commits[commit.parent]
        return found


class Repositories:
    """All repositories and uploaded objects of a stand-in. One lock protects all changes."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.by_name: dict[str, Repository] = {}
        self.objects: dict[str, StoredFile] = {}
        """LFS objects by SHA-256."""
        self.parts: dict[tuple[str, int], bytes] = {}
        """Parts of uploads by SHA-256 and number."""

    def create(self, name: str, *, private: bool = False, gated: bool = False) -> Repository:
        with self.lock:
            repository = self.by_name[name] = Repository(name, private=private, gated=gated)
            return repository

    def add_folder(self, name: str, folder: Path, *, private: bool = False, gated: bool = False) -> Repository:
        """Create a repository whose main branch has the files of a directory, including subdirectories."""
        repository = self.by_name.get(name) or self.create(name, private=private, gated=gated)
        files = {
            path.relative_to(folder).as_posix(): StoredFile(path, is_lfs(path.name, path.stat().st_size))
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        self.commit(name, files)
        return repository

    def commit(self, name: str, files: Mapping[str, StoredFile | bytes], *, ref: str = "main") -> str:
        """Add or replace files of a branch in a new commit, and return its hash."""
        with self.lock:
            repository = self.by_name[name]
            stored = {path: _stored(path, content) for path, content in files.items()}
            for file in stored.values():
                if file.lfs:
                    self.objects[file.sha256] = file
            old = repository.at(ref)
            return repository.commit(ref, {**(old.files if old else {}), **stored}, "files").oid

    def change_in_place(self, name: str, path: str, content: bytes, *, ref: str = "main") -> None:
        """Replace a file under the same commit, which a client must detect by the ETag."""
        with self.lock:
            repository = self.by_name[name]
            commit = repository.at(ref)
            assert commit is not None
            files = {**commit.files, path: _stored(path, content)}
            repository.commits[commit.oid] = Commit(commit.oid, commit.parent, commit.message, files)

    def upload(self, sha256: str, data: bytes) -> bool:
        """Store an LFS object if its content has the given SHA-256."""
        if hashlib.sha256(data).hexdigest() != sha256:
            return False
        with self.lock:
            self.objects[sha256] = StoredFile(data, lfs=True)
        return True


def _stored(path: str, content: StoredFile | bytes) -> StoredFile:
    return content if isinstance(content, StoredFile) else StoredFile(content, is_lfs(path, len(content)))
