"""verify OWNER/NAME finds every difference between manifest and repository without downloading a shard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qformat.artifact.manifest_seal import seal
from qformat.artifact.reading.verify import verify_integrity
from qformat.errors import HubError, Reason
from qformat.hub.card.licenses import License
from qformat.hub.card.prepared_card import CardOptions
from qformat.hub.fetch import fetch
from qformat.hub.publishing.publish import PublishOptions, publish
from qformat.hub.remote_verify import RemoteReport, verify_remote
from tests.hub.conftest import PATIENT, TOKEN
from tests.hub.signing_keys import write_key
from tests.hub_stand_in import Hub
from tests.small_models import contents

NAME = "me/small-nf4"
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def published(hub: Hub, artifact: Path) -> dict[str, bytes]:
    """The files of a published artifact."""
    publish(artifact, NAME, CardOptions(license=License("mit")), transfer=PATIENT)
    hub.log.clear()
    return {name: file.read() for name, file in hub.repositories.by_name[NAME].head.files.items()}


def check(**options: object) -> RemoteReport:
    return verify_remote(NAME, transfer=PATIENT, **options)  # type: ignore[arg-type]


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def resealed(published: dict[str, bytes], old: str, new: str) -> bytes:
    """Return the manifest with a text replaced and its own digest updated."""
    text = published["qformat.json"].decode()
    assert old in text
    digest = json.loads(text)["manifest_sha256"]
    return seal(text.replace(old, new).replace(digest, "0" * 64).encode())


def test_an_intact_artifact_passes_and_no_weights_are_fetched(hub: Hub, published: dict[str, bytes]) -> None:
    report = check()
    assert report.passed, report.findings
    assert (report.n_files, report.signed, report.others) == (10, False, ())
    assert report.nbytes == sum(len(data) for name, data in published.items() if name != ".gitattributes")
    requests = hub.requests(r"cdn/|resolve/.*\.safetensors")
    asked = [one for one in requests if one.server == "cdn"]
    assert len(asked) == 4, "length and text of each header"
    data_nbytes = sum(len(data) for name, data in published.items() if name.endswith(".safetensors"))
    assert sum(one.nbytes_sent for one in asked) < data_nbytes / 2
    assert not [one for one in hub.requests("cdn/") if "authorization" in one.headers]


@pytest.mark.parametrize("at", [-1, 5000, 100, 3])
def test_a_changed_bit_of_a_shard_is_found(hub: Hub, published: dict[str, bytes], at: int) -> None:
    shard = published[SHARD]
    hub.repositories.commit(NAME, {SHARD: flipped(shard, at % len(shard))})
    report = check()
    assert [(one.reason, one.file) for one in report.findings] == [(Reason.FILE_DIGEST, SHARD)]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.json"])
def test_a_changed_bit_of_a_small_file_is_found(hub: Hub, published: dict[str, bytes], name: str) -> None:
    hub.repositories.commit(NAME, {name: flipped(published[name], 1)})
    report = check()
    assert [(one.reason, one.file) for one in report.findings] == [(Reason.FILE_DIGEST, name)]


@pytest.mark.parametrize("change", ["edited", "same size", "removed"])
@pytest.mark.parametrize("name", ["LICENSE", "README.md"])
def test_a_changed_file_that_accompanies_the_model_is_a_notice_here_and_locally(
    hub: Hub, published: dict[str, bytes], tmp_path: Path, name: str, change: str
) -> None:
    repository = hub.repositories.by_name[NAME]
    if change == "removed":
        repository.commit("main", {file: one for file, one in repository.head.files.items() if file != name}, "less")
    else:
        hub.repositories.commit(
            NAME, {name: published[name] + b"x" if change == "edited" else b"X" + published[name][1:]}
        )
    reason = {
        "edited": Reason.FILE_SIZE,
        "same size": Reason.FILE_DIGEST,
        "removed": Reason.MISSING_FILE,
    }[change]
    report = check()
    assert report.passed, report.findings
    assert [(one.reason, one.file) for one in report.notices] == [(reason, name)]

    summary = fetch(NAME, tmp_path / "out", transfer=PATIENT)
    assert [(one.reason, one.file) for one in summary.notices] == [(reason, name)]
    local = verify_integrity(tmp_path / "out", sha256=True)
    assert local.passed
    assert [(one.reason, one.file) for one in local.notices] == [(reason, name)]
    there = {file: one.read() for file, one in repository.head.files.items() if not file.startswith(".")}
    assert contents(tmp_path / "out") == there


def test_with_a_signature_a_changed_file_that_accompanies_the_model_is_found(
    hub: Hub, artifact: Path, tmp_path: Path
) -> None:
    pytest.importorskip("model_signing")
    from qformat.cli.main import run

    key = write_key(tmp_path)
    publish(artifact, NAME, CardOptions(license=License("mit")), PublishOptions(sign_key=key), transfer=PATIENT)
    hub.repositories.commit(NAME, {"README.md": b"another card"})
    report = check(public_key=key.with_suffix(".pub"))
    assert [(one.reason, one.file) for one in report.findings] == [(Reason.FILE_SIZE, "README.md")]
    fetch(NAME, tmp_path / "out", transfer=PATIENT)
    assert run(["verify", str(tmp_path / "out")]) == 0
    assert run(["verify", str(tmp_path / "out"), "--public-key", str(key.with_suffix(".pub"))]) == 1


def test_with_a_signature_every_file_that_it_does_not_cover_is_found_here_and_locally(
    hub: Hub, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("model_signing")
    from qformat.cli.main import run

    key = write_key(tmp_path)
    publish(artifact, NAME, CardOptions(license=License("mit")), PublishOptions(sign_key=key), transfer=PATIENT)
    with_key = ["--signature", "--public-key", str(key.with_suffix(".pub"))]
    out = tmp_path / "out"
    fetch(NAME, out, transfer=PATIENT)
    excepted = [".gitattributes", ".gitignore", ".cache/huggingface/x", ".github/a"]
    more = ["adapter_config.json", "modeling_x.py", "optimizer.pt", "checkpoint-1/a.bin", "photo.png", ".hidden/a.py"]
    for name in (*excepted, *more):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"x")
    hub.repositories.commit(NAME, dict.fromkeys(excepted, b"x"))
    assert run(["verify", NAME, *with_key]) == 0
    hub.repositories.commit(NAME, dict.fromkeys(more, b"x"))
    capsys.readouterr()

    for location in (NAME, str(out)):
        assert run(["verify", location, *with_key, "--json"]) == 1
        facts = json.loads(capsys.readouterr().out)
        found = facts["findings"]
        assert sorted(one["file"] for one in found) == sorted(name.partition("/")[0] for name in more)
        assert {one["reason"] for one in found} == {"extra_file"}
        assert facts["notices"] == []


def test_a_changed_manifest_is_found_and_another_intact_manifest_does_not_match(
    hub: Hub, published: dict[str, bytes]
) -> None:
    hub.repositories.commit(NAME, {"qformat.json": flipped(published["qformat.json"], 300)})
    assert [one.file for one in check().findings] == ["qformat.json"]
    name = '"model.layers.1.self_attn.v_proj.weight"'
    hub.repositories.commit(NAME, {"qformat.json": resealed(published, name, name.replace("v_proj", "w_proj"))})
    assert [one.reason for one in check().findings] == [Reason.UNKNOWN_TENSOR]


def test_missing_cut_and_additional_files_are_found(hub: Hub, published: dict[str, bytes]) -> None:
    repository = hub.repositories.by_name[NAME]
    kept = {name: file for name, file in repository.head.files.items() if name != "tokenizer.json"}
    repository.commit("main", kept, "one less")
    more = {"adapter.safetensors": b"x", "notes.md": b"x", "onnx/a": b"x", "onnx/b": b"x", "checkpoint-1/a": b"x"}
    hub.repositories.commit(NAME, {SHARD: published[SHARD][:-1], **more})
    report = check()
    assert sorted((one.reason, one.file) for one in report.findings) == [
        (Reason.EXTRA_FILE, "adapter.safetensors"),
        (Reason.EXTRA_FILE, "onnx"),
        (Reason.FILE_SIZE, SHARD),
        (Reason.MISSING_FILE, "tokenizer.json"),
    ]
    assert sorted((one.reason, one.file) for one in report.notices) == [
        (Reason.EXTRA_FILE, "checkpoint-1"),
        (Reason.EXTRA_FILE, "notes.md"),
    ]
    assert set(report.others) == set(more)


def test_a_header_that_changes_in_transit_is_found(hub: Hub, published: dict[str, bytes]) -> None:
    hub.faults.add("flip", route="GET cdn/", nbytes=20)
    assert {one.reason for one in check().findings} == {Reason.FILE_DIGEST}


@pytest.mark.parametrize("every", [3, 5])
def test_rejected_requests_are_repeated(hub: Hub, published: dict[str, bytes], every: int) -> None:
    hub.faults.add("status", route="GET cdn/|resolve/", every=every, times=3)
    assert check().passed


def test_missing_artifacts_and_repositories_are_reported(hub: Hub, published: dict[str, bytes]) -> None:
    hub.repositories.create("me/empty")
    report = verify_remote("me/empty", transfer=PATIENT)
    assert [one.reason for one in report.findings] == [Reason.MISSING_FILE]
    with pytest.raises(HubError, match="the repository does not exist or is private"):
        verify_remote("me/missing", transfer=PATIENT)


def test_a_signature_is_checked_with_the_publishers_key_here_and_after_fetching(
    hub: Hub, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("model_signing")
    from qformat.cli.main import run

    key, other = write_key(tmp_path), write_key(tmp_path, "other")
    publish(artifact, NAME, CardOptions(license=License("mit")), PublishOptions(sign_key=key), transfer=PATIENT)
    with_key = ["--public-key", str(key.with_suffix(".pub"))]
    with_other = ["--signature", "--public-key", str(other.with_suffix(".pub"))]
    out = str(tmp_path / "out")

    assert run(["verify", NAME]) == 0
    assert "signature: present but not checked" in capsys.readouterr().out
    assert run(["verify", NAME, "--signature", *with_key]) == 0
    assert "signature: valid for this key" in capsys.readouterr().out
    assert run(["verify", NAME, *with_other]) == 1
    assert "signature: me/small-nf4@" in capsys.readouterr().out
    assert run(["fetch", NAME, out]) == 0
    assert run(["verify", out, "--signature", *with_key]) == 0
    assert "SHA-256 of every file, signature checked" in capsys.readouterr().out
    assert run(["verify", out, *with_other]) == 1
    assert run(["verify", out, "--signature"]) == 2
    (Path(out) / "model.sig").unlink()
    capsys.readouterr()
    assert run(["verify", out, *with_key]) == 1
    assert "missing_file" in capsys.readouterr().out


def test_a_signature_of_another_manifest_does_not_pass(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    pytest.importorskip("model_signing")
    key = write_key(tmp_path)
    publish(artifact, NAME, CardOptions(license=License("mit")), PublishOptions(sign_key=key), transfer=PATIENT)
    files = {name: file.read() for name, file in hub.repositories.by_name[NAME].head.files.items()}
    hub.repositories.commit(NAME, {"qformat.json": resealed(files, '"generator": "qformat', '"generator": "other')})
    report = check(public_key=key.with_suffix(".pub"))
    assert [one.reason for one in report.findings] == [Reason.SIGNATURE]
    assert not report.signature_checked


def test_the_command_line_prefers_a_directory_and_rejects_options_of_the_other_kind(
    hub: Hub,
    published: dict[str, bytes],
    artifact: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from qformat.cli.main import run

    assert run(["verify", NAME, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["passed"]
    assert facts["commit"] == hub.repositories.by_name[NAME].head.oid
    assert TOKEN not in json.dumps(facts)
    assert run(["verify", NAME, "--revision", "missing"]) == 1
    assert run(["verify", NAME, "--sha256"]) == 2
    assert run(["verify", str(artifact), "--revision", "main"]) == 2
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me").mkdir()
    artifact.rename(tmp_path / NAME)
    hub.log.clear()
    assert run(["verify", NAME]) == 0
    assert not hub.log
    assert contents(tmp_path / NAME)


def test_a_missing_path_is_not_looked_up_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    from qformat.cli.main import run

    assert run(["verify", "./missing/folder"]) == 1
    assert run(["verify", str(tmp_path / "missing")]) == 1
    assert not hub.log
