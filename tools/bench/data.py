"""Compares the preparation of training data with `datasets` and trl's SFTTrainer, in one process.

"Cold" is the complete way from JSON lines to tokens and labels. "Warm" is the same call again, up to the first batch in
random order, which is the delay at the start of a second run. Both sides start from the same file and tokenizer, and
give the same tokens.
"""

from __future__ import annotations

import gc
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import datasets
import torch
import transformers
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from qformat.training.data.collate import PackedCollator, PaddedCollator
from qformat.training.data.prepare import DataSettings, prepare_data
from qformat.training.data.tokenised_data import TokenisedData, TokenRows, for_trainer

ROOT = Path(__file__).resolve().parents[2]
MAX_LENGTH = 512
BATCH_SIZE = 4
WORDS_OF_EXAMPLE = (50, 170)  # about 200 tokens on average
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PEER_SETTINGS: dict[str, dict[str, Any]] = {"text": {}, "completion": {}, "messages": {"assistant_only_loss": True}}


@click.command(help=__doc__)
@click.option("--rows", default=100_000, show_default=True, help="Number of rows for qformat.")
@click.option("--peer-rows", default=20_000, show_default=True, help="Number of rows for trl. Rates are compared.")
@click.option("--kind", type=click.Choice(list(PEER_SETTINGS)), multiple=True, help="Kind of rows. Default: all.")
@click.option("--no-markers", is_flag=True, help="Remove the markers from the chat template of qformat.")
def main(rows: int, peer_rows: int, kind: tuple[str, ...], no_markers: bool) -> None:
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    tokenizer, plain = make_tokenizer(TEMPLATE), make_tokenizer(TEMPLATE)
    if no_markers:
        plain.chat_template = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    print(f"trl {trl.__version__}, datasets {datasets.__version__}, {os.cpu_count()} cores; {rows:,} rows")
    with tempfile.TemporaryDirectory() as name:
        for one in kind or PEER_SETTINGS:
            compare(Path(name) / one, one, rows, peer_rows, tokenizer, plain)


def compare(
    folder: Path,
    kind: str,
    n_rows: int,
    n_peer_rows: int,
    tokenizer: PreTrainedTokenizerFast,
    plain: PreTrainedTokenizerFast,
) -> None:
    folder.mkdir()
    source = write_rows(folder / "rows.jsonl", kind, n_rows)
    peer_source = write_rows(folder / "peer.jsonl", kind, n_peer_rows)
    settings = DataSettings(max_length=MAX_LENGTH)

    def ours() -> TokenisedData:
        return prepare_data(source, plain, settings, cache=folder / "cache")

    def theirs() -> Any:
        rows = datasets.load_dataset("json", data_files=str(peer_source), split="train", cache_dir=str(folder / "hf"))
        arguments = SFTConfig(
            output_dir=str(folder / "out"),
            max_length=MAX_LENGTH,
            per_device_train_batch_size=BATCH_SIZE,
            use_cpu=True,
            bf16=False,
            report_to="none",
            **PEER_SETTINGS[kind],
        )
        return SFTTrainer(model=tiny_model(), args=arguments, train_dataset=rows, processing_class=tokenizer)

    cold_s, data = timed(ours)
    rate = n_rows / cold_s
    tokens = data.statistics.tokens
    print(f"{kind}: {tokens / len(data):.0f} tokens per row; cold: {rate:,.0f} rows/s, {tokens / cold_s:,.0f} tokens/s")
    peer_s, _ = timed(theirs)
    peer_rate = n_peer_rows / peer_s
    print(f"    trl, cold: {peer_rate:,.0f} rows/s; ratio {rate / peer_rate:.1f}")
    warm_s, _ = timed(lambda: first_batch(ours(), PaddedCollator(pad_id=0)))
    packed_s, _ = timed(lambda: first_batch(ours().packed(MAX_LENGTH), PackedCollator()))
    peer_s, _ = timed(lambda: next(iter(theirs().get_train_dataloader())))
    print(f"    first batch, warm: {warm_s:.2f} s padded, {packed_s:.2f} s packed; trl {peer_s:.2f} s", flush=True)


def first_batch(rows: TokenRows, collator: Callable[[Any], Any]) -> Any:
    """Return the first batch in random order, from the data set that SFTTrainer receives."""
    loader = torch.utils.data.DataLoader(
        for_trainer(rows),  # type: ignore[arg-type]
        batch_size=BATCH_SIZE,
        shuffle=True,
        collate_fn=collator,
    )
    return next(iter(loader))


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    gc.collect()
    start = perf_counter()
    result = function()
    return perf_counter() - start, result


def write_rows(path: Path, kind: str, n_rows: int) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for row in rows_of(kind, n_rows):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def rows_of(kind: str, n_rows: int) -> Iterator[dict[str, Any]]:
    """Yield rows with words from the README. A conversation has two turns of each side."""
    chosen = random.Random(0)
    words = (ROOT / "README.md").read_text(encoding="utf-8").split()
    for _ in range(n_rows):
        n_words = chosen.randint(*WORDS_OF_EXAMPLE)
        parts = [" ".join(chosen.choices(words, k=n_words // 4)) for _ in range(4)]
        if kind == "text":
            yield {"text": " ".join(parts)}
        elif kind == "completion":
            yield {"prompt": " ".join(parts[:2]), "completion": " " + " ".join(parts[2:])}
        else:
            roles = ("user", "assistant", "user", "assistant")
            yield {"messages": [{"role": role, "content": part} for role, part in zip(roles, parts, strict=True)]}


def make_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the texts of this repository."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("spec/*.md"))]
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=8000,
            special_tokens=["<s>", "<pad>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>", model_max_length=10**6
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=8000, **sizes))


if __name__ == "__main__":
    main()
