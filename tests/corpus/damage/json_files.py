"""Damage to the manifest, the index, config.json and generation_config.json of an artifact."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from tests.corpus.damage.edits import Damage
from tests.corpus.damage.odd_json import damage_json, odd_edit, set_json

INDEX, CONFIG, MANIFEST = "model.safetensors.index.json", "config.json", "qformat.json"


def manifest_bytes(random: Random, folder: Path) -> Damage:
    return Damage((MANIFEST,), damage_json(random, folder / MANIFEST))


def manifest_object(random: Random, folder: Path) -> Damage:
    """Change the object in the manifest and seal it again, as a hostile writer would."""
    path = folder / MANIFEST
    record = json.loads(path.read_bytes())
    seal = record.pop("manifest_sha256")
    what = "; ".join(odd_edit(random, record) for _ in range(random.choice([1, 1, 2])))
    record["manifest_sha256"] = seal
    path.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    # A name or a digest that was changed contradicts the file or the tensor that has it.
    return Damage((MANIFEST, ".safetensors", INDEX, CONFIG, *record_files(folder)), what)


def record_files(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.iterdir()))


def index(random: Random, folder: Path) -> Damage:
    return Damage((INDEX,), damage_json(random, folder / INDEX))


def index_entries(random: Random, folder: Path) -> Damage:
    """Change which file has a tensor, or which tensors there are."""
    path = folder / INDEX
    record = json.loads(path.read_bytes())
    entries = record["weight_map"]
    name = random.choice(list(entries))
    files = [*{*entries.values()} - {entries[name]}, "../x.safetensors", "/dev/zero", "", "x", CONFIG, "a\x1b[2J"]
    match random.randrange(3):
        case 0:
            del entries[name]
            what = f"{name} removed"
        case 1:
            entries[name + "x"] = entries[name]
            what = f"{name}x added"
        case _:
            entries[name] = random.choice(files)
            what = f"{name} in {entries[name]!r}"
    path.write_text(json.dumps(record), "utf-8")
    return Damage((INDEX, ".safetensors"), what, must_refuse=True)


_CONFIGS: list[tuple[tuple[str, ...], Any]] = [
    *((("num_hidden_layers",), value) for value in (0, -1, 2, 3_000_000, "1", 1.5, None, [1])),
    *((("hidden_size",), value) for value in (0, -64, 63, 2**31, "64", None)),
    *((("intermediate_size",), value) for value in (0, 2**33, "x", [128])),
    *((("num_attention_heads",), value) for value in (0, -1, 3, 2**31, "2", {}, None)),
    *((("num_key_value_heads",), value) for value in (0, 3, "x")),
    *((("head_dim",), value) for value in (0, -1, 7, "x", 2**40)),
    *((("vocab_size",), value) for value in (0, -1, 319, 2**40, "320", None)),
    *((("max_position_embeddings",), value) for value in (0, -1, 1, "x", 2**40)),
    *((("rms_norm_eps",), value) for value in (0, -1, "x", None, 1e300)),
    *((("rope_theta",), value) for value in (0, -1, "x", None)),
    *((("rope_scaling",), value) for value in ({}, {"type": "x"}, {"rope_type": "yarn"}, "x", [])),
    *((("rope_parameters",), value) for value in ({}, {"rope_type": "x"}, {"rope_type": "yarn", "factor": 0}, 3)),
    *((("dtype",), value) for value in ("load", "float8_e4m3fn", "int8", "x", 3, {}, "float16")),
    *((("torch_dtype",), value) for value in ("load", "hub", "", "int64", None)),
    *((("architectures",), value) for value in ([], "LlamaForCausalLM", ["Nope"], [3], None, ["LlamaModel"],
                                                ["AutoModel"], ["logging"], ["T5ForConditionalGeneration"])),
    *((("model_type",), value) for value in ("", "x", "gpt2", 3, None, "\x1b[31m", "a" * 5000, "mixtral")),
    *((("hidden_act",), value) for value in ("eval", "", 3, None)),
    *((("attn_implementation",), value) for value in ("owner/kernel", "x", 3)),
    *((("_attn_implementation",), value) for value in ("owner/kernel", "x")),
    *((("auto_map",), value) for value in ({"AutoConfig": "x.Y"}, {"AutoModelForCausalLM": "o/r--m.C"}, "x", [1])),
    *((("tie_word_embeddings",), value) for value in (True, "x", 1)),
    *((("bos_token_id",), value) for value in (2**40, -1, "x", [])),
    *((("eos_token_id",), value) for value in ([], {}, "x", [1, "x"])),
    *((("use_cache",), value) for value in ("x", None)),
    *((("layer_types",), value) for value in ([], ["x"], "x", ["full_attention"] * 3)),
    *((("attention_bias",), value) for value in (True, "x")),
    *((("mlp_bias",), value) for value in (True, "x")),
    *((("id2label",), value) for value in (3, {"x": "y"}, [])),
    *((("num_labels",), value) for value in (10**9, -1, "x")),
    *((("pad_token_id",), value) for value in (10**9, -2, "x")),
]  # fmt: skip


def config_values(random: Random, folder: Path) -> Damage:
    """Set a member of config.json to a value that a model cannot have, or that costs much."""
    place, value = random.choice(_CONFIGS)
    # Which of two files is wrong cannot be known if config.json contradicts the tensors.
    return Damage((CONFIG,), set_json(folder / CONFIG, place, value))


_QUANTIZATION: list[tuple[str, Any]] = [
    *(("quant_method", value) for value in ("gptq", "", None, 3)),
    *(("load_in_4bit", value) for value in (False, "true", 1)),
    *(("bnb_4bit_quant_type", value) for value in ("fp4", "", None)),
    *(("bnb_4bit_quant_storage", value) for value in ("float16", None, "load")),
    *(("llm_int8_skip_modules", value) for value in (None, "lm_head", [3], ["model.layers.0.mlp.up_proj"], ["model"])),
]  # fmt: skip


def quantization(random: Random, folder: Path) -> Damage:
    """Change what config.json tells other readers about the weights."""
    name, value = random.choice(_QUANTIZATION)
    what = set_json(folder / CONFIG, ("quantization_config", name), value)
    return Damage((CONFIG,), what, must_refuse=True)


def config(random: Random, folder: Path) -> Damage:
    return Damage((CONFIG,), damage_json(random, folder / CONFIG))


_GENERATION: list[tuple[str, Any]] = [
    *(("max_length", value) for value in (0, -1, 10**12, "x", None)),
    *(("max_new_tokens", value) for value in (0, -1, 10**12, "x")),
    *(("temperature", value) for value in (0, -1, "x", 1e-40, float("nan"))),
    *(("top_k", value) for value in (0, -1, 10**12, "x", 1.5)),
    *(("top_p", value) for value in (0, -1, 2, "x")),
    *(("num_beams", value) for value in (0, -1, 10**6, "x")),
    *(("num_return_sequences", value) for value in (0, 10**6, "x")),
    *(("eos_token_id", value) for value in ([], "x", {}, 10**12, [[1]], -5)),
    *(("pad_token_id", value) for value in (10**12, "x", -7, [1])),
    *(("bad_words_ids", value) for value in ([], [[]], [[10**9]], "x")),
    *(("suppress_tokens", value) for value in ([10**9], "x", [])),
    *(("forced_eos_token_id", value) for value in (10**9, "x")),
    *(("sequence_bias", value) for value in ({}, "x", [[[1], 2.0]], [[[10**9], 1.0]])),
    *(("cache_implementation", value) for value in ("x", "static", 3)),
    *(("cache_config", value) for value in ("x", {"backend": "x"}, [])),
    *(("do_sample", value) for value in (True, "x", 3)),
    *(("repetition_penalty", value) for value in (0, -1, "x", float("inf"))),
    *(("no_repeat_ngram_size", value) for value in (10**9, -1, "x")),
    *(("custom_generate", value) for value in ("owner/name", 3)),
    *(("compile_config", value) for value in ({}, "x", {"mode": "x"})),
    *(("watermarking_config", value) for value in ({}, "x", {"greenlist_ratio": 0})),
    *(("assistant_early_exit", value) for value in (1, "x")),
    *(("guidance_scale", value) for value in (3.0, "x")),
    *(("stop_strings", value) for value in (["x"], 3, [""])),
    *(("prompt_lookup_num_tokens", value) for value in (10**6, "x", 2)),
    *(("penalty_alpha", value) for value in (0.5, "x")),
    *(("dola_layers", value) for value in ("high", [10**9])),
    *(("transformers_version", value) for value in (3, "x", None)),
]  # fmt: skip


def generation_values(random: Random, folder: Path) -> Damage:
    """Set a member of generation_config.json to a value that generation cannot use, or that costs much."""
    name, value = random.choice(_GENERATION)
    return Damage(("generation_config.json",), set_json(folder / "generation_config.json", (name,), value))


def generation(random: Random, folder: Path) -> Damage:
    return Damage(("generation_config.json",), damage_json(random, folder / "generation_config.json"))
