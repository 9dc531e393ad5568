"""`qformat convert`: what it prints, its options, and that a dry run shows exactly what a run writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import qformat
from qformat.cli.main import run
from tests.quality import models as quality_models
from tests.small_models import contents, llama_tensors, weight, write_checkpoint, write_llama


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "source")


def test_it_ends_with_sizes_bits_time_and_rate(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["convert", str(source), str(tmp_path / "out")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "bits per packed weight" in last
    assert "->" in last
    assert last.endswith("B/s")


def test_a_dry_run_shows_the_exact_size_and_writes_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(["convert", str(source), str(out), "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {entry.name for entry in tmp_path.iterdir()} == {"source"}
    assert run(["convert", str(source), str(out)]) == 0
    assert facts["nbytes"] == sum(len(data) for data in contents(out).values())
    assert {shard["name"]: shard["nbytes"] for shard in facts["shards"]} == {
        path.name: path.stat().st_size for path in out.glob("*.safetensors")
    }
    assert facts["fits"] is True
    assert facts["free_nbytes"] > 0


def test_a_dry_run_for_people_shows_shards_reasons_and_free_space(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["convert", str(source), str(tmp_path / "out"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "model-00001-of-00001.safetensors" in shown
    assert "embedding" in shown
    assert "free" in shown


def test_json_is_one_object(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", str(source), str(tmp_path / "out"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packed_tensors"] == 14
    assert facts["already_complete"] is False


def test_skip_keeps_what_matches_and_its_fused_partners(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(["convert", str(source), str(out), "--skip", "model.layers.0.self_attn.q_proj"]) == 0
    with qformat.open(out) as artifact:
        kept = {name for name in artifact if isinstance(artifact[name], qformat.KeptTensor)}
    assert {f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"} <= kept
    assert "model.layers.1.self_attn.q_proj.weight" not in kept
    skipped = json.loads((out / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert "model.layers.0.self_attn.v_proj" in skipped


def test_a_recipe_and_its_options_decide_block_size_and_levels(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[rule]]\npattern = "*.mlp.*"\naction = "nf4"\nblock_size = 128\ndouble_quant = false\n')
    out = tmp_path / "out"
    assert run(["convert", str(source), str(out), "--recipe", str(recipe), "--block-size", "32"]) == 0
    with qformat.open(out) as artifact:
        down = artifact["model.layers.0.mlp.down_proj.weight"]
        query = artifact["model.layers.0.self_attn.q_proj.weight"]
    assert isinstance(down, qformat.PackedTensor)
    assert isinstance(query, qformat.PackedTensor)
    assert (down.layout.block_size, down.layout.double_quant) == (128, False)
    assert (query.layout.block_size, query.layout.double_quant) == (32, True)


def test_a_pattern_that_matches_nothing_is_wrong_usage(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["convert", str(source), str(tmp_path / "out"), "--skip", "model.layers.0.mpl.*"]) == 2
    assert "Nearest" in capsys.readouterr().err


def test_small_shards_split_the_model_and_load_the_same(source: Path, tmp_path: Path) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    assert run(["convert", str(source), str(one)]) == 0
    assert run(["convert", str(source), str(many), "--max-shard-size", "4KB"]) == 0
    assert len(list(many.glob("*.safetensors"))) > 3
    with qformat.open(one) as first, qformat.open(many) as second:
        assert list(first) == list(second)
        for name in first:
            assert first[name].decode().tobytes() == second[name].decode().tobytes()


def test_weights_that_are_not_known_to_be_linear_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {**llama_tensors(), "model.layers.0.mystery.weight": weight((8, 8))}
    source = write_checkpoint(tmp_path / "source", tensors)
    assert run(["convert", str(source), str(tmp_path / "out")]) == 0
    assert "model.layers.0.mystery.weight" in capsys.readouterr().out


def test_blocks_that_run_across_rows_are_reported(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["convert", str(source), str(tmp_path / "other"), "--dry-run", "--json"]) == 0
    named = json.loads(capsys.readouterr().out)["blocks_across_rows"]
    assert "model.layers.0.self_attn.q_proj.weight" in named
    assert run(["convert", str(source), str(tmp_path / "other"), "--dry-run"]) == 0
    assert "blocks run across rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options", [["--block-size", "48"], ["--workers", "0"], ["--max-shard-size", "0"], ["--max-shard-size", "5 apples"]]
)
def test_invalid_options_are_wrong_usage(source: Path, tmp_path: Path, options: list[str]) -> None:
    assert run(["convert", str(source), str(tmp_path / "out"), *options]) == 2


def test_a_calibrated_conversion_reports_what_was_calibrated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, text = quality_models.write_source(tmp_path / "source"), quality_models.write_text(tmp_path / "words.txt")
    options = ["--calibrate", str(text), "--calibration-tokens", "600"]
    assert run(["convert", str(source), str(tmp_path / "out"), *options]) == 0
    assert "Calibrated 14 of 14 weights on 512 tokens in 4 windows" in capsys.readouterr().out
    assert run(["inspect", str(tmp_path / "out")]) == 0
    assert "error_feedback" in capsys.readouterr().out


def test_a_dry_run_lists_what_would_not_be_calibrated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, text = quality_models.write_source(tmp_path / "source"), quality_models.write_text(tmp_path / "words.txt")
    command = ["convert", str(source), str(tmp_path / "out"), "--calibrate", str(text), "--block-size", "128"]
    assert run([*command, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "2 of 14 weights" in shown
    assert "Not calibrated, its blocks run across rows: model.layers.0.mlp.gate_proj.weight" in shown
    assert run([*command, "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["calibration"]["windows"] == 21
    assert not (tmp_path / "out").exists()
    assert run([*command]) == 0
    assert facts["nbytes"] == sum(len(data) for data in contents(tmp_path / "out").values())


def test_calibration_tokens_without_a_text_are_wrong_usage(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["convert", str(source), str(tmp_path / "out"), "--calibration-tokens", "600"]) == 2
    assert "--calibrate FILE" in capsys.readouterr().err


def test_a_text_that_does_not_exist_is_wrong_usage(tmp_path: Path) -> None:
    source = quality_models.write_source(tmp_path / "source")
    assert run(["convert", str(source), str(tmp_path / "out"), "--calibrate", str(tmp_path / "none.txt")]) == 2
    assert not (tmp_path / "out").exists()
