"""publish: what arrives is whole, arrives once, and tells the truth; whatever the connection does."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import huggingface_hub
import pytest

from qformat.artifact.reading.verify import verify_integrity
from qformat.converters.convert import ConversionOptions, convert
from qformat.errors import HubError, UsageError, VerificationError
from qformat.hub.card.licenses import License
from qformat.hub.card.prepared_card import CardOptions
from qformat.hub.publishing.publish import Published, publish
from tests.hub.conftest import PATIENT, TOKEN
from tests.hub_stand_in import Hub, Repository
from tests.repository import ARTIFACT_VECTORS
from tests.small_models import contents, write_tiny

APACHE = CardOptions(license=License("apache-2.0"), base_model="base/small")
NAME = "me/small-nf4"


def do_publish(artifact: Path, card: CardOptions = APACHE, **options: object) -> Published:
    return publish(artifact, NAME, card, patience=PATIENT, **options)  # type: ignore[arg-type]


def stored(hub: Hub, name: str = NAME) -> Repository:
    return hub.repositories.by_name[name]


def folder_of(repository: Repository, folder: Path, ref: str = "main") -> Path:
    """Write a commit's files as a folder."""
    folder.mkdir()
    commit = repository.at(ref)
    assert commit is not None
    for name, file in commit.files.items():
        (folder / name).write_bytes(file.read())
    return folder


def n_commits(hub: Hub) -> int:
    """Commits besides the first one, which the Hub makes with the repository."""
    return len(stored(hub).commits) - 1


def test_what_is_published_is_an_artifact_and_the_local_one_stays_as_it_is(
    hub: Hub, artifact: Path, tmp_path: Path
) -> None:
    before = contents(artifact)
    done = do_publish(artifact)

    there = folder_of(stored(hub), tmp_path / "there")
    assert verify_integrity(there, sha256=True).good
    assert contents(artifact) == before
    after = contents(there)
    assert {name: after[name] for name in before if name != "qformat.json"} == {
        name: data for name, data in before.items() if name != "qformat.json"
    }
    changed = [line for line in after["qformat.json"].splitlines() if line not in before["qformat.json"].splitlines()]
    assert len(changed) == 2  # the card and the seal
    assert (done.commit, done.already_there) == (stored(hub).head.oid, False)


def test_publishing_again_sends_nothing_and_makes_no_commit(hub: Hub, artifact: Path) -> None:
    first = do_publish(artifact)
    hub.log.clear()
    again = do_publish(artifact)

    assert again.already_there
    assert again.commit == first.commit
    assert not [request for request in hub.log if request.method != "GET"]
    assert n_commits(hub) == 1


def test_the_card_is_one_that_huggingface_hub_accepts_and_says_what_the_source_says(
    hub: Hub, artifact: Path, small_source: Path
) -> None:
    hub.add_folder("base/small", small_source)
    do_publish(artifact, CardOptions(base_model="base/small"))

    text = stored(hub).head.files["README.md"].read().decode()
    card = huggingface_hub.ModelCard(text)
    card.validate()
    assert card.data.to_dict() == {
        "base_model": "base/small",
        "base_model_relation": "quantized",
        "language": ["en"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["qformat", "nf4", "bitsandbytes", "4-bit"],
    }
    assert "12.386 bits each" in text
    assert f"qformat fetch {NAME} small-nf4" in text


def test_a_damaged_artifact_is_refused_before_anything_is_asked_or_sent(hub: Hub, artifact: Path) -> None:
    shard = artifact / "model-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(VerificationError, match=r"model-00001-of-00002\.safetensors.*was changed"):
        do_publish(artifact)
    assert not hub.log


def test_a_card_put_into_the_folder_is_refused_with_the_option_that_publishes_it(hub: Hub, artifact: Path) -> None:
    (artifact / "README.md").write_text("mine")
    with pytest.raises(VerificationError, match="card='FILE'"):
        do_publish(artifact)


@pytest.mark.parametrize("every", [4, 5, 7])
def test_503_on_every_nth_request_ends_in_one_commit_of_the_same_bytes(
    hub: Hub, artifact: Path, tmp_path: Path, every: int
) -> None:
    hub.part_nbytes = 10_000
    hub.faults.add("status", route="hub/", every=every)
    do_publish(artifact)
    assert n_commits(hub) == 1
    assert verify_integrity(folder_of(stored(hub), tmp_path / "there"), sha256=True).good


@pytest.mark.parametrize(
    "route",
    ["revision", "tree", "repos/create", "validate-yaml", "preupload", "objects/batch", "PUT", "verify", "/commit/"],
)
@pytest.mark.parametrize("kind", ["status", "drop", "lose"])
def test_a_refused_dropped_or_unanswered_request_is_made_again(hub: Hub, artifact: Path, route: str, kind: str) -> None:
    fault = hub.faults.add(kind, route=route, times=1)  # type: ignore[arg-type]
    done = do_publish(artifact)
    assert fault.n_done == 1
    assert n_commits(hub) == 1
    assert done.commit == stored(hub).head.oid


def test_a_server_that_stays_silent_is_given_up_and_asked_again(hub: Hub, artifact: Path) -> None:
    hub.faults.add("slow", route="preupload|POST hub/.*/commit/", seconds=3.0, times=2)
    do_publish(artifact)
    assert n_commits(hub) == 1


def test_a_server_that_is_down_is_named_after_a_bounded_time(hub: Hub, artifact: Path) -> None:
    do_publish(artifact, dry_run=True)
    hub.faults.add("status", route="POST hub/.*/commit/")
    with pytest.raises(HubError, match=r"me/small-nf4: the commit: .*503.*times in a row"):
        do_publish(artifact)
    hub.faults.clear()
    hub.log.clear()
    do_publish(artifact)
    assert not hub.requests("PUT"), "what was uploaded before is not sent again"


def test_a_pull_request_is_opened_once_even_if_the_answer_is_lost(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    hub.repositories.create(NAME)
    head = stored(hub).head.oid
    hub.faults.add("lose", route="/commit/", times=1)
    first = do_publish(artifact, create_pr=True)
    again = do_publish(artifact, create_pr=True)

    assert stored(hub).pull_requests == [first.publication.title]
    assert again.already_there
    assert first.pull_request == again.pull_request == f"{hub.endpoint}/{NAME}/discussions/1"
    assert stored(hub).head.oid == head
    assert verify_integrity(folder_of(stored(hub), tmp_path / "there", "refs/pr/1"), sha256=True).good


def test_a_commit_of_somebody_else_meanwhile_is_not_overwritten(hub: Hub, artifact: Path) -> None:
    hub.repositories.create(NAME)

    def interfere() -> None:
        hub.repositories.commit(NAME, {"notes.txt": b"mine"})

    hub.faults.add("call", route="/commit/", hook=interfere, times=1)
    with pytest.raises(HubError, match="somebody else made the commit"):
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


def test_a_branch_is_made_and_the_main_one_is_left_alone(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    do_publish(artifact, revision="4bit/nf4")
    assert set(stored(hub).head.files) == {".gitattributes"}
    assert verify_integrity(folder_of(stored(hub), tmp_path / "there", "4bit/nf4"), sha256=True).good
    assert do_publish(artifact, revision="4bit/nf4").already_there


def test_files_of_an_older_artifact_are_removed_in_the_same_commit(
    hub: Hub, artifact: Path, small_source: Path, tmp_path: Path
) -> None:
    do_publish(artifact)
    one_shard = tmp_path / "one"
    convert(small_source, one_shard)
    done = do_publish(one_shard)
    assert done.changes.removed == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert verify_integrity(folder_of(stored(hub), tmp_path / "there"), sha256=True).good
    assert n_commits(hub) == 2


def test_other_weights_in_the_repository_are_not_mixed_with(hub: Hub, artifact: Path) -> None:
    hub.repositories.create(NAME)
    hub.repositories.commit(NAME, {"model.safetensors": b"16 bit"})
    with pytest.raises(HubError, match=r"holds other weights: model\.safetensors"):
        do_publish(artifact)


def test_private_repositories_are_made_private_and_a_public_one_is_not_taken_for_one(hub: Hub, artifact: Path) -> None:
    do_publish(artifact, private=True)
    assert stored(hub).private
    stored(hub).private = False
    with pytest.raises(HubError, match="is public, and was to be private"):
        do_publish(artifact, private=True)


@pytest.mark.parametrize(
    ("front", "concern"),
    [
        ("library_name: x", "names no licence"),
        ("license: cc-by-nc-nd-4.0", "forbids derivatives"),
        ("license: other\nlicense_name: some-nd", "forbids derivatives"),
        ("license: other\nlicense_name: mine", "has no link"),
        ("license:\n- mit\n- gpl-3.0", "several licences"),
    ],
)
def test_a_doubtful_licence_must_be_confirmed(hub: Hub, artifact: Path, front: str, concern: str) -> None:
    hub.repositories.create("base/small")
    hub.repositories.commit("base/small", {"README.md": f"---\n{front}\n---\n# x\n".encode()})
    card = CardOptions(base_model="base/small")
    with pytest.raises(UsageError, match=f"{concern}.*confirm_license=True"):
        do_publish(artifact, card)
    assert NAME not in hub.repositories.by_name
    assert concern in str(do_publish(artifact, card, dry_run=True).card.concern)
    do_publish(artifact, card, confirm_license=True)
    assert n_commits(hub) == 1


def test_a_base_model_that_cannot_be_read_leaves_the_licence_open(hub: Hub, artifact: Path, small_source: Path) -> None:
    hub.add_folder("base/small", small_source, gated=True)
    with pytest.raises(UsageError, match=r"card could not be read \(base/small: access is gated"):
        do_publish(artifact, CardOptions(base_model="base/small"))


def test_a_licence_with_name_and_link_is_inherited(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    front = "---\nlicense: other\nlicense_name: llama3\nlicense_link: LINK\n---\n"
    elsewhere = "https://huggingface.co/base/small/blob/main/terms.md"
    for link, expected in (("LICENSE", "LICENSE"), ("terms.md", elsewhere), ("https://x.org", "https://x.org")):
        (source / "README.md").write_text(front.replace("LINK", link))
        done = do_publish(artifact, CardOptions(source=source, base_model="base/small"), dry_run=True)
        data = huggingface_hub.ModelCard(done.card.text).data
        assert (data.license, data.license_name, data.license_link) == ("other", "llama3", expected)
        assert f"[llama3]({expected})" in done.card.text


def test_the_base_model_is_known_from_a_folder_in_the_hubs_cache(hub: Hub, small_source: Path, tmp_path: Path) -> None:
    commit = hub.add_folder("base/small", small_source).head.oid
    snapshot = Path(huggingface_hub.snapshot_download("base/small"))
    out = tmp_path / "out"
    convert(snapshot, out)
    done = do_publish(out, CardOptions(source=snapshot))
    assert f"at commit [`{commit}`]" in done.card.text
    assert huggingface_hub.ModelCard(done.card.text).data.base_model == "base/small"


def test_a_card_of_ones_own_is_published_as_it_is(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.md"
    mine.write_text("---\nlicense: mit\n---\nhello\n")
    do_publish(artifact, CardOptions(card=mine))
    there = folder_of(stored(hub), tmp_path / "there")
    assert (there / "README.md").read_text() == mine.read_text()
    assert verify_integrity(there, sha256=True).good
    mine.write_text("no metadata")
    with pytest.raises(UsageError, match="has no metadata"):
        do_publish(artifact, CardOptions(card=mine))


def test_a_dry_run_only_reads(hub: Hub, artifact: Path) -> None:
    planned = do_publish(artifact, dry_run=True)
    assert planned.commit is None
    assert set(planned.changes.new) == {*contents(artifact), "README.md"}
    assert planned.nbytes_to_send == planned.publication.nbytes > 50_000
    assert not [request for request in hub.log if request.method != "GET"]


def test_a_token_that_is_unknown_or_missing_is_told_with_what_to_do(
    hub: Hub, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HubError, match=r"token is not accepted.*hf auth login") as caught:
        publish(artifact, NAME, APACHE, token="hf_wrongwrongwrong", patience=PATIENT)
    assert "hf_wrong" not in str(caught.value)
    with pytest.raises(HubError, match=r"401.*hf auth login"):
        publish(artifact, NAME, APACHE, token=False, patience=PATIENT)


def test_the_token_is_nowhere_in_logs_errors_manifest_or_card(
    hub: Hub, artifact: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.faults.add("status", route="POST hub/.*/commit/", headers={"X-Error-Message": f"no: {TOKEN}"}, times=1)
    do_publish(artifact)
    hub.faults.add("status", route="repos/create", status=403, headers={"X-Error-Message": f"no: {TOKEN}"})
    with pytest.raises(HubError) as caught:
        publish(artifact, "me/other", APACHE, patience=PATIENT)
    assert "403" in str(caught.value)
    out = capsys.readouterr()
    ours = [record for record in caplog.records if record.name.startswith(("qformat", "huggingface_hub"))]
    texts = [*(record.getMessage() for record in ours), str(caught.value), repr(caught.value), out.out, out.err]
    texts += [file.read().decode("latin-1") for file in stored(hub).head.files.values()]
    assert hub.requests("POST")[0].headers["authorization"] == f"Bearer {TOKEN}"
    assert not [text for text in texts if TOKEN in text]


@pytest.mark.parametrize("status", [403, 503])
def test_the_signed_address_of_an_upload_is_not_told(hub: Hub, artifact: Path, status: int) -> None:
    hub.faults.add("status", route="PUT hub/-/lfs", status=status)
    with pytest.raises(HubError, match=f"uploading: .*{status}") as caught:
        do_publish(artifact)
    assert "of-the-stand-in" not in str(caught.value)
    assert n_commits(hub) == 0


def test_a_file_that_changes_while_it_is_uploaded_is_noticed(hub: Hub, artifact: Path) -> None:
    shard = artifact / "model-00001-of-00002.safetensors"

    def change() -> None:
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)

    hub.faults.add("call", route="objects/batch", hook=change, times=1)
    with pytest.raises(HubError):
        do_publish(artifact)
    assert n_commits(hub) == 0


def test_figures_of_an_earlier_verification_are_those_of_this_artifact_or_refused(
    hub: Hub, small_source: Path, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qformat.cli.main import run

    figures = tmp_path / "figures.json"
    assert run(["verify", str(artifact), "--source", str(small_source), "--json"]) == 0
    figures.write_text(capsys.readouterr().out)
    arguments = ["publish", str(artifact), NAME, "--license", "mit", "--dry-run", "--figures", str(figures)]
    assert run(arguments) == 0
    assert "| down_proj | 2 | 3,072 | 8.844% |" in capsys.readouterr().out
    record = json.loads(figures.read_text())
    record["manifest"]["files"]["config.json"]["sha256"] = "0" * 64
    figures.write_text(json.dumps(record))
    assert run(arguments) == 2
    assert "other files than the artifact's" in capsys.readouterr().err


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
    assert "nothing was sent" in capsys.readouterr().out
    assert run([*arguments, "--card", "x.md"]) == 2


def test_an_artifact_of_another_source_is_not_published_with_its_figures(
    hub: Hub, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qformat.cli.main import run

    other = write_tiny(tmp_path / "other")
    assert run(["publish", str(artifact), NAME, "--source", str(other)]) == 1
    assert "is not published" in capsys.readouterr().err
    assert not hub.log


def test_members_of_a_newer_manifest_are_published_as_they_are(hub: Hub, tmp_path: Path) -> None:
    vector = ARTIFACT_VECTORS / "version_1_7"
    artifact = Path(shutil.copytree(vector, tmp_path / "newer"))
    do_publish(artifact)
    there = json.loads(stored(hub).head.files["qformat.json"].read())
    here = json.loads((artifact / "qformat.json").read_text())
    del there["files"]["README.md"], there["manifest_sha256"], here["manifest_sha256"]
    assert there == here
    assert list(there) == list(here)


def test_several_shards_of_any_size_options_go_the_same_way(hub: Hub, small_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "many"
    convert(small_source, out, ConversionOptions(max_shard_nbytes=6_000, double_quant=False))
    hub.part_nbytes = 4_000
    do_publish(out)
    assert verify_integrity(folder_of(stored(hub), tmp_path / "there"), sha256=True).good
    assert "scales quantized" not in stored(hub).head.files["README.md"].read().decode()


def test_an_adapter_of_the_local_artifact_fits_the_published_one(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    from qformat.artifact.reading.structure import check_structure
    from qformat.training.adapter.base_record import BaseRecord

    do_publish(artifact)
    there = folder_of(stored(hub), tmp_path / "there")
    assert BaseRecord.of(check_structure(there)).digest == BaseRecord.of(check_structure(artifact)).digest


def test_a_recorded_evaluation_is_in_the_card_and_in_the_published_manifest(hub: Hub, artifact: Path) -> None:
    from qformat.artifact.reading.structure import read_manifest
    from qformat.artifact.writing.record_evaluation import record_evaluation

    kl = {"mean": 0.0123, "standard_error": 0.001}
    evaluation = {"window_length": 256, "texts": [{"name": "prose", "predicted_tokens": 5100, "kl": kl}]}
    record_evaluation(artifact, evaluation, of=read_manifest(artifact))  # type: ignore[arg-type]
    do_publish(artifact)
    files = stored(hub).head.files
    assert "| prose | 5,100 | 0.0123 ± 0.0010 |" in files["README.md"].read().decode()
    assert json.loads(files["qformat.json"].read())["evaluation"] == evaluation
