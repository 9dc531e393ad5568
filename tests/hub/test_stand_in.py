"""The stand-in of the Hub answers huggingface_hub as the Hub does, on which the other tests rely."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import close_session

from tests.hub_stand_in import Hub, environment, point_here, running
from tests.repository import ROOT
from tests.small_models import contents, write_llama


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running(Hub(with_cdn=True, page_size=3)) as hub:
        point_here(monkeypatch, hub, tmp_path / "home", token="hf_secret")
        yield hub
        close_session()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "source", n_shards=3)


def test_a_snapshot_has_the_bytes_of_the_folder_and_the_token_stays_at_the_hub(hub: Hub, folder: Path) -> None:
    (folder / "a name with # and spaces.txt").write_text("text")
    hub.add_folder("owner/model", folder)

    snapshot = Path(huggingface_hub.snapshot_download("owner/model"))

    assert {name: data for name, data in contents(snapshot).items() if name != ".gitattributes"} == contents(folder)
    assert hub.requests("GET cdn/")
    assert not [one for one in hub.requests(" cdn/") if "authorization" in one.headers]
    assert all(one.headers["authorization"] == "Bearer hf_secret" for one in hub.requests(" hub/"))


def test_an_interrupted_download_resumes_with_a_range(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    data = bytes(range(256)) * 65536
    hub.repositories.create("owner/model")
    hub.repositories.commit("owner/model", {"model.safetensors": data})
    hub.faults.add("cut", route="GET cdn/", nbytes=12_000_000, times=1)

    path = huggingface_hub.hf_hub_download("owner/model", "model.safetensors")

    assert Path(path).read_bytes() == data
    assert [one.status for one in hub.requests("GET cdn/")] == [200, 206]


def test_missing_and_forbidden_requests_raise_the_same_exceptions_as_with_the_hub(hub: Hub, folder: Path) -> None:
    hub.add_folder("owner/model", folder)
    hub.add_folder("owner/private", folder, private=True)
    hub.add_folder("owner/gated", folder, gated=True)
    with pytest.raises(RepositoryNotFoundError):
        huggingface_hub.model_info("owner/missing")
    with pytest.raises(RepositoryNotFoundError):
        huggingface_hub.model_info("owner/private")
    with pytest.raises(RevisionNotFoundError):
        huggingface_hub.model_info("owner/model", revision="missing")
    with pytest.raises(RemoteEntryNotFoundError):
        huggingface_hub.hf_hub_download("owner/model", "missing")
    with pytest.raises(GatedRepoError, match="not in the authorized list"):
        huggingface_hub.hf_hub_download("owner/gated", "config.json")


@pytest.mark.parametrize("part_nbytes", [None, 5000])
def test_a_folder_is_uploaded_once_in_one_piece_or_in_parts(hub: Hub, folder: Path, part_nbytes: int | None) -> None:
    hub.part_nbytes = part_nbytes
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    api = huggingface_hub.HfApi()
    api.create_repo("user/model", private=True)
    api.create_repo("user/model", exist_ok=True)
    for _ in range(2):
        api.upload_folder(repo_id="user/model", folder_path=folder)

    stored = hub.repositories.by_name["user/model"]
    assert stored.private
    files = {name: file.read() for name, file in stored.head.files.items() if name != ".gitattributes"}
    assert files == contents(folder)
    shards = [len(data) for name, data in files.items() if name.endswith(".safetensors")]
    assert len(hub.requests("PUT hub/")) == sum(-(-n // (part_nbytes or n)) for n in shards)


def test_a_commit_on_another_parent_is_rejected_and_branches_and_pull_requests_are_created(
    hub: Hub, folder: Path
) -> None:
    first = hub.add_folder("user/model", folder).head.parent
    api = huggingface_hub.HfApi()
    operations = [huggingface_hub.CommitOperationAdd("new.txt", b"new")]
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("user/model", operations, commit_message="late", parent_commit=first)
    api.create_branch("user/model", branch="feature/one")
    made = api.create_commit("user/model", operations, commit_message="new", revision="feature/one")
    assert hub.repositories.by_name["user/model"].refs["feature/one"] == made.oid
    operations = [huggingface_hub.CommitOperationAdd("new.txt", b"new")]
    asked = api.create_commit("user/model", operations, commit_message="please", create_pr=True)
    assert asked.pr_num == 1
    assert [one.title for one in api.get_repo_discussions("user/model")] == ["please"]
    assert next(one.title for one in api.list_repo_commits("user/model", revision="refs/pr/1")) == "please"
    assert "new.txt" not in api.list_repo_files("user/model")
    assert "new.txt" in api.list_repo_files("user/model", revision="refs/pr/1")


def test_the_stand_in_runs_as_a_process(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.hub_stand_in", f"owner/model={folder}", "--fault"]
    command.append('{"kind": "flip", "route": "resolve/.*LICENSE", "nbytes": 3}')
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        settings = {**environment(Hub(endpoint=process.stdout.readline().strip()), tmp_path / "home")}
        script = (
            "import huggingface_hub, sys; from pathlib import Path\n"
            "sys.stdout.write(huggingface_hub.hf_hub_download('owner/model', 'LICENSE'))"
        )
        path = subprocess.run([sys.executable, "-c", script], env=settings, check=True, capture_output=True, text=True)
        process.terminate()
    expected = bytearray((folder / "LICENSE").read_bytes())
    expected[3] ^= 1
    assert hashlib.sha256(Path(path.stdout).read_bytes()).digest() == hashlib.sha256(expected).digest()
