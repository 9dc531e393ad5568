"""The model card of a published artifact: metadata that the Hub validates, figures, how to load it, provenance.

The same artifact and the same figures give the same card, byte for byte: a repeated publish changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from qformat import strict_json
from qformat.artifact.manifest import FileRecord, JsonObject, KeptRecord, Manifest, PackedRecord
from qformat.hub.card.error_figures import ErrorFigures, ErrorRow
from qformat.hub.card.evaluation_table import evaluation_sections
from qformat.hub.card.licenses import License
from qformat.hub.card.markdown import cell, table
from qformat.hub.card.origin import Origin
from qformat.names import CARD_NAME, MANIFEST_NAME, SIGNATURE_NAME
from qformat.sizes import format_nbytes

TAGS = ("qformat", "nf4", "bitsandbytes", "4-bit")


def write_card(
    repository: str,
    manifest: Manifest,
    config: JsonObject,
    origin: Origin,
    *,
    figures: ErrorFigures | None = None,
    signed: bool = False,
) -> str:
    """Return the text of the README.md of an artifact that is published as `repository`.

    figures: how far its weights are from the source's.
    """
    pipeline_tag = origin.pipeline_tag or pipeline_tag_of(config)
    sections = [
        f"---\n{_metadata(origin, pipeline_tag)}\n---",
        f"# {repository.partition('/')[2]}",
        _summary(origin),
        _sizes(manifest),
        *(["## How far it is from the source", _errors(figures)] if figures is not None else []),
        *evaluation_sections(manifest.evaluation),
        "## Load it",
        _loading(repository, pipeline_tag),
        "## Check it",
        _checking(repository, signed=signed),
        "## Provenance",
        _provenance(manifest, origin),
        *_license_note(origin.license),
    ]
    return "\n\n".join(sections) + "\n"


def pipeline_tag_of(config: JsonObject) -> str | None:
    """Return the Hub's name of the task of an architecture, None where the name does not tell."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    if name.endswith("ForCausalLM"):
        return "text-generation"
    if name.endswith("ForConditionalGeneration") and "vision_config" in config:
        return "image-text-to-text"
    if name.endswith("ForSequenceClassification"):
        return "text-classification"
    return None


def _metadata(origin: Origin, pipeline_tag: str | None) -> str:
    from huggingface_hub import ModelCardData

    language = origin.language
    languages = [str(one) for one in language] if isinstance(language, list) else language
    fields: dict[str, Any] = {
        "base_model": origin.repository,
        "base_model_relation": None if origin.repository is None else "quantized",
        "language": languages if isinstance(languages, str | list) else None,
        "library_name": "transformers",
        **origin.license.as_metadata(),
        "pipeline_tag": pipeline_tag,
        "tags": list(TAGS),
    }
    return ModelCardData(**fields).to_yaml()


def _summary(origin: Origin) -> str:
    base = _link(origin.repository) if origin.repository is not None else "A language model"
    return (
        f"{base} with 4-bit weights (NF4) in the safetensors layout of bitsandbytes, and `{MANIFEST_NAME}`, a manifest "
        "with a digest for every byte. Made with qformat."
    )


def _link(repository: str) -> str:
    return f"[{repository}](https://huggingface.co/{repository})"


def _sizes(manifest: Manifest) -> str:
    packed = [record for record in manifest.tensors.values() if isinstance(record, PackedRecord)]
    kept = [record for record in manifest.tensors.values() if isinstance(record, KeptRecord)]
    nbytes = sum(record.nbytes for record in manifest.files.values())
    source_nbytes = sum(record.layout.n_elements * record.layout.float_format.nbytes for record in packed)
    kept_nbytes = sum(_kept_nbytes(record) for record in kept)
    source_nbytes += kept_nbytes
    reasons = Counter(record.reason for record in kept)
    why = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in sorted(reasons.items()))
    rows = [
        ("size", f"{_nbytes(nbytes)}, the source's tensors {_nbytes(source_nbytes)}"),
        ("4-bit weights", _packed_text(packed)),
        ("kept as they were", f"{len(kept)} tensors, {_nbytes(kept_nbytes)}" + (f" ({why})" if why else "")),
        ("recipe", _recipe_text(packed)),
    ]
    return table(("", ""), rows)


def _packed_text(packed: Sequence[PackedRecord]) -> str:
    n_weights = sum(record.layout.n_elements for record in packed)
    nbytes = sum(new.nbytes for record in packed for new in record.layout.components("").values())
    bits = f", {8 * nbytes / n_weights:.3f} bits each, scales included" if n_weights else ""
    return f"{len(packed)} tensors, {n_weights:,} weights{bits}"


def _recipe_text(packed: Sequence[PackedRecord]) -> str:
    kinds = Counter((record.layout.block_size, record.layout.double_quant) for record in packed)
    texts = [
        f"blocks of {block_size}{', scales quantized to 8 bits' if double_quant else ''}"
        + (f" ({count} tensors)" if len(kinds) > 1 else "")
        for (block_size, double_quant), count in sorted(kinds.items())
    ]
    return "; ".join(texts) or "nothing is quantized"


def _kept_nbytes(record: KeptRecord) -> int:
    return record.nbytes


def _errors(figures: ErrorFigures) -> str:
    header = ("module", "tensors", "weights", "relative RMS error", "largest error", "SNR", "cosine")
    rows = [_error_row(row) for row in (*figures.rows, figures.overall)]
    exact = (
        f"Of {figures.overall.n_tensors:,} packed tensors, {figures.n_exact:,} have the codes and scales that plain "
        "rounding of the source gives. Measured by `qformat verify --source`."
    )
    return f"{table(header, rows)}\n\n{exact}"


def _error_row(row: ErrorRow) -> tuple[str, ...]:
    return (
        row.kind,
        f"{row.n_tensors:,}",
        f"{row.n_weights:,}",
        "–" if row.relative_rms is None else f"{row.relative_rms:.3%}",
        "–" if row.max_abs_error is None else f"{row.max_abs_error:.4g}",
        "–" if row.snr_db is None else f"{row.snr_db:.2f} dB",
        "–" if row.cosine is None else f"{row.cosine:.5f}",
    )


def _loading(repository: str, pipeline_tag: str | None) -> str:
    model_class = "AutoModelForImageTextToText" if pipeline_tag == "image-text-to-text" else "AutoModelForCausalLM"
    name = repository.partition("/")[2]
    return f"""\
qformat maps the file and runs it as it is, without bitsandbytes:

```console
$ qformat fetch {repository} {name}
$ qformat generate {name} --prompt "Hello"
```

transformers, with bitsandbytes installed (`pip install transformers bitsandbytes accelerate`):

```python
from transformers import {model_class}, AutoTokenizer

model = {model_class}.from_pretrained("{repository}", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{repository}")
```

vLLM:

```console
$ vllm serve {repository} --quantization bitsandbytes
```"""


def _checking(repository: str, *, signed: bool) -> str:
    key = " --signature --public-key KEY.pub" if signed else ""
    text = f"""\
```console
$ qformat verify {repository}{key}
```

compares the manifest with the repository without downloading the weights; `qformat fetch` checks every byte while it
downloads."""
    if signed:
        text += f" `{SIGNATURE_NAME}` is a signature of OpenSSF model-signing over every file; "
        text += "ask the publisher for the key."
    return text


def _provenance(manifest: Manifest, origin: Origin) -> str:
    source = "a local checkpoint"
    if origin.repository is not None:
        source = _link(origin.repository)
        if origin.commit is not None:
            source += f" at commit [`{origin.commit}`](https://huggingface.co/{origin.repository}/tree/{origin.commit})"
    rows = [
        ("source", source),
        ("made by", cell(manifest.generator)),
        ("format", f"qformat {manifest.format_version}"),
    ]
    recipe = strict_json.dumps(manifest.recipe, indent=2).replace("`", "\\u0060")  # no text of it ends the block
    return (
        f"{table(('', ''), rows)}\n\nThe recipe:\n\n```json\n{recipe}\n```\n\n"
        f"{table(('file', 'bytes', 'SHA-256'), _file_rows(manifest.files))}"
    )


def _file_rows(files: Mapping[str, FileRecord]) -> list[tuple[str, ...]]:
    return [
        (cell(name), f"{record.nbytes:,}", f"`{record.sha256}`") for name, record in files.items() if name != CARD_NAME
    ]


def _license_note(found: License) -> list[str]:
    if found.identifier is None:
        return []
    name = found.name or found.identifier
    text = f"[{name}]({found.link})" if found.link is not None else name
    return ["## Licence", f"That of the source: {text}."]


def _nbytes(nbytes: int) -> str:
    return f"{format_nbytes(nbytes)} ({nbytes:,} bytes)" if nbytes >= 1000 else f"{nbytes} bytes"
