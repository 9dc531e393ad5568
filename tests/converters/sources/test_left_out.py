"""Files of a source that readers need are carried over, and everything else is named with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qformat.artifact.reading.verify import verify_integrity
from qformat.cli.main import run
from qformat.converters.convert import convert, plan
from qformat.converters.sources.left_out import MODULE
from tests.converters.sources.decoded_kinds import fp8_source, torch_llama, write_bin
from tests.converters.sources.gguf.gguf_models import write_gguf
from tests.converters.sources.hub.serving import NAME, serving
from tests.converters.sources.hub.serving import plan as plan_from_hub
from tests.small_models import SIDE_FILES, contents, write_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")

EXTRA = {
    "README.md": "documentation",
    "architecture.png": "documentation",
    "1_Pooling/": "directory",
    "onnx/": "directory",
    "checkpoint-500/": "record of a training",
    "optimizer.pt": "record of a training",
    "trainer_state.json": "record of a training",
    "consolidated.00.pth": "other weights",
    "model.onnx": "other weights",
    "adapter_model.safetensors": "other weights",
    "params.json": "not known to belong to a model",
    "quant_log.csv": "not known to belong to a model",
}

SENTENCE_TRANSFORMERS = {
    "modules.json": b'[{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]',
    "config_sentence_transformers.json": b'{"prompts": {"query": "query: "}}',
    "sentence_bert_config.json": b'{"max_seq_length": 512}',
    "sentence_xlm-roberta_config.json": b'{"max_seq_length": 512}',
}

BUILDERS: dict[str, Callable[[Path], Path]] = {
    "safetensors": write_llama,
    "shards": lambda folder: write_llama(folder, n_shards=3),
    "torch_bin": lambda folder: write_bin(folder, torch_llama()),
    "fp8": fp8_source,
    "gguf": write_gguf,
}


def add(source: Path, names: dict[str, str]) -> Path:
    for name in names:
        if name.endswith("/"):
            (source / name).mkdir()
            (source / name / "config.json").write_bytes(b"{}")
        else:
            (source / name).write_bytes(b"x")
    (source / ".gitattributes").write_bytes(b"x")
    return source


@pytest.mark.parametrize("builder", BUILDERS)
def test_every_entry_that_is_left_out_is_in_plan_and_manifest_with_its_reason(builder: str, tmp_path: Path) -> None:
    source = add(BUILDERS[builder](tmp_path / "source"), EXTRA)
    summary = convert(source, tmp_path / "out")
    assert summary.plan.left_out == EXTRA
    manifest = json.loads((tmp_path / "out" / "qformat.json").read_bytes())
    assert manifest["source"]["left_out"] == EXTRA
    assert verify_integrity(tmp_path / "out").passed
    assert not {name.rstrip("/") for name in EXTRA} & {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("builder", BUILDERS)
def test_without_such_entries_the_manifest_has_no_list(builder: str, tmp_path: Path) -> None:
    source = BUILDERS[builder](tmp_path / "source")
    convert(source, tmp_path / "out")
    assert "left_out" not in json.loads((tmp_path / "out" / "qformat.json").read_bytes())["source"]


def test_files_beside_a_gguf_file_that_was_given_alone_are_not_listed(tmp_path: Path) -> None:
    source = add(write_gguf(tmp_path / "downloads"), EXTRA)
    (path,) = source.glob("*.gguf")
    (source / "tokenizer.json").write_bytes(SIDE_FILES["tokenizer.json"])
    assert plan(source).left_out == EXTRA
    assert path.name not in plan(source).left_out


def test_entries_of_a_repository_are_listed_in_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = add(write_llama(tmp_path / "source"), EXTRA)
    with serving(monkeypatch, tmp_path / "home") as hub:
        hub.add_folder(NAME, source)
        assert plan_from_hub(NAME).left_out == EXTRA


def test_files_of_sentence_transformers_are_carried_over(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source")
    for name, data in SENTENCE_TRANSFORMERS.items():
        (source / name).write_bytes(data)
    convert(source, tmp_path / "out")
    assert contents(tmp_path / "out").items() >= SENTENCE_TRANSFORMERS.items()


MODULES = [
    {"path": ""},
    {"path": "1_Pooling"},
    {"path": "2_Dense/inner"},
    {"path": "3_Normalize"},
    {},
    "x",
    {"path": 3},
]


def test_directories_of_sentence_transformers_are_told_from_others(tmp_path: Path) -> None:
    source = add(write_llama(tmp_path / "source"), {"1_Pooling/": "", "2_Dense/": "", "onnx/": ""})
    (source / "modules.json").write_text(json.dumps(MODULES))
    needed = plan(source).left_out
    assert needed == {"1_Pooling/": MODULE, "2_Dense/": MODULE, "onnx/": "directory"}
    convert(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "qformat.json").read_bytes())["source"]["left_out"] == needed


def test_directories_of_sentence_transformers_in_a_repository_are_told_from_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = add(write_llama(tmp_path / "source"), {"1_Pooling/": "", "onnx/": ""})
    (source / "modules.json").write_text(json.dumps(MODULES))
    with serving(monkeypatch, tmp_path / "home") as hub:
        hub.add_folder(NAME, source)
        assert plan_from_hub(NAME).left_out == {"1_Pooling/": MODULE, "onnx/": "directory"}


@pytest.mark.parametrize("modules", [b"[", b"{}", b'"1_Pooling"', b"\xff"])
def test_a_damaged_list_of_modules_names_no_directories(modules: bytes, tmp_path: Path) -> None:
    source = add(write_llama(tmp_path / "source"), {"1_Pooling/": ""})
    (source / "modules.json").write_bytes(modules)
    assert plan(source).left_out == {"1_Pooling/": "directory"}


def test_the_summary_names_what_is_left_out_except_documentation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = add(write_llama(tmp_path / "source"), EXTRA)
    assert run(["convert", str(source), str(tmp_path / "out")]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Not carried over: ")]
    assert "1_Pooling/, onnx/ (directory)" in line
    assert "params.json, quant_log.csv (not known to belong to a model)" in line
    assert "README" not in line
    assert run(["convert", str(source), str(tmp_path / "again"), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == EXTRA
