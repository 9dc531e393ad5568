"""A tiny artifact with a tokenizer, training data for it, and trainings that take a second."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qformat.converters.convert import convert
from qformat.training.metrics import Listener
from qformat.training.result import TrainingResult
from qformat.training.run import TrainingJob, train
from qformat.training.settings import TrainingSettings
from tests.small_models import llama_config, llama_tensors, write_checkpoint

VOCABULARY = 320
WORDS = "the block holds one scale and every code counts from zero to fifteen while pages move".split()  # noqa: SIM905
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of at most VOCABULARY tokens with a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [" ".join(WORDS)] * 3,
        trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=512
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_artifact(folder: Path, *, seed: int = 0, layers: int = 2) -> Path:
    """Write a random Llama with a tokenizer, convert it, and return the artifact."""
    sizes: dict[str, Any] = {"hidden": 64, "intermediate": 128, "vocabulary": VOCABULARY, "n_layers": layers}
    source = write_checkpoint(folder / "source", llama_tensors(**sizes, seed=seed), config=llama_config(**sizes))
    small_tokenizer().save_pretrained(source)
    convert(source, folder / "nf4")
    return folder / "nf4"


def write_examples(path: Path, n: int = 24, *, seed: int = 0) -> Path:
    """Write prompts and completions of different lengths."""
    chosen = random.Random(seed)
    rows = [
        {"prompt": " ".join(chosen.choices(WORDS, k=3)), "completion": " ".join(chosen.choices(WORDS, k=4 + i % 9))}
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SHORT: dict[str, Any] = {
    "max_steps": 6,
    "batch_size": 2,
    "grad_accum": 2,
    "seq_len": 64,
    "learning_rate": 1e-2,
    "rank": 4,
    "dropout": 0.1,
    "save_every": 2,
    "keep_checkpoints": 10,
    "device": "cpu",
    "gradient_checkpointing": False,
    "log_every": 1,
}
"""Settings of a training of six steps with dropout and accumulation, and a checkpoint every second step."""


def run(
    artifact: Path,
    data: Path,
    output: Path,
    *,
    eval_data: Path | None = None,
    resume: str | None = None,
    say: Callable[[str], None] = lambda _: None,
    on_metrics: Listener = lambda _line, _n_steps: None,
    **changed: Any,
) -> TrainingResult:
    """Train with SHORT settings and some changes."""
    job = TrainingJob(artifact, [str(data)], output, [] if eval_data is None else [str(eval_data)])
    return train(job, TrainingSettings(**{**SHORT, **changed}), resume=resume, say=say, on_metrics=on_metrics)


def adapter_bytes(output: Path) -> bytes:
    return (output / "adapter_model.safetensors").read_bytes()
