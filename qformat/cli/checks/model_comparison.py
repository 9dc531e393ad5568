"""Compares a checkpoint with the model of its config.json beside a conversion, and rejects what no reader could load.

For a checkpoint of a common architecture with exactly the tensors of its model, a table suffices. Every other one is
compared with the model that transformers builds. Importing torch and transformers takes seconds, so another process
compares while this one encodes. It is done before the artifact appears.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from qformat.cli.display import echo, some
from qformat.errors import Reason, SourceError, install_extra
from qformat.names import CONFIG_NAME

if TYPE_CHECKING:
    from qformat.converters.encode.plan import Plan
    from qformat.model.rules.expected_tensors import ModelComparison

_REGARDLESS = "To convert it regardless, give --no-model-check"


class RunningComparison:
    """The comparison of one plan, which takes place while the `with` block runs.

    Args:
        source: Location of the source, for messages.
        wanted: Whether to compare.
    """

    def __init__(self, source: str, *, wanted: bool) -> None:
        self._source = Path(source)
        self._wanted = wanted
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._result: ModelComparison | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the other process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._folder is not None:
            self._folder.cleanup()

    def start(self, plan: Plan) -> None:
        """Begin to compare. The table, or transformers if this process has imported it already, compares at once.

        Args:
            plan: Plan of the conversion.
        """
        from qformat.model.rules.expected_tensors import (
            ModelComparison,
            as_request,
            compare_with_model,
            fits_without_a_model,
        )

        config = plan.small_files[CONFIG_NAME]
        shapes = {task.source.name: task.source.shape for task in plan.tasks}
        packed = [task.source.name for task in (*plan.packed, *plan.adopted)]
        if not self._wanted:
            self._result = ModelComparison("--no-model-check was given")
        elif fits_without_a_model(config, shapes):
            self._result = ModelComparison()
        elif "transformers" in sys.modules:
            self._result = compare_with_model(config, shapes, packed)
        elif any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
            self._result = ModelComparison(f"torch or transformers is not installed. {install_extra('models')}")
        else:
            self._folder = tempfile.TemporaryDirectory(prefix="qformat-comparison-")
            folder = Path(self._folder.name)
            (folder / "request").write_bytes(as_request(config, shapes, packed))
            command = [sys.executable, "-P", "-m", "qformat.model.rules.expected_tensors"]
            with (
                open(folder / "request", "rb") as request,
                open(folder / "answer", "wb") as answer,
                open(folder / "messages", "wb") as messages,
            ):
                self._process = subprocess.Popen(command, stdin=request, stdout=answer, stderr=messages)

    def result(self) -> ModelComparison:
        """Wait for the comparison and return it."""
        from qformat.model.rules.expected_tensors import ModelComparison, from_answer

        if self._result is None:
            assert self._process is not None, "not started"
            assert self._folder is not None
            status, folder = self._process.wait(), Path(self._folder.name)
            if status == 0:
                self._result = from_answer((folder / "answer").read_bytes())
            else:
                last = (folder / "messages").read_text("utf-8", "replace").strip().rpartition("\n")[2]
                self._result = ModelComparison(f"the process that compares ended with status {status}: {last}")
        return self._result

    def result_at_once(self) -> ModelComparison:
        """Return the comparison without waiting for another process, for an artifact that was complete before."""
        from qformat.model.rules.expected_tensors import ModelComparison

        return self._result or ModelComparison("the artifact was complete before")

    def refuse_if_known(self) -> None:
        """Reject a mismatch if the comparison has ended.

        Raises:
            SourceError: No reader could load the artifact.
        """
        if self._result is None and self._process is not None and self._process.poll() is not None:
            self.refuse()

    def refuse(self) -> None:
        """Wait for the comparison and reject a mismatch.

        Raises:
            SourceError: No reader could load the artifact.
        """
        found = self.result()
        if found.doubt is None and (problem := mismatch(found, self._source)) is not None:
            raise problem

    def show(self) -> None:
        """Print what was found as notes."""
        found = self.result()
        if found.not_compared is not None:
            echo(f"Note: names and shapes were not compared with the model of {CONFIG_NAME}: {found.not_compared}")
        if found.not_loaded:
            echo(
                f"Note: the model of {CONFIG_NAME} has no place for {len(found.not_loaded)} tensors, which no reader "
                f"loads. The artifact keeps them: {some(found.not_loaded)}"
            )
        if (problem := mismatch(found, self._source)) is not None:
            echo(f"Note: tensor {problem.tensor!r}: {problem.problem}. This is not an error, because {found.doubt}")


def comparison_json(found: ModelComparison) -> dict[str, object]:
    """Return a comparison as plain JSON values."""
    return {
        "not_compared": found.not_compared,
        "not_loaded": list(found.not_loaded),
        "missing": list(found.missing),
        "wrong_shapes": {
            name: {"found": list(stored), "expected": list(wanted)}
            for name, (stored, wanted) in found.wrong_shapes.items()
        },
    }


def mismatch(found: ModelComparison, source: Path) -> SourceError | None:
    """Return the error of a checkpoint whose artifact no reader could load, or None.

    Args:
        found: The comparison.
        source: Location of the source.
    """
    belong = f"{CONFIG_NAME} and the shards belong to different models"
    if found.wrong_shapes:
        tensor, (stored, wanted) = next(iter(found.wrong_shapes.items()))
        reason, count, next_step = Reason.COMPONENT_SHAPE, len(found.wrong_shapes), belong
        problem = f"shape {list(stored)}, but the model of {CONFIG_NAME} expects {list(wanted)}"
        which = "tensors whose shape does not fit"
    elif found.missing:
        tensor, reason, count = found.missing[0], Reason.MISSING_COMPONENT, len(found.missing)
        problem = f"the model of {CONFIG_NAME} needs it, but the checkpoint lacks it"
        which, next_step = "tensors that are missing", f"{belong}, or one is missing"
    elif found.without_layer:
        tensor, reason, count = found.without_layer[0], Reason.UNKNOWN_TENSOR, len(found.without_layer)
        problem = f"would be packed, but the model of {CONFIG_NAME} has no such layer"
        which = "such weights"
        next_step = f"Keep such weights in 16 bit with --skip, or use the {CONFIG_NAME} of this model"
    else:
        return None
    return SourceError(
        reason, source, f"{problem} ({which}: {count})", tensor=tensor, next_step=f"{next_step}. {_REGARDLESS}"
    )
