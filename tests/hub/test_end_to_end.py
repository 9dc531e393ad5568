"""From the Hub and back: convert a repository while it streams, verify, publish, verify remotely, fetch, run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest
import torch

from qformat.cli.main import run
from qformat.converters.convert import convert
from tests.hub.conftest import TOKEN
from tests.hub.signing_keys import write_key
from tests.hub_stand_in import Hub
from tests.model.sides import SAME_PRODUCTS, load_exact, load_ours, load_peer
from tests.rounding import rounds_like
from tests.small_models import contents, llama_config, llama_tensors, write_checkpoint

SIZES = {"hidden": 128, "intermediate": 192, "vocabulary": 50}
CARD = "---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# The model\n"


@dataclass(frozen=True)
class Case:
    """Return a checkpoint and tokens for its model."""

    source: Path
    ids: torch.Tensor


@pytest.fixture(params=["random", pytest.param("SmolLM2", marks=pytest.mark.slow)])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    if request.param == "random":
        source = tmp_path / "source"
        write_checkpoint(source, llama_tensors(**SIZES), n_shards=3, config=llama_config(**SIZES))
    else:
        source = request.getfixturevalue("smollm2")
    return Case(source, torch.arange(1, 40)[None])


def without_source(folder: Path) -> dict[str, object]:
    """Return all files of an artifact, with the location of the source removed from the manifest."""
    found: dict[str, object] = dict(contents(folder))
    manifest = json.loads((folder / "qformat.json").read_text())
    del manifest["source"], manifest["manifest_sha256"]
    return {**found, "qformat.json": manifest}


def shell(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must succeed, and return its output."""
    capsys.readouterr()
    assert run([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_a_model_goes_from_the_hub_and_back_and_computes_the_same_everywhere(
    hub: Hub, case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("model_signing")
    hub.add_folder("base/model", case.source)
    hub.repositories.commit("base/model", {"README.md": CARD.encode()})
    commit = hub.repositories.by_name["base/model"].head.oid
    key = write_key(tmp_path)
    streamed, local, elsewhere = tmp_path / "streamed", tmp_path / "local", tmp_path / "elsewhere"

    shell(capsys, "convert", "base/model", streamed)
    convert(case.source, local)
    assert without_source(streamed) == without_source(local)
    shell(capsys, "verify", streamed, "--source", case.source)

    shell(capsys, "publish", streamed, "me/model-nf4", "--source", "base/model", "--sign-key", key)
    shell(capsys, "verify", "me/model-nf4", "--signature", "--public-key", key.with_suffix(".pub"))
    shell(capsys, "fetch", "me/model-nf4", elsewhere)
    shell(capsys, "verify", elsewhere, "--sha256", "--signature", "--public-key", key.with_suffix(".pub"))
    assert shell(capsys, "diff", streamed, elsewhere, "--weights").endswith("the same weights\n")

    text = (elsewhere / "README.md").read_text()
    data = huggingface_hub.ModelCard(text).data
    assert (data.base_model, data.license, data.pipeline_tag) == ("base/model", "apache-2.0", "text-generation")
    assert f"at commit [`{commit}`]" in text
    assert "| down_proj | " in text

    snapshot = Path(huggingface_hub.snapshot_download("me/model-nf4"))
    assert {name: data for name, data in contents(snapshot).items() if name != ".gitattributes"} == contents(elsewhere)
    with torch.enable_grad():  # without gradients bitsandbytes rewrites its scales on some CPUs
        expected = load_peer(snapshot)(case.ids, use_cache=False).logits
        found = [load_ours(artifact)(case.ids, use_cache=False).logits for artifact in (local, elsewhere, snapshot)]
        assert all(torch.equal(logits, found[0]) for logits in found)
        if SAME_PRODUCTS:
            assert torch.equal(found[0], expected)
        else:
            assert rounds_like(found[0], expected, load_exact(local)(case.ids, use_cache=False).logits)
    everything = b"".join(data for folder in (streamed, elsewhere) for data in contents(folder).values())
    assert TOKEN.encode() not in everything
