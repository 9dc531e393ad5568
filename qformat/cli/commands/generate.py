"""`qformat generate`."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qformat.cli.display import echo_json
from qformat.cli.options import (
    artifact_argument,
    backend_option,
    device_option,
    json_option,
    options_record,
    trust_remote_code_option,
)
from qformat.sizes import format_nbytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qformat.artifact.reading.reader import MappedShards


@dataclass(frozen=True, slots=True)
class GenerateArguments:
    """What is given to `qformat generate`."""

    artifact: Path
    adapter: Path | None
    force_adapter: bool
    prompt: str
    chat: bool
    max_new_tokens: int
    temperature: float
    seed: int
    device: str | None
    backend: str | None
    verify: str
    trust_remote_code: bool
    as_json: bool


@click.command(
    epilog="""\b
Examples:
  qformat generate SmolLM2-135M-Instruct-nf4 --chat --prompt "What are the primary colours?"
  qformat generate SmolLM2-135M-Instruct-nf4 --adapter adapter --chat --prompt "What is a coroutine?"
  qformat generate SmolLM2-135M-Instruct-nf4 --prompt "Once upon a time" --temperature 0.8 --seed 7"""
)
@artifact_argument
@click.option("--adapter", metavar="DIR", type=click.Path(path_type=Path), help="A LoRA adapter trained on ART.")
@click.option("--force-adapter", is_flag=True, help="Use the adapter although it was trained on other weights.")
@click.option("--prompt", metavar="TEXT", required=True, help="What to continue, or with --chat the user's message.")
@click.option("--chat", is_flag=True, help="Wrap the prompt in the tokenizer's chat template.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="For a temperature above 0.")
@device_option
@backend_option
@click.option("--verify", type=click.Choice(["structure", "full"]), default="structure", show_default=True,
              help="full: read every byte first and compare its digest.")  # fmt: skip
@trust_remote_code_option()
@json_option("Print one JSON object at the end, and no text before.")
@options_record(GenerateArguments)
def command(options: GenerateArguments) -> None:
    """Generate text with the artifact in folder ART, mapped as it is."""
    started = time.monotonic()
    from qformat.cli.models import quiet_transformers

    quiet_transformers()
    from qformat.kernels.backends import force_backend
    from qformat.model.generation import Sampling, generate
    from qformat.model.load import load_model, load_tokenizer, open_shards

    imported = time.monotonic()
    if options.backend is not None:
        force_backend(options.backend)
    trust = options.trust_remote_code
    shards = open_shards(options.artifact)
    model = load_model(shards, device=options.device, verify=options.verify, trust_remote_code=trust)  # type: ignore[arg-type]
    if options.adapter is not None:
        model = _with_adapter(model, shards, options.adapter, force=options.force_adapter)
    tokenizer = load_tokenizer(options.artifact, trust_remote_code=trust)
    loaded = time.monotonic()
    result = generate(
        model,
        tokenizer,
        options.prompt,
        chat=options.chat,
        sampling=Sampling(options.max_new_tokens, options.temperature, options.seed),
        on_text=(lambda _: None) if options.as_json else (lambda text: click.echo(text, nl=False)),
    )
    if options.as_json:
        facts = {**asdict(result), "import_s": imported - started, "load_s": loaded - imported}
        echo_json(facts)
        return
    click.echo()
    click.echo(
        f"loaded in {loaded - imported:.2f} s (imports {imported - started:.2f} s), "
        f"first token after {result.first_token_s:.2f} s, {result.n_new_tokens} tokens, "
        f"{result.tokens_per_s:.1f} tokens/s, peak memory {format_nbytes(result.peak_nbytes)}",
        err=True,
    )


def _with_adapter(model: PreTrainedModel, shards: MappedShards, adapter: Path, *, force: bool) -> PreTrainedModel:
    """Put the adapter on the model, after a look at what it was trained on."""
    from qformat.training.adapter.attach import load_adapter
    from qformat.training.adapter.base_record import BaseRecord

    return load_adapter(model, adapter, BaseRecord.of(shards.layout), force_adapter=force)  # type: ignore[return-value]  # PeftModel generates alike
