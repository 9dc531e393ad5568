"""`qformat diff`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from qformat import strict_json
from qformat.cli.display import echo, echo_json, echo_layout, format_table
from qformat.cli.options import json_option, options_record
from qformat.cli.progress import Bar

if TYPE_CHECKING:
    from qformat.artifact.manifest_diff import ManifestDifference
    from qformat.artifact.value_diff import ValueDifference
    from qformat.hub.diff import Difference

EXIT_DIFFERENT = 1
_SHOWN = 12


@dataclass(frozen=True, slots=True)
class DiffArguments:
    """Arguments of `qformat diff`, under the names of the options."""

    a: str
    b: str
    revision_a: str | None
    revision_b: str | None
    weights: bool
    show_all: bool
    as_json: bool


@click.command(
    epilog="""\b
Examples:
  qformat diff SmolLM2-135M-Instruct-nf4 SmolLM2-135M-Instruct-nf4-b128
  qformat diff SmolLM2-135M-Instruct-nf4 owner/model-nf4 --weights"""
)
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--revision-a", metavar="REV", help="Branch, tag or commit if A is a Hub repository.")
@click.option("--revision-b", metavar="REV", help="Branch, tag or commit if B is a Hub repository.")
@click.option("--weights", is_flag=True, help="Compare tensors only: ignore recipe, generator, card and other files.")
@click.option("--all", "show_all", is_flag=True, help="List every tensor that differs.")
@json_option()
@options_record(DiffArguments)
def command(options: DiffArguments) -> None:
    """Show how the artifacts A and B differ. Both are folders or Hub repositories (owner/name).

    The manifests are compared. If both are folders, the codes, scales and values that differ are counted. The exit
    code is 0 if the artifacts are the same, and 1 if they differ.
    """
    from qformat.hub.diff import diff

    with Bar() as bar:
        found = diff(
            options.a,
            options.b,
            revision_a=options.revision_a,
            revision_b=options.revision_b,
            on_plan=lambda nbytes: bar.start(nbytes, "Comparing"),
            on_progress=bar.advance,
        )
    same = found.manifests.same_weights if options.weights else found.equal
    if options.as_json:
        echo_json({"same": same, **_facts(found)})
    else:
        _show(found, show_all=options.show_all)
        what = "weights" if options.weights else "artifacts"
        echo(f"the same {what}" if same else f"different {what}")
    if not same:
        click.get_current_context().exit(EXIT_DIFFERENT)


def _facts(found: Difference) -> dict[str, object]:
    manifests = found.manifests
    values = {} if found.values is None else {value.name: value for value in found.values}
    return {
        "a": found.a,
        "b": found.b,
        "equal": found.equal,
        "same_model": manifests.same_model,
        "same_source": manifests.same_source,
        "same_weights": manifests.same_weights,
        "n_tensors": manifests.n_tensors,
        "only_in_a": list(manifests.only_in_a),
        "only_in_b": list(manifests.only_in_b),
        "tensors": [
            {
                "name": tensor.name,
                "differs_in": [aspect.value for aspect in tensor.aspects],
                **(_counts(values[tensor.name]) if tensor.name in values else {}),
            }
            for tensor in manifests.tensors
        ],
        "members": {name: {"a": one, "b": other} for name, (one, other) in manifests.members.items()},
        "files": {
            "only_in_a": list(manifests.files_only_in_a),
            "only_in_b": list(manifests.files_only_in_b),
            "changed": list(manifests.changed_files),
            "same_shards": manifests.same_shards,
        },
    }


def _counts(value: ValueDifference) -> dict[str, int]:
    counts = {
        "n_elements": value.n_elements,
        "n_codes": value.n_codes,
        "n_blocks": value.n_blocks,
        "n_scales": value.n_scales,
        "n_values": value.n_values,
    }
    return {name: count for name, count in counts.items() if count is not None}


def _show(found: Difference, *, show_all: bool) -> None:
    manifests = found.manifests
    echo(f"A: {found.a}", f"B: {found.b}")
    echo(_model_line(manifests))
    for where, names in (("A", manifests.only_in_a), ("B", manifests.only_in_b)):
        if names:
            echo(f"only in {where}: {_some(names, show_all=show_all)}")
    if manifests.tensors:
        echo_layout(_tensors_table(found, show_all=show_all))
    elif manifests.same_model:
        echo("all tensors are byte-identical")
    for name, (one, other) in manifests.members.items():
        echo(f"{name}: {_short(one)} -> {_short(other)}")
    for what, files in (
        ("files only in A", manifests.files_only_in_a),
        ("files only in B", manifests.files_only_in_b),
        ("files that differ", manifests.changed_files),
    ):
        if files:
            echo(f"{what}: {', '.join(files)}")
    if manifests.same_weights and not manifests.same_shards:
        echo("the same tensors are divided into different shards")


def _model_line(manifests: ManifestDifference) -> str:
    if not manifests.same_model:
        return "a different model: names or shapes of tensors differ"
    if manifests.same_source is None:
        return "the same tensor names and shapes; the manifests do not record whether the source was the same"
    n_other = manifests.n_sources - manifests.n_same_sources
    source = "from the same source" if manifests.same_source else f"{n_other} of them from a different source"
    return f"the same model: {manifests.n_tensors} tensors with the same names and shapes, {source}"


def _tensors_table(found: Difference, *, show_all: bool) -> str:
    values = {} if found.values is None else {value.name: value for value in found.values}
    tensors = found.manifests.tensors
    shown = tensors if show_all else tensors[:_SHOWN]
    rows = [(tensor.name, ", ".join(aspect.value for aspect in tensor.aspects)) for tensor in shown]
    header, *lines = format_table([("tensor", "differs in"), *rows]).splitlines()
    stacked = [header]
    for tensor, line in zip(shown, lines, strict=True):
        stacked.append(line)
        if (value := values.get(tensor.name)) is not None and (counts := _counts_in_words(value)):
            stacked.append(f"    {counts}")
    if hidden := len(tensors) - len(shown):
        stacked.append(f"... and {hidden} more tensors; --all lists them")
    return "\n".join(stacked)


def _counts_in_words(value: ValueDifference) -> str:
    parts = {
        "codes": _part(value.n_codes, value.n_elements),
        "scales": _part(value.n_scales, value.n_blocks),
        "values": _part(value.n_values, value.n_elements),
    }
    return ", ".join(f"{name}: {part}" for name, part in parts.items() if part)


def _part(count: int | None, total: int | None) -> str:
    if count is None or total is None:
        return ""
    return f"{count:,} of {total:,} ({count / total:.2%})" if total else "0"


def _some(names: tuple[str, ...], *, show_all: bool) -> str:
    shown = names if show_all else names[:_SHOWN]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(shown) < len(names) else "")


def _short(value: strict_json.Json) -> str:
    text = "nothing" if value is None else strict_json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."
