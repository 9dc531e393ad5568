"""publish with failing connections, concurrent publishers, invalid tokens, and tokens that must stay secret."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from qformat.artifact.reading.verify import verify_integrity
from qformat.errors import HubError
from qformat.hub.publishing.publish import publish
from tests.hub.conftest import PATIENT, TOKEN
from tests.hub.publishing.published import APACHE, NAME, do_publish, folder_of, n_commits, stored
from tests.hub_stand_in import Hub


@pytest.mark.parametrize("every", [4, 5, 7])
def test_503_on_every_nth_request_gives_one_commit_of_the_same_bytes(
    hub: Hub, artifact: Path, tmp_path: Path, every: int
) -> None:
    hub.part_nbytes = 10_000
    hub.faults.add("status", route="hub/", every=every)
    do_publish(artifact)
    assert n_commits(hub) == 1
    assert verify_integrity(folder_of(stored(hub), tmp_path / "there"), sha256=True).passed


@pytest.mark.parametrize(
    "route",
    ["revision", "tree", "repos/create", "validate-yaml", "preupload", "objects/batch", "PUT", "verify", "/commit/"],
)
@pytest.mark.parametrize("kind", ["status", "drop", "lose"])
def test_a_rejected_dropped_or_unanswered_request_is_repeated(hub: Hub, artifact: Path, route: str, kind: str) -> None:
    fault = hub.faults.add(kind, route=route, times=1)  # type: ignore[arg-type]
    done = do_publish(artifact)
    assert fault.n_done == 1
    assert n_commits(hub) == 1
    assert done.commit == stored(hub).head.oid


def test_a_request_without_a_response_times_out_and_is_repeated(hub: Hub, artifact: Path) -> None:
    hub.faults.add("slow", route="preupload|POST hub/.*/commit/", seconds=3.0, times=2)
    do_publish(artifact, transfer=replace(PATIENT, patience=replace(PATIENT.patience, timeout_s=1)))
    assert n_commits(hub) == 1


def test_a_server_that_is_down_is_reported_after_a_bounded_time(hub: Hub, artifact: Path) -> None:
    do_publish(artifact, dry_run=True)
    hub.faults.add("status", route="POST hub/.*/commit/")
    with pytest.raises(HubError, match=r"me/small-nf4: committing: .*503.*times in a row"):
        do_publish(artifact)
    hub.faults.clear()
    hub.log.clear()
    do_publish(artifact)
    assert not hub.requests("PUT"), "what was uploaded before is not sent again"


ONCE = replace(PATIENT, patience=replace(PATIENT.patience, attempts=1))


@pytest.mark.parametrize("kind", ["status", "lose"])
def test_a_publisher_that_dies_at_any_request_is_repeated(hub: Hub, artifact: Path, tmp_path: Path, kind: str) -> None:
    """From the k-th request on, nothing arrives, or no answer does: the Hub sees the same as after a kill."""
    do_publish(artifact)
    expected = stored(hub).head.files.keys()
    n_requests = len(hub.log)
    for k in range(0, n_requests, 3):
        name = f"me/again-{k}"
        hub.faults.add(kind, route="hub/", after=k)  # type: ignore[arg-type]
        with suppress(HubError):
            publish(artifact, name, APACHE, transfer=ONCE)
        hub.faults.clear()
        publish(artifact, name, APACHE, transfer=PATIENT)
        repository = stored(hub, name)
        assert repository.head.files.keys() == expected
        assert verify_integrity(folder_of(repository, tmp_path / str(k)), sha256=True).passed
        assert len(repository.commits) == 2  # the Hub makes the first one


def test_a_pull_request_is_opened_once_even_if_the_response_is_lost(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    hub.repositories.create(NAME)
    head = stored(hub).head.oid
    hub.faults.add("lose", route="/commit/", times=1)
    first = do_publish(artifact, create_pr=True)
    again = do_publish(artifact, create_pr=True)

    assert stored(hub).pull_requests == [first.publication.title]
    assert again.already_there
    assert first.pull_request == again.pull_request == f"{hub.endpoint}/{NAME}/discussions/1"
    assert stored(hub).head.oid == head
    assert verify_integrity(folder_of(stored(hub), tmp_path / "there", "refs/pr/1"), sha256=True).passed


def test_a_concurrent_commit_is_not_overwritten(hub: Hub, artifact: Path) -> None:
    hub.repositories.create(NAME)

    def interfere() -> None:
        hub.repositories.commit(NAME, {"notes.txt": b"mine"})

    hub.faults.add("call", route="/commit/", hook=interfere, times=1)
    with pytest.raises(HubError, match="another commit was made on 'main' meanwhile"):
        do_publish(artifact)
    assert set(stored(hub).head.files) == {".gitattributes", "notes.txt"}
    done = do_publish(artifact)
    assert done.changes.others == ("notes.txt",)


def test_two_publishers_of_the_same_bytes_at_once_make_one_commit(hub: Hub, artifact: Path) -> None:
    hub.repositories.create(NAME)
    hub.faults.add("call", route="/commit/", hook=lambda: do_publish(artifact), times=1)
    done = do_publish(artifact)
    assert n_commits(hub) == 1
    assert done.commit == stored(hub).head.oid


def test_an_invalid_or_missing_token_is_reported_with_the_next_step(
    hub: Hub, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HubError, match=r"the token is invalid.*hf auth login") as caught:
        publish(artifact, NAME, APACHE, token="hf_wrongwrongwrong", transfer=PATIENT)
    assert "hf_wrong" not in str(caught.value)
    with pytest.raises(HubError, match=r"401.*hf auth login"):
        publish(artifact, NAME, APACHE, token=False, transfer=PATIENT)


def test_the_token_is_not_in_logs_errors_manifest_or_card(
    hub: Hub, artifact: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.faults.add("status", route="POST hub/.*/commit/", headers={"X-Error-Message": f"no: {TOKEN}"}, times=1)
    do_publish(artifact)
    hub.faults.add("status", route="repos/create", status=403, headers={"X-Error-Message": f"no: {TOKEN}"})
    with pytest.raises(HubError) as caught:
        publish(artifact, "me/other", APACHE, transfer=PATIENT)
    assert "403" in str(caught.value)
    out = capsys.readouterr()
    ours = [record for record in caplog.records if record.name.startswith(("qformat", "huggingface_hub"))]
    texts = [*(record.getMessage() for record in ours), str(caught.value), repr(caught.value), out.out, out.err]
    texts += [file.read().decode("latin-1") for file in stored(hub).head.files.values()]
    assert hub.requests("POST")[0].headers["authorization"] == f"Bearer {TOKEN}"
    assert not [text for text in texts if TOKEN in text]


@pytest.mark.parametrize("status", [403, 503])
def test_the_signed_url_of_an_upload_is_not_shown(hub: Hub, artifact: Path, status: int) -> None:
    hub.faults.add("status", route="PUT hub/-/lfs", status=status)
    with pytest.raises(HubError, match=f"uploading: .*{status}") as caught:
        do_publish(artifact)
    assert "of-the-stand-in" not in str(caught.value)
    assert n_commits(hub) == 0


def test_a_file_that_changes_during_the_upload_is_detected(hub: Hub, artifact: Path) -> None:
    shard = artifact / "model-00001-of-00002.safetensors"

    def change() -> None:
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)

    hub.faults.add("call", route="objects/batch", hook=change, times=1)
    with pytest.raises(HubError):
        do_publish(artifact)
    assert n_commits(hub) == 0


def test_a_hub_without_xet_storage_is_reported_with_the_next_step(
    hub: Hub, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in answers 404 to the request for a token of Xet, and hf_xet raises a ConnectionError."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    with pytest.raises(HubError, match=r"me/small-nf4: uploading: .*404.*set HF_HUB_DISABLE_XET=1") as caught:
        do_publish(artifact)
    assert caught.value.status == 404
    assert len(hub.requests("xet-write-token")) == 1, "404 is permanent"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    do_publish(artifact)
    assert n_commits(hub) == 1


def test_a_token_that_xet_rejects_is_reported_with_the_next_step(
    hub: Hub, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    hub.faults.add("status", route="xet-write-token", status=403)
    with pytest.raises(HubError, match=r"uploading: .*403.*no permission to write.*hf auth login"):
        do_publish(artifact)


XET_SERVER_ERROR = (
    "Network error: HTTP status server error (503 Service Unavailable), domain: http://x/y?X-Amz-S=secret"
)


@pytest.mark.parametrize("failure", [ConnectionError(XET_SERVER_ERROR), TimeoutError("timed out"), OSError("broken")])
def test_an_upload_that_hf_xet_gives_up_is_repeated(
    hub: Hub, artifact: Path, monkeypatch: pytest.MonkeyPatch, failure: OSError
) -> None:
    n_failures = fail_uploads(monkeypatch, [failure, failure])
    do_publish(artifact)
    assert n_failures() == 2
    assert n_commits(hub) == 1

    fail_uploads(monkeypatch, [failure] * 4)
    with pytest.raises(HubError, match=r"me/other: uploading: .*4 times in a row") as caught:
        publish(artifact, "me/other", APACHE, transfer=PATIENT)
    assert "secret" not in str(caught.value)


def test_a_file_that_cannot_be_read_during_the_upload_is_not_a_failure_of_the_hub(
    hub: Hub, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_failures = fail_uploads(monkeypatch, [PermissionError(errno.EACCES, "Permission denied")])
    with pytest.raises(PermissionError):
        do_publish(artifact)
    assert n_failures() == 1


def fail_uploads(monkeypatch: pytest.MonkeyPatch, failures: list[OSError]) -> Callable[[], int]:
    """Let the first uploads raise these errors. Returns a function that counts the errors raised so far."""
    waiting = iter(failures)
    n_raised = 0
    upload = HfApi.preupload_lfs_files

    def failing(*arguments: Any, **options: Any) -> None:
        nonlocal n_raised
        if (failure := next(waiting, None)) is not None:
            n_raised += 1
            raise failure
        upload(*arguments, **options)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", failing)
    return lambda: n_raised
