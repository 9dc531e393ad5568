"""Properties of every kind of source: deterministic output, changes detected, damage reported."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from qformat.artifact.reading.verify import verify_integrity
from qformat.cli.main import cli
from qformat.converters.compare.compare import compare
from qformat.converters.convert import ConversionOptions, convert, plan
from qformat.converters.sources.open_source import KINDS, open_source
from qformat.errors import QformatError, Reason, SourceError
from tests.converters.faulty_disk import interrupt
from tests.converters.sources.decoded_kinds import (
    bnb_llama,
    experts,
    fp8_source,
    torch_llama,
    write_bin,
    write_bnb,
    write_mxfp4,
)
from tests.converters.sources.gguf.gguf_models import write_gguf
from tests.small_models import contents, write_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")

BUILDERS: dict[str, Callable[[Path], Path]] = {
    "safetensors": write_llama,
    "torch_bin": lambda folder: write_bin(folder, torch_llama()),
    "gguf": lambda folder: write_gguf(folder, kind="Q6_K"),
    "fp8": fp8_source,
    "bitsandbytes_4bit": lambda folder: write_bnb(folder, bnb_llama()),
    "mxfp4": lambda folder: write_mxfp4(folder, experts("gate_up_proj", n_experts=3, n_rows=40, n_groups=2)),
}

WEIGHTS = {"torch_bin": "pytorch_model.bin", "gguf": "model.gguf"}


def weights_of(source: Path) -> Path:
    (found,) = (path for path in source.iterdir() if path.suffix in {".safetensors", ".bin", ".gguf"})
    return found


@pytest.fixture(params=BUILDERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def source(kind: str, tmp_path: Path) -> Path:
    return BUILDERS[kind](tmp_path / "source")


def test_every_kind_of_source_is_tested_here() -> None:
    assert {listed.name for listed in KINDS} == {*BUILDERS, "owner/name"}


def test_the_kind_is_detected_from_the_files_and_recorded(kind: str, source: Path, tmp_path: Path) -> None:
    opened = open_source(source)
    assert opened.kind == kind
    opened.close()
    convert(source, tmp_path / "out")
    described = json.loads((tmp_path / "out" / "qformat.json").read_text())["source"]
    assert described["kind"] == kind
    assert described["files"][weights_of(source).name]["nbytes"] == weights_of(source).stat().st_size
    assert str(tmp_path) not in json.dumps(described)


def test_any_number_of_workers_and_any_interruption_give_the_same_bytes(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", workers=1)
    expected = contents(tmp_path / "out")
    convert(source, tmp_path / "four", workers=4)
    assert contents(tmp_path / "four") == expected
    for n_done in (1, 11):
        out = tmp_path / f"after-{n_done}"
        interrupt(source, out, n_done=n_done, options=ConversionOptions())
        convert(source, out)
        assert contents(out) == expected
    assert verify_integrity(tmp_path / "out", sha256=True).passed
    assert compare(tmp_path / "out", source).passed


def test_a_source_that_changes_during_conversion_gives_no_artifact(source: Path, tmp_path: Path) -> None:
    path = weights_of(source)

    def touch(_: object) -> None:
        os.utime(path, ns=(0, 0))

    with pytest.raises(SourceError, match="was changed during the conversion") as refused:
        convert(source, tmp_path / "out", on_plan=touch)
    assert refused.value.reason is Reason.SOURCE_CHANGED
    assert path.name in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_bytes_read_before_an_interruption_must_be_the_same_after_it(source: Path, tmp_path: Path) -> None:
    interrupt(source, tmp_path / "out", n_done=5, options=ConversionOptions())
    path = weights_of(source)
    data = np.fromfile(path, np.uint8)
    data[-data.size * 9 // 10 :] ^= 1  # the weights, not the header
    data.tofile(path)
    with pytest.raises(SourceError):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_truncated_file_is_rejected_and_reported(source: Path, tmp_path: Path) -> None:
    path, pick = weights_of(source), random.Random(0)
    whole = path.read_bytes()
    for length in (0, 1, 7, 30, len(whole) - 1, *(pick.randrange(len(whole)) for _ in range(12))):
        path.write_bytes(whole[:length])
        with pytest.raises(SourceError) as refused:
            convert(source, tmp_path / "out")
        assert str(path) in str(refused.value)
        assert not (tmp_path / "out").exists()


def test_flipped_bits_in_the_header_raise_our_error_or_give_a_model(kind: str, source: Path) -> None:
    path, pick = weights_of(source), random.Random(1)
    whole = path.read_bytes()
    header_nbytes = 3000 if kind in WEIGHTS else 8 + int.from_bytes(whole[:8], "little")
    messages = []
    for _ in range(100):
        flipped = bytearray(whole)
        flipped[pick.randrange(header_nbytes)] ^= 1 << pick.randrange(8)
        path.write_bytes(flipped)
        try:
            plan(source)
        except QformatError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert not [message for message in messages if str(source) not in message and "model.layers" not in message]


@pytest.mark.parametrize("kind", sorted(BUILDERS.keys() - {"gguf"}), indirect=True)  # that one brings its own config
def test_a_config_of_another_encoding_is_rejected(source: Path) -> None:
    path = source / "config.json"
    config = json.loads(path.read_text())
    stored = config.get("quantization_config", {}).get("quant_method")
    for method in ("gptq", "fp8", "mxfp4", "bitsandbytes"):
        if method != stored:
            path.write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
            with pytest.raises(SourceError) as refused:
                plan(source)
            assert refused.value.reason in {Reason.ALREADY_QUANTIZED, Reason.CONFIG_FIELD, Reason.MISSING_COMPONENT}
            assert str(source) in str(refused.value)


def test_info_lists_every_kind() -> None:
    output = CliRunner().invoke(cli, ["info", "--json"], catch_exceptions=False).output
    listed = json.loads(output)["sources"]
    assert listed == {kind.name: kind.description for kind in KINDS}
    text = CliRunner().invoke(cli, ["info"], catch_exceptions=False).output
    assert all(kind.description in text for kind in KINDS)


def test_only_the_pickle_of_a_bin_file_needs_torch(tmp_path: Path) -> None:
    script = "import sys, qformat\n"
    for kind in sorted(BUILDERS.keys() - {"torch_bin"}):
        source = BUILDERS[kind](tmp_path / kind)
        script += (
            f"qformat.convert({str(source)!r}, {str(tmp_path / (kind + '-nf4'))!r})\n"
            f"assert not {{'torch', 'transformers', 'gguf', 'bitsandbytes'}} & set(sys.modules), {kind!r}\n"
        )
    subprocess.run([sys.executable, "-c", script], check=True)
