"""Routes for readers: revisions, trees, histories, files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import quote

from tests.hub_stand_in.answers import Answer, as_json, refusal
from tests.hub_stand_in.repositories import Commit, Repository, StoredFile

if TYPE_CHECKING:
    from tests.hub_stand_in.server import Call, Hub


def lfs_record(file: StoredFile) -> dict[str, object]:
    return {"oid": file.sha256, "size": file.nbytes, "pointerSize": len(file.pointer)}


def tree_entry(path: str, file: StoredFile) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "oid": file.oid, "size": file.nbytes, "path": path}
    return {**entry, "lfs": lfs_record(file)} if file.lfs else entry


def commit_or_refusal(repository: Repository, revision: str) -> Commit | Answer:
    commit = repository.at(revision)
    return refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}") if commit is None else commit


def model_info(hub: Hub, call: Call, repository: Repository, revision: str = "main") -> Answer:
    """GET /api/models/ID[/revision/REV]."""
    commit = commit_or_refusal(repository, revision)
    if isinstance(commit, Answer):
        return commit
    siblings: list[dict[str, object]] = []
    for path, file in commit.files.items():
        sibling: dict[str, object] = {"rfilename": path}
        if call.query.get("blobs"):
            sibling |= {"size": file.nbytes, "blobId": file.oid}
            sibling |= {"lfs": {**lfs_record(file), "sha256": file.sha256}} if file.lfs else {}
        siblings.append(sibling)
    record = {
        "id": repository.name,
        "modelId": repository.name,
        "author": repository.name.partition("/")[0],
        "sha": commit.oid,
        "private": repository.private,
        "gated": "manual" if repository.gated else False,
        "disabled": False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "siblings": siblings,
    }
    return as_json(record)


def tree(hub: Hub, call: Call, repository: Repository, revision: str, folder: str = "") -> Answer:
    """GET /api/models/ID/tree/REV[/FOLDER], in pages."""
    commit = commit_or_refusal(repository, revision)
    if isinstance(commit, Answer):
        return commit
    prefix = folder.strip("/") + "/" if folder.strip("/") else ""
    entries: dict[str, dict[str, object]] = {}
    for path, file in sorted(commit.files.items()):
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts)):
            above = prefix + "/".join(parts[:depth])
            entries[above] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": above}
        entries[path] = tree_entry(path, file)
    if call.query.get("recursive", "").lower() not in {"true", "1"}:
        entries = {path: entry for path, entry in entries.items() if "/" not in path[len(prefix) :]}
    listed = [entries[path] for path in sorted(entries)]
    if prefix and not listed:
        return refusal(404, "EntryNotFound", f"{folder} does not exist on {revision}")
    start = int(call.query.get("cursor", "0"))
    stop = start + hub.page_size
    answer = as_json(listed[start:stop], X_Repo_Commit=commit.oid)
    if stop < len(listed):
        query = "&".join(f"{key}={quote(value)}" for key, value in call.query.items() if key != "cursor")
        answer.headers["Link"] = f'<{hub.endpoint}{call.path}?{query}&cursor={stop}>; rel="next"'
    return answer


def paths_info(hub: Hub, call: Call, repository: Repository, revision: str) -> Answer:
    """POST /api/models/ID/paths-info/REV."""
    commit = commit_or_refusal(repository, revision)
    if isinstance(commit, Answer):
        return commit
    asked = call.json()["paths"] if call.body[:1] == b"{" else call.form().get("paths", [])
    asked = [asked] if isinstance(asked, str) else asked
    return as_json([tree_entry(path, commit.files[path]) for path in asked if path in commit.files])


def commits(hub: Hub, call: Call, repository: Repository, revision: str) -> Answer:
    """GET /api/models/ID/commits/REV."""
    if repository.at(revision) is None:
        return refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    history = repository.history(revision)
    entries = [
        {"id": one.oid, "title": one.message, "message": "", "authors": [], "date": "2026-01-01T00:00:00.000Z"}
        for one in history
    ]
    return as_json(entries, X_Total_Count=str(len(history)))


def refs(hub: Hub, call: Call, repository: Repository) -> Answer:
    """GET /api/models/ID/refs."""
    branches = [
        {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": oid}
        for ref, oid in repository.refs.items()
        if not ref.startswith("refs/")
    ]
    pulls = [
        {"name": ref, "ref": ref, "targetCommit": oid}
        for ref, oid in repository.refs.items()
        if ref.startswith("refs/pr/")
    ]
    return as_json({"branches": branches, "converts": [], "tags": [], "pullRequests": pulls})


def discussions(hub: Hub, call: Call, repository: Repository) -> Answer:
    """GET /api/models/ID/discussions: the open pull requests, all on one page."""
    entries = [
        {
            "num": number,
            "title": title,
            "status": "open",
            "isPullRequest": True,
            "author": {"name": "user"},
            "createdAt": "2026-01-01T00:00:00.000Z",
            "repo": {"name": repository.name, "type": "model"},
        }
        for number, title in enumerate(repository.pull_requests, 1)
    ]
    start = int(call.query.get("p", "0"))
    return as_json({"discussions": entries if start == 0 else [], "count": len(entries), "start": 0})


def resolve(hub: Hub, call: Call, repository: Repository, revision: str, path: str) -> Answer:
    """HEAD and GET /ID/resolve/REV/PATH: the file, or a redirect to the content delivery host."""
    commit = commit_or_refusal(repository, revision)
    if isinstance(commit, Answer):
        return commit
    file = commit.files.get(path)
    if file is None:
        return refusal(404, "EntryNotFound", "Entry not found")
    headers: Mapping[str, str] = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.etag}"'}
    if file.lfs and hub.cdn_endpoint is not None:
        location = f"{hub.cdn_endpoint}/{file.sha256}?signature=stand-in"
        linked = {"X-Linked-Size": str(file.nbytes), "X-Linked-ETag": f'"{file.sha256}"', "Location": location}
        return Answer(302, {**headers, **linked}, b"Found. Redirecting")
    return Answer(200, {**headers, "Content-Type": "application/octet-stream"}, file)


def delivered(hub: Hub, path: str) -> Answer:
    """GET /SHA256 of the content delivery host."""
    sha256 = re.sub(r"\?.*", "", path).strip("/")
    file = hub.repositories.objects.get(sha256)
    if file is None:
        return Answer(403, {}, b"no such object")
    return Answer(200, {"ETag": f'"{sha256}"', "Content-Type": "application/octet-stream"}, file)
