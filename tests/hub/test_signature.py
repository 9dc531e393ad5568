"""Signatures are compatible with the command of model-signing, and all others are rejected."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from qformat.artifact.reading.verify import verify_integrity
from qformat.errors import ArtifactError, Reason, UsageError
from qformat.hub.card.licenses import License
from qformat.hub.card.prepared_card import CardOptions
from qformat.hub.publishing.publish import PublishOptions, publish
from qformat.hub.signature import check_signature, public_key_of, sign
from tests.hub.conftest import PATIENT
from tests.hub.signing_keys import write_key
from tests.hub_stand_in import Hub

DIGESTS = {"a.txt": hashlib.sha256(b"a").hexdigest(), "qformat.json": hashlib.sha256(b"{}").hexdigest()}


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "model_signing", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def write_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"a")
    (folder / "qformat.json").write_bytes(b"{}")
    (folder / ".gitattributes").write_bytes(b"*.safetensors filter=lfs\n")
    return folder


def test_model_signing_accepts_our_signatures_and_we_accept_those_of_model_signing(tmp_path: Path) -> None:
    key, model = write_key(tmp_path), write_model(tmp_path / "model")
    signature = model / "model.sig"
    signature.write_bytes(sign(DIGESTS, "model", key))
    options = ["--signature", str(signature)]
    checked = run_tool("verify", "key", str(model), *options, "--public_key", str(key.with_suffix(".pub")))
    assert checked.returncode == 0, checked.stdout + checked.stderr

    made = run_tool("sign", "key", str(model), *options, "--private_key", str(key))
    assert made.returncode == 0, made.stdout + made.stderr
    check_signature(signature.read_bytes(), DIGESTS, key.with_suffix(".pub"), where=signature)


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({**DIGESTS, "a.txt": "0" * 64}, "'a.txt' has another SHA-256"),
        ({**DIGESTS, "b.txt": "0" * 64}, "Extra files.*b.txt"),
        ({"a.txt": DIGESTS["a.txt"]}, "Missing files.*qformat.json"),
    ],
)
def test_a_signature_of_other_files_is_rejected(tmp_path: Path, files: dict[str, str], problem: str) -> None:
    key = write_key(tmp_path)
    with pytest.raises(ArtifactError, match=problem) as caught:
        check_signature(sign(DIGESTS, "model", key), files, key.with_suffix(".pub"), where="model.sig")
    assert caught.value.reason is Reason.SIGNATURE


def test_a_signature_by_another_key_is_rejected(tmp_path: Path) -> None:
    other = write_key(tmp_path, "other").with_suffix(".pub")
    with pytest.raises(ArtifactError, match="is not a signature of these files by the key"):
        check_signature(sign(DIGESTS, "model", write_key(tmp_path)), DIGESTS, other, where="model.sig")


def test_a_changed_truncated_or_invalid_signature_is_rejected(tmp_path: Path) -> None:
    key = write_key(tmp_path)
    good = sign(DIGESTS, "model", key)
    bad = [b"", b"{}", b"[]", b"null", b"[" * 5000, b"\xff\xfe", good + b"}"]
    bad += [good[:cut] for cut in range(0, len(good) - 1, 97)]
    payload = good.index(b'"payload"') + 12
    bad += [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in range(payload, payload + 400, 23)]
    for data in bad:
        with pytest.raises(ArtifactError):
            check_signature(data, DIGESTS, key.with_suffix(".pub"), where="model.sig")


def test_invalid_keys_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "text.pem").write_text("hello")
    key = write_key(tmp_path)
    for wrong in (tmp_path / "text.pem", tmp_path / "missing.pem", key.with_suffix(".pub")):
        with pytest.raises(UsageError, match=wrong.name):
            sign(DIGESTS, "model", wrong)
        with pytest.raises(UsageError, match=wrong.name):
            public_key_of(wrong)
    with pytest.raises(UsageError, match=r"text\.pem"):
        check_signature(sign(DIGESTS, "m", key), DIGESTS, tmp_path / "text.pem", where="model.sig")


def test_model_signing_accepts_a_published_signature_and_a_repeated_publish_keeps_it(
    hub: Hub, artifact: Path, tmp_path: Path
) -> None:
    key = write_key(tmp_path)
    card = CardOptions(license=License("mit"), base_model="base/small")

    def do_publish(with_key: Path | None) -> bool:
        return publish(artifact, "me/signed", card, PublishOptions(sign_key=with_key), transfer=PATIENT).already_there

    assert [do_publish(key), do_publish(key)] == [False, True]
    head = hub.repositories.by_name["me/signed"].head
    there = tmp_path / "there"
    there.mkdir()
    for name, file in head.files.items():
        (there / name).write_bytes(file.read())
    assert verify_integrity(there, sha256=True).passed
    signed_by = ["--signature", str(there / "model.sig"), "--public_key", str(key.with_suffix(".pub"))]
    assert run_tool("verify", "key", str(there), *signed_by).returncode == 0
    assert "--signature --public-key" in (there / "README.md").read_text()
    (there / "LICENSE").write_text("Permission is not granted.\n")
    assert run_tool("verify", "key", str(there), *signed_by).returncode == 1

    options = PublishOptions(create_pr=True, sign_key=write_key(tmp_path, "newest"))
    asked = [publish(artifact, "me/signed", card, options, transfer=PATIENT).already_there for _ in range(2)]
    assert asked == [False, True]
    assert do_publish(write_key(tmp_path, "newer")) is False
    assert do_publish(None) is False
    assert "model.sig" not in hub.repositories.by_name["me/signed"].head.files
