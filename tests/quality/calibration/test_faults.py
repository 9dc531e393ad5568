"""Calibrated conversions that are killed, or run out of disk, at chosen or random points, and are then resumed."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest

from qformat.artifact.reading.verify import verify_integrity
from qformat.converters.convert import ConversionOptions, convert
from qformat.errors import TargetError
from qformat.quality.calibration.settings import CalibrationSettings
from tests.converters.faulty_disk import FaultyDisk, Killed, PowerCut
from tests.quality.calibration.calibrated import calibrate
from tests.small_models import contents, llama_config, llama_tensors, names_beside, write_checkpoint
from tests.training import runs

TOKENS = 512

Undisturbed = tuple[list[str], dict[str, bytes]]
"""The calls to the disk of a conversion that nothing disturbs, and its bytes."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, so that there is one between the first and the last."""
    sizes = {"hidden": 64, "intermediate": 64, "vocabulary": runs.VOCABULARY, "n_layers": 3}
    config = {**llama_config(**sizes), "max_position_embeddings": 128}
    folder = write_checkpoint(tmp_path_factory.mktemp("faults") / "source", llama_tensors(**sizes), config=config)
    runs.small_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def disk_calls(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    disk = FaultyDisk()
    out = calibrate(source, tmp_path_factory.mktemp("whole") / "out", text, tokens=TOKENS, disk=disk, workers=2)
    return disk.names, contents(out)


def continue_and_compare(source: Path, text: Path, out: Path, whole: dict[str, bytes]) -> None:
    with contextlib.suppress(TargetError):  # refused, since the fault came behind the very last mark and OUT is there
        calibrate(source, out, text, tokens=TOKENS, workers=2)
    assert contents(out) == whole
    assert names_beside(out) == {out.name}


@pytest.mark.parametrize("seed", range(8))
def test_killed_at_a_random_point_the_same_command_gives_the_same_bytes(
    seed: int, source: Path, text: Path, disk_calls: Undisturbed, tmp_path: Path
) -> None:
    names, whole = disk_calls
    calibrated_from = max(i for i, name in enumerate(names) if name == "raw_mkdir")  # the folder of hidden states
    at = random.Random(seed).randrange(calibrated_from, len(names))
    disk = PowerCut(at, seed) if seed % 2 else FaultyDisk(at, "kill")
    with pytest.raises(Killed):
        calibrate(source, tmp_path / "out", text, tokens=TOKENS, disk=disk, workers=2)
    continue_and_compare(source, text, tmp_path / "out", whole)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill", "ENOSPC", "EIO", "short write", "power cut"])
def test_a_fault_at_any_call(fault: str, source: Path, text: Path, disk_calls: Undisturbed, tmp_path: Path) -> None:
    names, whole = disk_calls
    for at, name in enumerate(names):
        if "write" in fault and "write" not in name:
            continue
        disk = PowerCut(at, at) if fault == "power cut" else FaultyDisk(at, fault)
        out = tmp_path / str(at) / "out"
        out.parent.mkdir()
        try:
            calibrate(source, out, text, tokens=TOKENS, disk=disk, workers=2)
        except (Killed, TargetError):
            continue_and_compare(source, text, out, whole)
        assert contents(out) == whole


def interrupt(source: Path, text: Path, out: Path, *, n_layers: int) -> None:
    """Stop a calibrated conversion once `n_layers` layers are done."""

    def stop(done: int, total: int) -> None:
        if done == n_layers:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(source, out, text, tokens=TOKENS, on_layer=stop, workers=2)


def test_interrupted_between_layers_it_resumes_with_the_layer_and_its_hidden_states(
    source: Path, text: Path, disk_calls: Undisturbed, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupt(source, text, out, n_layers=2)
    assert not out.exists()
    seen: list[int] = []
    calibrate(source, out, text, tokens=TOKENS, on_layer=lambda done, total: seen.append(done), workers=2)
    assert seen == [2, 3]
    assert contents(out) == disk_calls[1]


def test_without_the_hidden_states_they_are_computed_from_the_staged_layers(
    source: Path, text: Path, disk_calls: Undisturbed, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupt(source, text, out, n_layers=2)
    for path in (tmp_path / "out.partial" / "hidden_states").iterdir():
        path.write_bytes(path.read_bytes()[:-4] + b"oops")
    seen: list[int] = []
    calibrate(source, out, text, tokens=TOKENS, on_layer=lambda done, total: seen.append(done), workers=2)
    assert seen == [0, 1, 2, 3]
    assert contents(out) == disk_calls[1]


def test_a_full_disk_is_reported_with_the_required_space_and_leaves_no_output(
    source: Path, text: Path, disk_calls: Undisturbed, tmp_path: Path
) -> None:
    names, whole = disk_calls
    at = max(i for i, name in enumerate(names) if name == "raw_mkdir") + 5
    with pytest.raises(TargetError, match=r"not enough disk space: the output needs .* bytes in total"):
        calibrate(source, tmp_path / "out", text, tokens=TOKENS, disk=FaultyDisk(at, "full from here on"), workers=2)
    assert not (tmp_path / "out").exists()
    continue_and_compare(source, text, tmp_path / "out", whole)


def test_a_partial_output_of_other_settings_is_not_resumed(source: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(source, text, out, n_layers=1)
    for options in (ConversionOptions(), ConversionOptions(calibration=CalibrationSettings(text, 2 * TOKENS))):
        with pytest.raises(TargetError, match="contains an interrupted run with a different source, recipe or options"):
            convert(source, out, options)
    convert(source, out, restart=True)
    assert verify_integrity(out).passed
    assert names_beside(out) == {out.name}
