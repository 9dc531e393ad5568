"""Sequence classifiers: converted, loaded, saved and trained as on the decoded model; other tasks are refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import qformat
from qformat.cli.main import run
from qformat.converters.export import export
from qformat.errors import UsageError
from qformat.model.nf4_linear import NF4Linear
from qformat.model.transformers_quantizer import METHOD
from tests.clients.trainers.short_runs import BOUND, N_STEPS, THREE_STEPS, losses_of, small_artifact
from tests.small_models import contents

IDS = torch.arange(5, 25)[None]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a head for three labels, converted, with its source beside it."""
    from transformers import LlamaForSequenceClassification

    return small_artifact(tmp_path_factory.mktemp("classifier"), LlamaForSequenceClassification, num_labels=3)


@pytest.fixture
def registered() -> Iterator[None]:
    before = AUTO_QUANTIZER_MAPPING[METHOD]
    qformat.register()
    yield
    AUTO_QUANTIZER_MAPPING[METHOD] = before


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def test_a_classifier_converts_loads_and_saves_as_the_decoded_model(classifier: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

    assert qformat.verify(classifier).passed
    model = qformat.load_model(classifier, device="cpu", dtype=torch.float32)
    assert isinstance(model, LlamaForSequenceClassification)
    assert model.config.num_labels == 3
    assert type(model.score) is torch.nn.Linear
    assert sum(isinstance(module, NF4Linear) for module in model.modules()) == 14
    export(classifier, tmp_path / "decoded", to="fp32")
    oracle = AutoModelForSequenceClassification.from_pretrained(tmp_path / "decoded", dtype=torch.float32)
    assert logits(model).shape == (1, 3)
    torch.testing.assert_close(logits(model), logits(oracle), rtol=BOUND, atol=BOUND)
    qformat.load_model(classifier, device="cpu").save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(classifier)


def test_register_loads_a_classifier(classifier: Path, registered: None) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    assert torch.equal(logits(model), logits(qformat.load_model(classifier, device="cpu")))


def test_register_gives_a_causal_artifact_a_new_head(artifact: Path, registered: None) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(artifact, num_labels=5)
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert model.score.weight.shape == (5, 64)
    assert sum(isinstance(module, NF4Linear) for module in model.modules()) == 14
    assert logits(model).isfinite().all()


def test_generate_in_python_is_refused(classifier: Path) -> None:
    model = qformat.load_model(classifier, device="cpu")
    with pytest.raises(UsageError, match="LlamaForSequenceClassification does not predict the next token"):
        model.generate(IDS, max_new_tokens=1)


@pytest.mark.parametrize(
    "command",
    [
        "generate NF4 --prompt block",
        "eval NF4 --data TEXT --seq-len 16",
        "eval NF4 --source SOURCE --data TEXT --seq-len 16",
        "tune NF4 OUT --source SOURCE --data TEXT --seq-len 16",
        "train NF4 OUT --data TEXT",
        "train NF4 --dry-run",
    ],
)
def test_commands_for_language_models_refuse_a_classifier_in_one_line(
    command: str, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the block holds one scale and every code counts from zero\n" * 20)
    places = {"NF4": classifier, "SOURCE": classifier.parent / "source", "TEXT": text, "OUT": tmp_path / "out"}
    assert run([str(places.get(word, word)) for word in command.split()]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert re.match(r"Error: \S+: LlamaForSequenceClassification does not predict the next token", last)
    assert list(tmp_path.iterdir()) == [text]


@pytest.mark.slow
def test_the_reward_trainer_has_the_losses_of_the_decoded_model(classifier: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    words = ("one", "scale", "code", "zero")
    rows = Dataset.from_list([{"chosen": f"the block holds {word}", "rejected": f"pages {word}"} for word in words])
    export(classifier, tmp_path / "decoded", to="fp32")

    def losses(model: Any, folder: Path) -> list[float]:
        torch.manual_seed(0)
        model.score = torch.nn.Linear(64, 1, bias=False)  # a reward is one number
        model.num_labels = model.config.num_labels = 1
        lora = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS")
        trainer = RewardTrainer(
            model=get_peft_model(model, lora),
            args=RewardConfig(output_dir=str(folder), **THREE_STEPS),
            train_dataset=rows,
            processing_class=qformat.load_tokenizer(classifier),
        )
        return losses_of(trainer)

    ours = qformat.load_model(classifier, device="cpu", dtype=torch.float32)
    oracle = AutoModelForSequenceClassification.from_pretrained(tmp_path / "decoded", dtype=torch.float32)
    oracle.is_loaded_in_4bit = getattr(ours, "is_loaded_in_4bit", False)
    found, expected = losses(ours, tmp_path / "ours"), losses(oracle, tmp_path / "oracle")
    assert len(found) == N_STEPS
    assert torch.tensor(found) == pytest.approx(torch.tensor(expected), rel=BOUND)
    assert max(expected) - min(expected) > 2 * BOUND * max(expected)
