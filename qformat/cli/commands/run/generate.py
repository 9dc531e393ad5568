"""`qformat generate`."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qformat.cli.display import echo, echo_json, echo_piece
from qformat.cli.help_sections import SectionedCommand
from qformat.cli.options import (
    artifact_argument,
    backend_option,
    device_option,
    json_option,
    options_record,
    trust_remote_code_option,
)
from qformat.cli.progress import Bar
from qformat.sizes import format_nbytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qformat.artifact.reading.reader import MappedShards
    from qformat.model.text.generation import Generation


SECTIONS = {
    "Prompt": ("prompt", "chat"),
    "Adapter": ("adapter", "force_adapter"),
    "Sampling": ("max_new_tokens", "temperature", "seed"),
    "Loading": ("device", "backend", "verify", "trust_remote_code"),
    "Output": ("as_json",),
}


@dataclass(frozen=True, slots=True)
class GenerateArguments:
    """Arguments of `qformat generate`, under the names of the options."""

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
    cls=SectionedCommand,
    sections=SECTIONS,
    epilog="""\b
Examples:
  qformat generate SmolLM2-135M-Instruct-nf4 --prompt "Once upon a time"
  qformat generate ART --adapter adapter --chat --prompt "What is Python?"
  qformat generate ART --prompt "A recipe:" --temperature 0.8 --seed 7""",
)
@artifact_argument
@click.option("--adapter", metavar="DIR", type=click.Path(path_type=Path), help="LoRA adapter trained on ART.")
@click.option("--force-adapter", is_flag=True, help="Use the adapter even if it was trained on other weights.")
@click.option("--prompt", metavar="TEXT", required=True, help="Text to continue or, with --chat, the user's message.")
@click.option("--chat", is_flag=True, help="Put the prompt into the tokenizer's chat template.")
@click.option("--max-new-tokens", metavar="N", type=click.IntRange(min=1), default=256, show_default=True,
              help="Largest number of tokens to generate.")  # fmt: skip
@click.option("--temperature", metavar="X", type=click.FloatRange(min=0), default=0.0, show_default=True,
              help="Temperature of sampling; 0 always takes the most likely token.")  # fmt: skip
@click.option("--seed", metavar="N", type=click.IntRange(min=0), default=0, show_default=True,
              help="Seed for a temperature above 0.")  # fmt: skip
@device_option
@backend_option
@click.option("--verify", type=click.Choice(["structure", "full"]), default="structure", show_default=True,
              help="What to check before loading: the structure only, or also the digest of every byte.")  # fmt: skip
@trust_remote_code_option()
@json_option("Print one JSON object at the end, without streaming the text.")
@options_record(GenerateArguments)
def command(options: GenerateArguments) -> None:
    """Generate text with the artifact in folder ART, whose weights are mapped from disk.

    The text appears token by token. Speed and memory follow on stderr.
    """
    with Bar() as bar:
        bar.note("Loading")
        result, times = _generate(options, bar)
    if options.as_json:
        echo_json({**asdict(result), **times})
        return
    echo()
    echo(
        f"loaded in {times['load_s']:.2f} s (imports {times['import_s']:.2f} s), "
        f"first token after {result.first_token_s:.2f} s, {result.n_new_tokens} tokens, "
        f"{result.tokens_per_s:.1f} tokens/s, peak memory {format_nbytes(result.peak_nbytes)}",
        err=True,
    )


def _generate(options: GenerateArguments, bar: Bar) -> tuple[Generation, dict[str, float]]:
    """Load the model and stream its text to stdout. Returns also how long imports and loading took."""
    started = time.monotonic()
    from qformat.cli.models import quiet_transformers

    quiet_transformers()
    from qformat.kernels.backends import force_backend
    from qformat.model.boundary import has_tokenizer
    from qformat.model.load import load_model, load_tokenizer, open_shards
    from qformat.model.text.generation import Sampling, generate

    imported = time.monotonic()
    if options.backend is not None:
        force_backend(options.backend)
    trust = options.trust_remote_code
    shards = open_shards(options.artifact)
    model = load_model(shards, device=options.device, verify=options.verify, trust_remote_code=trust)  # type: ignore[arg-type]
    if options.adapter is not None:
        model = _with_adapter(model, shards, options.adapter, force=options.force_adapter)
    adapter = options.adapter
    with_tokens = adapter if adapter is not None and has_tokenizer(adapter) else options.artifact
    tokenizer = load_tokenizer(with_tokens, trust_remote_code=trust)
    loaded = time.monotonic()
    bar.note("Generating")

    def on_text(text: str) -> None:
        if not options.as_json:
            bar.clear()
            echo_piece(text)

    with bar.while_compiling():
        result = generate(
            model,
            tokenizer,
            options.prompt,
            chat=options.chat,
            sampling=Sampling(options.max_new_tokens, options.temperature, options.seed),
            on_text=on_text,
        )
    return result, {"import_s": imported - started, "load_s": loaded - imported}


def _with_adapter(model: PreTrainedModel, shards: MappedShards, adapter: Path, *, force: bool) -> PreTrainedModel:
    """Put the adapter on the model, after a check of the weights that it was trained on."""
    from qformat.training.adapter.attach import load_adapter
    from qformat.training.adapter.base_record import BaseRecord

    return load_adapter(model, adapter, BaseRecord.of(shards.layout), force_adapter=force)  # type: ignore[return-value]  # PeftModel generates alike
