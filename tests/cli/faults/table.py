"""Every command that writes, in each form in which it writes, and how each fault of the disk is tested for it.

A new command belongs in `FORMS` or in `READING`; `test_table.py` fails until it is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Fault(StrEnum):
    """What can go wrong while a command writes."""

    KILL = "the process is killed"
    POWER_CUT = "a power cut loses what was not synced"
    FULL = "the disk is full"
    BROKEN = "the disk reports an error"
    SHORT_WRITE = "the disk accepts half of a write"
    NO_WRITE = "the disk accepts no more bytes and reports no error"
    SECOND_WRITER = "another process runs the same command"
    READ_ONLY = "the folder is read-only"


@dataclass(frozen=True)
class Form:
    """A way to call a command, on tiny inputs, in which it writes something.

    `{given}` in the arguments is the folder of inputs that no test changes, and the working directory is the folder of
    one test.

    Attributes:
        arguments: The command line.
        makes: What appears under its final name when the command ends, relative to the working directory.
        copies: Inputs that the command changes: names in the folder of inputs, copied to the working directory.
        loads_model: The command imports torch, and its checkpoints are written by other libraries.
        resumes: Option of the second run if the first has left files that match a pattern.
        work: Functions that must not run if the output cannot be written, because they take minutes.
        takes_seconds: A run takes a second or more, so that the slow tests give each call only one of the faults.
        n_fast: Number of places of a fault in the fast tests.
    """

    arguments: str
    makes: str
    copies: tuple[str, ...] = ()
    loads_model: bool = False
    resumes: tuple[str, str] | None = None
    work: tuple[str, ...] = ()
    takes_seconds: bool = False
    n_fast: int = 12

    @property
    def command(self) -> str:
        return self.arguments.split()[0]


_TUNE = (
    "tune {given}/nf4 out --source {given}/source --data {given}/text.txt --steps 2 --batch-size 2 --seq-len 32 "
    "--held-out 2 --save-every 1 --device cpu --accept-worse"
)
_EVAL = "eval {artifact} --source {given}/source --data {given}/text.txt --windows 2 --seq-len 32 --device cpu"
_TUNING = "qformat.quality.tuning.steps.TuningRun.run"
_EVALUATE = "qformat.quality.evaluation.evaluate.evaluate"

FORMS = {
    "convert": Form("convert {given}/source out --no-model-check --workers 1", "out"),
    "convert, several threads": Form("convert {given}/source out --no-model-check --workers 3", "out"),
    "convert --force": Form(
        "convert {given}/source nf4 --no-model-check --block-size 128 --force", "nf4", copies=("nf4",)
    ),
    "convert --calibrate": Form(
        "convert {given}/source out --no-model-check --calibrate {given}/text.txt --calibration-tokens 128",
        "out",
        loads_model=True,
        n_fast=4,
    ),
    "convert from the Hub": Form("convert owner/source out --no-model-check", "out"),
    "export": Form("export {given}/nf4 out --to bf16 --workers 1", "out"),
    "export --force": Form("export {given}/nf4 plain --to fp16 --force", "plain", copies=("plain",)),
    "tune": Form(_TUNE, "out", loads_model=True, takes_seconds=True, n_fast=6, work=(_TUNING,)),
    "tune --teacher-cache": Form(
        _TUNE + " --teacher-cache cache", "out", loads_model=True, takes_seconds=True, n_fast=3, work=(_TUNING,)
    ),
    "train": Form(
        "train {given}/nf4 out --data {given}/examples.jsonl --max-steps 2 --batch-size 2 --grad-accum 1 --seq-len 32 "
        "--rank 2 --save-every 1 --device cpu",
        "out/adapter_model.safetensors",
        loads_model=True,
        resumes=("out/checkpoint-*/checkpoint.json", "--resume"),
        work=("qformat.training.trainer.AdapterTrainer.train_from",),
        takes_seconds=True,
        n_fast=2,
    ),
    "eval --record": Form(
        _EVAL.format(artifact="nf4", given="{given}") + " --record",
        "nf4/qformat.json",
        copies=("nf4",),
        loads_model=True,
        work=(_EVALUATE,),
        n_fast=4,
    ),
    "eval --report": Form(
        _EVAL.format(artifact="{given}/nf4", given="{given}") + " --report report.html",
        "report.html",
        loads_model=True,
        work=(_EVALUATE,),
        n_fast=4,
    ),
    "verify --report": Form(
        "verify {given}/nf4 --source {given}/source --report report.html",
        "report.html",
        work=("qformat.cli.commands.check.verify.verified",),
    ),
    "seal --accept": Form("seal changed --accept", "changed/qformat.json", copies=("changed",)),
    "fetch": Form("fetch owner/nf4 out --connections 1", "out"),
}
"""Forms in which commands write, by name."""

_OF_PUBLISH = "tests/hub/publishing/test_publish_faults.py::"
_NO_FILE = "tests/cli/faults/test_writes_nothing.py::test_publish_writes_no_file"

ON_THE_HUB: dict[str, dict[Fault, str]] = {
    "publish": {
        Fault.KILL: _OF_PUBLISH + "test_a_publisher_that_dies_at_any_request_is_repeated",
        Fault.SECOND_WRITER: _OF_PUBLISH + "test_two_publishers_of_the_same_bytes_at_once_make_one_commit",
        Fault.READ_ONLY: _OF_PUBLISH + "test_an_invalid_or_missing_token_is_reported_with_the_next_step",
        Fault.POWER_CUT: _NO_FILE,
        Fault.FULL: _NO_FILE,
        Fault.BROKEN: _NO_FILE,
        Fault.SHORT_WRITE: _NO_FILE,
        Fault.NO_WRITE: _NO_FILE,
    }
}
"""Commands that write on the Hub only, and the test of each fault."""

READING = {
    "diff": "diff {given}/nf4 {given}/changed",
    "inspect": "inspect {given}/nf4",
    "verify": "verify {given}/nf4 --source {given}/source --sha256",
    "eval": _EVAL.format(artifact="{given}/nf4", given="{given}"),
    "generate": "generate {given}/nf4 --prompt the --max-new-tokens 2 --device cpu",
    "info": "info",
    "seal": "seal {given}/changed",
    "convert --dry-run": "convert {given}/source out --dry-run",
    "export --dry-run": "export {given}/nf4 out --to bf16 --dry-run",
    "train --dry-run": "train {given}/nf4 --dry-run --device cpu",
    "publish --dry-run": "publish {given}/nf4 me/nf4 --license apache-2.0 --base-model owner/source --dry-run",
}
"""Commands that write nothing in this form, by name."""

READ_PATHS = {
    "adapter", "artifact", "card", "config", "figures", "original", "path", "public_key", "recipe", "sign_key",
}  # fmt: skip
"""Parameters of commands that are paths from which the command only reads."""
