"""Checkpoints written by bitsandbytes: adopted with the same codes and scales, and loaded with the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qformat.artifact.components import Component
from qformat.artifact.reading.reader import open_artifact
from qformat.artifact.reading.verify import verify_integrity
from qformat.cli.main import run
from qformat.cli.messages import as_flag
from qformat.converters.compare.compare import compare
from qformat.converters.convert import ConversionOptions, convert, plan
from qformat.errors import Reason, SourceError, UsageError, spelled
from tests.converters.faulty_disk import interrupt
from tests.converters.sources.decoded_kinds import bnb_llama, packed, write_bnb
from tests.small_models import contents

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
]

PROJECTION = "model.layers.0.mlp.up_proj.weight"
STATE = PROJECTION + ".quant_state.bitsandbytes__nf4"


def as_bytes(tensor: torch.Tensor) -> bytes:
    data: bytes = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return data


@pytest.mark.parametrize(
    "options",
    [{}, {"double_quant": False}, {"block_size": 128}, {"storage": torch.bfloat16}, {"storage": torch.float32}],
    ids=str,
)
def test_every_component_is_the_one_that_bitsandbytes_wrote(options: dict[str, object], tmp_path: Path) -> None:
    tensors = bnb_llama(**options)
    source = write_bnb(tmp_path / "source", tensors)
    convert(source, tmp_path / "out")
    assert verify_integrity(tmp_path / "out", sha256=True).passed
    found = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        stored = as_bytes(found[name])
        assert (stored.rstrip(b" ") if "quant_state" in name else stored) == as_bytes(tensor), name
    compared = compare(tmp_path / "out", source)
    assert compared.passed
    assert compared.n_exact == compared.n_packed == 14
    manifest = json.loads((tmp_path / "out" / "qformat.json").read_text())
    assert manifest["source"]["kind"] == "bitsandbytes_4bit"
    assert manifest["recipe"] == {"adopted": "bitsandbytes_4bit"}
    assert "source_xxh3" not in manifest["tensors"][PROJECTION]


@pytest.mark.parametrize(
    ("shape", "storage"), [((5, 7), torch.uint8), ((3, 1), torch.bfloat16), ((1, 8), torch.float32)]
)
def test_odd_sizes_in_wide_storage(shape: tuple[int, int], storage: torch.dtype, tmp_path: Path) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    tensors = bnb_llama() | packed(weight, "model.layers.0.mlp.odd.weight", storage=storage)
    source = write_bnb(tmp_path / "source", tensors)
    convert(source, tmp_path / "out")
    assert compare(tmp_path / "out", source).passed
    with open_artifact(tmp_path / "out") as artifact:
        found = artifact["model.layers.0.mlp.odd.weight"]
        stored = as_bytes(tensors["model.layers.0.mlp.odd.weight"])
        assert found.packed.tobytes() == stored[: -(-weight.numel() // 2)]  # type: ignore[union-attr]


def test_a_second_level_stored_in_bfloat16_stays_unmodified(tmp_path: Path) -> None:
    tensors = bnb_llama()
    state = json.loads(as_bytes(tensors[STATE]))
    state |= {"nested_dtype": "bfloat16", "nested_offset": 0.052978515625}
    tensors[STATE] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    convert(write_bnb(tmp_path / "source", tensors), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")
    assert json.loads(as_bytes(found[STATE])) == state
    assert verify_integrity(tmp_path / "out").passed


def test_the_config_keeps_what_readers_of_the_file_rely_on(tmp_path: Path) -> None:
    tensors = bnb_llama()
    kept = "model.layers.1.mlp.down_proj.weight"
    for name in [name for name in tensors if name.startswith(kept)]:
        del tensors[name]
    tensors[kept] = torch.zeros(32, 48, dtype=torch.bfloat16)
    source = write_bnb(tmp_path / "source", tensors, llm_int8_skip_modules=["lm_head", "vision_tower"])
    convert(source, tmp_path / "out")
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert quantization["bnb_4bit_compute_dtype"] == "float16"
    assert quantization["llm_int8_skip_modules"] == ["lm_head", "model.layers.1.mlp.down_proj", "vision_tower"]
    manifest = json.loads((tmp_path / "out" / "qformat.json").read_text())
    assert manifest["tensors"][kept]["reason"] == "not_packed_in_source"
    assert verify_integrity(tmp_path / "out").passed


def test_individually_packed_experts_are_adopted_and_not_on_the_skip_list(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.{}.down_proj.weight"
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    tensors = bnb_llama()
    for expert in range(2):
        tensors |= packed(weight * (expert + 1), name.format(expert))
    source = write_bnb(tmp_path / "source", tensors)
    convert(source, tmp_path / "out")
    assert verify_integrity(tmp_path / "out").passed
    assert compare(tmp_path / "out", source).passed
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert quantization["llm_int8_skip_modules"] == ["lm_head"]


@pytest.mark.parametrize(
    ("given", "in_python", "as_flags"),
    [
        ({"skip": ["model.layers.0.*"]}, "skip", "--skip"),
        ({"recipe": Path("r.toml"), "skip": ["model.layers.0.*"]}, "recipe and skip", "--recipe and --skip"),
        ({"block_size": 64}, "block_size", "--block-size"),
        ({"double_quant": False}, "double_quant=False", "--no-double-quant"),
        (
            {"skip": ["lm_head"], "block_size": 128, "double_quant": False},
            "skip, block_size and double_quant=False",
            "--skip, --block-size and --no-double-quant",
        ),
    ],
)
def test_options_cannot_change_what_is_adopted(
    tmp_path: Path, given: dict[str, Any], in_python: str, as_flags: str
) -> None:
    source = write_bnb(tmp_path / "source", bnb_llama())
    with pytest.raises(UsageError, match="adopted unmodified") as caught:
        plan(source, ConversionOptions(**given))
    message = f"{source}: the checkpoint is already in 4 bit and is adopted unmodified. Leave out "
    assert str(caught.value) == message + in_python
    assert spelled(caught.value.words, as_flag) == message + as_flags


@pytest.mark.parametrize("flags", [["--block-size", "64"], ["--no-double-quant"]])
def test_the_command_rejects_quantization_options_for_an_adopted_source(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_bnb(tmp_path / "source", bnb_llama())
    assert run(["convert", str(source), str(tmp_path / "out"), *flags]) == 2
    assert f"adopted unmodified. Leave out {flags[0]}\n" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(["convert", str(source), str(tmp_path / "out")]) == 0


def test_an_artifact_without_its_manifest_is_adopted_into_the_same_shards(tmp_path: Path) -> None:
    convert(write_bnb(tmp_path / "source", bnb_llama()), tmp_path / "first")
    (tmp_path / "first" / "qformat.json").unlink()
    convert(tmp_path / "first", tmp_path / "second")
    first, second = contents(tmp_path / "first"), contents(tmp_path / "second")
    del second["qformat.json"]
    assert first == second


def test_an_interrupted_adoption_resumes_and_gives_the_same_bytes(tmp_path: Path) -> None:
    source = write_bnb(tmp_path / "source", bnb_llama())
    convert(source, tmp_path / "whole")
    for n_done in (1, 7, 16):
        out = tmp_path / f"out-{n_done}"
        interrupt(source, out, n_done=n_done, options=ConversionOptions())
        assert not out.exists()
        convert(source, out)
        assert contents(out) == contents(tmp_path / "whole")


def test_codes_that_differ_from_the_adopted_ones_are_found(tmp_path: Path) -> None:
    tensors = bnb_llama()
    convert(write_bnb(tmp_path / "source", tensors), tmp_path / "out")
    tensors[PROJECTION][5] ^= 0x10
    tensors[PROJECTION + ".absmax"][1] ^= 1
    compared = compare(tmp_path / "out", write_bnb(tmp_path / "other", tensors))
    (finding,) = compared.findings
    assert finding.reason is Reason.CODES_MISMATCH
    assert finding.tensor == PROJECTION
    assert "1 of 1536 codes and 1 of the scales differ" in finding.message


def replaced(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**bnb_llama(), name: tensor}


def without(name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in bnb_llama().items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "reason", "said"),
    [
        (bnb_llama(kind="fp4"), Reason.QUANT_STATE, "FP4"),
        ({PROJECTION: torch.zeros(4)}, Reason.ALREADY_QUANTIZED, "no tensor is in NF4"),
        (without(PROJECTION + ".absmax"), Reason.MISSING_COMPONENT, "absmax"),
        (without(PROJECTION), Reason.MISSING_COMPONENT, "packed"),
        (without(STATE), Reason.MISSING_COMPONENT, "quant_state"),
        (replaced(PROJECTION, torch.zeros(3, 1, dtype=torch.uint8)), Reason.COMPONENT_SHAPE, "expected 768 bytes"),
        (replaced(PROJECTION, torch.zeros(1, 768, dtype=torch.uint8)), Reason.COMPONENT_SHAPE, "in a column"),
        (replaced(PROJECTION, torch.zeros(96, 1, dtype=torch.int64)), Reason.COMPONENT_DTYPE, "I64"),
        (replaced(PROJECTION + ".absmax", torch.zeros(23, dtype=torch.uint8)), Reason.COMPONENT_SHAPE, "[24]"),
        (replaced(PROJECTION + ".nested_absmax", torch.zeros(1, dtype=torch.uint8)), Reason.COMPONENT_DTYPE, "F32"),
        (replaced(PROJECTION + ".quant_map", torch.zeros(16)), Reason.CODEBOOK, "NF4 codebook"),
        (
            replaced(PROJECTION + ".nested_absmax", torch.full((1,), torch.inf)),
            Reason.NONFINITE_SCALE,
            "entry 0 is inf",
        ),
        (replaced(STATE, torch.zeros(5000, dtype=torch.uint8)), Reason.QUANT_STATE, "5000 bytes"),
        (replaced(STATE, torch.zeros(50, dtype=torch.uint8)), Reason.JSON_SYNTAX, "not valid JSON"),
    ],
)
def test_checkpoints_that_bitsandbytes_would_misread_are_rejected(
    tensors: dict[str, torch.Tensor], reason: Reason, said: str, tmp_path: Path
) -> None:
    source = write_bnb(tmp_path / "source", tensors)
    with pytest.raises(SourceError) as refused:
        convert(source, tmp_path / "out")
    assert refused.value.reason is reason
    assert said in str(refused.value)
    assert str(source) in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_skip_list_with_a_packed_module_is_rejected(tmp_path: Path) -> None:
    source = write_bnb(tmp_path / "source", bnb_llama(), llm_int8_skip_modules=["lm_head", "model.layers.0"])
    with pytest.raises(SourceError, match=r"model\.layers\.0"):
        plan(source)


def test_transformers_gives_the_same_logits_before_and_after(smollm2: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(smollm2, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source", max_shard_size="50MB")
    convert(tmp_path / "source", tmp_path / "out")
    assert verify_integrity(tmp_path / "out").passed
    tokens = torch.arange(100, 140)[None]
    logits = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)(input_ids=tokens, use_cache=False).logits
        for folder in (tmp_path / "source", tmp_path / "out")
    ]
    assert torch.equal(*logits)
    for part in Component:
        assert (
            f"model.layers.3.mlp.up_proj.weight{part.value}"
            in json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
        )
