"""Trains a PEFT adapter on an artifact and training data: the entry point `train`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PrinterCallback

from qformat.artifact.manifest import JsonObject
from qformat.artifact.writing.disk import Disk
from qformat.artifact.writing.staging import refuse_nested
from qformat.errors import DeviceMemoryError, Option, TargetError, UsageError
from qformat.model.boundary import check_tokens
from qformat.model.build import check_predicts_tokens
from qformat.model.load import load_model, load_tokenizer, open_whole
from qformat.names import ADAPTER_WEIGHTS_NAME, CARD_NAME
from qformat.processes import check_single_process
from qformat.training.adapter.attach import add_adapter
from qformat.training.adapter.base_record import BaseRecord
from qformat.training.adapter.card import adapter_card
from qformat.training.adapter.output_layer import decode_output_layer
from qformat.training.checkpoints import (
    PARTIAL_NAME,
    SEAL_NAME,
    Checkpoint,
    CheckpointFolder,
    disk_problem,
    restoring,
)
from qformat.training.data.collate import PackedCollator, PaddedCollator
from qformat.training.data.prepare import DataSettings, prepare_data
from qformat.training.data.show_example import show_example
from qformat.training.data.tokenised_data import TokenisedData, for_trainer
from qformat.training.metrics import METRICS_NAME, Listener, MetricsCallback, MetricsFile
from qformat.training.non_finite import naming_weights
from qformat.training.optimizer.make_optimizer import make_optimizer
from qformat.training.result import TrainingResult
from qformat.training.settings import TrainingSettings, page_budget_nbytes
from qformat.training.starting_checks import check_free, check_same_training
from qformat.training.trainer import AdapterTrainer, trainer_arguments, write_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """The inputs and the output of a training.

    Attributes:
        artifact: Directory of the 4-bit artifact.
        data: Sources of training data (see `qformat.training.data.reading.sources.find_files`).
        output: Directory that receives the adapter and its checkpoints.
        eval_data: Sources of held-out data, in the same forms as `data`. Empty for no evaluation.
        split: Split to read from Hub datasets in `data`.
        eval_split: Split to read from Hub datasets in `eval_data`.
    """

    artifact: Path
    data: Sequence[str]
    output: Path
    eval_data: Sequence[str] = ()
    split: str = "train"
    eval_split: str = "test"


@dataclass(frozen=True, slots=True)
class _Prepared:
    tokenizer: PreTrainedTokenizerBase
    train: TokenisedData
    evaluation: TokenisedData | None


def train(
    job: TrainingJob,
    settings: TrainingSettings,
    *,
    resume: str | None = None,
    say: Callable[[str], None] = lambda _: None,
    on_metrics: Listener = lambda _line, _n_steps: None,
) -> TrainingResult:
    """Train an adapter and write it to `job.output`.

    Whatever happens, existing checkpoints stay intact. A resumed training gives the same bytes as an uninterrupted one.

    Args:
        job: Inputs and output of the training. The output directory must be empty or absent, unless `resume` is given.
        settings: Settings of the training.
        resume: "latest", or the name of a checkpoint in `job.output`. None to train from the start.
        say: Receives progress messages for people, a line at a time.
        on_metrics: Receives every line of metrics.jsonl.

    Returns:
        The output directory, the metrics and the facts of the training.

    Raises:
        UsageError: The settings do not fit the model, the data or the checkpoint, or torchrun or another launcher
            started several processes.
        ArtifactError: The artifact is damaged, was changed during the training, or contains NaN or Inf.
        DataError: The training data cannot be used.
        AdapterError: The checkpoint is damaged.
        DeviceMemoryError: The device has too little memory.
        DivergenceError: The loss or the gradient is NaN or Inf.
        TargetError: The output cannot be written.
    """
    check_single_process("a training", os.environ)
    refuse_nested(job.artifact, job.output)
    checkpoints = CheckpointFolder(job.output, keep=settings.keep_checkpoints)
    checkpoint = None if resume is None else checkpoints.find(resume)
    if checkpoint is None:
        check_free(job.output)
    if settings.eval_every is not None and not job.eval_data:
        raise UsageError(Option("eval_every"), ": needs evaluation data. Specify it with ", Option("eval_data"))
    shards = open_whole(job.artifact)
    check_predicts_tokens(job.artifact, trust_remote_code=settings.trust_remote_code)
    base = BaseRecord.of(shards.layout)
    prepared = _prepare(job, settings, say)
    facts: JsonObject = {
        "base": asdict(base),
        "data": prepared.train.content_digest,
        "eval_data": None if prepared.evaluation is None else prepared.evaluation.content_digest,
        "settings": settings.binding(),
    }
    if checkpoint is not None:
        with restoring(checkpoint.folder / SEAL_NAME):
            check_same_training(checkpoint, facts, artifact=job.artifact, data=job.data, eval_data=job.eval_data)
    for line in ("First example («trained tokens»):", *show_example(prepared.tokenizer, prepared.train[0]).split("\n")):
        say(line)

    with _lack_of_memory_in_words():
        model = load_model(
            shards,
            device=settings.device,
            dtype=torch.bfloat16,
            trust_remote_code=settings.trust_remote_code,
        )
        for data in (prepared.train, prepared.evaluation):
            if data is not None:
                check_tokens(data.highest_token, model)
        decode_output_layer(model)
        adapted = add_adapter(model, settings, base_name=str(job.artifact))
        checkpoints.disk.make_folder(job.output)
        with checkpoints.lock():
            if checkpoint is None:
                check_free(job.output)  # another training may have ended meanwhile
            run = _Run(job, settings, prepared, adapted, checkpoints, facts, base)
            with naming_weights(shards):
                result = run.train(checkpoint, say, on_metrics)
            shards.watch.check()
            _write_result(adapted, result, base, checkpoints.disk)
    return result


@contextmanager
def _lack_of_memory_in_words() -> Iterator[None]:
    """Explain a lack of memory outside of micro-batches, which have a message of their own."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            "the device has too little memory to load the model or to update the weights. Check what fits with "
            "`qformat train --dry-run`. Then lower ",
            Option("rank"),
            " or ",
            Option("page_budget"),
            f", or close other programs that use the device: {error}",
        ) from error


@dataclass(frozen=True, slots=True)
class _Run:
    """A training that is ready to start."""

    job: TrainingJob
    settings: TrainingSettings
    prepared: _Prepared
    model: PeftModel
    checkpoints: CheckpointFolder
    facts: JsonObject
    base: BaseRecord

    def train(self, checkpoint: Checkpoint | None, say: Callable[[str], None], on_metrics: Listener) -> TrainingResult:
        metrics = MetricsFile(self.job.output / METRICS_NAME, self.checkpoints.disk)
        if checkpoint is None:
            metrics.forget_all()
        else:
            metrics.forget_after(checkpoint.step)
        trainer = self._make_trainer(metrics, on_metrics)
        if checkpoint is not None:
            with restoring(checkpoint.folder / SEAL_NAME):
                trainer._total_train_tokens = int(cast(int, checkpoint.facts["tokens"]))
            say(f"Resuming after step {checkpoint.step}")
        trainer.train_from(None if checkpoint is None else checkpoint.folder)
        about = {"settings": self.settings.to_json(), "statistics": self.prepared.train.statistics.to_json()}
        return TrainingResult(
            output=self.job.output,
            steps=trainer.state.global_step,
            metrics=metrics.read(),
            facts={**self.facts, **about},
        )

    def _make_trainer(self, metrics: MetricsFile, on_metrics: Listener) -> AdapterTrainer:
        settings, prepared = self.settings, self.prepared
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        budget = page_budget_nbytes(settings.page_budget)
        optimizer = make_optimizer(
            settings.optim,  # type: ignore[arg-type]
            trained,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            page_budget="auto" if budget is None else budget,
        )
        rows = prepared.train.packed(settings.seq_len) if settings.packing else prepared.train
        tokenizer = prepared.tokenizer
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        trainer = AdapterTrainer(
            model=self.model,
            args=trainer_arguments(settings, self.job.output, next(self.model.parameters()).device),
            train_dataset=for_trainer(rows),
            eval_dataset=None if prepared.evaluation is None else for_trainer(prepared.evaluation),
            data_collator=PackedCollator() if settings.packing else PaddedCollator(pad_id=pad_id or 0),
            processing_class=tokenizer,
            optimizers=(optimizer, None),
            callbacks=[MetricsCallback(metrics, on_metrics, optimizer)],
            checkpoints=self.checkpoints,
            facts=self.facts,
            base=self.base,
            lengths=rows.lengths,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer


def _prepare(job: TrainingJob, settings: TrainingSettings, say: Callable[[str], None]) -> _Prepared:
    tokenizer = load_tokenizer(job.artifact, trust_remote_code=settings.trust_remote_code)
    data_settings = DataSettings(
        max_length=settings.seq_len,
        too_long=settings.too_long,
        loss_on=settings.loss_on,
        skip_bad_lines=settings.skip_bad_lines,
    )
    train_data = prepare_data(job.data, tokenizer, data_settings, split=job.split)
    evaluation = prepare_data(job.eval_data, tokenizer, data_settings, split=job.eval_split) if job.eval_data else None
    counts = train_data.statistics
    left_out = {**counts.dropped, **counts.bad}
    say(
        f"{counts.examples:,} examples with {counts.tokens:,} tokens ({counts.trained_tokens:,} trained); "
        f"{counts.truncated:,} truncated, {sum(left_out.values()):,} skipped"
        + "".join(f", {reason}: {n}" for reason, n in left_out.items())
        + "".join(f"; {n:,} converted from the format of {name}" for name, n in counts.converted.items())
    )
    return _Prepared(tokenizer, train_data, evaluation)


def _write_result(model: PeftModel, result: TrainingResult, base: BaseRecord, disk: Disk) -> None:
    """Move the files of the adapter into the output directory atomically, one by one, the weights last."""
    folder = result.output / PARTIAL_NAME
    disk.remove_folder(folder)
    disk.make_folder(folder)
    try:
        write_adapter(model, folder, base, disk)
        disk.write_file(folder / CARD_NAME, adapter_card(result, base).encode())
        for path in sorted(folder.iterdir(), key=lambda path: path.name == ADAPTER_WEIGHTS_NAME):
            disk.sync_file(path)
            disk.rename(path, result.output / path.name)
    except (OSError, SafetensorError) as error:
        raise TargetError(
            f"{result.output}: the adapter cannot be written: {disk_problem(error)}. Make room and ",
            *disk.to_continue,
        ) from error
    finally:
        disk.remove_folder(folder)
    disk.sync_folder(result.output)
