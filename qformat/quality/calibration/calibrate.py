"""Chooses codes and scales on a text, layer by layer, with the layers before each one already quantized.

The hidden states of the windows enter a layer as the quantized layers before it compute them. The layer's Linears are
encoded in the order in which they run, those that share an input (q, k, v; gate, up) together: the input is accumulated
as a Hessian, error feedback turns the weights into codes, and the decoded values replace the weights before the input
of the next Linears is collected. Then the layer runs once more, and its output enters the next layer.

Only one layer has weights at a time. The hidden states are in files of the work directory. The journal records which of
them are complete and which weights are done, so that an interrupted run resumes at the same layer with bit-identical
results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qformat.artifact.components import PackedShape
from qformat.artifact.manifest import JsonObject
from qformat.artifact.packed_arrays import PackedArrays, encode_plain
from qformat.artifact.tensor_spec import TensorSpec
from qformat.artifact.writing.weight_encoder import StagedWeights
from qformat.errors import DivergenceError
from qformat.model.shard_tensors import TORCH_DTYPES
from qformat.quality.calibration.decoder import Calls, Decoder
from qformat.quality.calibration.error_feedback import FeedbackSettings, encode_with_feedback, inverse_factor
from qformat.quality.calibration.hidden_states import HiddenStates, HiddenStatesWriter

BATCH_TOKENS = 2048
"""Number of tokens that run through a layer at a time: enough for full speed, with small activations."""

FOLDER_NAME = "hidden_states"


@dataclass(frozen=True, slots=True)
class Calibration:
    """Chooses codes and scales; the encoder to pass to a conversion.

    Attributes:
        decoder: The model, with one layer loaded at a time.
        tensors: All tensors of the source, keyed by name.
        layouts: Layouts of all packed weights of the conversion, keyed by name.
        names: Weights whose codes are chosen on the text.
        windows: Token ids, int64 [n_windows, length].
        settings: Options of the error feedback.
        record: Description of the calibration for the manifest.
        workers: Number of threads for torch and the kernels. Another number may give other bits.
        on_layer: Called with the number of calibrated layers and the total number of layers.
    """

    decoder: Decoder
    tensors: Mapping[str, TensorSpec]
    layouts: Mapping[str, PackedShape]
    names: frozenset[str]
    windows: Tensor
    settings: FeedbackSettings
    record: JsonObject
    workers: int
    on_layer: Callable[[int, int], None] = field(default=lambda done, total: None)

    @property
    def scratch_nbytes(self) -> int:
        """Disk space in bytes that the hidden states need in addition to the output."""
        return 2 * 4 * self.windows.numel() * int(self.decoder.model.config.get_text_config().hidden_size)

    def encode(self, staged: StagedWeights) -> Iterator[tuple[str, PackedArrays]]:
        """Yield every weight of `names` that is not staged yet. Each must be staged before the next is requested.

        Raises:
            SourceError: The layers of the model cannot be run one by one.
            TargetError: The hidden states cannot be written.
            DivergenceError: An activation is NaN or Inf.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(self.workers)
        try:
            yield from _Run(self, staged).layers()
        finally:
            torch.set_num_threads(threads)


@dataclass(frozen=True, slots=True)
class _Stage:
    """Weights that share an input, as named in the source. `once`: the input occurs once per run of the layer."""

    names: tuple[str, ...]
    once: bool


class _Run:
    """One calibration."""

    def __init__(self, calibration: Calibration, staged: StagedWeights) -> None:
        self._calibration = calibration
        self._decoder = calibration.decoder
        self._staged = staged
        self._folder = staged.staging.work / FOLDER_NAME
        self._disk = staged.staging.disk
        self._batches = torch.split(calibration.windows, max(1, BATCH_TOKENS // calibration.windows.shape[1]))
        self._calls: Calls = {}

    def layers(self) -> Iterator[tuple[str, PackedArrays]]:
        n_layers = len(self._decoder.layers)
        unfinished = [index for index in range(n_layers) if not all(map(self._staged.is_staged, self._chosen(index)))]
        if unfinished:
            self._disk.make_folder(self._folder)
            start, hidden = self._first_states(up_to=unfinished[0])
            for index in range(start, unfinished[-1] + 1):
                self._calibration.on_layer(index, n_layers)
                yield from self._layer(index, hidden)
                if index < unfinished[-1]:
                    hidden = self._behind(index, hidden)
                self._decoder.drop_layer(index)
        self._calibration.on_layer(n_layers, n_layers)
        self._disk.remove_folder(self._folder)

    def _chosen(self, index: int) -> list[str]:
        return [name for name in self._decoder.targets[index] if name in self._calibration.names]

    @torch.inference_mode()
    def _first_states(self, *, up_to: int) -> tuple[int, HiddenStates]:
        """Record how layers are called. Returns the layer to begin with, at most `up_to`, and the states before it."""
        left = self._left_behind(up_to)
        if left is not None:
            self._calls = self._decoder.record(self._batches, read=self._read, keep=lambda hidden: None)
            return left
        with HiddenStatesWriter(self._path(0), self._disk) as writer:
            self._calls = self._decoder.record(self._batches, read=self._read, keep=writer.write)
            return 0, writer.finish()

    def _left_behind(self, up_to: int) -> tuple[int, HiddenStates] | None:
        """Return the last layer, at most `up_to`, whose hidden states an earlier run left intact, and these."""
        for entry in reversed(self._staged.staging.entries):
            layer, shape, digest = (entry.get(key) for key in ("hidden_states_before", "shape", "xxh3"))
            if isinstance(layer, int) and isinstance(shape, list) and isinstance(digest, str) and layer <= up_to:
                states = HiddenStates(self._path(layer), tuple(int(size) for size in shape), digest)  # type: ignore[arg-type]
                return (layer, states) if states.is_whole() else None
        return None

    def _layer(self, index: int, hidden: HiddenStates) -> Iterator[tuple[str, PackedArrays]]:
        """Encode the weights of a layer. Afterwards the layer has the decoded values as weights."""
        self._decoder.load_layer(index, self._read)
        chosen = self._chosen(index)
        staged = {name for name in self._decoder.targets[index] if self._staged.is_staged(name)}
        complete = staged.issuperset(chosen)
        for name in staged if complete else staged.difference(chosen):
            self._put(index, name, self._staged.read_encoded(name))
        for stage in [] if complete else self._stages(index, hidden):
            factor = None if staged.issuperset(stage.names) else self._factor(index, stage, hidden)
            for name in stage.names:
                if name in staged:
                    encoded = self._staged.read_encoded(name)
                else:
                    encoded = self._choose(index, name, factor)
                    yield name, encoded
                self._put(index, name, encoded)

    @torch.inference_mode()
    def _stages(self, index: int, hidden: HiddenStates) -> list[_Stage]:
        """Return the weights of a layer in the order in which they run, grouped by input.

        Weights that run more than once, or not at all, come last, each in its own stage.
        """
        chosen = self._chosen(index)
        seen: list[tuple[Tensor, str]] = []  # keeps the inputs alive, so that no id is used twice

        def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            return lambda module, inputs: seen.append((inputs[0], name))

        with _Hooks((self._decoder.linear(index, name), watch(name)) for name in chosen):
            self._forward(index, hidden.read()[: len(self._batches[0])])
        times = {name: sum(other == name for _, other in seen) for name in chosen}
        stages: dict[int, list[str]] = {}
        for tensor, name in seen:
            if times[name] == 1:
                stages.setdefault(id(tensor), []).append(name)
        alone = [_Stage((name,), once=False) for name in chosen if times[name] != 1]
        return [_Stage(tuple(names), once=True) for names in stages.values()] + alone

    @torch.inference_mode()
    def _factor(self, index: int, stage: _Stage, hidden: HiddenStates) -> Tensor | None:
        """Return the factor U of the input shared by a stage's weights, or None if the input never occurred or is zero.

        Raises DivergenceError if it contains NaN or Inf.
        """
        linear = self._decoder.linear(index, stage.names[0])
        width = linear.in_features
        hessian, n_rows = torch.zeros(width, width), 0

        def collect(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            nonlocal n_rows
            rows = inputs[0].reshape(-1, width)
            hessian.addmm_(rows.T, rows)
            n_rows += len(rows)
            if stage.once:
                raise _EnoughError  # the rest of the layer need not run

        with _Hooks([(linear, collect)]):
            for batch in self._in_batches(hidden):
                with suppress(_EnoughError):
                    self._forward(index, batch)
        if not torch.isfinite(hessian.diagonal()).all():
            raise self._not_finite(stage.names[0].removesuffix(".weight"), "input")
        if n_rows:
            hessian.mul_(2 / n_rows)
        return inverse_factor(hessian, damping=self._calibration.settings.damping)

    def _choose(self, index: int, name: str, factor: Tensor | None) -> PackedArrays:
        """Encode a weight. Without a factor, it is encoded without calibration."""
        layout = self._calibration.layouts[name]
        if factor is None:
            return encode_plain(self._staged.read_source(name).view(layout.float_format.raw_dtype), layout)
        weights = self._decoder.linear(index, name).weight
        return encode_with_feedback(
            weights.detach().numpy(),
            factor,
            layout=layout,
            settings=self._calibration.settings,
            workers=self._calibration.workers,
        )

    def _behind(self, index: int, hidden: HiddenStates) -> HiddenStates:
        """Run a layer on all windows and return the hidden states after it."""
        with HiddenStatesWriter(self._path(index + 1), self._disk) as writer, torch.inference_mode():
            for batch in self._in_batches(hidden):
                output = self._forward(index, batch)
                if not torch.isfinite(output).all():
                    raise self._not_finite(f"layer {index}", "output")
                writer.write(output)
            states = writer.finish()
        self._staged.staging.record(
            {"hidden_states_before": index + 1, "shape": list(states.shape), "xxh3": states.digest}
        )
        return states

    def _put(self, index: int, name: str, encoded: PackedArrays) -> None:
        """Replace a layer's weight by its decoded values."""
        layout = self._calibration.layouts[name]
        decoded = _as_tensor(encoded.decode().reshape(-1).view(np.uint8), layout.float_format.value, layout.shape)
        linear = self._decoder.linear(index, name)
        linear.weight = nn.Parameter(decoded.to(torch.float32), requires_grad=False)

    def _forward(self, index: int, hidden: Tensor) -> Tensor:
        return self._calls[len(hidden)][index](self._decoder.layers[index], hidden)

    def _in_batches(self, hidden: HiddenStates) -> tuple[Tensor, ...]:
        return torch.split(hidden.read(), len(self._batches[0]))

    def _path(self, layer: int) -> Path:
        """Return one of two files used alternately: one is read while the other is written."""
        return self._folder / str(layer % 2)

    def _read(self, name: str) -> Tensor:
        facts = self._calibration.tensors[name]
        return _as_tensor(self._staged.read_source(name), facts.dtype, facts.shape)

    def _not_finite(self, where: str, what: str) -> DivergenceError:
        return DivergenceError(
            f"{self._decoder.path}: {where}: its {what} on the calibration text is not finite. "
            "Check that the weights are intact. If they are, convert without calibration"
        )


class _Hooks:
    """Context manager that registers forward pre-hooks on modules."""

    def __init__(self, hooks: Iterable[tuple[nn.Module, Callable[[nn.Module, tuple[Any, ...]], None]]]) -> None:
        self._handles = [module.register_forward_pre_hook(hook) for module, hook in hooks]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


class _EnoughError(Exception):
    """The required input was collected."""


def _as_tensor(data: NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor in torch's own memory, because the bits of a product may depend on the alignment."""
    return torch.from_numpy(data).view(TORCH_DTYPES[dtype]).view(shape).clone()
