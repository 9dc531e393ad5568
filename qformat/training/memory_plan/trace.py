"""Runs one micro-batch on fake tensors and measures its memory over time, for any architecture.

The first and the last decoder layer run, and one layer of each kind. The other layers are skipped and get the
measurements of the layer of their kind.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from qformat.errors import UsageError, first_line
from qformat.training.memory_plan.loss import Loss, full_loss, tiled_loss
from qformat.training.memory_plan.meter import Meter, Segment
from qformat.training.memory_plan.model import FakeModel
from qformat.training.memory_plan.tensors import ModelTensors
from qformat.training.settings import TrainingSettings


class FakeTraining:
    """A model with adapters on fake tensors, which runs micro-batches without memory."""

    def __init__(self, tensors: ModelTensors, settings: TrainingSettings, *, trust_remote_code: bool = False) -> None:
        """Build the model.

        Args:
            tensors: Tensors of the model.
            settings: Settings of the training.
            trust_remote_code: Whether to run model code that comes with the model.

        Raises:
            ArtifactError: The tensors and config.json do not fit together.
            UsageError: The settings do not fit the model.
        """
        built = FakeModel.build(tensors, settings, trust_remote_code=trust_remote_code)
        self.model = built.model
        self.decodes_output = built.decodes_output
        self._mode, self._layers, self._kinds = built.mode, built.layers, built.kinds

    @property
    def base(self) -> PreTrainedModel:
        """The model without PEFT's wrapper."""
        return cast(PreTrainedModel, self.model.get_base_model())

    @property
    def n_layers(self) -> int:
        """Number of decoder layers. 0 if they cannot be found; then the whole model runs."""
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
        """Run the forward and backward pass and return the memory use of all layers.

        Args:
            settings: Settings of the run. Only gradient_checkpointing, packing, autocast and grad_accum may differ
                from those that the model was built with.
            batch_size: Rows of the micro-batch.
            seq_len: Tokens of a row.
            loss: "tiled" for trl's loss, "logits" for that of transformers.
            every_layer: Whether to run every layer instead of skipping identical ones.

        Returns:
            The segments in order of time.

        Raises:
            UsageError: The model cannot be run on fake tensors.
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
            if len(chosen) < self.n_layers:  # some architectures fail if layers are skipped
                return self.micro_batch(settings, batch_size=batch_size, seq_len=seq_len, loss=loss, every_layer=True)
            raise UsageError(
                f"the memory of this model cannot be planned, because the model does not run on fake tensors: "
                f"{first_line(problem)}"
            ) from problem

    def _representatives(self) -> set[int]:
        """Return the layers to run: the first (its input may need no gradient), the last, and one of each kind."""
        firsts = {kind: number for number, kind in reversed(list(enumerate(self._kinds))) if number > 0}
        return {0, *firsts.values(), self.n_layers - 1} if self._layers else set()

    def _run(
        self, settings: TrainingSettings, batch_size: int, seq_len: int, loss: Loss, chosen: set[int]
    ) -> list[Segment]:
        base = self.base
        base.train()
        meter = Meter()
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
                if parameter.requires_grad and settings.grad_accum > 1:  # left by an earlier micro-batch
                    parameter.grad = torch.zeros_like(parameter)
                    meter.leave_out([parameter.grad])
            meter.leave_out([*self.model.parameters(), *self.model.buffers()])
            with meter:
                meter.mark("embedding", None)
                inputs = _inputs(settings, batch_size, seq_len)
                with torch.autocast("cpu", torch.bfloat16, enabled=settings.autocast):
                    value = tiled_loss(base, inputs, meter) if loss == "tiled" else full_loss(base, inputs, meter)
                value.backward()  # type: ignore[no-untyped-call]
                del value, inputs
                meter.mark("backward", None)
            if settings.gradient_checkpointing:
                base.gradient_checkpointing_disable()  # type: ignore[no-untyped-call]
                base.disable_input_require_grads()  # type: ignore[no-untyped-call]
            for parameter in self.model.parameters():
                parameter.grad = None
        return self._for_all_layers(meter)

    def _for_all_layers(self, meter: Meter) -> list[Segment]:
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


@contextmanager
def _unreported() -> Iterator[None]:
    """Silence torch, which logs a page of text for each operation that fails on fake tensors."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


def _inputs(settings: TrainingSettings, batch_size: int, seq_len: int) -> dict[str, Any]:
    """Return the same inputs as the collators. Packed rows, and rows of different lengths, need a mask."""
    rows, length = (1, batch_size * seq_len) if settings.packing else (batch_size, seq_len)
    needs_mask = settings.packing or batch_size > 1
    return {
        "input_ids": torch.zeros(rows, length, dtype=torch.long),
        "position_ids": torch.arange(length)[None].expand(rows, -1),
        "attention_mask": torch.ones(rows, 1, length, length, dtype=torch.bool) if needs_mask else None,
        "use_cache": False,
    }


@contextmanager
def _stepping_over(layers: Sequence[nn.Module], chosen: set[int]) -> Iterator[None]:
    """Skip all but the chosen layers. A skipped layer returns its input in the form of the first layer's output."""
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
def _marking(layers: Sequence[nn.Module], chosen: set[int], meter: Meter) -> Iterator[None]:
    """Begin a segment when the forward pass of a layer begins, and when the gradient of its output is complete."""

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
