"""`qformat.register()` and directories that bitsandbytes wrote, compared with transformers + bitsandbytes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import qformat
from qformat.artifact.reading.bitsandbytes_folder import read_bitsandbytes_folder
from qformat.errors import ArtifactError, DeviceMemoryError, UsageError
from qformat.model import transformers_quantizer
from qformat.model.nf4_linear import NF4Linear
from qformat.model.transformers_quantizer import METHOD, NF4Quantizer, _device_of
from tests.model.mapped_ranges import mapped_ranges
from tests.small_models import llama_config, llama_tensors, write_checkpoint

IDS = torch.tensor([[1, 5, 9, 2, 7, 3]])


@pytest.fixture
def registered():
    before = AUTO_QUANTIZER_MAPPING[METHOD]
    qformat.register()
    yield
    AUTO_QUANTIZER_MAPPING[METHOD] = before


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    # The length of a row is a multiple of the block size: on some CPUs, bitsandbytes decodes others incorrectly.
    sizes = {"hidden": 128, "intermediate": 192, "vocabulary": 50}
    folder = tmp_path_factory.mktemp("source") / "llama"
    return write_checkpoint(folder, llama_tensors(**sizes), config=llama_config(**sizes), n_shards=2)


@pytest.fixture(scope="module")
def artifact(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("artifact") / "nf4"
    qformat.convert(source, out)
    return out


@pytest.fixture(scope="module", params=["nested", "one_level", "bf16_storage"])
def bitsandbytes_folder(source, request, tmp_path_factory) -> Path:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=request.param != "one_level",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16 if request.param == "bf16_storage" else torch.uint8,
    )
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.bfloat16)
    out = tmp_path_factory.mktemp("bnb") / "model-bnb-4bit"
    model.save_pretrained(out)
    return out


def logits(model) -> torch.Tensor:
    # With gradients, bitsandbytes decodes exactly; its inference path may rewrite the scales.
    return model(IDS).logits.detach()


def test_from_pretrained_uses_nf4_linear_and_gives_the_logits_of_load_model(artifact, registered):
    model, info = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.bfloat16, output_loading_info=True)
    assert sum(isinstance(module, NF4Linear) for module in model.modules()) == 14
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(model), logits(qformat.load_model(artifact)))


def test_a_base_model_loads_the_packed_weights_without_a_report_of_unexpected_ones(artifact, registered):
    model, info = AutoModel.from_pretrained(artifact, dtype=torch.bfloat16, output_loading_info=True)
    assert sum(isinstance(module, NF4Linear) for module in model.modules()) == 14
    assert set(info["unexpected_keys"]) == {"lm_head.weight"}, "what a base model has no place for, in any format"
    assert not info["missing_keys"]


def test_every_tensor_lies_in_the_mapped_file_and_has_a_storage_of_its_own(artifact, registered):
    model = AutoModelForCausalLM.from_pretrained(artifact)
    mapped = mapped_ranges(artifact)
    for name, tensor in model.state_dict().items():
        assert any(start <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= stop for start, stop in mapped)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


@pytest.mark.parametrize("home", ["disk", "cpu"])
def test_offloading_is_rejected_with_an_alternative(artifact, registered, home, monkeypatch):
    quantizer = NF4Quantizer(BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    device_map = {"": 0, "model.layers.1": home}
    with pytest.raises(UsageError, match="load_model"):
        quantizer._process_model_before_weight_loading(None, checkpoint_files=["x"], device_map=device_map)


def test_each_packed_layer_goes_to_its_device_in_the_map(artifact, registered):
    """The meta device replaces a second GPU."""
    model = AutoModelForCausalLM.from_pretrained(artifact, device_map={"": "cpu"})
    model.hf_device_map = {"model.layers.0": "cpu", "model.layers.1": "meta", "": "cpu"}
    homes = {name: _device_of(model, name).type for name, _ in model.named_parameters() if "proj.weight" in name}
    assert {name: home for name, home in homes.items() if ("layers.1." in name) != (home == "meta")} == {}
    assert len(homes) == 14


def test_the_needed_memory_is_reported_if_packed_weights_do_not_fit(artifact, registered, monkeypatch):
    monkeypatch.setattr(transformers_quantizer, "_device_of", lambda *_: torch.device("meta"))
    monkeypatch.setattr(transformers_quantizer, "free_nbytes", lambda device: 1000)
    with pytest.raises(DeviceMemoryError, match=r"on meta: the packed weights need [\d.]+ [kM]B, 1 kB is free"):
        AutoModelForCausalLM.from_pretrained(artifact)


def test_registering_needs_no_bitsandbytes(artifact):
    code = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "import qformat; qformat.register()\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(artifact)!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "NF4Linear", done.stderr


def test_quantizing_while_loading_stays_with_bitsandbytes(source, registered):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"


def test_registering_twice_has_no_effect(registered):
    replaced = NF4Quantizer.replaced
    qformat.register()
    assert AUTO_QUANTIZER_MAPPING[METHOD] is NF4Quantizer
    assert NF4Quantizer.replaced is replaced


def test_a_directory_of_bitsandbytes_is_mapped_and_gives_the_same_logits(bitsandbytes_folder, caplog):
    expected = AutoModelForCausalLM.from_pretrained(bitsandbytes_folder, dtype=torch.bfloat16)
    model = qformat.load_model(bitsandbytes_folder, dtype=torch.bfloat16)
    assert torch.equal(logits(model), logits(expected))
    assert "cannot be checked against digests" in caplog.text


def test_full_verification_of_a_directory_without_digests_is_rejected(bitsandbytes_folder):
    with pytest.raises(qformat.errors.UsageError, match="needs the digests of a manifest"):
        qformat.load_model(bitsandbytes_folder, verify="full")


def test_saving_keeps_every_component(artifact, tmp_path):
    model = qformat.load_model(artifact)
    model.save_pretrained(tmp_path / "saved")
    before, after = model.state_dict(), qformat.load_model(tmp_path / "saved").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in before)


def test_saving_after_from_pretrained_keeps_every_component(artifact, registered, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(artifact)
    model.save_pretrained(tmp_path / "saved")
    before, after = model.state_dict(), qformat.load_model(tmp_path / "saved").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in before)


def test_the_error_for_a_16_bit_directory_says_how_to_convert_it(source):
    with pytest.raises(ArtifactError, match="qformat convert"):
        qformat.load_model(source)


@pytest.mark.parametrize("lost", ["absmax", "nested_absmax", "quant_map"])
def test_the_error_for_a_missing_component_has_its_name(artifact, tmp_path, lost):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "folder"
    shutil.copytree(artifact, folder)
    (folder / "qformat.json").unlink()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = next(iter(index["weight_map"].values()))
    tensors = load_file(folder / shard)
    name = next(key for key in tensors if key.endswith(f".weight.{lost}"))
    del tensors[name]
    save_file(tensors, folder / shard)
    with pytest.raises(ArtifactError, match=lost):
        read_bitsandbytes_folder(folder)
