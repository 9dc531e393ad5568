"""What `compare` finds out: a record a tensor, and the figures of the whole artifact."""

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
    """What the comparison found out about a packed weight.

    errors: of the values that a reader gets, in the weight's dtype. code_counts: how often each of the 16 codes
    occurs. n_wrong_codes, n_wrong_scales: how many are not what encoding the source gives, or None where the source
    cannot be encoded, since it is not finite. source_named: the source is the one whose digest the manifest has, or
    None if it has none. nbytes: of all components. n_far_scales: of a weight whose codes were chosen on a text, the
    scales that are far from the source's (`chosen_codes`); None for all others.
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
        """Whether its codes were chosen on a text."""
        return self.n_far_scales is not None

    @property
    def holds(self) -> bool:
        """Whether codes and scales are what the recipe gives, or are near the source where they were chosen."""
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
    """What the comparison found out about a tensor kept in 16 bit (or whatever it came in)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    keep_reason: str
    nbytes: int
    n_wrong_bytes: int
    source_named: bool
    tuned: bool = False
    """The manifest says that it was tuned, and it may differ."""

    @property
    def identical(self) -> bool:
        """Whether it is the source's tensor, bit for bit."""
        return self.n_wrong_bytes == 0


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of `compare`; tensors in the order of the manifest, without those that could not be compared.

    n_packed, n_kept: how many of each the artifact has; n_source_digests: for how many of them the manifest has the
    digest of the source. scale_change: in a tuned artifact, the share by which scales may differ from those that the
    recipe gives.
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
        """Whether nothing is wrong: every code, scale and kept bit is what this source gives."""
        return not self.findings

    @property
    def overall(self) -> ErrorSums:
        """The errors of all packed weights together."""
        return add_up(tensor.errors for tensor in self.packed)

    @property
    def code_counts(self) -> tuple[int, ...]:
        """How often each of the 16 codes occurs in the artifact."""
        return tuple(sum(tensor.code_counts[code] for tensor in self.packed) for code in range(16))

    @property
    def n_exact(self) -> int:
        """How many packed weights have the codes and scales that encoding the source gives, chosen ones left out."""
        return sum(tensor.exact for tensor in self.packed if not tensor.chosen)

    @property
    def n_chosen(self) -> int:
        """How many packed weights have codes that were chosen on a text."""
        return sum(tensor.chosen for tensor in self.packed)

    @property
    def n_near(self) -> int:
        """How many of these are near the source."""
        return sum(tensor.holds for tensor in self.packed if tensor.chosen)

    @property
    def n_identical(self) -> int:
        """How many kept tensors are the source's, bit for bit."""
        return sum(tensor.identical for tensor in self.kept)

    @property
    def tuned(self) -> tuple[KeptComparison, ...]:
        """The kept tensors that were tuned and differ from the source's."""
        return tuple(tensor for tensor in self.kept if tensor.tuned and not tensor.identical)

    @property
    def n_source_named(self) -> int:
        """How many source tensors are those whose digest the manifest has."""
        named = sum(tensor.source_named is True for tensor in self.packed)
        return named + sum(tensor.source_named for tensor in self.kept)

    @property
    def source_nbytes(self) -> int:
        """Bytes of the compared tensors in the source."""
        return sum(tensor.source_nbytes for tensor in self.packed) + sum(tensor.nbytes for tensor in self.kept)

    @property
    def bits_per_weight(self) -> float | None:
        """Bits that a packed weight takes, all components counted."""
        n_weights = sum(tensor.layout.n_elements for tensor in self.packed)
        return 8 * sum(tensor.nbytes for tensor in self.packed) / n_weights if n_weights else None

    @property
    def bits_per_parameter(self) -> float | None:
        """Bits that a parameter of the whole model takes, packed or kept."""
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
    """Return the kind of module that a tensor belongs to: the last part of its path that is no number."""
    parts = [part for part in module_path(name).split(".") if not _NUMBER.fullmatch(part)]
    return parts[-1] if parts else name


def layer_of(name: str) -> int | None:
    """Return the layer that a tensor belongs to: the first number in its path."""
    return next((int(part) for part in name.split(".") if _NUMBER.fullmatch(part)), None)
