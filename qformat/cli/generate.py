"""`qformat generate`."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qformat import strict_json
from qformat.sizes import format_nbytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@click.command(
    epilog="""\b
Examples:
  qformat generate SmolLM2-135M-Instruct-nf4 --chat --prompt "What are the primary colours?"
  qformat generate SmolLM2-135M-Instruct-nf4 --adapter adapter --chat --prompt "What is a coroutine?"
  qformat generate SmolLM2-135M-Instruct-nf4 --prompt "Once upon a time" --temperature 0.8 --seed 7"""
)
@click.argument("artifact", metavar="ART", type=click.Path(path_type=Path))
@click.option("--adapter", metavar="DIR", type=click.Path(path_type=Path), help="A LoRA adapter trained on ART.")
@click.option("--force-adapter", is_flag=True, help="Use the adapter although it was trained on other weights.")
@click.option("--prompt", metavar="TEXT", required=True, help="What to continue, or with --chat the user's message.")
@click.option("--chat", is_flag=True, help="Wrap the prompt in the tokenizer's chat template.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="For a temperature above 0.")
@click.option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ...; by default the GPU if there is one.")
@click.option("--backend", metavar="NAME", help="Force a backend, as QFORMAT_BACKEND does: numba, triton, torch.")
@click.option("--verify", type=click.Choice(["structure", "full"]), default="structure", show_default=True,
              help="full: read every byte first and compare its digest.")  # fmt: skip
@click.option("--trust-remote-code", is_flag=True, help="Run model code that comes with the artifact.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end, and no text before.")
def command(
    artifact: Path,
    adapter: Path | None,
    force_adapter: bool,
    prompt: str,
    chat: bool,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device: str | None,
    backend: str | None,
    verify: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Generate text with the artifact in folder ART, mapped as it is."""
    started = time.monotonic()
    from qformat.cli.models import quiet_transformers

    quiet_transformers()
    from qformat.kernels.backends import force_backend
    from qformat.model.generation import Sampling, generate
    from qformat.model.load import load_model, load_tokenizer

    imported = time.monotonic()
    force_backend(backend)
    model = load_model(artifact, device=device, verify=verify, trust_remote_code=trust_remote_code)  # type: ignore[arg-type]
    if adapter is not None:
        model = _with_adapter(model, artifact, adapter, force=force_adapter)
    tokenizer = load_tokenizer(artifact, trust_remote_code=trust_remote_code)
    loaded = time.monotonic()
    result = generate(
        model,
        tokenizer,
        prompt,
        chat=chat,
        sampling=Sampling(max_new_tokens, temperature, seed),
        on_text=(lambda _: None) if as_json else (lambda text: click.echo(text, nl=False)),
    )
    if as_json:
        facts = {**asdict(result), "import_s": imported - started, "load_s": loaded - imported}
        click.echo(strict_json.dumps(facts, indent=2))
        return
    click.echo()
    click.echo(
        f"loaded in {loaded - imported:.2f} s (imports {imported - started:.2f} s), "
        f"first token after {result.first_token_s:.2f} s, {result.n_new_tokens} tokens, "
        f"{result.tokens_per_s:.1f} tokens/s, peak memory {format_nbytes(result.peak_nbytes)}",
        err=True,
    )


def _with_adapter(model: PreTrainedModel, artifact: Path, adapter: Path, *, force: bool) -> PreTrainedModel:
    """Put the adapter on the model, after a look at what it was trained on."""
    from qformat.model.load import open_shards
    from qformat.training.adapter.adapters import load_adapter
    from qformat.training.adapter.base_record import BaseRecord

    shards = open_shards(artifact)
    base = BaseRecord.of(shards.layout)
    shards.close()
    return load_adapter(model, adapter, base, force=force)  # type: ignore[return-value]  # PeftModel generates alike
