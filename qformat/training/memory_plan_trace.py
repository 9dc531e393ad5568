"""One micro-batch of a training on tensors without memory, watched: what lives when, in bytes, for any architecture.

The model is the one that `train` builds, PEFT's adapters included, under torch's FakeTensorMode. Decoder layers that
are alike are run once (the first and the last one apart); the others are stepped over, and their bytes are those of the
layer that they are like.

Operations run as on a GPU. What would differ there is stood in for: products that decode a weight, and trl's loss.
"""

from __future__ import annotations

import logging
import re
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from qformat.artifact.components import Component
from qformat.artifact.header import NewTensor
from qformat.artifact.structure import CONFIG_NAME
from qformat.codec.floats import FloatFormat
from qformat.codec.nf4 import BLOCK_SIZES, block_count, packed_nbytes
from qformat.codec.quant_state import QuantState
from qformat.errors import ArtifactError, Reason, UsageError
from qformat.model.build import attach, build_on_meta, linear_at, names_in_model, read_config
from qformat.model.nf4_linear import NF4Linear
from qformat.model.shard_tensors import TORCH_DTYPES, PackedComponents
from qformat.training.adapters import add_adapter
from qformat.training.lora_linear import NF4LoraLinear, lora_linear
from qformat.training.memory_plan_tensors import ModelTensors
from qformat.training.settings import TrainingSettings

Loss = Literal["tiled", "logits"]
"""trl's, which multiplies by the output layer piece by piece, or transformers' own, which makes all logits."""

_LOSS_TOKENS, _LOSS_COLUMNS = 4096, 32768
"""The tile of trl's loss (trl/kernels/chunked_logprob.py, TOKEN_CHUNK_SIZE; trl/trainer/utils.py, chunk size)."""

_OF_ITS_PLACE = re.compile(r"idx|index|number|_id$|^_|^training$|^gradient_checkpointing$")
"""Attributes in which layers that are alike may differ."""


Phase = Literal["embedding", "forward", "after", "loss", "backward"]
"""after: between the forward of a layer and that of the next one, or the loss."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of time: bytes that live longer than it (negative: freed), and the most beyond its start."""

    phase: Phase
    delta: int
    peak: int


class FakeTraining:
    """A model with adapters, without memory, and micro-batches of it."""

    def __init__(self, tensors: ModelTensors, settings: TrainingSettings, *, trust_remote_code: bool = False) -> None:
        """Build the model. Raises ArtifactError where tensors and config.json do not fit, UsageError as `train`."""
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)  # some models make constants of their own
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            model = self._build(tensors, trust_remote_code)
            with self._mode:
                with torch.device("meta"):  # where PEFT does not try to move them
                    self.model: PeftModel = add_adapter(model, settings, base_name=str(tensors.folder))
                _leave_meta(self.model)
        for module in self.model.modules():
            if isinstance(module, NF4LoraLinear):
                module.__class__ = _DecodingLoraLinear
        self._layers = _decoder_layers(model)
        self._kinds = [_kind(model, layer, number) for number, layer in enumerate(self._layers)]

    @property
    def base(self) -> PreTrainedModel:
        """The model under the adapters."""
        return cast(PreTrainedModel, self.model.get_base_model())

    @property
    def n_layers(self) -> int:
        """Decoder layers; 0 where they are not known, and the model is run as a whole."""
        return len(self._layers)

    def micro_batch(
        self,
        settings: TrainingSettings,
        *,
        batch_size: int,
        seq_len: int,
        loss: Loss = "tiled",
        every_layer: bool = False,
    ) -> list[Segment]:
        """Run forward and backward and return what happened, layer by layer, for all layers.

        settings: those that need no other model: gradient_checkpointing, packing, autocast, grad_accum.
        every_layer: step over none. Raises UsageError for a model that does not run so.
        """
        chosen = set(range(self.n_layers)) if every_layer else self._representatives()
        try:
            with _unreported():
                return self._run(settings, batch_size, seq_len, loss, chosen)
        except (
            RuntimeError,
            TypeError,
            ValueError,
            KeyError,
            IndexError,
            AttributeError,
            NotImplementedError,
        ) as problem:
            if len(chosen) < self.n_layers:  # layers that need one another
                return self.micro_batch(settings, batch_size=batch_size, seq_len=seq_len, loss=loss, every_layer=True)
            first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
            raise UsageError(
                f"the memory of this model cannot be planned, since it does not run unloaded: {first}"
            ) from (problem)

    def _representatives(self) -> set[int]:
        """The first layer (its input may need no gradient), one of each kind, the last (no layer uses its output)."""
        firsts = {kind: number for number, kind in reversed(list(enumerate(self._kinds))) if number > 0}
        return {0, *firsts.values(), self.n_layers - 1} if self._layers else set()

    def _build(self, tensors: ModelTensors, trust_remote_code: bool) -> PreTrainedModel:
        config = read_config(tensors.folder, trust_remote_code=trust_remote_code)
        with self._mode:
            model = build_on_meta(
                tensors.folder, config, dtype=torch.bfloat16, trust_remote_code=trust_remote_code, attention=None
            )
            if model.config._attn_implementation == "sdpa":
                model.set_attn_implementation(_attention())
            places = names_in_model(model, tensors.packed, tensors.folder)
            found: dict[str, PackedComponents | Tensor] = {name: _empty(new) for name, new in tensors.kept.items()}
            for name, parts in tensors.packed.items():
                shape = tuple(linear_at(model, places[name], tensors.folder).weight.shape)
                found[name] = _packed(name, parts, shape, tensors)
            attach(model, found, names_in_model(model, found, tensors.folder), tensors.folder)
            output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
            self.decodes_output = isinstance(output, NF4Linear)
            if isinstance(output, NF4Linear):  # as `train` does
                plain = nn.Linear(output.in_features, output.out_features, bias=False, device="meta")
                plain.weight = nn.Parameter(output.dequantize(torch.bfloat16), requires_grad=False)
                model.set_output_embeddings(plain)  # type: ignore[no-untyped-call]
        return model

    def _run(
        self, settings: TrainingSettings, batch_size: int, seq_len: int, loss: Loss, chosen: set[int]
    ) -> list[Segment]:
        base = self.base
        base.train()
        meter = _Meter()
        with (
            self._mode,
            warnings.catch_warnings(),
            _stepping_over(self._layers, chosen),
            _marking(self._layers, chosen, meter),
        ):
            warnings.simplefilter("ignore")
            if settings.gradient_checkpointing:
                base.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
                base.enable_input_require_grads()  # type: ignore[no-untyped-call]
            for parameter in self.model.parameters():
                parameter.grad = None
                if parameter.requires_grad and settings.grad_accum > 1:  # the first micro-batch left them
                    parameter.grad = torch.zeros_like(parameter)
                    meter.leave_out([parameter.grad])
            meter.leave_out([*self.model.parameters(), *self.model.buffers()])
            with meter:
                meter.mark("embedding", None)
                inputs = _inputs(settings, batch_size, seq_len)
                with torch.autocast("cpu", torch.bfloat16, enabled=settings.autocast):
                    value = _tiled_loss(base, inputs, meter) if loss == "tiled" else _full_loss(base, inputs, meter)
                value.backward()  # type: ignore[no-untyped-call]
                del value, inputs
                meter.mark("backward", None)
            if settings.gradient_checkpointing:
                base.gradient_checkpointing_disable()  # type: ignore[no-untyped-call]
                base.disable_input_require_grads()  # type: ignore[no-untyped-call]
            for parameter in self.model.parameters():
                parameter.grad = None
        return self._for_all_layers(meter)

    def _for_all_layers(self, meter: _Meter) -> list[Segment]:
        by_place = {(phase, number): segment for phase, number, segment in meter.segments if number is not None}
        alike: dict[object, int] = {}
        for number in sorted(number for phase, number in by_place if phase == "forward" and number):
            alike.setdefault(self._kinds[number], number)

        def of(phase: str, number: int) -> Segment:
            return by_place.get((phase, number)) or by_place[phase, alike[self._kinds[number]]]

        def forward(number: int) -> Segment:
            run, after = of("forward", number), of("after", number)
            return Segment("forward", run.delta + after.delta, max(run.peak, run.delta + after.peak))

        last = self.n_layers - 1
        others = [segment for _, number, segment in meter.segments if number is None]
        return [
            *(segment for segment in others if segment.phase == "embedding"),
            *(forward(number) for number in range(last)),
            *([of("forward", last), replace(of("after", last), phase="loss")] if self._layers else []),
            *(segment for segment in others if segment.phase == "loss"),
            *(of("backward", number) for number in reversed(range(self.n_layers))),
            *(segment for segment in others if segment.phase == "backward"),
        ]


class _Meter(TorchDispatchMode):
    """Bytes of all storages that were made since, by the weak references to them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.segments: list[tuple[str, int | None, Segment]] = []
        self._live = self._start = self._peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._current: tuple[str, int | None] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage not in self._known:
                    self._add(storage)
        return out

    def _add(self, storage: Any) -> None:
        nbytes = -(-storage.nbytes() // 512) * 512  # as CUDA's allocator rounds
        self._known.add(storage)
        self._live += nbytes
        self._peak = max(self._peak, self._live)
        weakref.finalize(storage, self._freed, nbytes)

    def _freed(self, nbytes: int) -> None:
        self._live -= nbytes

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these, which were there before."""
        self._known.update(tensor.untyped_storage() for tensor in tensors)

    def mark(self, phase: str, number: int | None) -> None:
        """End the segment before, and begin one of a phase and, in forward and backward, a layer."""
        if self._current is not None:
            old, old_number = self._current
            segment = Segment(cast(Any, old), self._live - self._start, self._peak - self._start)
            self.segments.append((old, old_number, segment))
        self._current = (phase, number)
        self._start = self._peak = self._live


class _DecodingLoraLinear(NF4LoraLinear):
    """The same autograd node over a product whose decoded weight has no memory, either."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = None if args or kwargs else self._plain_adapter()
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        dropout = self.lora_dropout[adapter]
        dropped = None if isinstance(dropout, nn.Identity) else dropout(x)
        lora_a = cast(nn.Linear, self.lora_A[adapter]).weight
        lora_b = cast(nn.Linear, self.lora_B[adapter]).weight
        base = _DecodedProduct(cast(NF4Linear, self.base_layer))
        return lora_linear(x, dropped, lora_a, lora_b, self.scaling[adapter], base)


@dataclass(frozen=True, slots=True)
class _DecodedProduct:
    layer: NF4Linear

    def linear(self, x: Tensor) -> Tensor:
        bias = None if self.layer.bias is None else self.layer.bias.to(x.dtype)
        return functional.linear(x, self._decoded(x), bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        return torch.mm(grad, self._decoded(grad))

    def _decoded(self, x: Tensor) -> Tensor:
        return x.new_empty(self.layer.out_features, self.layer.in_features)


class _TiledLoss(torch.autograd.Function):
    """The memory of trl's ChunkedLogProbFunction on a GPU."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        n = hidden.shape[0]
        statistics = [torch.empty(n, dtype=torch.float32) for _ in range(7)]
        tile = hidden.new_empty(min(n, _LOSS_TOKENS), _LOSS_COLUMNS)
        del tile
        log_z, entropy = torch.empty_like(statistics[0]), torch.empty_like(statistics[0])
        ctx.save_for_backward(hidden, weight, bias, log_z, entropy)
        return statistics[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, _, _ = ctx.saved_tensors
        sums = [
            torch.zeros(tensor.shape, dtype=torch.float32) if needed else None
            for tensor, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=True)
        ]
        tile = hidden.new_empty(min(hidden.shape[0], _LOSS_TOKENS), _LOSS_COLUMNS)
        found = [None if total is None else total.to(hidden.dtype) for total in sums]
        del tile
        return tuple(found)


@contextmanager
def _unreported() -> Iterator[None]:
    """Torch reports each operation that fails without memory with a page of text; the caller tells it in a line."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


def _inputs(settings: TrainingSettings, batch_size: int, seq_len: int) -> dict[str, Any]:
    """As the collators make them. Rows of different lengths, and packed ones, need a mask."""
    rows, length = (1, batch_size * seq_len) if settings.packing else (batch_size, seq_len)
    needs_mask = settings.packing or batch_size > 1
    return {
        "input_ids": torch.zeros(rows, length, dtype=torch.long),
        "position_ids": torch.arange(length)[None].expand(rows, -1),
        "attention_mask": torch.ones(rows, 1, length, length, dtype=torch.bool) if needs_mask else None,
        "use_cache": False,
    }


def _attention() -> str:
    """Register and name transformers' sdpa attention with masks made as for unpadded rows without looking at them.

    Where rows are padded or packed, the mask is given (`_inputs`) and none is made.
    """

    def mask(*_: Any, batch_size: int, q_length: int, kv_length: int, local_size: int | None = None, **__: Any) -> Any:
        if local_size is None or kv_length < local_size:
            return None  # is_causal says it all
        return torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool)

    AttentionInterface.register("qformat_plan", sdpa_attention_forward)
    AttentionMaskInterface.register("qformat_plan", mask)
    return "qformat_plan"


def _tiled_loss(base: PreTrainedModel, inputs: dict[str, Any], meter: _Meter) -> Tensor:
    hidden = base.base_model(**inputs).last_hidden_state[:, :-1]
    meter.mark("loss", None)
    output = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    rows = hidden.reshape(-1, hidden.shape[-1])
    scored = rows.index_select(0, torch.arange(rows.shape[0]))
    return cast(Tensor, _TiledLoss.apply(scored, output.weight, output.bias)).sum()  # type: ignore[no-untyped-call]


def _full_loss(base: PreTrainedModel, inputs: dict[str, Any], meter: _Meter) -> Tensor:
    output = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    handle = output.register_forward_pre_hook(lambda _module, _args: meter.mark("loss", None))
    try:
        return cast(Tensor, base(**inputs, labels=torch.zeros_like(inputs["input_ids"])).loss)
    finally:
        handle.remove()


@contextmanager
def _stepping_over(layers: Sequence[nn.Module], chosen: set[int]) -> Iterator[None]:
    """Let all but the chosen layers return what they get, in the form in which the first one returns it."""
    is_tuple: list[bool] = []
    handles = (
        [layers[0].register_forward_hook(lambda _m, _a, out: is_tuple.append(isinstance(out, tuple)))] if layers else []
    )
    skipped = [layer for number, layer in enumerate(layers) if number not in chosen]

    def step_over(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if is_tuple[0] else hidden

    for layer in skipped:
        layer.forward = step_over
    try:
        yield
    finally:
        for layer in skipped:
            del layer.forward
        for handle in handles:
            handle.remove()


@contextmanager
def _marking(layers: Sequence[nn.Module], chosen: set[int], meter: _Meter) -> Iterator[None]:
    """Begin a segment where a layer's forward begins, and where the gradient of its output is complete."""

    def before(number: int) -> Callable[..., None]:
        return lambda *_: meter.mark("forward", number)

    def after(number: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            hidden = out[0] if isinstance(out, tuple) else out
            if hidden.grad_fn is not None:
                hidden.grad_fn.register_prehook(lambda _grads: meter.mark("backward", number))
            meter.mark("after", number)

        return hook

    handles = []
    for number in sorted(chosen):
        handles += [
            layers[number].register_forward_pre_hook(before(number)),
            layers[number].register_forward_hook(after(number)),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _leave_meta(model: nn.Module) -> None:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                new = torch.empty_like(parameter, device="cpu")
                module._parameters[name] = nn.Parameter(new, requires_grad=parameter.requires_grad)


def _decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    lists = [
        list(module)
        for module in decoder.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    return max(lists, key=len, default=[])


def _kind(model: PreTrainedModel, layer: nn.Module, number: int) -> object:
    """Return what layers of the same memory have in common: shapes, settings, kind of attention."""
    types = getattr(model.config.get_text_config(), "layer_types", None)
    shapes = tuple(
        (name, tuple(t.shape), t.dtype, t.requires_grad)
        for name, t in [*layer.named_parameters(), *layer.named_buffers()]
    )
    attributes = tuple(
        (name, key, value)
        for name, module in layer.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, int | float | str | None) and not _OF_ITS_PLACE.search(key)
    )
    return type(layer), types[number] if types else None, shapes, attributes


def _empty(new: NewTensor) -> Tensor:
    return torch.empty(new.shape, dtype=TORCH_DTYPES[new.dtype])


def _packed(
    name: str, parts: Mapping[Component, NewTensor], shape: tuple[int, ...], tensors: ModelTensors
) -> PackedComponents:
    n_elements, n_blocks = shape[0] * shape[1], parts[Component.ABSMAX].shape[0]
    codes = parts[Component.PACKED]
    block_size = next((size for size in BLOCK_SIZES if block_count(n_elements, size) == n_blocks), None)
    if block_size is None or not 0 <= codes.nbytes - packed_nbytes(n_elements) < 4:
        raise ArtifactError(
            Reason.COMPONENT_SHAPE,
            tensors.folder / CONFIG_NAME,
            f"{codes.nbytes} bytes of codes in {n_blocks} blocks, but the model has {list(shape)}",
            tensor=name,
        )
    components = {part: _empty(new) for part, new in parts.items()}
    components[Component.PACKED] = torch.empty(packed_nbytes(n_elements), 1, dtype=torch.uint8)
    double = Component.NESTED_ABSMAX in parts
    return PackedComponents(components, QuantState(block_size, FloatFormat.BF16, shape, 0.0 if double else None))
