"""`tools.spec.reference_reader`: the standard library and the specification suffice to read an artifact."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qformat.artifact.reading.reader import PackedTensor, open_artifact
from qformat.codec.floats import FloatFormat
from tests.small_models import write_llama
from tests.spec import corpus, edits
from tools.spec import reference_reader

SCRIPT = Path(reference_reader.__file__)

ONLY_IN_XXH3 = {"changed_component_digest", "changed_header_digest"}
"""Vectors in which only an XXH3-128 in the manifest is wrong; the standard library has no XXH3."""


def test_it_is_short_and_imports_only_the_standard_library() -> None:
    source = SCRIPT.read_text("utf-8")
    assert len(source.splitlines()) <= 320
    imported: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
    assert imported <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("vector", corpus.artifacts(), ids=corpus.name_of)
def test_it_decodes_valid_artifacts_to_the_expected_bits(vector: corpus.Vector) -> None:
    artifact = reference_reader.Artifact(corpus.ARTIFACTS / vector["name"])
    assert set(artifact.tensors) == set(vector["tensors"])
    for name, expected in vector["tensors"].items():
        if expected["encoding"] == "kept":
            assert artifact.decode(name).hex() == expected["bytes"]
        else:
            for dtype, bits in expected["decoded"].items():
                assert artifact.decode(name, dtype).hex() == bits, f"{name} as {dtype}"


@pytest.mark.parametrize("vector", corpus.edited(), ids=corpus.name_of)
def test_it_judges_edited_artifacts_as_qformat_does(vector: corpus.Vector, tmp_path: Path) -> None:
    folder = corpus.copy_of(vector["base"], tmp_path)
    edits.apply(vector["edits"], folder)
    if vector["refused_by"] is None or vector["name"] in ONLY_IN_XXH3:
        reference_reader.Artifact(folder)
        return
    with pytest.raises(reference_reader.Refused) as refusal:
        reference_reader.Artifact(folder)
    # Without XXH3, a changed component is reported as a changed file.
    expected = "file_digest" if vector["reason"] == "component_digest" else vector["reason"]
    assert refusal.value.args[0] == expected


def test_it_decodes_a_converted_model_to_the_bits_of_qformat(tmp_path: Path) -> None:
    import qformat

    source = write_llama(tmp_path / "source")
    qformat.convert(source, tmp_path / "out")
    theirs = reference_reader.Artifact(tmp_path / "out")
    n_packed = 0
    with open_artifact(tmp_path / "out") as ours:
        for name, tensor in ours.items():
            if isinstance(tensor, PackedTensor):
                n_packed += 1
                for float_format in FloatFormat:
                    assert theirs.decode(name, float_format.value) == tensor.decode(float_format).tobytes()
            else:
                assert theirs.decode(name) == np.ascontiguousarray(tensor.data).tobytes()
    assert n_packed > 0


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-I", str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def test_its_command_line_checks_decodes_and_reports_errors(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    (vector,) = (vector for vector in corpus.artifacts() if vector["name"] == "double_quant")
    folder = corpus.copy_of("double_quant", tmp_path)
    checked = run(str(folder))
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "no errors found\n", "")
    assert run(str(folder), "--tensor", name).stdout.strip() == vector["tensors"][name]["decoded"]["BF16"]
    assert run(str(folder), "--tensor", "no.such.weight").returncode == 1
    (folder / "config.json").write_text("{}")
    refused = run(str(folder))
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "invalid artifact: file_size config.json" in refused.stderr
