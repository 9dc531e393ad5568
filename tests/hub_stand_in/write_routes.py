"""Routes for writers: repositories, branches, uploads, commits, pull requests."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import TYPE_CHECKING

from tests.hub_stand_in.answers import Answer, as_json, refusal
from tests.hub_stand_in.read_routes import commit_or_refusal
from tests.hub_stand_in.repositories import Repository, StoredFile, is_lfs

if TYPE_CHECKING:
    from tests.hub_stand_in.server import Call, Hub

SIGNED = "?X-Amz-Signature=of-the-stand-in"
"""Part of the URL of an upload that must stay secret."""


def create_repository(hub: Hub, call: Call) -> Answer:
    """POST /api/repos/create."""
    asked = call.json()
    name = f"{asked.get('organization') or hub.user_of(call)}/{asked['name']}"
    record = {"url": f"{hub.endpoint}/{name}", "name": name}
    if name in hub.repositories.by_name:
        return as_json({**record, "error": "You already created this model repo"}, 409)
    private = bool(asked.get("private")) or asked.get("visibility") == "private"
    repository = hub.repositories.create(name, private=private)
    repository.readers.add(hub.token_of(call) or "")
    return as_json(record)


def create_branch(hub: Hub, call: Call, repository: Repository, branch: str) -> Answer:
    """POST /api/models/ID/branch/NAME."""
    if branch in repository.refs:
        return as_json({"error": f"Reference {branch} already exists"}, 409)
    commit = commit_or_refusal(repository, call.json().get("startingPoint") or "main")
    if isinstance(commit, Answer):
        return commit
    repository.refs[branch] = commit.oid
    return as_json({})


def validate_yaml(hub: Hub, call: Call) -> Answer:
    """POST /api/validate-yaml: requires a front matter with valid fields of a model card."""
    content = call.json()["content"]
    errors = []
    if not content.startswith("---\n") or "\n---" not in content[4:]:
        errors.append({"message": "the README has no YAML front matter"})
    return as_json({"errors": errors, "warnings": []}, 400 if errors else 200)


def preupload(hub: Hub, call: Call, repository: Repository, revision: str) -> Answer:
    """POST /api/models/ID/preupload/REV."""
    commit = commit_or_refusal(repository, revision)
    if isinstance(commit, Answer):
        return commit
    files = []
    for asked in call.json()["files"]:
        entry = {
            "path": asked["path"],
            "uploadMode": "lfs" if is_lfs(asked["path"], asked["size"]) else "regular",
            "shouldIgnore": False,
        }
        if asked["path"] in commit.files:
            entry["oid"] = commit.files[asked["path"]].oid
        files.append(entry)
    return as_json({"files": files})


def lfs_batch(hub: Hub, call: Call) -> Answer:
    """POST /ID.git/info/lfs/objects/batch: no actions for existing objects, parts for large ones."""
    objects = []
    for asked in call.json()["objects"]:
        oid, nbytes = asked["oid"], asked["size"]
        entry: dict[str, object] = {"oid": oid, "size": nbytes}
        if oid not in hub.repositories.objects:
            upload: dict[str, object] = {"href": f"{hub.endpoint}/-/lfs/{oid}{SIGNED}"}
            if hub.part_nbytes is not None and nbytes > hub.part_nbytes:
                n_parts = -(-nbytes // hub.part_nbytes)
                parts = {f"{part:05d}": f"{hub.endpoint}/-/lfs/{oid}/{part}{SIGNED}" for part in range(1, n_parts + 1)}
                upload = {
                    "href": f"{hub.endpoint}/-/lfs/{oid}/complete",
                    "header": {"chunk_size": str(hub.part_nbytes), **parts},
                }
            verifier = hub.verify_endpoint or hub.endpoint
            entry["actions"] = {"upload": upload, "verify": {"href": f"{verifier}/-/lfs/{oid}/verify"}}
        objects.append(entry)
    transfer = "multipart" if hub.part_nbytes is not None else "basic"
    return as_json({"transfer": transfer, "objects": objects})


def put_object(hub: Hub, call: Call, sha256: str, part: str | None = None) -> Answer:
    """PUT /-/lfs/SHA256[/PART]."""
    if part is None:
        stored = hub.repositories.upload(sha256, call.body)
        return Answer() if stored else as_json({"error": "the bytes have another SHA-256"}, 400)
    with hub.repositories.lock:
        hub.repositories.parts[sha256, int(part)] = call.body
    return Answer(200, {"ETag": f'"{hashlib.md5(call.body).hexdigest()}"'})


def complete_object(hub: Hub, call: Call, sha256: str) -> Answer:
    """POST /-/lfs/SHA256/complete."""
    parts = []
    for part in call.json()["parts"]:
        data = hub.repositories.parts.get((sha256, part["partNumber"]))
        if data is None or part["etag"].strip('"') != hashlib.md5(data).hexdigest():
            return as_json({"error": f"part {part['partNumber']} is not here"}, 400)
        parts.append(data)
    stored = hub.repositories.upload(sha256, b"".join(parts))
    return as_json({}) if stored else as_json({"error": "the bytes have another SHA-256"}, 400)


def verify_object(hub: Hub, call: Call, sha256: str) -> Answer:
    """POST /-/lfs/SHA256/verify."""
    file = hub.repositories.objects.get(sha256)
    good = file is not None and file.nbytes == call.json()["size"]
    return as_json({}) if good else as_json({"error": "object is not here"}, 404)


def commit(hub: Hub, call: Call, repository: Repository, revision: str) -> Answer:
    """POST /api/models/ID/commit/REV: lines of JSON; 412 if the parent is no longer the head."""
    with hub.repositories.lock:
        base = commit_or_refusal(repository, revision)
        if isinstance(base, Answer):
            return base
        header: dict[str, object] = {}
        files = dict(base.files)
        for line in call.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                header = value
            elif key == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = StoredFile(content, lfs=False)
            elif key == "lfsFile":
                stored = hub.repositories.objects.get(value["oid"])
                if stored is None:
                    return as_json({"error": f"{value['path']}: object {value['oid']} was not uploaded"}, 400)
                files[value["path"]] = stored
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                return as_json({"error": f"unknown operation {key}"}, 400)
        if header.get("parentCommit") not in {None, base.oid}:
            message = "A commit has happened since. Please refresh and try again."
            return refusal(412, "PreconditionFailed", message)
        ref, title = revision, str(header["summary"])
        record: dict[str, object] = {}
        if call.query.get("create_pr"):
            repository.pull_requests.append(title)
            ref = f"refs/pr/{len(repository.pull_requests)}"
            repository.refs[ref] = base.oid
            url = f"{hub.endpoint}/{repository.name}/discussions/{len(repository.pull_requests)}"
            record = {"pullRequestUrl": url}
        made = repository.commit(ref, files, title)
        return as_json(
            {
                "success": True,
                "commitOid": made.oid,
                "commitUrl": f"{hub.endpoint}/{repository.name}/commit/{made.oid}",
                **record,
            }
        )
