"""The published card and manifest state the source, the licence and the figures correctly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest

from qformat.artifact.reading.verify import verify_integrity
from qformat.converters.convert import convert
from qformat.errors import UsageError
from qformat.hub.card.prepared_card import CardOptions
from tests.hub.publishing.published import NAME, do_publish, folder_of, n_commits, stored
from tests.hub_stand_in import Hub
from tests.repository import ARTIFACT_VECTORS
from tests.small_models import write_tiny


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
    assert "12.386 bits per weight including scales" in text
    assert f"qformat fetch {NAME} small-nf4" in text


@pytest.mark.parametrize(
    ("front", "concern"),
    [
        ("library_name: x", "does not state a licence"),
        ("license: cc-by-nc-nd-4.0", "forbids derivatives"),
        ("license: other\nlicense_name: some-nd", "forbids derivatives"),
        ("license: other\nlicense_name: mine", "without a link to its text"),
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


def test_the_licence_of_an_unreadable_base_model_is_unknown(hub: Hub, artifact: Path, small_source: Path) -> None:
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


def test_a_card_of_the_user_is_published_unmodified(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.md"
    mine.write_text("---\nlicense: mit\n---\nhello\n")
    do_publish(artifact, CardOptions(card=mine))
    there = folder_of(stored(hub), tmp_path / "there")
    assert (there / "README.md").read_text() == mine.read_text()
    assert verify_integrity(there, sha256=True).passed
    mine.write_text("no metadata")
    with pytest.raises(UsageError, match="has no metadata"):
        do_publish(artifact, CardOptions(card=mine))


def test_figures_of_another_artifact_are_rejected(
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


def test_an_artifact_of_another_source_is_not_published_with_its_figures(
    hub: Hub, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qformat.cli.main import run

    other = write_tiny(tmp_path / "other")
    assert run(["publish", str(artifact), NAME, "--source", str(other)]) == 1
    assert "is not published" in capsys.readouterr().err
    assert not hub.log


def test_members_of_a_newer_manifest_are_published_unmodified(hub: Hub, tmp_path: Path) -> None:
    vector = ARTIFACT_VECTORS / "version_1_7"
    artifact = Path(shutil.copytree(vector, tmp_path / "newer"))
    do_publish(artifact)
    there = json.loads(stored(hub).head.files["qformat.json"].read())
    here = json.loads((artifact / "qformat.json").read_text())
    del there["files"]["README.md"], there["manifest_sha256"], here["manifest_sha256"]
    assert there == here
    assert list(there) == list(here)


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
