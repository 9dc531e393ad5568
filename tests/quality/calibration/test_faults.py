"""Calibrated conversions that are interrupted between layers and then resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from qformat.artifact.reading.verify import verify_integrity
from qformat.converters.convert import ConversionOptions, convert
from qformat.errors import TargetError
from qformat.quality.calibration.settings import CalibrationSettings
from tests.quality.calibration.calibrated import calibrate
from tests.small_models import contents, llama_config, llama_tensors, names_beside, write_checkpoint
from tests.training import runs

TOKENS = 512


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, so that there is one between the first and the last."""
    sizes = {"hidden": 64, "intermediate": 64, "vocabulary": runs.VOCABULARY, "n_layers": 3}
    config = {**llama_config(**sizes), "max_position_embeddings": 128}
    folder = write_checkpoint(tmp_path_factory.mktemp("faults") / "source", llama_tensors(**sizes), config=config)
    runs.small_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the bytes of a conversion that nothing disturbs."""
    return contents(calibrate(source, tmp_path_factory.mktemp("whole") / "out", text, tokens=TOKENS, workers=2))


def interrupt(source: Path, text: Path, out: Path, *, n_layers: int) -> None:
    """Stop a calibrated conversion once `n_layers` layers are done."""

    def stop(done: int, total: int) -> None:
        if done == n_layers:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(source, out, text, tokens=TOKENS, on_layer=stop, workers=2)


def test_interrupted_between_layers_it_resumes_with_the_layer_and_its_hidden_states(
    source: Path, text: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupt(source, text, out, n_layers=2)
    assert not out.exists()
    seen: list[int] = []
    calibrate(source, out, text, tokens=TOKENS, on_layer=lambda done, total: seen.append(done), workers=2)
    assert seen == [2, 3]
    assert contents(out) == whole


def test_without_the_hidden_states_they_are_computed_from_the_staged_layers(
    source: Path, text: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupt(source, text, out, n_layers=2)
    for path in (tmp_path / "out.partial" / "hidden_states").iterdir():
        path.write_bytes(path.read_bytes()[:-4] + b"oops")
    seen: list[int] = []
    calibrate(source, out, text, tokens=TOKENS, on_layer=lambda done, total: seen.append(done), workers=2)
    assert seen == [0, 1, 2, 3]
    assert contents(out) == whole


def test_a_partial_output_of_other_settings_is_not_resumed(source: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(source, text, out, n_layers=1)
    for options in (ConversionOptions(), ConversionOptions(calibration=CalibrationSettings(text, 2 * TOKENS))):
        with pytest.raises(TargetError, match="contains an interrupted run with a different source, recipe or options"):
            convert(source, out, options)
    convert(source, out, restart=True)
    assert verify_integrity(out).passed
    assert names_beside(out) == {out.name}
