"""What is wrong with a tensor that was compared, in findings: sentences for people, reasons for programs."""

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
    """Judges what was found about tensors.

    shards: of the artifact. source: where it lies. scale_change: the share by which the scales of a tuned artifact may
    differ, None for one that is not tuned.
    """

    shards: ShardFiles
    source: Path
    scale_change: float | None

    def of_packed(self, tensor: SourceTensor, compared: PackedComparison) -> Iterator[Finding]:
        """Yield what is wrong. With another source, wrong codes say nothing more: they are counted in one finding."""
        wrong = self._wrong_in_packed(compared)
        if compared.source_named is False:
            yield self._other_source(tensor, wrong)
        elif compared.n_wrong_codes is None:
            yield self.of_source(tensor, wrong, Reason.NONFINITE_WEIGHT)
        elif not compared.holds:
            yield self._of_artifact(Reason.CODES_MISMATCH, tensor.name, wrong)
        if compared.n_wrong_codes is not None and not compared.errors.finite:
            problem = "some codes decode to values that are not finite"
            yield self._of_artifact(Reason.NONFINITE_WEIGHT, tensor.name, problem)

    def of_kept(self, tensor: SourceTensor, compared: KeptComparison) -> Iterator[Finding]:
        """Yield what is wrong; a tuned tensor may be another one."""
        wrong = f"{compared.n_wrong_bytes} of {tensor.nbytes} bytes of this kept tensor are not the source's"
        if not compared.source_named:
            yield self._other_source(tensor, wrong)
        elif not compared.identical and not compared.tuned:
            yield self._of_artifact(Reason.SOURCE_MISMATCH, tensor.name, wrong)

    def of_source(self, tensor: SourceTensor, problem: str, reason: Reason = Reason.SOURCE_MISMATCH) -> Finding:
        """Return a finding about a tensor of the source."""
        path = self.source / tensor.file
        return Finding(reason, tensor.file, f"{path}: tensor {tensor.name!r}: {problem}", tensor.name)

    def of_absent(self, name: str) -> Finding:
        """Return the finding about a tensor that the source does not have."""
        message = f"{self.source}: tensor {name!r}: is in the artifact, but not in this source"
        return Finding(Reason.SOURCE_MISMATCH, self.source.name, message, name)

    def _wrong_in_packed(self, compared: PackedComparison) -> str:
        if compared.n_far_scales is not None:
            return (
                f"its codes were chosen on a text, but {compared.n_far_scales} of {compared.layout.n_blocks} scales "
                f"are far from the source's, or the relative RMS error of {compared.errors.relative_rms or 0:.1%} is"
            )
        if compared.n_wrong_codes is None:
            return "the source has values that are not finite and cannot be encoded"
        allowed = "" if self.scale_change is None else f" (scales: within {self.scale_change:.0%} of it)"
        return (
            f"{compared.n_wrong_codes} of {compared.layout.n_elements} codes and {compared.n_wrong_scales} of the "
            f"scales are not what encoding the source gives{allowed}"
        )

    def _other_source(self, tensor: SourceTensor, wrong: str) -> Finding:
        return self.of_source(
            tensor, f"is not the tensor that the artifact was made from (its XXH3-128 is another one); {wrong}"
        )

    def _of_artifact(self, reason: Reason, name: str, problem: str) -> Finding:
        path = self.shards.path_of(name)
        return Finding(reason, path.name, f"{path}: tensor {name!r}: {problem}. Convert the source again", name)
