"""Fuzzed sources: whatever files a checkpoint has, plan and convert succeed or raise an error of qformat."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qformat.artifact.reading.verify import verify_integrity
from qformat.converters.convert import ConversionOptions, convert
from qformat.errors import QformatError, SourceError, TargetError, UsageError
from tests.converters.faulty_disk import FaultyDisk
from tests.corpus.damage.odd_json import odd_edit
from tests.corpus.fuzzing import RANDOM
from tests.small_models import INDEX, contents, header_bytes, write_tiny

FUZZ = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SOAK = settings(max_examples=5_000, deadline=None, suppress_health_check=list(HealthCheck))

KEYS = st.sampled_from(
    [
        "model_type",
        "text_config",
        "architectures",
        "tie_word_embeddings",
        "quantization_config",
        "num_experts",
        "vocab_size",
        "auto_map",
        "",
        "🦙",
    ]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["llama", "gpt2", "mamba2", "qwen3_next", "deepseek_v3", "gemma3", "bert", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=base) as temporary:
        yield Path(temporary)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return contents(write_tiny(tmp_path_factory.mktemp("pristine") / "source", n_shards=2))


def attempt(folder: Path, files: dict[str, bytes], options: ConversionOptions | None = None) -> None:
    """Convert these files. Nothing stands under OUT after an error, and a good artifact otherwise."""
    shutil.rmtree(folder)
    source, out = folder / "source", folder / "out"
    source.mkdir(parents=True)
    for name, data in files.items():
        (source / name).write_bytes(data)
    error: QformatError | None = None
    try:
        convert(source, out, options, workers=1, disk=FaultyDisk())
    except (SourceError, TargetError, UsageError) as caught:
        error = caught
    if error is not None:
        str(error).encode("utf-8")
        assert not out.exists()
        return
    assert verify_integrity(out, workers=1).passed
    assert os.listdir(folder) in (["source", "out"], ["out", "source"])


def fuzz_config(folder: Path, pristine: dict[str, bytes], data: st.DataObject) -> None:
    config = {**json.loads(pristine["config.json"]), **data.draw(st.dictionaries(KEYS, VALUES, max_size=4))}
    attempt(folder, {**pristine, "config.json": json.dumps(config).encode()})


def fuzz_tensors(folder: Path, pristine: dict[str, bytes], data: st.DataObject) -> None:
    """One file with any names and small shapes: the table of rules sees what it has never seen."""
    known = [
        "model",
        "layers",
        "0",
        "1",
        "experts",
        "mlp",
        "self_attn",
        "q_proj",
        "k_proj",
        "gate_proj",
        "up_proj",
        "gate",
        "lm_head",
        "embed_tokens",
        "norm",
        "weight",
        "bias",
        "vision_tower",
        "conv1d",
        "mixer",
        "in_proj",
        "router",
        "shared_expert",
        "qkv_proj",
        "absmax",
        "wte",
    ]
    part = st.sampled_from(["", *known]) | st.text(max_size=3)
    name = st.lists(part, min_size=1, max_size=6).map(".".join)
    names = data.draw(st.lists(name | name.map(lambda stem: stem + ".weight"), min_size=1, max_size=8, unique=True))
    record: dict[str, Any] = {}
    offset = 0
    for name_ in names:
        dtype = data.draw(st.sampled_from(["BF16", "BF16", "F16", "F32", "I64", "U8", "F8_E4M3"]))
        shape = data.draw(st.lists(st.integers(0, 5), max_size=3) | st.just([4, 16]))
        nbytes = {"BF16": 2, "F16": 2, "F32": 4, "I64": 8, "U8": 1, "F8_E4M3": 1}[dtype]
        for size in shape:
            nbytes *= size
        record[name_] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    config = {
        "model_type": data.draw(st.sampled_from(["llama", "gpt2", "mixtral", "mamba2", "gemma3", "qwen2_vl", "x"]))
    }
    attempt(
        folder,
        {
            "model.safetensors": header_bytes(record)
            + data.draw(st.binary(min_size=offset, max_size=offset) | st.just(bytes(offset))),
            "config.json": json.dumps(config).encode(),
        },
        ConversionOptions(
            keep_nonfinite=data.draw(st.booleans()),
            block_size=data.draw(st.sampled_from([32, 64])),
            max_shard_nbytes=data.draw(st.sampled_from([1, 300, 10**9])),
        ),
    )


def fuzz_index(folder: Path, pristine: dict[str, bytes], data: st.DataObject) -> None:
    """Change values anywhere in the index, which the files then contradict."""
    random, index = data.draw(RANDOM), json.loads(pristine[INDEX])
    odd_edit(random, index)
    attempt(folder, {**pristine, INDEX: json.dumps(index).encode()})


def fuzz_files(folder: Path, pristine: dict[str, bytes], data: st.DataObject) -> None:
    files = copy.copy(pristine)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(files)))
        changed = bytearray(files[name])
        position = data.draw(st.integers(0, max(0, min(len(changed) - 1, 900))))
        match data.draw(st.integers(0, 4)):
            case 0:
                changed[position : position + 1] = data.draw(st.binary(max_size=2))
            case 1:
                del changed[position:]
            case 2:
                changed += data.draw(st.binary(min_size=1, max_size=3))
            case 3:
                other = data.draw(st.sampled_from(sorted(files)))
                changed = bytearray(files[other])
            case 4 if len(files) > 1:
                del files[name]
                continue
        files[name] = bytes(changed)
    attempt(folder, files)


@pytest.mark.parametrize("fuzz", [fuzz_config, fuzz_tensors, fuzz_index, fuzz_files])
def test_any_source_is_converted_or_raises_one_of_our_errors(
    fuzz: Any, folder: Path, pristine: dict[str, bytes]
) -> None:
    @FUZZ
    @given(st.data())
    def run(data: st.DataObject) -> None:
        fuzz(folder, pristine, data)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("fuzz", [fuzz_config, fuzz_tensors, fuzz_index, fuzz_files])
def test_any_source_is_converted_or_raises_one_of_our_errors_at_length(
    fuzz: Any, folder: Path, pristine: dict[str, bytes]
) -> None:
    @SOAK
    @given(st.data())
    def run(data: st.DataObject) -> None:
        fuzz(folder, pristine, data)

    run()
