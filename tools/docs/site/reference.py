"""Make the page of the Python API: the public names by subject, each with its docstring."""

from __future__ import annotations

from collections.abc import Iterable

GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Convert and export", ("convert", "plan", "ConversionOptions", "ConversionSummary", "Plan", "export")),
    (
        "Check and compare",
        (
            "verify",
            "verify_against_source",
            "verify_remote",
            "compare",
            "diff",
            "seal",
            "IntegrityReport",
            "Verification",
            "RemoteReport",
            "Comparison",
            "Difference",
            "SealResult",
            "FileChange",
        ),
    ),
    (
        "Load and run",
        ("open", "load_model", "load_tokenizer", "register", "force_backend", "Artifact", "PackedTensor", "KeptTensor"),
    ),
    (
        "Quality",
        ("evaluate", "tune", "Evaluation", "CalibrationSettings", "TuningSettings", "TuningJob", "TuningResult"),
    ),
    ("Train", ("train", "TrainingSettings", "TrainingJob", "TrainingResult")),
    ("Hub", ("fetch", "publish", "FetchSummary", "PublishOptions", "CardOptions", "Published")),
)
"""The public names of the package: functions first, then their settings and results."""

OPENING = """# Python API

The public names of `import qformat`, from their docstrings. [Python](python.md) shows them at work.
"""
ERRORS = """## Errors

::: qformat.errors
    options:
      show_root_heading: false
      show_root_toc_entry: false
"""


def problems(public_names: Iterable[str]) -> list[str]:
    """Return which public names are in no group, and which names of the groups are not public."""
    public, grouped = {*public_names}, [name for _, names in GROUPS for name in names]
    return [
        *(f"qformat.{name}: in no group (tools/docs/site/reference.py)" for name in sorted(public - {*grouped})),
        *(f"qformat.{name}: in a group, but not public" for name in sorted({*grouped} - public)),
        *(f"qformat.{name}: in two groups" for name in sorted({name for name in grouped if grouped.count(name) > 1})),
    ]


def page() -> str:
    """Return the page as Markdown that mkdocstrings completes."""
    groups = [f"## {title}\n\n" + "\n".join(f"::: qformat.{name}\n" for name in names) for title, names in GROUPS]
    return "\n".join([OPENING, *groups, ERRORS])
