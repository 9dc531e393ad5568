"""Damage to an adapter, and to the checkpoint of an interrupted training."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from random import Random
from typing import Any

import torch

from tests.artifact.damaged import rewrite_shard
from tests.corpus.damage.edits import Damage, any_edit, append, flip_bit, truncate, zero_sector
from tests.corpus.damage.odd_json import damage_json, set_json

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "qformat_base.json"


def adapter_config(random: Random, folder: Path) -> Damage:
    return Damage((CONFIG, WEIGHTS), damage_json(random, folder / CONFIG))


CONFIG_VALUES: list[tuple[str, Any]] = [
    *(("r", value) for value in (0, -1, 2**30, "x", None, 1.5, [2], 3)),
    *(("lora_alpha", value) for value in (0, "x", None, 1e308, float("nan"))),
    *(("target_modules", value) for value in ([], "x", "(a+)+$", None, ["nope"], [3], "(", "all-linear", "." * 60)),
    *(("peft_type", value) for value in ("x", None, 3, "PREFIX_TUNING", "LOHA", "IA3", "BONE")),
    *(("task_type", value) for value in ("x", 3, None, "SEQ_CLS")),
    *(("rank_pattern", value) for value in ({"(a+)+$": 3}, {"(": 3}, {"q_proj": 2**30}, "x", {"q_proj": "x"})),
    *(("alpha_pattern", value) for value in ({"(a+)+$": 3}, {"q_proj": "x"}, [])),
    *(("layers_to_transform", value) for value in (10**9, [10**9], "x", [-1], [])),
    *(("layers_pattern", value) for value in ("(", "x", ["(a+)+"])),
    *(("modules_to_save", value) for value in (["nope"], "x", [3], ["lm_head"], ["embed_tokens"])),
    *(("trainable_token_indices", value) for value in ([10**9], [-1], ["x"], {"embed_tokens": [10**9]}, "x")),
    *(("target_parameters", value) for value in (["nope"], "x", [3])),
    *(("init_lora_weights", value) for value in ("x", "pissa", "loftq", 3, "eva")),
    *(("loftq_config", value) for value in ({"loftq_bits": 0}, "x")),
    *(("use_dora", value) for value in (True, "x")),
    *(("use_rslora", value) for value in ("x", True)),
    *(("bias", value) for value in ("x", "all", 3)),
    *(("fan_in_fan_out", value) for value in (True, "x")),
    *(("exclude_modules", value) for value in ("(", "(a+)+$", ["q_proj"], 3)),
    *(("auto_mapping", value) for value in ({"base_model_class": "x", "parent_library": "os"}, "x")),
    *(("base_model_name_or_path", value) for value in ("\x1b[2J", 3, None, "a" * 10_000)),
    *(("megatron_config", value) for value in ({}, "x")),
    *(("corda_config", value) for value in ({}, "x")),
    *(("lora_dropout", value) for value in (2.0, -1, "x")),
    *(("revision", value) for value in (3, "x")),
    *(("inference_mode", value) for value in ("x", False)),
]  # fmt: skip


def adapter_values(random: Random, folder: Path) -> Damage:
    """Set a member of adapter_config.json to a value that PEFT may not expect."""
    name, value = random.choice(CONFIG_VALUES)
    return Damage((CONFIG, WEIGHTS), set_json(folder / CONFIG, (name,), value))


def adapter_weights(random: Random, folder: Path) -> Damage:
    """Damage the file of an adapter's weights."""
    path = folder / WEIGHTS
    length = int.from_bytes(path.read_bytes()[:8], "little")
    match random.randrange(6):
        case 0:
            return Damage((WEIGHTS,), truncate(random, path), must_refuse=True)
        case 1:
            return Damage((WEIGHTS,), append(random, path), must_refuse=True)
        case 2:
            return Damage((WEIGHTS,), flip_bit(random, path, 0, 8), must_refuse=True)
        case 3:
            return Damage((WEIGHTS, CONFIG), flip_bit(random, path, 8, 8 + length))
        case 4:
            # No digest of them exists. A message may be about the result: a value that is not finite.
            return Damage((WEIGHTS, folder.name), flip_bit(random, path, 8 + length))
        case _:
            return Damage((WEIGHTS, CONFIG), _tensor(random, path))


def _tensor(random: Random, path: Path) -> str:
    """Remove, rename or reshape a tensor of the adapter, in a valid file."""
    action = random.choice(["removed", "renamed", "transposed", "shorter", "added"])

    def change(header: dict[str, dict[str, Any]], parts: dict[str, bytes]) -> None:
        name = random.choice(list(header))
        entry = header[name]
        if action == "removed":
            del header[name]
        elif action == "renamed":
            new = random.choice([name + "x", "x", name.replace("lora_A", "lora_B"), name.replace("0", "7")])
            header[new], parts[new] = header.pop(name), parts[name]
        elif action == "transposed":
            entry["shape"] = entry["shape"][::-1]
        elif action == "shorter":
            rows, *rest = entry["shape"]
            parts[name] = parts[name][: len(parts[name]) // rows * (rows - 1)]
            entry["shape"] = [rows - 1, *rest]
        else:
            header["x"], parts["x"] = {**entry}, parts[name]

    rewrite_shard(path, change)
    return f"a tensor {action}"


def base_record(random: Random, folder: Path) -> Damage:
    return Damage((BASE, CONFIG), damage_json(random, folder / BASE))


def adapter_tokenizer(random: Random, folder: Path) -> Damage:
    """Damage a file of the tokenizer that lies beside the adapter."""
    name = random.choice(["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
    files = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    edit = any_edit if name.endswith("jinja") else damage_json
    return Damage(files, edit(random, folder / name))


def latest(folder: Path) -> Path:
    """Return the newest checkpoint of a training."""
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def checkpoint_bytes(random: Random, folder: Path) -> Damage:
    """Damage the bytes of any file of the newest checkpoint."""
    checkpoint = latest(folder)
    path = random.choice(sorted(path for path in checkpoint.rglob("*") if path.is_file()))
    edit = random.choice([any_edit, flip_bit, zero_sector])
    # A seal with the name of another file is right about itself.
    files = (path.name, checkpoint.name) if path.name == "checkpoint.json" else (path.name,)
    return Damage(files, f"{path.name}: {edit(random, path)}")


class _Foreign:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("a pickle was run",)


_PICKLES: list[Any] = [
    {}, [], None, 3, "x", {"state": {}}, {"state": {0: {}}, "param_groups": []}, {"x": torch.zeros(3)},
    [torch.zeros(2)],
    {"state": {0: {"step": "x"}}, "param_groups": [{"params": [0]}]}, {"cpu": "x"}, {"python": (3, (1,), None)},
    {"_step_count": "x"}, {"last_epoch": None, "base_lrs": "x"}, torch.zeros(5), {"cpu": torch.zeros(7)}, _Foreign(),
]  # fmt: skip


def checkpoint_pickles(random: Random, folder: Path) -> Damage:
    """Replace a pickle of the newest checkpoint with one of other objects, in one of the forms that torch reads."""
    checkpoint = latest(folder)
    path = random.choice(sorted(path for path in checkpoint.rglob("*") if path.suffix in {".pt", ".pth", ".bin"}))
    chosen = random.choice(_PICKLES)
    if random.random() < 0.7:
        torch.save(chosen, path)
    else:
        buffer = io.BytesIO()
        pickle.dump(chosen, buffer)
        path.write_bytes(buffer.getvalue())
    return Damage((path.name, checkpoint.name), f"{path.name}: {type(chosen).__name__} {str(chosen)[:60]}")


def checkpoint_state(random: Random, folder: Path) -> Damage:
    """Damage a JSON file of the newest checkpoint other than its seal."""
    checkpoint = latest(folder)
    path = random.choice(sorted(path for path in checkpoint.rglob("*.json") if path.name != "checkpoint.json"))
    return Damage((path.name, checkpoint.name), f"{path.name}: {damage_json(random, path)}")


def reseal_checkpoint(folder: Path) -> None:
    """Give every file of the newest checkpoint a new digest."""
    import xxhash

    checkpoint = latest(folder)
    path = checkpoint / "checkpoint.json"
    try:
        seal = json.loads(path.read_bytes())
    except ValueError:
        return
    if not isinstance(seal, dict) or not isinstance(seal.get("files"), dict):
        return
    for name, record in seal["files"].items():
        file = checkpoint / name
        if isinstance(record, dict) and file.is_file():
            data = file.read_bytes()
            record |= {"nbytes": len(data), "xxh3": xxhash.xxh3_128_hexdigest(data)}
    seal.pop("seal_xxh3", None)
    text = json.dumps(seal, separators=(",", ":"), ensure_ascii=False)
    seal["seal_xxh3"] = xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))
    path.write_text(json.dumps(seal, indent=2), "utf-8")
