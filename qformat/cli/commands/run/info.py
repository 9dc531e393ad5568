"""`qformat info`."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from dataclasses import dataclass
from typing import Any

import click

from qformat.cli.display import echo, echo_json, echo_layout, format_table, terminal_width
from qformat.cli.options import backend_option, json_option, options_record
from qformat.sizes import format_nbytes
from qformat.version import __version__

PACKAGES = ("torch", "triton", "transformers", "peft", "numba", "numpy", "bitsandbytes")


@dataclass(frozen=True, slots=True)
class InfoArguments:
    """Arguments of `qformat info`, under the names of the options."""

    backend: str | None
    as_json: bool


@click.command(
    epilog="""\b
Example:
  qformat info --backend torch"""
)
@backend_option
@json_option()
@options_record(InfoArguments)
def command(options: InfoArguments) -> None:
    """Show versions, devices, the backend of each operation with the reason, and the formats `convert` reads."""
    from qformat.cli.models import quiet_transformers

    quiet_transformers()
    from qformat.kernels.backends import force_backend

    if options.backend is not None:
        force_backend(options.backend)
    versions, devices, operations, sources = _versions(), _devices(), _operations(), _sources()
    if options.as_json:
        facts = {"versions": versions, "devices": devices, "operations": operations, "sources": sources}
        echo_json(facts)
        return
    width = terminal_width(sys.stdout) if sys.stdout.isatty() else None
    echo(", ".join(f"{name} {version}" for name, version in versions.items()))
    echo(*(f"{device['name']}: {device['description']}" for device in devices))
    rows = [["device", "operation", "backend", "why"]]
    rows += [[row["device"], row["operation"], row["backend"], row["why"]] for row in operations]
    echo_layout("\n" + format_table(rows, width=width))
    formats = [["source", "formats that `qformat convert` reads"], *map(list, sources.items())]
    echo_layout("\n" + format_table(formats, width=width))


def _versions() -> dict[str, str]:
    found = {"qformat": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _sources() -> dict[str, str]:
    from qformat.converters.sources.open_source import KINDS

    return {kind.name: kind.description for kind in KINDS}


def _devices() -> list[dict[str, str]]:
    import torch

    from qformat.codec.cpu.blocks import decoder_name
    from qformat.kernels.cpu_features import has_fast_bf16

    bf16 = "bf16 products in hardware" if has_fast_bf16() else "no bf16 products in hardware: computes in fp32"
    description = f"{platform.machine()}, {torch.get_num_threads()} threads, decodes with {decoder_name()}, {bf16}"
    devices = [{"name": "cpu", "description": description}]
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        text = f"{card.name}, sm_{card.major}{card.minor}, {format_nbytes(card.total_memory)}"
        devices.append({"name": f"cuda:{index}", "description": text})
    return devices


def _operations() -> list[dict[str, Any]]:
    import torch

    from qformat.kernels import cpu_features
    from qformat.kernels.backends import choose

    rows = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        choice = choose(device)
        dtype = cpu_features.compute_dtype(torch.bfloat16) if device == "cpu" else torch.bfloat16
        large = f"decodes, then torch's product in {str(dtype).removeprefix('torch.')}"
        small = _small_product(choice.backend)
        few_rows = "gemv_nf4, linear_nf4 with few rows"
        rows += [
            {"device": device, "operation": "dequantize_nf4", "backend": choice.backend, "why": choice.reason},
            {"device": device, "operation": "linear_nf4", "backend": choice.backend, "why": large},
            {"device": device, "operation": few_rows, "backend": choice.backend, "why": small},
        ]
    return rows


def _small_product(backend: str) -> str:
    from qformat.codec.cpu.product import best_instructions
    from qformat.codec.floats import FloatFormat
    from qformat.kernels.implementations import MAX_ROWS_FROM_CODES

    if backend == "numba":
        name = best_instructions(FloatFormat.BF16)
        return f"from the codes up to M = {MAX_ROWS_FROM_CODES}, {name}" if name else "none: this CPU has no AVX2"
    if backend == "triton":
        return f"from the codes up to M = {MAX_ROWS_FROM_CODES}, tensor cores"
    return "none: decodes"
