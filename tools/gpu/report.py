"""The report of `tools.gpu.check`: every figure as JSON and as a table, with a comparison to an earlier run."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tools.gpu.results import Result

SCHEMA = 1


def device_facts(device: torch.device) -> dict[str, Any]:
    """Return the name and the size of a GPU for the report."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_nbytes": properties.total_memory,
    }


def versions() -> dict[str, str | None]:
    """Return the versions of the packages that affect the figures; None for a package that is not installed."""
    found: dict[str, str | None] = {}
    for name in ("qformat", "torch", "triton", "bitsandbytes"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def report(results: Sequence[Result], *, device: dict[str, Any]) -> dict[str, Any]:
    """Return a run as one JSON object."""
    return {
        "schema": SCHEMA,
        "device": device,
        "versions": versions(),
        "passed": all(result.passed is not False for result in results),
        "results": [dataclasses.asdict(result) for result in results],
    }


def table(run: dict[str, Any], *, earlier: dict[str, Any] | None = None) -> str:
    """Return a report as text: one line per figure, and one per check for all figures that passed."""
    device, found = run["device"], run["versions"]
    lines = [
        f"{device['name']} (sm_{device['compute_capability'].replace('.', '')}, {device['multiprocessors']} SMs)",
        ", ".join(f"{name} {version or 'not installed'}" for name, version in found.items()),
        "",
    ]
    before = {key(row): row["value"] for row in earlier["results"]} if earlier else {}
    rows = run["results"]
    for check in dict.fromkeys(row["check"] for row in rows):
        mine = [row for row in rows if row["check"] == check]
        judged = [row for row in mine if row["passed"] is not None]
        good = [row for row in judged if row["passed"]]
        if judged:
            lines.append(f"{check}: {len(good)} of {len(judged)} passed")
        for row in mine:
            if row["passed"] is True:
                continue
            ratio = f"   {row['value'] / before[key(row)]:.3f} x earlier" if before.get(key(row)) else ""
            mark = "FAILED " if row["passed"] is False else ""
            lines.append(
                f"  {mark}{row['case']:32s} {row['metric']:40s} {row['value']:12.3f} {row['unit']}{ratio}".rstrip()
            )
    lines += ["", "all checks passed" if run["passed"] else "SOME CHECKS FAILED"]
    return "\n".join(lines) + "\n"


def key(row: dict[str, Any]) -> tuple[str, str, str]:
    """Return the key that identifies a figure across runs."""
    return row["check"], row["case"], row["metric"]


def read_report(path: Path) -> dict[str, Any]:
    """Read the report of an earlier run. Raises ValueError if the file is not such a report."""
    run = json.loads(path.read_text())
    if not isinstance(run, dict) or run.get("schema") != SCHEMA:
        raise ValueError(f"{path}: is not a report of tools.gpu.check with schema {SCHEMA}")
    return run
