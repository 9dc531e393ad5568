"""Saving a loaded model as trainers do: beside checkpoints and tokenizers, repeatedly, and to the Hub."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import qformat
from qformat.model.load import load_model
from tests.small_models import llama_config, llama_tensors, write_checkpoint

SIZES = {"hidden": 128, "intermediate": 192, "vocabulary": 50}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    source = write_checkpoint(tmp_path / "source", llama_tensors(**SIZES), config=llama_config(**SIZES))
    (source / "tokenizer_config.json").write_text('{"model_max_length": 64}\n')
    (source / "README.md").write_text("# The source\n")
    qformat.convert(source, tmp_path / "artifact", qformat.ConversionOptions(max_shard_nbytes=100_000))
    return tmp_path / "artifact"


def by_load_model(path: Path) -> Any:
    return load_model(path, device="cpu")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def arguments(out: Path) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(out), max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        logging_strategy="no",
    )  # fmt: skip


def test_trainer_saves_beside_its_checkpoints_and_a_second_run_works(artifact: Path, tmp_path: Path) -> None:
    from transformers import Trainer

    ids = list(range(3, 15))
    rows = [{"input_ids": ids, "labels": ids}] * 4
    out = tmp_path / "out"
    states = []
    for _ in range(2):
        trainer = Trainer(by_load_model(artifact), arguments(out), train_dataset=rows)
        trainer.train()
        trainer.save_model()
        assert qformat.verify(out, sha256=True).passed
        saved, trained = by_load_model(out), trainer.model
        states.append(saved.state_dict())
        assert all(torch.equal(tensor, saved.state_dict()[name]) for name, tensor in trained.state_dict().items())
        assert qformat.verify(out / "checkpoint-2", sha256=True).passed
    assert {path.name for path in out.iterdir()} >= {"checkpoint-1", "checkpoint-2", "training_args.bin"}
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    norm = "model.norm.weight"
    assert not torch.equal(states[0][norm], by_load_model(artifact).state_dict()[norm])


def test_a_tokenizer_saved_before_the_model_stays_with_a_warning(
    artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokenizer_config.json").write_text('{"model_max_length": 32}\n')
    with caplog.at_level(logging.WARNING, "qformat"):
        by_load_model(artifact).save_pretrained(out)
    assert "kept files that differ from those of the model: tokenizer_config.json" in caplog.text
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"model_max_length": 32}
    assert qformat.verify(out, sha256=True).passed


def test_a_tokenizer_saved_after_the_model_can_be_accepted(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    by_load_model(artifact).save_pretrained(out)
    (out / "tokenizer_config.json").write_text('{"model_max_length": 16, "a": 1}\n')
    with pytest.raises(qformat.errors.ArtifactError, match="qformat seal"):
        by_load_model(out)
    qformat.seal(out, accept=True)
    by_load_model(out)
    assert qformat.verify(out, sha256=True).passed


def test_a_model_is_saved_over_its_own_files_and_can_be_saved_again(artifact: Path, tmp_path: Path) -> None:
    model = by_load_model(artifact)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.model.norm.weight.fill_(2)
    model.save_pretrained(artifact)
    assert qformat.verify(artifact, sha256=True).passed
    assert set(by_load_model(artifact).model.norm.weight.tolist()) == {2}
    with torch.no_grad():
        model.model.norm.weight.copy_(before["model.norm.weight"])
    model.save_pretrained(artifact)
    model.save_pretrained(tmp_path / "again")
    for folder in (artifact, tmp_path / "again"):
        assert qformat.verify(folder, sha256=True).passed
        now = by_load_model(folder).state_dict()
        assert all(torch.equal(tensor, now[name]) for name, tensor in before.items())


def test_a_pushed_model_is_a_complete_artifact_that_lists_its_card(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import utils

    from qformat.hub.fetch import fetch
    from qformat.hub.remote_verify import verify_remote
    from tests.hub_stand_in import Hub, point_here, running

    token = "hf_aVerySecretToken0123456789"
    with running(Hub(tokens={token: "me"}, with_cdn=True)) as hub:
        point_here(monkeypatch, hub, tmp_path / "hub_home", token=token)
        try:
            by_load_model(artifact).push_to_hub("me/model", tags=["a-tag"])
            report = verify_remote("me/model")
            assert (report.findings, report.notices) == ((), ())
            fetch("me/model", tmp_path / "fetched")
            assert (tmp_path / "fetched" / "README.md").exists()
            (tmp_path / "fetched" / "README.md").write_text("# Edited\n")
            by_load_model(tmp_path / "fetched").push_to_hub("me/model")
            report = verify_remote("me/model")
            assert (report.findings, report.notices) == ((), ())
        finally:
            utils.close_session()
