"""What runs on a damaged copy: every command and function that reads such a file, on a few tokens."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from qformat.artifact.reading.reader import open_artifact
from qformat.cli.main import run
from qformat.errors import QformatError
from qformat.model.load import load_model


class Refusal(Exception):
    """A command ended with an exit code other than 0. The message is its error, or all of its output."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the files of a run are.

    Attributes:
        originals: Folder of the undamaged files.
        copy: Folder that holds the damaged copy under the name of its original.
        out: Path for the output.
        file: Name of the damaged file.
    """

    originals: Path
    copy: Path
    out: Path
    file: str = ""

    def folder(self, name: str) -> Path:
        """Return the damaged copy of a folder if there is one, otherwise the original."""
        return self.copy / name if (self.copy / name).exists() else self.originals / name


@dataclass(frozen=True, slots=True)
class Command:
    """One command or function.

    Attributes:
        name: Name for messages.
        run: Runs it and returns its result, if runs on different copies can be compared by it.
        compares_weights: It builds on the bytes of weights, so it compares them with their digests first.
        one_in: It runs on every copy, or on one in this many.
    """

    name: str
    run: Callable[[Place], bytes | None]
    compares_weights: bool = False
    one_in: int = 1


def _cli(*arguments: str | Path) -> str:
    """Run a command of the command line in this process and return its standard output."""
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        code = run([str(argument) for argument in arguments])
    if code:
        parts = re.split(r"^Error: ", errors.getvalue(), flags=re.MULTILINE)
        raise Refusal(parts[-1] if len(parts) > 1 else printed.getvalue() + errors.getvalue())
    return printed.getvalue()


def _bytes_of(paths: Iterable[Path]) -> bytes:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.digest()


def _open(place: Place) -> bytes:
    digest = hashlib.sha256()
    with open_artifact(place.folder("artifact")) as artifact:
        for name in sorted(artifact):
            digest.update(name.encode() + artifact[name].decode().tobytes())
    return digest.digest()


def _load(name: str) -> Callable[[Place], bytes]:
    def load(place: Place) -> bytes:
        model = load_model(place.folder(name), device="cpu")
        with torch.inference_mode():
            logits = model(input_ids=torch.arange(8)[None], use_cache=False).logits
        return bytes(logits.float().numpy().tobytes())

    return load


def _generate(name: str, *more: str) -> Callable[[Place], bytes]:
    def generate(place: Place) -> bytes:
        adapter = ["--adapter", place.folder("trained")] if name == "trained" else []
        artifact = place.folder("artifact" if name == "trained" else name)
        arguments = ["--device", "cpu", "--max-new-tokens", "3", "--json", *more]
        return str(
            json.loads(_cli("generate", artifact, "--prompt", "the block", *adapter, *arguments))["text"]
        ).encode()

    return generate


def _verify(place: Place) -> None:
    _cli("verify", place.folder("artifact"))


def _inspect(place: Place) -> None:
    _cli("inspect", place.folder("artifact"), "--json")


def _export(place: Place) -> bytes:
    _cli("export", place.folder("artifact"), place.out, "--to", "bf16", "--workers", "1")
    return _bytes_of(place.out.glob("*.safetensors"))


def _convert(name: str) -> Callable[[Place], bytes]:
    def convert(place: Place) -> bytes:
        _cli("convert", place.folder(name), place.out, "--workers", "1")
        return _bytes_of(place.out.glob("*.safetensors"))

    return convert


def train_arguments(place: Place, data: Path, *more: str) -> list[str]:
    """Return the arguments of a training of two steps that saves a checkpoint after each."""
    arguments = "--max-steps 2 --save-every 1 --batch-size 1 --grad-accum 1 --seq-len 64 --rank 2 --device cpu"
    return ["train", str(place.folder("artifact")), str(place.out), "--data", str(data), *arguments.split(), *more]


def _data_file(place: Place) -> Path:
    return place.folder("data") / (place.file if (place.folder("data") / place.file).is_file() else "rows.jsonl")


def _train(place: Place) -> bytes:
    _cli(*train_arguments(place, _data_file(place)))
    return _bytes_of([place.out / "adapter_model.safetensors"])


def _train_on_chats(place: Place) -> bytes:
    _cli(*train_arguments(place, place.folder("data") / "chats.jsonl"))
    return _bytes_of([place.out / "adapter_model.safetensors"])


def _resume(place: Place) -> bytes:
    if not place.out.exists():
        shutil.copytree(place.folder("interrupted"), place.out)
    _cli(*train_arguments(place, place.folder("data") / "rows.jsonl", "--resume", "latest"))
    return _bytes_of([place.out / "adapter_model.safetensors"])


def _eval(place: Place) -> None:
    file = _data_file(place)
    data = place.folder("data") / "text.txt" if file.name == "rows.jsonl" and place.file != file.name else file
    arguments = "--seq-len 16 --windows 2 --device cpu --record"
    _cli("eval", place.folder("artifact"), "--data", data, *arguments.split())


def _tune(place: Place) -> bytes:
    data = place.folder("data") / (place.file if (place.folder("data") / place.file).is_file() else "text.txt")
    arguments = "--seq-len 16 --held-out 1 --steps 1 --batch-size 1 --device cpu --accept-worse"
    _cli("tune", place.folder("artifact"), place.out, "--source", place.folder("source"), "--data", data,
         *arguments.split())  # fmt: skip
    return _bytes_of(place.out.glob("*.safetensors"))


COMMANDS: dict[str, tuple[Command, ...]] = {
    "artifact": (
        Command("open", _open),
        Command("verify", _verify, compares_weights=True),
        Command("inspect", _inspect),
        Command("load", _load("artifact")),
        Command("generate", _generate("artifact")),
        Command("generate --chat", _generate("artifact", "--chat"), one_in=2),
        Command("export", _export, compares_weights=True),
        Command("train", _train, compares_weights=True, one_in=3),
        Command("train on chats", _train_on_chats, compares_weights=True, one_in=4),
        Command("tune", _tune, compares_weights=True, one_in=4),
        Command("eval --record", _eval, compares_weights=True, one_in=3),
    ),
    "folder_4bit": (
        Command("load", _load("folder_4bit")),
        Command("generate", _generate("folder_4bit")),
        Command("convert", _convert("folder_4bit")),
    ),
    "trained": (Command("generate --adapter", _generate("trained")),),
    "interrupted": (Command("train --resume", _resume, compares_weights=True),),
    "data": (Command("train", _train), Command("eval", _eval, one_in=2), Command("tune", _tune, one_in=4)),
    "source": (Command("convert", _convert("source")),),
    "source_bin": (Command("convert", _convert("source_bin")),),
    "source_gguf": (Command("convert", _convert("source_gguf")),),
}
"""The commands that run on a copy, by the name of its original."""

REFUSALS = (QformatError, Refusal)
