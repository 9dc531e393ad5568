"""Results of `compare`: one record per tensor, and figures for the whole artifact."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from qformat.artifact.components import PackedShape
from qformat.artifact.reading.verify import Finding
from qformat.codec.cpu.error_sums import ErrorSums, add_up
from qformat.converters.compare.chosen_codes import MAX_RELATIVE_RMS, MAX_SHARE_FAR
from qformat.converters.rules.rules import module_path

_NUMBER = re.compile(r"[0-9]{1,6}")


@dataclass(frozen=True, slots=True)
class PackedComparison:
    """Result for one packed weight.

    Attributes:
        name: Name of the weight.
        layout: Shape, dtype and encoding options.
        source_nbytes: Size of the source tensor in bytes.
        nbytes: Size of all components in bytes.
        errors: Error of the values that a reader gets, in the weight's dtype.
        code_counts: Number of occurrences of each of the 16 codes.
        n_wrong_codes: Number of codes that differ from what encoding the source gives. None if the source cannot be
            encoded because it contains NaN or Inf.
        n_wrong_scales: The same for the values of the scales.
        source_named: Whether the source has the digest recorded in the manifest. None if none is recorded.
        n_far_scales: Number of scales far from the source's, for a weight whose codes were chosen on a text
            (`chosen_codes`). None for all other weights.
    """

    name: str
    layout: PackedShape
    source_nbytes: int
    nbytes: int
    errors: ErrorSums
    code_counts: tuple[int, ...]
    n_wrong_codes: int | None
    n_wrong_scales: int | None
    source_named: bool | None
    n_far_scales: int | None = None

    @property
    def chosen(self) -> bool:
        """Whether the codes were chosen on a text."""
        return self.n_far_scales is not None

    @property
    def holds(self) -> bool:
        """Whether codes and scales are what the recipe gives or, if they were chosen on a text, near the source."""
        if self.n_far_scales is None or self.exact:
            return self.exact
        error = self.errors.relative_rms
        few_far = self.n_far_scales <= MAX_SHARE_FAR * self.layout.n_blocks
        return few_far and error is not None and error <= MAX_RELATIVE_RMS

    @property
    def exact(self) -> bool:
        """Whether codes and scales are what encoding the source gives."""
        return self.n_wrong_codes == 0 and self.n_wrong_scales == 0


@dataclass(frozen=True, slots=True)
class KeptComparison:
    """Result for one tensor that is kept in its original dtype.

    Attributes:
        name: Name of the tensor.
        dtype: Dtype as safetensors headers spell it.
        shape: Shape of the tensor.
        keep_reason: Why it is kept, a value of `KeepReason`.
        nbytes: Size in bytes.
        n_wrong_bytes: Number of bytes that differ from the source's.
        source_named: Whether the source has the digest recorded in the manifest.
        tuned: Whether the manifest says that the tensor was tuned and may therefore differ.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    keep_reason: str
    nbytes: int
    n_wrong_bytes: int
    source_named: bool
    tuned: bool = False

    @property
    def identical(self) -> bool:
        """Whether it is bit-identical to the source's tensor."""
        return self.n_wrong_bytes == 0


@dataclass(frozen=True, slots=True)
class Comparison:
    """Result of `compare`. Tensors are in the order of the manifest, without those that could not be compared.

    Attributes:
        artifact: Directory of the artifact.
        source: Location of the source.
        packed: Results for the packed weights.
        kept: Results for the kept tensors.
        n_packed: Number of packed weights in the artifact.
        n_kept: Number of kept tensors in the artifact.
        n_source_digests: Number of tensors for which the manifest records the source's digest.
        findings: Everything that is wrong.
        scale_change: Share by which scales of a tuned artifact may differ from the encoded ones. None if it is not
            tuned.
    """

    artifact: Path
    source: Path
    packed: tuple[PackedComparison, ...]
    kept: tuple[KeptComparison, ...]
    n_packed: int
    n_kept: int
    n_source_digests: int
    findings: tuple[Finding, ...]
    scale_change: float | None = None

    @property
    def passed(self) -> bool:
        """Whether every code, scale and kept bit is what this source gives."""
        return not self.findings

    @property
    def overall(self) -> ErrorSums:
        """Error of all packed weights together."""
        return add_up(tensor.errors for tensor in self.packed)

    @property
    def code_counts(self) -> tuple[int, ...]:
        """Number of occurrences of each of the 16 codes in the artifact."""
        return tuple(sum(tensor.code_counts[code] for tensor in self.packed) for code in range(16))

    @property
    def n_exact(self) -> int:
        """Number of packed weights whose codes and scales are what encoding gives, without those chosen on a text."""
        return sum(tensor.exact for tensor in self.packed if not tensor.chosen)

    @property
    def n_chosen(self) -> int:
        """Number of packed weights whose codes were chosen on a text."""
        return sum(tensor.chosen for tensor in self.packed)

    @property
    def n_near(self) -> int:
        """Number of packed weights whose codes were chosen on a text and that are near the source."""
        return sum(tensor.holds for tensor in self.packed if tensor.chosen)

    @property
    def n_identical(self) -> int:
        """Number of kept tensors that are bit-identical to the source's."""
        return sum(tensor.identical for tensor in self.kept)

    @property
    def tuned(self) -> tuple[KeptComparison, ...]:
        """The kept tensors that were tuned and differ from the source's."""
        return tuple(tensor for tensor in self.kept if tensor.tuned and not tensor.identical)

    @property
    def n_source_named(self) -> int:
        """Number of source tensors that have the digest recorded in the manifest."""
        named = sum(tensor.source_named is True for tensor in self.packed)
        return named + sum(tensor.source_named for tensor in self.kept)

    @property
    def source_nbytes(self) -> int:
        """Size in bytes of the compared tensors in the source."""
        return sum(tensor.source_nbytes for tensor in self.packed) + sum(tensor.nbytes for tensor in self.kept)

    @property
    def bits_per_weight(self) -> float | None:
        """Bits per packed weight, counting all components. None if there are none."""
        n_weights = sum(tensor.layout.n_elements for tensor in self.packed)
        return 8 * sum(tensor.nbytes for tensor in self.packed) / n_weights if n_weights else None

    @property
    def bits_per_parameter(self) -> float | None:
        """Bits per parameter of the whole model, packed or kept. None if there are none."""
        n_parameters = sum(tensor.layout.n_elements for tensor in self.packed)
        n_parameters += sum(math.prod(tensor.shape) for tensor in self.kept)
        nbytes = sum(tensor.nbytes for tensor in self.packed) + sum(tensor.nbytes for tensor in self.kept)
        return 8 * nbytes / n_parameters if n_parameters else None

    def by_kind(self) -> dict[str, tuple[PackedComparison, ...]]:
        """Return the packed weights by kind of module (`q_proj`), in the order in which the kinds first occur."""
        groups: dict[str, list[PackedComparison]] = {}
        for tensor in self.packed:
            groups.setdefault(kind_of(tensor.name), []).append(tensor)
        return {kind: tuple(group) for kind, group in groups.items()}


def kind_of(name: str) -> str:
    """Return the kind of module that a tensor belongs to: the last component of its path that is not a number."""
    parts = [part for part in module_path(name).split(".") if not _NUMBER.fullmatch(part)]
    return parts[-1] if parts else name


def layer_of(name: str) -> int | None:
    """Return the layer that a tensor belongs to: the first number in its path."""
    return next((int(part) for part in name.split(".") if _NUMBER.fullmatch(part)), None)
