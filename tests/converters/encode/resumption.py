"""Resumes an interrupted conversion and counts the tensors that it still has to encode."""

from __future__ import annotations

from pathlib import Path

from qformat.converters.convert import ConversionSummary, convert
from tests.converters.faulty_disk import OPTIONS, FaultyDisk


class CountingDisk(FaultyDisk):
    def __init__(self) -> None:
        super().__init__()
        self.n_tensors = 0

    def perform(self, name: str, arguments: tuple[object, ...]) -> object:
        if name == "raw_write":
            assert isinstance(arguments[1], memoryview)
            self.n_tensors += b'"tensor":' in bytes(arguments[1])
        return super().perform(name, arguments)


def resume(source: Path, out: Path, **arguments: object) -> tuple[ConversionSummary, int]:
    """Run the conversion again; return the summary and the number of tensors that were encoded."""
    counting = CountingDisk()
    summary = convert(source, out, OPTIONS, disk=counting, **arguments)  # type: ignore[arg-type]
    return summary, counting.n_tensors
