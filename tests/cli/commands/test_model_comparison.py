"""`qformat convert` rejects what no reader could load, and names the tensors that no reader loads."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from qformat.cli.checks.model_comparison import RunningComparison
from qformat.cli.main import run
from qformat.converters.convert import plan
from qformat.errors import Reason, SourceError
from tests.small_models import Tensor, llama_config, llama_tensors, weight, write_checkpoint, write_llama

Output = pytest.CaptureFixture[str]

MISFITS: dict[str, tuple[dict[str, Tensor], str, str]] = {
    "missing": ({}, "model.norm.weight", "the checkpoint lacks it (tensors that are missing: 1)"),
    "wrong shape": ({"lm_head.weight": weight((26, 32))}, "lm_head.weight", "shape [26, 32], but the model"),
    "packed without a layer": (
        {"model.layers.5.mlp.up_proj.weight": weight((48, 32))},
        "model.layers.5.mlp.up_proj.weight",
        "has no such layer",
    ),
}


@pytest.fixture(params=MISFITS)
def misfit(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str, str]:
    added, name, problem = MISFITS[request.param]
    tensors = {**llama_tensors(), **added}
    if not added:
        del tensors[name]
    return write_checkpoint(tmp_path / "source", tensors, config=llama_config()), name, problem


@pytest.fixture
def with_extras(tmp_path: Path) -> Path:
    extras = {"v_head.summary.weight": weight((1, 32)), "model.layers.0.self_attn.rotary_emb.inv_freq": weight((8,))}
    return write_checkpoint(tmp_path / "source", {**llama_tensors(), **extras}, config=llama_config())


@pytest.fixture(autouse=True)
def imported() -> None:
    """Compare in this process, which has imported transformers."""
    import transformers  # noqa: F401


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_what_no_reader_could_load_is_rejected(
    dry: list[str], misfit: tuple[Path, str, str], tmp_path: Path, capsys: Output
) -> None:
    source, name, problem = misfit
    assert run(["convert", str(source), str(tmp_path / "out"), *dry]) == 1
    shown = capsys.readouterr().err
    assert name in shown
    assert problem in shown
    assert "--no-model-check" in shown
    assert not (tmp_path / "out").exists()


def test_a_further_run_without_the_check_finishes_what_was_begun(
    misfit: tuple[Path, str, str], tmp_path: Path, capsys: Output
) -> None:
    command = ["convert", str(misfit[0]), str(tmp_path / "out")]
    assert run(command) == 1
    assert run([*command, "--no-model-check"]) == 0
    assert "not compared" in capsys.readouterr().out
    assert run(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_tensors_that_no_reader_loads_are_named_and_kept(
    dry: list[str], with_extras: Path, tmp_path: Path, capsys: Output
) -> None:
    assert run(["convert", str(with_extras), str(tmp_path / "out"), *dry]) == 0
    assert "has no place for 2 tensors" in capsys.readouterr().out
    assert run(["convert", str(with_extras), str(tmp_path / "out"), "--json", "--force", *dry]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["compared_with_model"] == {
        "not_compared": None,
        "not_loaded": ["model.layers.0.self_attn.rotary_emb.inv_freq", "v_head.summary.weight"],
        "missing": [],
        "wrong_shapes": {},
    }
    assert facts["kept_tensors"] + facts["packed_tensors"] == len(llama_tensors()) + 2


def test_a_checkpoint_with_code_of_its_own_is_only_reported(tmp_path: Path, capsys: Output) -> None:
    config = {**llama_config(), "auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}
    tensors = {**llama_tensors(), "lm_head.weight": weight((26, 32))}
    source = write_checkpoint(tmp_path / "source", tensors, config=config)
    assert run(["convert", str(source), str(tmp_path / "out")]) == 0
    assert "brings its own code" in capsys.readouterr().out


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_a_config_without_any_size_is_only_reported(dry: list[str], tmp_path: Path, capsys: Output) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    source = write_checkpoint(tmp_path / "source", llama_tensors(), config=config)
    assert run(["convert", str(source), str(tmp_path / "out"), *dry]) == 0
    assert "states no size of the model" in capsys.readouterr().out


def test_without_transformers_a_note_says_what_to_install(
    with_extras: Path, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "transformers")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run(["convert", str(with_extras), str(tmp_path / "out")]) == 0
    assert "names and shapes were not compared" in capsys.readouterr().out


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_a_common_checkpoint_that_fits_needs_no_other_process(
    dry: list[str], tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_llama(tmp_path / "source")
    monkeypatch.delitem(sys.modules, "transformers")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert run(["convert", str(source), str(tmp_path / "out"), "--json", *dry]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["compared_with_model"] == {"not_compared": None, "not_loaded": [], "missing": [], "wrong_shapes": {}}
    assert "transformers" not in sys.modules


@pytest.mark.slow
def test_another_process_compares_if_transformers_is_not_imported(
    misfit: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, name, _ = misfit
    monkeypatch.delitem(sys.modules, "transformers")
    with RunningComparison(str(source), wanted=True) as comparison:
        comparison.start(plan(source))
        with pytest.raises(SourceError) as caught:
            comparison.refuse()
    assert caught.value.tensor == name
    assert caught.value.reason in {Reason.COMPONENT_SHAPE, Reason.MISSING_COMPONENT, Reason.UNKNOWN_TENSOR}


def test_another_process_that_fails_is_a_note(with_extras: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "transformers")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with RunningComparison(str(with_extras), wanted=True) as comparison:
        comparison.start(plan(with_extras))
        comparison.refuse()
        assert "status 1" in str(comparison.result().not_compared)


def test_an_artifact_that_was_complete_before_waits_for_no_other_process(
    with_extras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "never_ends"
    program.write_text("#!/bin/sh\nexec sleep 1000\n")
    program.chmod(0o755)
    monkeypatch.delitem(sys.modules, "transformers")
    monkeypatch.setattr(sys, "executable", str(program))
    with RunningComparison(str(with_extras), wanted=True) as comparison:
        comparison.start(plan(with_extras))
        assert "complete before" in str(comparison.result_at_once().not_compared)
