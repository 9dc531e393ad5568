"""Extends trl's SFTTrainer for `NF4Linear` models: paging retries, verified checkpoints, guards and exact evaluation.

Steps, schedules, gradient accumulation and the loss come from trl and transformers. This trainer differs as follows:

- A micro-batch that runs out of memory runs again with the optimizer states paged out.
- A non-finite loss or gradient stops the training before it reaches the weights.
- Checkpoints appear atomically: complete, or not at all (`checkpoints`).
- An evaluation gives every token the same weight. It restores the random generators, so the steps that follow are the
  same as without the evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel, set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor, nn
from transformers import TrainerState
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from qformat.artifact.manifest import JsonObject
from qformat.artifact.writing.disk import Disk
from qformat.errors import DeviceMemoryError, DivergenceError, UsageError
from qformat.model.boundary import forward_errors
from qformat.model.loaded_model import check_unchanged
from qformat.names import ADAPTER_WEIGHTS_NAME, BASE_RECORD_NAME
from qformat.training.adapter.attach import check_shapes
from qformat.training.adapter.base_record import BaseRecord
from qformat.training.checkpoints import CheckpointFolder, restoring
from qformat.training.data.length_groups import SeededLengthGroups
from qformat.training.data.tokenised_data import IGNORED
from qformat.training.optimizer.paged_adamw import PagedAdamW
from qformat.training.paging_retry import Result, run_with_paging_retry
from qformat.training.settings import TrainingSettings

TRAINER_STATE_NAME = "trainer_state.json"
_RANDOM_STATES_NAME = "rng_state.pth"


class AdapterTrainer(SFTTrainer):
    """Trains the adapters of a PEFT model.

    Args:
        *arguments: Positional arguments of SFTTrainer.
        checkpoints: Directory that receives the checkpoints.
        facts: Facts about the training that every checkpoint records.
        base: Identity of the model that the adapter is trained on.
        lengths: Number of tokens in each row of the training data, int64 (n,).
        **named: Keyword arguments of SFTTrainer.
    """

    def __init__(
        self,
        *arguments: Any,
        checkpoints: CheckpointFolder,
        facts: JsonObject,
        base: BaseRecord,
        lengths: NDArray[np.int64],
        **named: Any,
    ) -> None:
        self._lengths = lengths
        self._checkpoints = checkpoints
        self._facts = facts
        self._base = base
        self._run_folder: Path | None = None
        self._evaluated_at: int | None = None
        super().__init__(*arguments, **named)

    def train_from(self, checkpoint: Path | None) -> None:
        """Train up to the last step, from the start or from a checkpoint.

        A checkpoint of the last step only restores the weights and runs the final evaluation.
        """
        if checkpoint is None:
            self.args.eval_on_start = self.eval_dataset is not None
            self.train()
            return
        state = _read_state(checkpoint / TRAINER_STATE_NAME)
        if state.global_step < state.max_steps:
            self.train(resume_from_checkpoint=str(checkpoint))
            return
        # Here transformers would train for one more step.
        self._load_from_checkpoint(str(checkpoint))
        self.state = state
        if self.eval_dataset is not None:
            self.evaluate()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run the forward and backward pass of a micro-batch and return its loss.

        If the device runs out of memory, page the optimizer states out and run the micro-batch once more.

        Args:
            model: Model with adapters, as accelerate prepared it.
            inputs: Batch from the collator.
            num_items_in_batch: Number of trained tokens in the step, by which the loss is divided.

        Returns:
            The loss of the micro-batch, a scalar.

        Raises:
            DivergenceError: The loss is NaN or Inf.
            DeviceMemoryError: The device runs out of memory again.
        """
        n_tokens, n_metrics = (
            self._total_train_tokens,
            {name: len(seen) for name, seen in self._metrics["train"].items()},
        )

        def micro_batch() -> Tensor:
            # Undo what trl counted in a run that ran out of memory, because the next run counts it again.
            self._total_train_tokens = n_tokens
            for name, seen in self._metrics["train"].items():
                del seen[n_metrics.get(name, 0) :]
            loss: Tensor = super(AdapterTrainer, self).training_step(  # type: ignore[no-untyped-call]
                model, dict(inputs), num_items_in_batch
            )
            return loss

        loss = self._run_micro_batch(micro_batch)
        if not math.isfinite(loss.item()):
            raise self._diverged(f"the loss is {loss.item()}")
        return loss

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Evaluate the model and return its loss and perplexity without affecting the training.

        Args:
            eval_dataset: Data to evaluate. Defaults to the trainer's evaluation data.
            ignore_keys: Ignored. Present because the Trainer passes it.
            metric_key_prefix: Prefix of the metric names.

        Returns:
            The mean loss over all trained tokens, in nats, and the perplexity, under prefixed names.
        """
        model = self.model
        assert isinstance(model, PeftModel)
        was_training = model.training
        total, n_tokens = 0.0, 0
        with _random_states_kept(self.args.device):
            model.eval()
            for inputs in self.get_eval_dataloader(eval_dataset):
                prepared = self._prepare_inputs(inputs)
                n_tokens += int((prepared["labels"] != IGNORED).sum())
                total += self._run_micro_batch(partial(self._summed_loss, model, prepared))
        loss = total / n_tokens
        metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_perplexity": math.exp(min(loss, 700.0))}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        model.train(was_training)
        self._evaluated_at = self.state.global_step
        return metrics

    def _summed_loss(self, model: PeftModel, inputs: dict[str, Any]) -> float:
        """Return the sum of the loss over the tokens: with one item in the batch, the loss is divided by 1."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return float(self.compute_loss(model, dict(inputs), num_items_in_batch=1))  # type: ignore[no-untyped-call]

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int] | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        together = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return SeededLengthGroups(together, self._lengths, self.args.seed)

    def _run_micro_batch(self, micro_batch: Callable[[], Result]) -> Result:
        if self.state.global_step:  # from the second step on, an error is a defect of the program
            return self._run_within_memory(micro_batch)
        assert isinstance(self.model, PeftModel)
        with forward_errors(self.model.get_base_model()):
            return self._run_within_memory(micro_batch)

    def _run_within_memory(self, micro_batch: Callable[[], Result]) -> Result:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        if isinstance(optimizer, PagedAdamW):
            return run_with_paging_retry(optimizer, micro_batch)
        try:
            return micro_batch()
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(
                "a micro-batch ran out of device memory. Lower the batch size or the sequence length, turn on gradient "
                f"checkpointing, or use a paged optimizer: {error}"
            ) from error

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        if norm is not None and not math.isfinite(float(norm)):
            raise self._diverged(f"the norm of the gradient is {float(norm)}")
        return norm

    def _diverged(self, what: str) -> DivergenceError:
        intact = self._checkpoints.last_intact()
        where = "no checkpoint exists yet" if intact is None else f"the last intact checkpoint is {intact}"
        advice = "Lower the learning rate, or check the data of this step"
        if self.state.global_step == 0:  # no learning rate was applied yet
            advice = (
                f"Check the data of this step, and whether {self._base.name} itself gives a finite loss (qformat eval)"
            )
        return DivergenceError(
            f"step {self.state.global_step + 1}: {what}. The step did not change the weights; {where}. {advice}"
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        assert isinstance(self.model, PeftModel)
        check_unchanged(self.model.get_base_model())
        facts = {**self._facts, "tokens": self._total_train_tokens}
        with self._checkpoints.writing(self.state.global_step, facts) as folder:
            self._run_folder = folder.parent
            try:
                # Skip the method of SFTTrainer, which would add a model card.
                super(SFTTrainer, self)._save_checkpoint(model, trial)
            finally:
                self._run_folder = None
        is_last = self.state.global_step == self.state.max_steps
        if is_last and self.eval_dataset is not None and self._evaluated_at != self.state.global_step:
            # Evaluate once the last checkpoint is on disk, but before the trackers finish.
            self.evaluate()

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._run_folder) if self._run_folder is not None else str(super()._get_output_dir(trial))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert output_dir is not None
        assert isinstance(self.model, PeftModel)
        write_adapter(self.model, Path(output_dir), self._base, self._checkpoints.disk)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # PEFT's load_adapter would also cast the weights to a dtype of its own choice.
        with restoring(Path(resume_from_checkpoint) / ADAPTER_WEIGHTS_NAME):
            weights = load_peft_weights(resume_from_checkpoint, device="cpu")
            check_shapes(cast(PeftModel, self.model), weights, Path(resume_from_checkpoint))
            set_peft_model_state_dict(self.model, weights)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with restoring(Path(checkpoint or "") / f"{OPTIMIZER_NAME} or {SCHEDULER_NAME}"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with restoring(Path(checkpoint or "") / _RANDOM_STATES_NAME):
            super()._load_rng_state(checkpoint)

    def _load_callback_state(self) -> None:
        with restoring(self._checkpoints.output / TRAINER_STATE_NAME):
            super()._load_callback_state()


def _read_state(path: Path) -> TrainerState:
    with restoring(path):
        state: TrainerState = TrainerState.load_from_json(str(path))
        numbers = (state.global_step, state.max_steps, state.num_train_epochs, state.epoch)
        if not all(isinstance(number, (int, float)) for number in numbers) or not isinstance(state.log_history, list):
            raise TypeError("the position or the history is missing")
        return state


def write_adapter(model: PeftModel, folder: Path, base: BaseRecord, disk: Disk) -> None:
    """Write a standard PEFT adapter and, beside it, the identity of its base model.

    Args:
        model: Model whose adapter is written.
        folder: Existing directory that receives the files.
        base: Identity of the model that the adapter was trained on.
        disk: Performs the file operations.
    """
    # Otherwise PEFT fetches the base model's configuration from the Hub to check its embedding.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    disk.write_file(folder / BASE_RECORD_NAME, base.to_bytes())


def trainer_arguments(settings: TrainingSettings, output: Path, device: torch.device) -> SFTConfig:
    """Translate the settings to an SFTConfig of trl.

    Args:
        settings: Settings of the training.
        output: Output directory of the training.
        device: Device that the model is on.

    Returns:
        The configuration of the trainer.

    Raises:
        UsageError: A tracker is not installed, or trl rejects a setting.
    """
    schedule = "constant_with_warmup" if settings.schedule == "constant" and settings.warmup else settings.schedule
    try:
        arguments = SFTConfig(
            output_dir=str(output),
            max_steps=settings.max_steps or -1,
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.grad_accum,
            learning_rate=settings.learning_rate,
            lr_scheduler_type=schedule,
            warmup_steps=settings.warmup,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            seed=settings.seed,
            data_seed=settings.seed,
            bf16=settings.autocast,
            use_cpu=device.type == "cpu",
            gradient_checkpointing=settings.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            train_sampling_strategy="group_by_length" if settings.group_by_length else "random",
            logging_steps=settings.log_every,
            logging_nan_inf_filter=False,
            save_strategy="steps",
            save_steps=settings.save_every,
            eval_strategy="no" if settings.eval_every is None else "steps",
            eval_steps=settings.eval_every,
            report_to=list(settings.report_to) or "none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            dataloader_pin_memory=device.type == "cuda",
            max_length=None,
        )
        for tracker in get_reporting_integration_callbacks(settings.report_to):  # type: ignore[no-untyped-call]
            tracker()  # raises if its package is not installed
    except (ValueError, ImportError, RuntimeError) as problem:
        raise UsageError(f"the training settings cannot be used on this machine: {problem}") from problem
    if device.type == "cuda":
        _ = arguments.device  # reading it makes transformers choose the devices
        # Train on one GPU even if the machine has several.
        arguments._n_gpu = 1
    return arguments


@contextmanager
def _random_states_kept(device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
