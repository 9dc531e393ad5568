"""Turns the result of a comparison into findings: sentences for people, reason codes for programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qformat.artifact.reading.shard_files import ShardFiles
from qformat.artifact.reading.verify import Finding
from qformat.converters.compare.comparison import KeptComparison, PackedComparison
from qformat.converters.sources.source import SourceTensor
from qformat.errors import Reason


@dataclass(frozen=True, slots=True)
class Judgement:
    """Derives findings from the results for tensors.

    Attributes:
        shards: The artifact's open shards.
        source: Location of the source.
        scale_change: Share by which scales of a tuned artifact may differ. None if it is not tuned.
    """

    shards: ShardFiles
    source: Path
    scale_change: float | None

    def of_packed(self, tensor: SourceTensor, compared: PackedComparison) -> Iterator[Finding]:
        """Yield what is wrong with a packed weight.

        If the source is not the recorded one, wrong codes are expected and only counted within that finding.

        Args:
            tensor: The source tensor.
            compared: Result of the comparison.
        """
        wrong = self._wrong_in_packed(compared)
        if compared.source_named is False:
            yield self._other_source(tensor, wrong)
        elif compared.n_wrong_codes is None:
            yield self.of_source(tensor, wrong, Reason.NONFINITE_WEIGHT)
        elif not compared.holds:
            yield self._of_artifact(Reason.CODES_MISMATCH, tensor.name, wrong)
        if compared.n_wrong_codes is not None and not compared.errors.finite:
            problem = "some codes decode to NaN or Inf"
            yield self._of_artifact(Reason.NONFINITE_WEIGHT, tensor.name, problem)

    def of_kept(self, tensor: SourceTensor, compared: KeptComparison) -> Iterator[Finding]:
        """Yield what is wrong with a kept tensor. A tuned one may differ from the source.

        Args:
            tensor: The source tensor.
            compared: Result of the comparison.
        """
        wrong = f"{compared.n_wrong_bytes} of {tensor.nbytes} bytes of this kept tensor differ from the source"
        if not compared.source_named:
            yield self._other_source(tensor, wrong)
        elif not compared.identical and not compared.tuned:
            yield self._of_artifact(Reason.SOURCE_MISMATCH, tensor.name, wrong)

    def of_source(self, tensor: SourceTensor, problem: str, reason: Reason = Reason.SOURCE_MISMATCH) -> Finding:
        """Return a finding about a tensor of the source.

        Args:
            tensor: The source tensor.
            problem: What is wrong.
            reason: Reason code of the finding.
        """
        path = self.source / tensor.file
        return Finding(reason, tensor.file, f"{path}: tensor {tensor.name!r}: {problem}", tensor.name)

    def of_absent(self, name: str) -> Finding:
        """Return the finding about a tensor that is missing from the source."""
        message = f"{self.source}: tensor {name!r}: is in the artifact but not in the source"
        return Finding(Reason.SOURCE_MISMATCH, self.source.name, message, name)

    def _wrong_in_packed(self, compared: PackedComparison) -> str:
        if compared.n_far_scales is not None:
            return (
                f"its codes were chosen on a text, but {compared.n_far_scales} of {compared.layout.n_blocks} scales "
                f"are far from the source's, or its relative RMS error, {compared.errors.relative_rms or 0:.1%}, is "
                "too large"
            )
        if compared.n_wrong_codes is None:
            return "the source contains NaN or Inf and cannot be encoded"
        allowed = "" if self.scale_change is None else f" (tolerance for scales: {self.scale_change:.0%})"
        return (
            f"{compared.n_wrong_codes} of {compared.layout.n_elements} codes and {compared.n_wrong_scales} of the "
            f"scales differ from what encoding the source gives{allowed}"
        )

    def _other_source(self, tensor: SourceTensor, wrong: str) -> Finding:
        return self.of_source(tensor, f"is not the tensor that was converted (its XXH3-128 differs); {wrong}")

    def _of_artifact(self, reason: Reason, name: str, problem: str) -> Finding:
        path = self.shards.path_of(name)
        return Finding(reason, path.name, f"{path}: tensor {name!r}: {problem}. Convert the source again", name)
