"""publish creates an intact artifact, in one commit, and replaces only the files of an older artifact."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from qformat.artifact.reading.verify import verify_integrity
from qformat.converters.convert import ConversionOptions, convert
from qformat.errors import HubError, VerificationError
from tests.hub.publishing.published import NAME, do_publish, folder_of, n_commits, stored
from tests.hub_stand_in import Hub
from tests.small_models import contents


def test_the_published_files_are_an_artifact_and_the_local_one_is_unmodified(
    hub: Hub, artifact: Path, tmp_path: Path
) -> None:
    before = contents(artifact)
    done = do_publish(artifact)

    there = folder_of(stored(hub), tmp_path / "there")
    assert verify_integrity(there, sha256=True).passed
    assert contents(artifact) == before
    after = contents(there)
    assert {name: after[name] for name in before if name != "qformat.json"} == {
        name: data for name, data in before.items() if name != "qformat.json"
    }
    changed = [line for line in after["qformat.json"].splitlines() if line not in before["qformat.json"].splitlines()]
    assert len(changed) == 2  # the card and the digest of the manifest
    assert (done.commit, done.already_there) == (stored(hub).head.oid, False)


def test_publishing_again_uploads_nothing_and_makes_no_commit(hub: Hub, artifact: Path) -> None:
    first = do_publish(artifact)
    hub.log.clear()
    again = do_publish(artifact)

    assert again.already_there
    assert again.commit == first.commit
    assert not [request for request in hub.log if request.method != "GET"]
    assert n_commits(hub) == 1


def test_a_damaged_artifact_is_rejected_before_any_request(hub: Hub, artifact: Path) -> None:
    shard = artifact / "model-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(VerificationError, match=r"model-00001-of-00002\.safetensors.*was changed"):
        do_publish(artifact)
    assert not hub.log


def test_a_card_in_the_directory_is_rejected_with_the_option_that_publishes_it(hub: Hub, artifact: Path) -> None:
    (artifact / "README.md").write_text("mine")
    with pytest.raises(VerificationError, match="card='FILE'"):
        do_publish(artifact)


def test_a_branch_is_created_and_the_main_branch_is_unmodified(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    do_publish(artifact, revision="4bit/nf4")
    assert set(stored(hub).head.files) == {".gitattributes"}
    assert verify_integrity(folder_of(stored(hub), tmp_path / "there", "4bit/nf4"), sha256=True).passed
    assert do_publish(artifact, revision="4bit/nf4").already_there


def test_files_of_an_older_artifact_are_removed_in_the_same_commit(
    hub: Hub, artifact: Path, small_source: Path, tmp_path: Path
) -> None:
    do_publish(artifact)
    one_shard = tmp_path / "one"
    convert(small_source, one_shard)
    done = do_publish(one_shard)
    assert done.changes.removed == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert verify_integrity(folder_of(stored(hub), tmp_path / "there"), sha256=True).passed
    assert n_commits(hub) == 2


def test_other_weights_in_the_repository_are_rejected(hub: Hub, artifact: Path) -> None:
    hub.repositories.create(NAME)
    hub.repositories.commit(NAME, {"model.safetensors": b"16 bit"})
    with pytest.raises(HubError, match=r"has other weight files, .*: model\.safetensors"):
        do_publish(artifact)


def test_a_private_repository_is_created_as_such_and_a_public_one_is_rejected(hub: Hub, artifact: Path) -> None:
    do_publish(artifact, private=True)
    assert stored(hub).private
    stored(hub).private = False
    with pytest.raises(HubError, match="is public, but a private repository was requested"):
        do_publish(artifact, private=True)


def test_a_dry_run_only_reads(hub: Hub, artifact: Path) -> None:
    planned = do_publish(artifact, dry_run=True)
    assert planned.commit is None
    assert set(planned.changes.new) == {*contents(artifact), "README.md"}
    assert planned.nbytes_to_send == planned.publication.nbytes > 50_000
    assert not [request for request in hub.log if request.method != "GET"]


def test_a_dry_run_without_the_hub_shows_the_files_and_the_card(
    hub: Hub, artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qformat.cli.main import run

    do_publish(artifact)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.log.clear()
    planned = do_publish(artifact, dry_run=True)
    assert planned.unread is not None
    assert "HF_HUB_OFFLINE" in planned.unread
    assert set(planned.changes.new) == {*contents(artifact), "README.md"}
    assert run(["publish", str(artifact), NAME, "--license", "mit", "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "\n# " in shown.out
    assert "at most" in shown.out.splitlines()[-1]
    assert "was not read, so every file is shown as new" in shown.err
    assert not hub.log
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        do_publish(artifact)


def test_a_dry_run_still_reports_what_the_hub_refuses(hub: Hub, artifact: Path) -> None:
    hub.repositories.create(NAME)
    hub.repositories.commit(NAME, {"model.safetensors": b"16 bit"})
    with pytest.raises(HubError, match="has other weight files"):
        do_publish(artifact, dry_run=True)


def test_the_command_line_publishes_and_prints_the_commit(
    hub: Hub, artifact: Path, small_source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qformat.cli.main import run

    arguments = ["publish", str(artifact), NAME, "--source", str(small_source), "--base-model", "base/small"]
    assert run([*arguments, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "add     model-00001-of-00002.safetensors  27,008" in shown
    assert "| down_proj | 2 | 3,072 | 8.844% |" in shown
    assert run([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["commit"] == stored(hub).head.oid
    assert run(arguments) == 0
    assert "nothing was uploaded" in capsys.readouterr().out
    assert run([*arguments, "--card", "x.md"]) == 2


def test_the_line_of_the_command_is_erased_before_the_hubs_client_draws_bars(
    hub: Hub, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars

    from qformat.cli.main import run

    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", None)
    enable_progress_bars()
    during: list[tuple[bool, str]] = []
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    hub.faults.add(
        "call",
        route="objects/batch",
        hook=lambda: during.append((are_progress_bars_disabled(), terminal.getvalue())),
    )
    assert run(["publish", str(artifact), NAME, "--license", "apache-2.0", "--base-model", "base/small"]) == 0
    ((disabled, drawn),) = during
    assert not disabled
    assert "Checking digests" in drawn
    assert drawn.rstrip(" ").endswith("\r")  # back at the start of an empty line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_an_artifact_of_several_shards_is_published(hub: Hub, small_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "many"
    convert(small_source, out, ConversionOptions(max_shard_nbytes=6_000, double_quant=False))
    hub.part_nbytes = 4_000
    do_publish(out)
    assert verify_integrity(folder_of(stored(hub), tmp_path / "there"), sha256=True).passed
    assert "one float32 scale per 64 weights" in stored(hub).head.files["README.md"].read().decode()


def test_an_adapter_of_the_local_artifact_fits_the_published_one(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    from qformat.artifact.reading.structure import check_structure
    from qformat.training.adapter.base_record import BaseRecord

    do_publish(artifact)
    there = folder_of(stored(hub), tmp_path / "there")
    assert BaseRecord.of(check_structure(there)).digest == BaseRecord.of(check_structure(artifact)).digest
