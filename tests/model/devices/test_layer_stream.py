"""Layers in host memory, streamed through an artificial device: order, reuse, overlap, memory and bit-identity."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qformat
from qformat.errors import ArtifactError, DeviceMemoryError, Reason, UsageError
from qformat.model import load
from qformat.model.build import build_on_meta, names_in_model, read_config
from qformat.model.devices import host_layers
from qformat.model.devices.host_layers import attach_placed, decide
from qformat.model.devices.layer_stream import LayerDevice, PlainLayers
from qformat.model.devices.placement import Placement, model_sizes, placement
from qformat.model.load import load_model, open_shards
from qformat.model.loaded_model import Origin, adopt
from qformat.model.nf4_linear import NF4Linear
from qformat.model.shard_tensors import tensor_names
from tests.model.devices.late_layers import LateLayers
from tests.model.sides import adapters, all_equal, backward, gradients, train, with_lora
from tests.small_models import contents, llama_config, llama_tensors, write_checkpoint

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
IDS = torch.arange(20)[None]
N_LAYERS = 6

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layers")
    sizes = {"n_layers": N_LAYERS, "hidden": 64, "intermediate": 128, "vocabulary": 50}
    source = write_checkpoint(folder / "source", llama_tensors(**sizes), config=llama_config(**sizes))
    qformat.convert(source, folder / "artifact")
    return folder / "artifact"


def unplaced(artifact: Path) -> tuple[Any, Any, dict[str, str]]:
    """Return a model on the meta device, the shards, and the model's names of their tensors."""
    shards = open_shards(artifact)
    config = read_config(artifact, trust_remote_code=False)
    model = build_on_meta(artifact, config, dtype=torch.bfloat16, trust_remote_code=False, attention=None)
    return model, shards, names_in_model(model, tensor_names(shards.layout), artifact)


def layer(number: int) -> str:
    return f"model.layers.{number}"


def streamed(artifact: Path, numbers: list[int], device: LayerDevice | None = None) -> tuple[Any, Any]:
    device = device or LateLayers()
    model, shards, names = unplaced(artifact)
    placed = placement(model_sizes(model, shards.layout, names), [layer(number) for number in numbers])
    names = attach_placed(model, shards, names, CPU, placed, streamed_by=device)
    load._set_generation_config(model, artifact)
    adopt(model, Origin(shards.layout, names))
    return model.eval(), device


def entered(model: Any, device: LateLayers) -> list[int]:
    """Return the numbers of the streamed layers in the order in which their copies were started."""
    homes = {of.host.data_ptr(): number for number, of in enumerate(model.layer_stream._layers)}
    return [homes[copy.host.data_ptr()] for copy in device.started]


@pytest.mark.parametrize("numbers", [[0], [5], [0, 1], [0, 2, 4], [1, 2, 5], list(range(N_LAYERS))])
def test_logits_and_tokens_are_bit_identical(artifact: Path, numbers: list[int]) -> None:
    expected = load_model(artifact, device="cpu")
    model, device = streamed(artifact, numbers)
    for ids in (IDS, IDS[:, :3]):
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected(ids).logits)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), expected.generate(IDS, **options))
    assert len(device.allocated) == min(2, len(numbers))


def test_layers_are_copied_in_order_and_once_per_pass(artifact: Path) -> None:
    model, device = streamed(artifact, list(range(N_LAYERS)))
    with torch.no_grad():
        for _ in range(3):
            model(IDS)
    # The first layer of the next pass is copied while the last layer runs.
    assert entered(model, device) == [*range(N_LAYERS)] * 3 + [0]
    slots = [copy.slot.data_ptr() for copy in device.started]
    assert all(slot != following for slot, following in itertools.pairwise(slots))


def test_the_next_layer_is_copied_while_a_layer_runs(artifact: Path) -> None:
    model, device = streamed(artifact, [0, 2, 3, 5])
    under_way: list[int] = []
    for module in model.model.layers:
        module.mlp.register_forward_hook(lambda *_: under_way.append(sum(not copy.done for copy in device.started)))
    with torch.no_grad():
        model(IDS)
    assert under_way == [1] * N_LAYERS


def test_memory_use_equals_the_placement(artifact: Path) -> None:
    model, shards, names = unplaced(artifact)
    sizes = model_sizes(model, shards.layout, names)
    placed = placement(sizes, [layer(number) for number in (1, 3, 5)])
    device = LateLayers()
    attach_placed(model, shards, names, CPU, placed, streamed_by=device)
    with torch.no_grad():
        model(IDS)
    assert [memory.nbytes for memory in device.allocated] == [placed.slot_nbytes] * placed.n_slots
    assert sum(memory.nbytes for memory in device.host) == placed.host_nbytes
    streamed_names = tuple(f"{name}." for name in placed.streamed)
    resident = {
        id(tensor): tensor.nbytes
        for name, tensor in model.state_dict(keep_vars=True).items()
        if not name.startswith(streamed_names)
    }
    used = sum(resident.values()) + sum(memory.nbytes for memory in device.allocated)
    assert 0.9 * placed.device_nbytes < used + sizes.scratch_nbytes <= placed.device_nbytes


def test_the_state_dict_and_saving_see_the_complete_model(artifact: Path, tmp_path: Path) -> None:
    expected = load_model(artifact, device="cpu").state_dict()
    model, _ = streamed(artifact, [0, 1, 2, 4])
    for _ in range(2):
        state = model.state_dict()
        assert all_equal({name: tensor.view(torch.uint8) for name, tensor in state.items()},
                         {name: tensor.view(torch.uint8) for name, tensor in expected.items()})  # fmt: skip
        with torch.no_grad():
            model(IDS)
    model.save_pretrained(tmp_path / "saved")
    assert contents(tmp_path / "saved") == contents(artifact)


def test_every_tensor_of_the_state_dict_has_a_storage_of_its_own(artifact: Path) -> None:
    """Also those of the layer that ran last, which are in a slot: safetensors would drop all but one of them."""
    model, _ = streamed(artifact, [0, 1, 2, N_LAYERS - 1])
    with torch.no_grad():
        model(IDS)
    state = model.state_dict()
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in state.values())
    before = {name: tensor.clone() for name, tensor in state.items()}
    with torch.no_grad():  # other layers pass through the slots
        model(IDS)
    assert all(torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)) for name, tensor in state.items())


@pytest.mark.parametrize("numbers", [[0, 2, 4], list(range(N_LAYERS))])
@pytest.mark.parametrize("reentrant", [False, True])
def test_training_with_gradient_checkpointing_is_bit_identical(
    artifact: Path, numbers: list[int], reentrant: bool
) -> None:
    found = []
    for model in (load_model(artifact, device="cpu"), streamed(artifact, numbers)[0]):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        wrapped = with_lora(model)
        losses = train(wrapped, [IDS] * 3, rate=2e-3)
        backward(wrapped, IDS)
        found.append((losses, gradients(wrapped), adapters(wrapped)))
    assert found[0][0] == found[1][0]
    assert all_equal(found[0][1], found[1][1])
    assert all_equal(found[0][2], found[1][2])


def test_a_backward_pass_goes_downwards_and_copies_no_layer_twice(artifact: Path) -> None:
    model, device = streamed(artifact, list(range(N_LAYERS)))
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    wrapped = with_lora(model)
    for _ in range(2):
        device.started.clear()
        backward(wrapped, IDS)
    up, down = list(range(2, N_LAYERS)), list(reversed(range(N_LAYERS - 2)))
    assert entered(model, device) == up + down


@pytest.mark.parametrize("training", [True, False])
def test_training_without_gradient_checkpointing_is_rejected(artifact: Path, training: bool) -> None:
    model = with_lora(streamed(artifact, [1, 3, 4])[0]).train(training)
    with pytest.raises(UsageError, match=r"gradient_checkpointing_enable\(\).*no_grad"):
        model(IDS, labels=IDS)


def test_a_backward_pass_through_overwritten_weights_is_an_error(artifact: Path) -> None:
    model, _ = streamed(artifact, [1, 3, 4])
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(IDS, labels=IDS).loss.backward()


def test_a_layer_that_does_not_run_has_its_weights_in_host_memory(artifact: Path) -> None:
    expected = load_model(artifact, device="cpu").model.layers
    model, _ = streamed(artifact, [0, 2, 4])
    with torch.no_grad():
        model(IDS)
    for number in range(N_LAYERS):
        linear = model.model.layers[number].mlp.up_proj
        assert isinstance(linear, NF4Linear)
        assert torch.equal(linear.dequantize(), expected[number].mlp.up_proj.dequantize())


def test_layers_in_any_order_give_correct_results(artifact: Path) -> None:
    """The expected order is only a prediction; a wrong one costs time."""
    expected = load_model(artifact, device="cpu")
    model, _ = streamed(artifact, [0, 1, 2, 3, 4, 5])
    order = [3, 3, 0, 5, 1, 4, 2, 0]
    for of in (expected, model):
        of.model.layers = nn.ModuleList([of.model.layers[number] for number in order])
        of.config.num_hidden_layers = len(order)
    with torch.no_grad():
        assert torch.equal(model(IDS, use_cache=False).logits, expected(IDS, use_cache=False).logits)


def test_an_adapter_that_is_added_later_is_moved_to_the_device(artifact: Path) -> None:
    model, _ = streamed(artifact, [0, 1, 2])
    linear = model.model.layers[1].mlp.up_proj
    linear.register_parameter("late", nn.Parameter(torch.zeros(3, device="meta")))
    with pytest.raises(NotImplementedError, match="meta"), torch.no_grad():  # the move fails for a meta tensor
        model(IDS)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_streamed_model_cannot_be_copied(artifact: Path, copied: Any) -> None:
    model, _ = streamed(artifact, [0, 1, 2])
    with pytest.raises(UsageError, match="Load it again instead"):
        copied(model)


def test_plain_memory_works_as_a_device(artifact: Path) -> None:
    expected = load_model(artifact, device="cpu")
    model, _ = streamed(artifact, [0, 2, 3], PlainLayers(CPU))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected(IDS).logits)


def gpu_with(monkeypatch: pytest.MonkeyPatch, *, free: int, host: int = 2**40) -> None:
    """Pretend that there is a GPU; decisions about it do not need one."""
    monkeypatch.setattr(host_layers, "free_nbytes", lambda device: free if device == GPU else host)
    monkeypatch.setattr(load, "chosen_device", lambda device: GPU)


def test_load_model_streams_layers_that_do_not_fit(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, shards, names = unplaced(artifact)
    whole = placement(model_sizes(model, shards.layout, names), []).device_nbytes
    gpu_with(monkeypatch, free=whole)  # 90 % of it is used
    found: list[Placement] = []

    def on_cpu(model: Any, shards: Any, names: Any, device: Any, placed: Placement) -> Any:
        found.append(placed)
        assert device == GPU
        return attach_placed(model, shards, names, CPU, placed, streamed_by=LateLayers())

    monkeypatch.setattr(load, "attach_placed", on_cpu)
    expected = streamed(artifact, [])[0]
    model = load_model(artifact, device="cuda", device_map="auto")
    assert 3 <= len(found[0].streamed) < N_LAYERS
    assert found[0].device_nbytes <= 0.9 * whole
    assert model.layer_stream.names == found[0].streamed
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected(IDS).logits)
    model = load_model(artifact, device="cuda", device_map={"": 0, layer(2): "cpu"}, max_memory={0: "1GiB"})
    assert model.layer_stream.names == (layer(2),)
    assert not hasattr(load_model(artifact, device="cuda", device_map="auto", max_memory={0: "1GiB"}), "layer_stream")


@pytest.mark.parametrize("options", [{"device_map": "auto"}, {"device_map": {"": 0}}])
def test_insufficient_memory_is_reported_before_anything_is_read(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, options: Any
) -> None:
    gpu_with(monkeypatch, free=100_000)
    monkeypatch.setattr(host_layers, "map_shards", lambda *_: pytest.fail("something was read"))
    with pytest.raises(DeviceMemoryError, match=r"memory on .* needs .*\d{3} kB.*, 1 kB is available"):
        load_model(artifact, device="cuda", max_memory={0: 1000}, **options)


def test_insufficient_host_memory_is_reported_before_anything_is_read(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_with(monkeypatch, free=2**40, host=1000)
    monkeypatch.setattr(host_layers, "map_shards", lambda *_: pytest.fail("something was read"))
    with pytest.raises(DeviceMemoryError, match=r"memory on cpu: the model needs \d{3} kB"):
        load_model(artifact, device="cuda", device_map={"": 0, "model.layers": "cpu"})


def test_full_verification_runs_before_placement(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    damaged = tmp_path / "damaged"
    shutil.copytree(artifact, damaged)
    shard = next(damaged.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    gpu_with(monkeypatch, free=2**40)
    with pytest.raises(ArtifactError) as refusal:
        load_model(damaged, device="cuda", device_map="auto", verify="full")
    assert refusal.value.reason is Reason.COMPONENT_DIGEST


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"": 0, "model.layer.3": "cpu"}, "only layers can be in host memory.*Did you mean 'model.layers.3'"),
        ({"": 0, "model.embed_tokens": "cpu"}, "only layers can be in host memory"),
        ({"": 0, "model.layers.3.mlp": "cpu"}, "a layer cannot be split. Map the layer 'model.layers.3' instead"),
        ({"": 1}, "Several GPUs are not supported"),
        ({"": 0, "model.layers.1": "disk"}, "found 'disk', expected 'cpu' or 'cuda:0'"),
        ({"model.layers.0": 0}, "has no entry for 'model.layers.1'"),
    ],
)
def test_a_map_that_does_not_fit_is_rejected(artifact: Path, device_map: Any, message: str) -> None:
    model, shards, names = unplaced(artifact)
    with pytest.raises(UsageError, match=message):
        decide(model, shards.layout, names, GPU, device_map, {0: "1GiB"})


def test_arguments_that_do_not_fit_together_are_rejected(artifact: Path) -> None:
    with pytest.raises(UsageError, match="device_map is for a GPU"):
        load_model(artifact, device="cpu", device_map="auto")
    with pytest.raises(UsageError, match="max_memory only applies together with device_map"):
        load_model(artifact, device="cpu", max_memory={"cpu": 5})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_gpu(artifact: Path) -> None:
    expected = load_model(artifact, device="cuda")
    device_map = {"": 0, **{layer(number): "cpu" for number in range(1, N_LAYERS)}}
    model = load_model(artifact, device="cuda", device_map=device_map)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    ids = IDS.cuda()
    assert torch.equal(model.generate(ids, **options), expected.generate(ids, **options))
