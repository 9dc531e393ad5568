"""The table of all classes of damage, and the copies that a run makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.corpus.damage import components, data_files, json_files, shards, sources, texts, trainings
from tests.corpus.damage.edits import Generator
from tests.spec import edits


def _refresh(folder: Path) -> None:
    edits.apply([{"op": "refresh"}], folder)


def _seal(folder: Path) -> None:
    edits.apply([{"op": "seal"}], folder)


@dataclass(frozen=True, slots=True)
class DamageClass:
    """One class of damage.

    Attributes:
        name: Name of the class.
        original: Folder of `tests.corpus.originals` that is copied.
        generate: Damages the copy.
        reseal: Makes every digest anew, None if the class has no digests.
        raw: Whether copies without new digests are made, too.
        digests: Whether the original has digests that raw damage contradicts.
    """

    name: str
    original: str
    generate: Generator
    reseal: Callable[[Path], None] | None = None
    raw: bool = True
    digests: bool = True


def _of_artifact(name: str, generate: Generator) -> DamageClass:
    return DamageClass(name, "artifact", generate, _refresh)


def _without_digests(name: str, original: str, generate: Generator) -> DamageClass:
    return DamageClass(name, original, generate, digests=False)


CLASSES = (
    _of_artifact("framing", shards.frame),
    _of_artifact("header bytes", shards.header_bytes),
    _of_artifact("header object", shards.header_object),
    _of_artifact("header values", shards.header_odd),
    _of_artifact("shards exchanged", shards.exchanged),
    _of_artifact("component bits", components.bits),
    _of_artifact("scales that are not finite", components.non_finite),
    _of_artifact("kept values", components.bad_norm),
    _of_artifact("quant_state", components.quant_state),
    _of_artifact("component layout", components.layout),
    DamageClass("manifest bytes", "artifact", json_files.manifest_bytes),
    DamageClass("manifest object", "artifact", json_files.manifest_object, _seal, raw=False),
    _of_artifact("index", json_files.index),
    _of_artifact("index entries", json_files.index_entries),
    _of_artifact("config", json_files.config),
    _of_artifact("config values", json_files.config_values),
    _of_artifact("quantization_config", json_files.quantization),
    _of_artifact("generation_config", json_files.generation),
    _of_artifact("generation values", json_files.generation_values),
    _of_artifact("tokenizer", texts.tokenizer),
    _of_artifact("tokenizer values", texts.tokenizer_values),
    _of_artifact("tokenizer_config", texts.tokenizer_config),
    _of_artifact("tokenizer_config values", texts.tokenizer_config_values),
    _of_artifact("template bytes", texts.template_bytes),
    _of_artifact("template programs", texts.template_programs),
    DamageClass("accompanying", "artifact", texts.accompanying),
    DamageClass("unlisted files", "artifact", texts.unlisted),
    _without_digests("4-bit folder: bits", "folder_4bit", components.bits),
    _without_digests("4-bit folder: quant_state", "folder_4bit", components.quant_state),
    _without_digests("4-bit folder: layout", "folder_4bit", components.layout),
    _without_digests("4-bit folder: scales", "folder_4bit", components.non_finite),
    _without_digests("adapter config", "trained", trainings.adapter_config),
    _without_digests("adapter values", "trained", trainings.adapter_values),
    _without_digests("adapter weights", "trained", trainings.adapter_weights),
    _without_digests("adapter base", "trained", trainings.base_record),
    _without_digests("adapter tokenizer", "trained", trainings.adapter_tokenizer),
    DamageClass("checkpoint bytes", "interrupted", trainings.checkpoint_bytes, trainings.reseal_checkpoint),
    DamageClass("checkpoint pickles", "interrupted", trainings.checkpoint_pickles, trainings.reseal_checkpoint),
    DamageClass("checkpoint state", "interrupted", trainings.checkpoint_state, trainings.reseal_checkpoint),
    _without_digests("data: JSON Lines", "data", data_files.rows),
    _without_digests("data: chats", "data", data_files.chats),
    _without_digests("data: array", "data", data_files.array),
    _without_digests("data: Parquet bytes", "data", data_files.parquet_bytes),
    _without_digests("data: Parquet columns", "data", data_files.parquet_columns),
    _without_digests("data: text", "data", data_files.text),
    _without_digests("source: shard", "source", sources.shard),
    _without_digests("source: index", "source", sources.source_index),
    _without_digests("source: config", "source", sources.source_config),
    _without_digests("source: texts", "source", sources.source_texts),
    _without_digests("source: .bin bytes", "source_bin", sources.torch_bytes),
    _without_digests("source: .bin storage", "source_bin", sources.torch_storage),
    _without_digests("source: .bin objects", "source_bin", sources.torch_objects),
    _without_digests("source: GGUF bytes", "source_gguf", sources.gguf_bytes),
    _without_digests("source: GGUF header", "source_gguf", sources.gguf_header),
)

BY_NAME = {found.name: found for found in CLASSES}


@dataclass(frozen=True, slots=True)
class Copy:
    """A damaged copy, which its class, its seed and whether it was resealed determine."""

    kind: str
    seed: int
    resealed: bool

    def __str__(self) -> str:
        return f"{self.kind!r} {self.seed} {'resealed' if self.resealed else 'raw'}"


def copies(n: int) -> list[Copy]:
    """Return the first `n` copies. Every class comes in turn, raw and resealed."""

    def forms() -> Iterator[tuple[str, bool]]:
        for kind in CLASSES:
            if kind.raw:
                yield kind.name, False
            if kind.reseal is not None:
                yield kind.name, True

    table = list(forms())
    return [Copy(*table[i % len(table)][:1], i // len(table), table[i % len(table)][1]) for i in range(n)]
