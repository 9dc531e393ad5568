"""`qformat inspect`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qformat import strict_json
from qformat.cli.display import echo, echo_json, echo_layout, format_table
from qformat.cli.options import json_option, options_record
from qformat.errors import UsageError
from qformat.sizes import format_nbytes

if TYPE_CHECKING:
    from qformat.artifact.reading.reader import Artifact, PackedTensor

N_SHOWN_VALUES = 8
N_COLUMNS_OF_BARS = 60


@dataclass(frozen=True, slots=True)
class InspectArguments:
    """Arguments of `qformat inspect`, under the names of the options."""

    path: Path
    tensor: str | None
    as_json: bool


@click.command(
    epilog="""\b
Examples:
  qformat inspect SmolLM2-135M-Instruct-nf4
  qformat inspect SmolLM2-135M-Instruct-nf4 \\
      --tensor model.layers.0.mlp.up_proj.weight"""
)
@click.argument("path", metavar="PATH", type=click.Path(path_type=Path))
@click.option(
    "--tensor", metavar="NAME", help="Show one tensor: components, digests, distribution of codes and first values."
)
@json_option()
@options_record(InspectArguments)
def command(options: InspectArguments) -> None:
    """Show the tensors of the artifact or checkpoint in folder PATH.

    Without --tensor, only headers are read.
    """
    from qformat.names import MANIFEST_NAME

    path, tensor = options.path, options.tensor
    if os.path.lexists(path / MANIFEST_NAME):  # a broken link, too: opening it says what is wrong
        from qformat.artifact.reading.reader import open_artifact

        with open_artifact(path) as artifact:
            facts = _artifact_facts(artifact) if tensor is None else _tensor_facts(artifact, tensor)
            show = _show_artifact if tensor is None else _show_tensor
    else:
        facts = _checkpoint_facts(path, tensor)
        show = _show_checkpoint
    if options.as_json:
        echo_json(facts)
    else:
        show(facts)


def _artifact_facts(artifact: Artifact) -> dict[str, Any]:
    from qformat.artifact.manifest import PackedRecord

    manifest = artifact.manifest
    tensors = []
    for name, record in manifest.tensors.items():
        if isinstance(record, PackedRecord):
            nbytes = sum(artifact.located[name + part.value].entry.nbytes for part in record.components)
            layout = record.layout
            options = f"block {layout.block_size}" + (", double quantization" if layout.double_quant else "")
            entry = {
                "encoding": "nf4",
                "dtype": layout.float_format.value,
                "shape": layout.shape,
                "how": options,
            }
        else:
            nbytes = artifact.located[name].entry.nbytes
            entry = {"encoding": "kept", "dtype": record.dtype, "shape": record.shape, "how": record.reason}
        shard = artifact.located[name].shard
        tensors.append({"name": name, **entry, "nbytes": nbytes, "shard": shard})
    return {
        "path": str(artifact.path),
        "format_version": manifest.format_version,
        "generator": manifest.generator,
        "source": manifest.source,
        "recipe": manifest.recipe,
        "evaluation": manifest.evaluation,
        "nbytes": sum(record.nbytes for record in manifest.files.values()),
        "files": {name: {"nbytes": record.nbytes, "sha256": record.sha256} for name, record in manifest.files.items()},
        "tensors": tensors,
    }


def _show_artifact(facts: Mapping[str, Any]) -> None:
    recipe = facts["recipe"]
    echo(f"{facts['path']}: qformat artifact, format {facts['format_version']}, by {facts['generator']}")
    source = facts["source"]
    where = f", {source['repository']} at commit {source.get('commit')}" if "repository" in source else ""
    echo(f"source: {source.get('kind')}, {len(source.get('files', {}))} files{where}")
    echo(f"recipe: {strict_json.dumps(recipe)}")
    if facts["evaluation"] is not None:
        echo(f"evaluation: {strict_json.dumps(facts['evaluation'])}")
    _show_tensor_table(facts["tensors"])
    counts = Counter(entry["encoding"] for entry in facts["tensors"])
    echo(
        f"{counts['nf4']} packed and {counts['kept']} kept tensors, {len(facts['files']) + 1} files, "
        f"{format_nbytes(facts['nbytes'])}"
    )


def _show_tensor_table(tensors: list[dict[str, Any]]) -> None:
    """Print one table per way of storing tensors, which keeps the tables narrow."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in tensors:
        groups.setdefault(f"{entry['encoding']}, {entry['dtype']}, {entry['how']}", []).append(entry)
    for heading, entries in groups.items():
        rows = [("tensor", "shape", "bytes")]
        rows += [(entry["name"], "x".join(map(str, entry["shape"])), f"{entry['nbytes']:,}") for entry in entries]
        echo("", heading)
        echo_layout(format_table(rows, right=(1, 2)))
    echo()


def _tensor_facts(artifact: Artifact, name: str) -> dict[str, Any]:
    from qformat.artifact.reading.reader import PackedTensor

    if name not in artifact:
        raise UsageError(_no_such_tensor(name, list(artifact)))
    tensor = artifact[name]
    facts: dict[str, Any] = {"name": name, "shape": tensor.shape}
    if isinstance(tensor, PackedTensor):
        return {**facts, "encoding": "nf4", **_packed_facts(artifact, tensor)}
    record = artifact.manifest.tensors[name]
    entry = artifact.located[name].entry
    return {
        **facts,
        "encoding": "kept",
        "dtype": tensor.dtype,
        "components": [_component_facts(artifact, name, "data", record.xxh3)],  # type: ignore[union-attr]
        "nbytes": entry.nbytes,
        "values": [_plain(value) for value in tensor.decode().reshape(-1)[:N_SHOWN_VALUES]],
    }


def _packed_facts(artifact: Artifact, tensor: PackedTensor) -> dict[str, Any]:
    import numpy as np

    from qformat.codec.floats import FloatFormat
    from qformat.codec.nf4 import unpack

    record = artifact.manifest.tensors[tensor.name]
    counts = np.bincount(unpack(tensor.packed, n_elements=tensor.layout.n_elements), minlength=16)
    values = tensor.decode(FloatFormat.F32).reshape(-1)[:N_SHOWN_VALUES]
    return {
        "dtype": tensor.layout.float_format.value,
        "block_size": tensor.layout.block_size,
        "double_quant": tensor.layout.double_quant,
        "nested_offset": tensor.state.nested_offset,
        "components": [
            _component_facts(artifact, tensor.name + part.value, part.label, digest)
            for part, digest in record.components.items()  # type: ignore[union-attr]
        ],
        "code_counts": [int(count) for count in counts],
        "values": [_plain(value) for value in values],
    }


def _component_facts(artifact: Artifact, name: str, label: str, digest: str) -> dict[str, Any]:
    located = artifact.located[name]
    entry = located.entry
    return {
        "component": label,
        "dtype": entry.dtype,
        "shape": entry.shape,
        "shard": located.shard,
        "start": entry.start,
        "nbytes": entry.nbytes,
        "xxh3": digest,
    }


def _plain(value: Any) -> float | str:
    """Return a value for JSON, in which infinities and NaN are strings."""
    number = float(value)
    return number if abs(number) < float("inf") else str(number)


def _show_tensor(facts: Mapping[str, Any]) -> None:
    echo(f"{facts['name']}: {facts['encoding']}, {facts['dtype']} {list(facts['shape'])}")
    parts = facts["components"]
    rows = [("component", "dtype", "shape", "bytes", "XXH3-128")]
    for part in parts:
        shape = "x".join(map(str, part["shape"])) or "scalar"
        rows.append((part["component"], part["dtype"], shape, f"{part['nbytes']:,}", part["xxh3"]))
    echo_layout(format_table(rows, right=(2, 3)))
    echo()
    places = [(part["component"], part["shard"], f"{part['start']:,}") for part in parts]
    echo_layout(format_table([("component", "shard", "start"), *places], right=(2,)))
    echo()
    if "code_counts" in facts:
        total, largest = max(sum(facts["code_counts"]), 1), max(*facts["code_counts"], 1)
        echo("codes:")
        for code, count in enumerate(facts["code_counts"]):
            echo_layout(f"  {code:2d}  {count / total:7.2%}  {'#' * round(N_COLUMNS_OF_BARS * count / largest)}")
    echo(f"first values: {', '.join(f'{value:.6g}' for value in facts['values'])}")


def _checkpoint_facts(path: Path, tensor: str | None) -> dict[str, Any]:
    from qformat.converters.sources.open_source import open_source

    source = open_source(path)
    source.close()
    if tensor is not None and tensor not in source.tensors:
        raise UsageError(_no_such_tensor(tensor, list(source.tensors)))
    return {
        "path": str(path),
        "kind": source.kind,
        "tensors": [
            {
                "name": entry.name,
                "encoding": "plain",
                "dtype": entry.dtype,
                "shape": entry.shape,
                "nbytes": entry.nbytes,
                "how": entry.file,
            }
            for entry in source.tensors.values()
            if tensor in {None, entry.name}
        ],
    }


def _show_checkpoint(facts: Mapping[str, Any]) -> None:
    echo(f"{facts['path']}: plain {facts['kind']} checkpoint")
    _show_tensor_table(facts["tensors"])
    total = sum(entry["nbytes"] for entry in facts["tensors"])
    echo(f"{len(facts['tensors'])} tensors, {format_nbytes(total)}")


def _no_such_tensor(name: str, names: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, names, n=3, cutoff=0)
    return f"tensor {name!r} does not exist. Similar names: {', '.join(near)}"
