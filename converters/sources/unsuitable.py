"""Says what a location is that is not a checkpoint, and how to get one from it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qformat.converters.sources.source import Source
from qformat.errors import Option, Reason, SourceError, UsageError, Words
from qformat.names import ADAPTER_CONFIG_NAME, CONFIG_NAME, INDEX_NAME, SINGLE_SHARD_NAME, SINGLE_TORCH_NAME

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://?|git@|(?:www\.)?(?:huggingface\.co|hf\.co)/")
_OF_THE_HUB = re.compile(
    r"(?:(?:https?|ssh)://?(?:[^/@]*@)?|git@)?(?:www\.)?(?:huggingface\.co|hf\.co)[/:]|hf://(?:models/)?"
)
_AT_THE_HUB = re.compile(
    r"(?P<name>[^/?#\s]+/[^/?#\s@]+?)(?:\.git)?(?:@(?P<at>[^/?#\s]+))?"
    r"(?:/(?:tree|blob|resolve|raw)/(?P<revision>[^/?#\s]+))?(?:[/?#].*)?"
)
_SECRET = re.compile(r"//[^/@]*@")
"""The user's name and token in an address, which no message may show."""

_PART_OF_MANY = re.compile(r".*-\d{5}-of-\d{5}\.(?:safetensors|bin)")

_SAVE_AGAIN = "Save the model with save_pretrained, which writes safetensors, and convert the result"


@dataclass(frozen=True, slots=True)
class _Sign:
    """A file or directory that tells what a directory is.

    Attributes:
        of: Whether an entry of the directory is one.
        problem: What the directory or the entry is.
        next_step: What the user can do.
        reason: Reason code.
    """

    of: Callable[[str], bool]
    problem: str
    next_step: str
    reason: Reason = Reason.UNSUPPORTED_SOURCE


def _named(*names: str) -> Callable[[str], bool]:
    return lambda entry: entry in names


def _ends(*suffixes: str) -> Callable[[str], bool]:
    return lambda entry: entry.endswith(suffixes)


_SIGNS = (
    _Sign(
        _named(ADAPTER_CONFIG_NAME),
        "belongs to a PEFT adapter (LoRA), and the directory holds no model",
        "Convert the base model and load the adapter on the artifact. Or merge the two with PEFT (merge_and_unload), "
        "save the result with save_pretrained, and convert that",
    ),
    _Sign(
        _named("model_index.json"),
        "belongs to a pipeline of diffusers, whose models are in directories of their own",
        "Give the directory of one model, such as text_encoder",
    ),
    _Sign(
        lambda entry: entry == "zero_to_fp32.py" or entry.startswith("global_step"),
        "belongs to a training with DeepSpeed ZeRO, whose weights are spread over processes",
        "Gather them with `python zero_to_fp32.py . DIR`, put config.json and the tokenizer into DIR, and convert it",
    ),
    _Sign(
        _named("pytorch_model_fsdp.bin"),
        "holds weights that accelerate saved under FSDP, and their name is not the one that readers look for",
        f"Rename it to {SINGLE_TORCH_NAME}, with the model's config.json and tokenizer beside it",
    ),
    _Sign(
        lambda entry: entry.startswith("pytorch_model_fsdp_") or entry.endswith(".distcp"),
        "holds shards of a training with FSDP, whose weights are spread over processes",
        "Merge them with `accelerate merge-weights`, put config.json and the tokenizer beside the result, and convert "
        "it",
    ),
    _Sign(
        _ends(".pt", ".pth"),
        "PyTorch .pt weights cannot be converted (`qformat info` lists the supported kinds of source)",
        _SAVE_AGAIN,
    ),
    _Sign(
        _ends(".msgpack"),
        "Flax weights cannot be converted (`qformat info` lists the supported kinds of source)",
        _SAVE_AGAIN,
    ),
    _Sign(
        _ends(".h5"),
        "TensorFlow weights cannot be converted (`qformat info` lists the supported kinds of source)",
        _SAVE_AGAIN,
    ),
    _Sign(
        lambda entry: _PART_OF_MANY.fullmatch(entry) is not None,
        "is one of several shards, but their index is missing",
        f"Fetch the index from where the shards come from ({INDEX_NAME}, or pytorch_model.bin.index.json)",
        reason=Reason.MISSING_FILE,
    ),
)
"""In order of precedence: the first one that an entry of the directory shows is named."""


def refuse_address(location: Path | str) -> None:
    """Reject an address on the web, which is neither a path nor a repository's name.

    Raises:
        UsageError: The location is an address.
    """
    text = str(location)
    if _ADDRESS.match(text) is None or os.path.lexists(text):
        return
    at_hub = _OF_THE_HUB.match(text)
    found = _AT_THE_HUB.fullmatch(text[at_hub.end() :]) if at_hub is not None else None
    text = _SECRET.sub("//", text)
    if found is None:
        raise UsageError(
            f"{text}: is an address. Give the directory of a checkpoint, or a repository of the Hub as owner/name"
        )
    revision = found["revision"] or found["at"]
    words: Words = (f"{text}: is an address. Give the repository of the Hub as {found['name']}",)
    if revision not in {None, "main"}:
        words = (*words, ", with ", Option("revision", revision))
    raise UsageError(*words)


def not_a_checkpoint(path: Path, names: list[str]) -> SourceError:
    """Return the error for a location without weights that can be read.

    Args:
        path: The location.
        names: Names of its entries, sorted; none if it is not a directory.
    """
    if not names and not os.path.isdir(path):
        if os.path.isfile(path):
            problem, step = "is a file", f"Give the folder that holds it: {path.parent}"
        else:
            problem = "is not a directory" if os.path.lexists(path) else "does not exist"
            step = "Give the directory of a checkpoint, or a Hub repository as owner/name"
        return SourceError(Reason.MISSING_FILE, path, problem, next_step=step)
    for sign in _SIGNS:
        found = next((name for name in names if sign.of(name)), None)
        if found is not None:
            return SourceError(sign.reason, path / found, sign.problem, next_step=sign.next_step)
    others = [name for name in names if name.endswith((".safetensors", ".bin"))]
    hint = f" (found {', '.join(others[:5])})" if others else ""
    return SourceError(Reason.MISSING_FILE, path, f"has neither {INDEX_NAME} nor {SINGLE_SHARD_NAME}{hint}")


def refuse_mlx(source: Source) -> None:
    """Reject a checkpoint that MLX quantized: its config names bits and group size, but no method.

    Raises:
        SourceError: MLX quantized the checkpoint.
    """
    for field in ("quantization", "quantization_config"):
        record = source.config.get(field)
        if not isinstance(record, dict) or "quant_method" in record or not {"bits", "group_size"} <= record.keys():
            continue
        raise SourceError(
            Reason.ALREADY_QUANTIZED, source.location / CONFIG_NAME,
            f"the checkpoint is already quantized by MLX ({record['bits']} bits, groups of {record['group_size']})",
            field=field, next_step="Convert the 16-bit checkpoint that it was made from; its model card names it",
        )  # fmt: skip
