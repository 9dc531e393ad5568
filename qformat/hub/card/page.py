"""Model card of a published artifact: metadata that the Hub validates, sizes, usage, measurements and provenance.

The same artifact and the same figures give a byte-identical card, so publishing again changes nothing.
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
from qformat.hub.card.origin import Origin
from qformat.markdown import escaped, front_matter, link, table
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
    """Return the model card (README.md) of an artifact.

    Args:
        repository: Name of the repository that the artifact is published as, `owner/name`.
        manifest: Manifest of the artifact.
        config: The artifact's config.json.
        origin: Base model and its licence.
        figures: Quantization error against the source checkpoint. Without it, the card has no table of errors.
        signed: The artifact is published with a signature.
    """
    sections = [
        front_matter(_metadata(origin, origin.pipeline_tag or pipeline_tag_of(config))),
        f"# {escaped(repository.partition('/')[2])}",
        _summary(origin),
        _sizes(manifest),
        "## Usage",
        *_usage(repository, manifest, pipeline_tag_of(config)),
        *(["## Quantization error", _errors(figures)] if figures is not None else []),
        *evaluation_sections(manifest.evaluation),
        "## Verification",
        _verification(repository, signed=signed),
        "## Provenance",
        _provenance(manifest, origin),
        *_license_note(origin.license),
    ]
    return "\n\n".join(sections) + "\n"


def pipeline_tag_of(config: JsonObject) -> str | None:
    """Return the Hub's name for the task of a model, or None if its architecture does not tell."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    if name.endswith("ForCausalLM"):
        return "text-generation"
    if name.endswith("ForConditionalGeneration") and "vision_config" in config:
        return "image-text-to-text"
    if name.endswith("ForSequenceClassification"):
        return "text-classification"
    return None


def _metadata(origin: Origin, pipeline_tag: str | None) -> dict[str, Any]:
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
    data: Any = ModelCardData(**fields)
    found: dict[str, Any] = data.to_dict()
    return found


def _summary(origin: Origin) -> str:
    base = f"{_link(origin.repository)}, quantized" if origin.repository is not None else "A language model, quantized"
    return (
        f"{base} to 4 bits (NF4) with qformat. The safetensors files have the layout of bitsandbytes, so transformers "
        f"loads them without conversion. The manifest `{MANIFEST_NAME}` records a digest of every file and of "
        "every tensor."
    )


def _link(repository: str) -> str:
    return link(repository, f"https://huggingface.co/{repository}")


def _sizes(manifest: Manifest) -> str:
    packed = [record for record in manifest.tensors.values() if isinstance(record, PackedRecord)]
    kept = [record for record in manifest.tensors.values() if isinstance(record, KeptRecord)]
    nbytes = sum(record.nbytes for record in manifest.files.values())
    kept_nbytes = sum(record.nbytes for record in kept)
    source_nbytes = kept_nbytes + sum(record.layout.n_elements * record.layout.float_format.nbytes for record in packed)
    reasons = Counter(record.reason for record in kept)
    why = ", ".join(f"{count} {escaped(reason.replace('_', ' '))}" for reason, count in sorted(reasons.items()))
    rows = [
        ("size", f"{_nbytes(nbytes)}; the tensors of the source checkpoint take {_nbytes(source_nbytes)}"),
        ("4-bit weights", _packed_text(packed)),
        ("not quantized", f"{len(kept)} tensors, {_nbytes(kept_nbytes)}" + (f" ({why})" if why else "")),
        ("scales", _scales_text(packed)),
    ]
    return table(("", ""), rows)


def _packed_text(packed: Sequence[PackedRecord]) -> str:
    n_weights = sum(record.layout.n_elements for record in packed)
    nbytes = sum(new.nbytes for record in packed for new in record.layout.components("").values())
    bits = f", {8 * nbytes / n_weights:.3f} bits per weight including scales" if n_weights else ""
    return f"{len(packed)} tensors, {n_weights:,} weights{bits}"


def _scales_text(packed: Sequence[PackedRecord]) -> str:
    kinds = Counter((record.layout.block_size, record.layout.double_quant) for record in packed)
    texts = [
        f"one {'8-bit' if double_quant else 'float32'} scale per {block_size} weights"
        + (f" ({count} tensors)" if len(kinds) > 1 else "")
        for (block_size, double_quant), count in sorted(kinds.items())
    ]
    return "; ".join(texts) or "none"


def _errors(figures: ErrorFigures) -> str:
    header = ("module", "tensors", "weights", "relative RMS error", "maximum error", "SNR", "cosine similarity")
    rows = [_error_row(row) for row in (*figures.rows, figures.overall)]
    text = (
        "Difference between the decoded weights and the weights of the source checkpoint, measured by `qformat verify "
        f"--source`. Of {figures.overall.n_tensors:,} quantized tensors, {figures.n_exact:,} are byte-identical to a "
        "new encoding of the source checkpoint."
    )
    return f"{text}\n\n{table(header, rows)}"


def _error_row(row: ErrorRow) -> tuple[str, ...]:
    return (
        escaped(row.kind),
        f"{row.n_tensors:,}",
        f"{row.n_weights:,}",
        "–" if row.relative_rms is None else f"{row.relative_rms:.3%}",
        "–" if row.max_abs_error is None else f"{row.max_abs_error:.4g}",
        "–" if row.snr_db is None else f"{row.snr_db:.2f} dB",
        "–" if row.cosine is None else f"{row.cosine:.5f}",
    )


_MODEL_CLASSES = {
    "image-text-to-text": "AutoModelForImageTextToText",
    "text-classification": "AutoModelForSequenceClassification",
}


def _usage(repository: str, manifest: Manifest, task: str | None) -> list[str]:
    """Return a section per program. Models that do not generate text have only the one of transformers."""
    generates = task != "text-classification"
    sections = [_transformers(repository, _MODEL_CLASSES.get(task or "", "AutoModelForCausalLM"))]
    if generates:
        double_quant = any(
            isinstance(record, PackedRecord) and record.layout.double_quant for record in manifest.tensors.values()
        )
        sections = [_qformat(repository), *sections, _vllm(repository, double_quant=double_quant)]
    return sections


def _qformat(repository: str) -> str:
    name = repository.partition("/")[2]
    return f"""\
### qformat

qformat maps the files into memory and computes with the 4-bit weights. It does not need bitsandbytes.

```console
$ qformat fetch {repository} {name}
$ qformat generate {name} --prompt "Hello"
```"""


def _transformers(repository: str, model_class: str) -> str:
    return f"""\
### transformers

Run `pip install transformers accelerate bitsandbytes`, then:

```python
from transformers import {model_class}, AutoTokenizer

model = {model_class}.from_pretrained("{repository}", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{repository}")
```"""


def _vllm(repository: str, *, double_quant: bool) -> str:
    text = f"""\
### vLLM

vLLM 0.28 and later need a plugin for this layout. With it, the model runs on one rank only, without tensor parallelism.

```console
$ pip install vllm-bnb-plugin
$ vllm serve {repository}
```"""
    if double_quant:
        text += (
            "\n\nThe plugin (version 0.0.3) rounds the offset of the 8-bit scales to the dtype of the model, usually "
            "bfloat16. The weights, and therefore the results, differ slightly from those of qformat and transformers."
        )
    return text


def _verification(repository: str, *, signed: bool) -> str:
    key = " --signature --public-key KEY.pub" if signed else ""
    text = f"""\
```console
$ qformat verify {repository}{key}
```

This command compares the repository with the manifest and does not download the weights. `qformat fetch` checks every
byte that it downloads."""
    if signed:
        text += (
            f" `{SIGNATURE_NAME}` is an OpenSSF Model Signing signature of all files of the artifact; `KEY.pub` is the "
            "public key of the publisher."
        )
    return text


def _provenance(manifest: Manifest, origin: Origin) -> str:
    source = "a local checkpoint"
    if origin.repository is not None:
        source = _link(origin.repository)
        if origin.commit is not None:
            source += f" at commit [`{origin.commit}`](https://huggingface.co/{origin.repository}/tree/{origin.commit})"
    rows = [
        ("source checkpoint", source),
        ("created by", escaped(manifest.generator)),
        ("format", f"qformat {manifest.format_version}"),
    ]
    recipe = strict_json.dumps(manifest.recipe, indent=2).replace(
        "`", "\\u0060"
    )  # so that no text in it ends the block
    return (
        f"{table(('', ''), rows)}\n\nRecipe of the conversion:\n\n```json\n{recipe}\n```\n\nFiles:\n\n"
        f"{table(('file', 'bytes', 'SHA-256'), _file_rows(manifest.files))}"
    )


def _file_rows(files: Mapping[str, FileRecord]) -> list[tuple[str, ...]]:
    listed = [(name, record) for name, record in files.items() if name != CARD_NAME]
    return [(escaped(name), f"{record.nbytes:,}", f"`{record.sha256}`") for name, record in listed]


def _license_note(found: License) -> list[str]:
    if found.identifier is None:
        return []
    name = found.name or found.identifier
    text = link(name, found.link) if found.link is not None else escaped(name)
    return ["## Licence", f"The licence of the source checkpoint applies: {text}."]


def _nbytes(nbytes: int) -> str:
    return f"{format_nbytes(nbytes)} ({nbytes:,} bytes)" if nbytes >= 1000 else f"{nbytes} bytes"
