"""The model card states what the manifest records, and no text of a manifest breaks its markup."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest

from qformat.artifact.manifest import KeptRecord, Manifest, PackedRecord
from qformat.artifact.reading.structure import read_manifest
from qformat.errors import UsageError
from qformat.hub.card.error_figures import ErrorFigures, ErrorRow
from qformat.hub.card.licenses import License
from qformat.hub.card.origin import Origin
from qformat.hub.card.page import pipeline_tag_of, write_card

CONFIG: dict[str, object] = {"architectures": ["LlamaForCausalLM"]}


def test_the_card_of_an_artifact_of_unknown_origin_states_no_base_model(small_artifact: Path) -> None:
    text = write_card("me/it", read_manifest(small_artifact), {}, Origin())
    data = huggingface_hub.ModelCard(text).data.to_dict()
    assert data == {"library_name": "transformers", "tags": ["qformat", "nf4", "bitsandbytes", "4-bit"]}
    assert "a local checkpoint" in text
    assert "## Licence" not in text


def test_sizes_files_and_recipe_are_those_of_the_manifest(small_artifact: Path) -> None:
    manifest = read_manifest(small_artifact)
    text = write_card("me/it", manifest, CONFIG, Origin())  # type: ignore[arg-type]
    for name, record in manifest.files.items():
        assert f"| {name} | {record.nbytes:,} | `{record.sha256}` |" in text
    assert "one 8-bit scale per 64 weights" in text
    assert '"block_size": 64' in text
    assert manifest.generator in text


def usage(manifest: Manifest, config: dict[str, object] = CONFIG) -> str:
    text = write_card("me/it", manifest, config, Origin())  # type: ignore[arg-type]
    return text.partition("## Usage")[2].partition("\n## ")[0]


def test_the_section_on_vllm_states_its_plugin_and_its_limits(small_artifact: Path) -> None:
    section = usage(read_manifest(small_artifact)).partition("### vLLM")[2]
    assert "pip install vllm-bnb-plugin" in section
    assert "vllm serve me/it\n" in section
    assert "on one rank only" in section
    assert "rounds the offset of the 8-bit scales to the dtype of the model, usually bfloat16." in section
    assert "differ slightly from those of qformat and transformers" in section
    assert "--quantization" not in section


def test_the_section_on_vllm_mentions_no_rounding_for_scales_without_an_offset(small_artifact: Path) -> None:
    manifest = read_manifest(small_artifact)
    plain = {
        name: replace(record, layout=replace(record.layout, double_quant=False))
        for name, record in manifest.tensors.items()
        if isinstance(record, PackedRecord)
    }
    section = usage(replace(manifest, tensors=plain))
    assert "vllm-bnb-plugin" in section
    assert "rounds" not in section


@pytest.mark.parametrize(
    ("architecture", "model_class", "generates"),
    [
        ("LlamaForCausalLM", "AutoModelForCausalLM", True),
        ("LlamaForSequenceClassification", "AutoModelForSequenceClassification", False),
    ],
)
def test_the_usage_is_that_of_the_architecture(
    small_artifact: Path, architecture: str, model_class: str, generates: bool
) -> None:
    section = usage(read_manifest(small_artifact), {"architectures": [architecture]})
    assert f"from transformers import {model_class}, AutoTokenizer" in section
    assert f'{model_class}.from_pretrained("me/it", device_map="auto")' in section
    assert ("qformat generate it" in section) is generates
    assert ("vllm serve" in section) is generates


def test_texts_of_a_manifest_cannot_break_the_markup(small_artifact: Path) -> None:
    manifest = read_manifest(small_artifact)
    hostile = replace(
        manifest,
        generator="x | y\n# <script>alert(1)</script>",
        recipe={"rules": ["```\n# heading"]},
        evaluation={"texts": [{"name": "<b>\n| a", "perplexity": {"mean": 1.5, "standard_error": None}}]},
    )
    text = write_card("me/it", hostile, CONFIG, Origin())  # type: ignore[arg-type]
    assert "<script" not in text
    assert "# heading" not in [line.strip() for line in text.splitlines()]
    assert text.count("```") % 2 == 0
    assert "| &lt;b&gt; \\| a | – | 1.500 |" in text


def test_texts_of_the_source_and_of_figures_cannot_break_the_markup(small_artifact: Path) -> None:
    manifest = read_manifest(small_artifact)
    name = next(name for name, record in manifest.tensors.items() if isinstance(record, KeptRecord))
    kept = replace(manifest.tensors[name], reason="<i>why</i>|")  # type: ignore[arg-type]
    row = ErrorRow("<b>q|</b>", 1, 10, 0.1, 0.1, 20.0, 0.9)
    origin = Origin("base/it", None, License("other", "*free*\n# <s>", "javascript:alert(1)"), None, ["en\n---\n# x"])
    text = write_card(
        "me/__it__",
        replace(manifest, tensors={**manifest.tensors, name: kept}),
        CONFIG,  # type: ignore[arg-type]
        origin,
        figures=ErrorFigures((row,), row, 1),
    )
    for markup in ("<i>", "<b>", "<s>", "](javascript", "\n# x", "\n# __it__"):
        assert markup not in text
    assert "The licence of the source checkpoint applies: \\*free\\* \\# &lt;s&gt;." in text
    assert huggingface_hub.ModelCard(text).data.to_dict()["license_link"] == "javascript:alert(1)"


def test_an_evaluation_is_shown_without_the_figures_that_it_lacks(small_artifact: Path) -> None:
    manifest = read_manifest(small_artifact)

    def section(evaluation: object) -> str:
        text = write_card("me/it", replace(manifest, evaluation=evaluation), CONFIG, Origin())  # type: ignore[arg-type]
        return text.partition("## Evaluation")[2].partition("\n## ")[0]

    figure = {"mean": 0.01234, "standard_error": 0.0012}
    texts = [
        {
            "name": "prose",
            "predicted_tokens": 12345,
            "kl": figure,
            "perplexity": {"mean": 12.5, "standard_error": 0.25},
        },
        {"name": "code", "kl": {"mean": "many"}, "top1_agreement": True},
        7,
    ]
    shown = section({"window_length": 512, "texts": texts, "note": None})
    assert "| text | tokens | perplexity | KL from the source checkpoint, nats per token |" in shown
    assert "| prose | 12,345 | 12.500 ± 0.250 | 0.0123 ± 0.0012 |" in shown
    assert "| code | – | – | – |" in shown
    assert "Each window has 512 tokens." in shown
    for nothing in (None, {}, {"texts": []}, {"texts": [{}]}, {"texts": "many"}):
        assert section(nothing) == ""


def test_a_language_list_a_task_and_a_linked_licence_of_the_source_are_kept(small_artifact: Path) -> None:
    origin = Origin(
        "base/it", "0" * 40, License("other", "my-licence", "https://example.org/l"), "image-to-text", ["de", "en"]
    )
    data = huggingface_hub.ModelCard(write_card("me/it", read_manifest(small_artifact), {}, origin)).data.to_dict()
    assert data["language"] == ["de", "en"]
    assert data["pipeline_tag"] == "image-to-text"
    assert (data["license"], data["license_name"]) == ("other", "my-licence")


@pytest.mark.parametrize(
    ("config", "tag"),
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, "text-generation"),
        ({"architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {}}, "image-text-to-text"),
        ({"architectures": ["T5ForConditionalGeneration"]}, None),
        ({"architectures": ["LlamaForSequenceClassification"]}, "text-classification"),
        ({"architectures": "LlamaForCausalLM"}, None),
        ({}, None),
    ],
)
def test_the_task_follows_from_the_architecture(config: dict[str, object], tag: str | None) -> None:
    assert pipeline_tag_of(config) == tag  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ([], "the file is not an object"),
        ({"passed": False}, "did not pass"),
        ({"passed": True}, "manifest is not an object"),
        ({"passed": True, "manifest": {"files": {}}}, "other files"),
    ],
)
def test_an_unsuitable_verification_gives_no_figures(small_artifact: Path, record: object, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        ErrorFigures.parse(record, read_manifest(small_artifact), "figures.json")  # type: ignore[arg-type]
