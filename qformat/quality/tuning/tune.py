"""Writes an artifact with the same codes and better scales and norms, trained on the 16-bit model's predictions.

    artifact ─┐                         ┌─ held out: measured before and after
    source ───┼─► checked by digests ─► tokens ─► steps (checkpoints in OUT.partial/) ─► rounded ─► rewritten as OUT
    data ─────┘                         └─ trained on

OUT is written atomically. The same command resumes an interrupted run and gives the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qformat import strict_json
from qformat.artifact.digests import xxh3
from qformat.artifact.manifest import JsonObject
from qformat.artifact.reading.reader import Artifact, open_artifact
from qformat.artifact.reading.verify import check_digests
from qformat.artifact.writing.disk import Disk
from qformat.artifact.writing.output_kind import ARTIFACT, check_target
from qformat.artifact.writing.rewrite import replaced_by, rewrite
from qformat.artifact.writing.staging import Staging, refuse_full_disk, refuse_nested, work_folder
from qformat.errors import Option, UsageError, VerificationError
from qformat.model.build import check_predicts_tokens
from qformat.model.checkpoint import find_folder, load_checkpoint
from qformat.model.load import chosen_device, load_model, load_tokenizer
from qformat.model.memory import peak_nbytes
from qformat.quality.output_head import split_head
from qformat.quality.source_check import check_whole_source
from qformat.quality.teacher import LiveTeacher, Teacher, TeacherCache
from qformat.quality.tuning.distillation import Closeness
from qformat.quality.tuning.settings import TuningSettings
from qformat.quality.tuning.steps import HeldOut, StepLine, TuningRun, checkpoint_folder, rows_of_step
from qformat.quality.tuning.tunable import LARGEST_CHANGE, TunableModel, make_tunable, share_kept_tensors
from qformat.quality.windows import TokenWindows, read_windows
from qformat.training.checkpoints import CheckpointFolder
from qformat.training.non_finite import naming_weights
from qformat.version import __version__

DTYPE = torch.bfloat16
"""Dtype of the arithmetic. Trained values and losses are float32."""


@dataclass(frozen=True, slots=True)
class TuningJob:
    """Inputs and output of a tuning.

    Attributes:
        artifact: Directory of the artifact to tune.
        source: Its source checkpoint: a directory, or owner/name in the local Hub cache.
        data: Text to train on, see `qformat.quality.windows.read_windows`.
        out: Directory of the artifact to write.
        teacher_cache: Directory in which to cache the 16-bit model's predictions. None computes them in every step.
    """

    artifact: Path
    source: Path | str
    data: Sequence[str]
    out: Path
    teacher_cache: Path | None = None


@dataclass(frozen=True, slots=True)
class TuningResult:
    """Result of a tuning. Figures are for the held-out windows, and for `TopKTarget` if the teacher was cached.

    Attributes:
        out: Directory of the tuned artifact.
        step: Step of the best checkpoint, which was written.
        before: Closeness of the artifact before tuning.
        tuned: Closeness of the best checkpoint before rounding.
        after: Closeness of the written artifact.
        tokens: Number of tokens trained on up to that step.
        memory_nbytes: Peak memory in bytes.
    """

    out: Path
    step: int
    before: Closeness
    tuned: Closeness
    after: Closeness
    tokens: int
    memory_nbytes: int


def tune(
    job: TuningJob,
    settings: TuningSettings,
    *,
    force: bool = False,
    restart: bool = False,
    accept_worse: bool = False,
    use_best: bool = False,
    trust_source: bool = False,
    disk: Disk | None = None,
    say: Callable[[str], None] = lambda _: None,
    on_step: Callable[[StepLine], None] = lambda _: None,
) -> TuningResult | None:
    """Tune an artifact and write the result to `job.out`.

    If an error occurs, `out` is left as it was, and calling the function again with the same arguments resumes the
    tuning.

    Args:
        job: Inputs and output.
        settings: Options of the training.
        force: Whether to replace an artifact that exists at `out`.
        restart: Whether to discard what an interrupted run left behind.
        accept_worse: Whether to write the result even if it is not better on the held-out text.
        use_best: Whether to stop training and write the best checkpoint of an interrupted run.
        trust_source: Whether to accept source tensors whose digests the artifact does not contain.
        disk: Interface to the file system. Defaults to the real one.
        say: Called with progress messages for the user.
        on_step: Called with the figures of each step.

    Returns:
        The result, or None if an earlier run had already written exactly this output.

    Raises:
        SourceError: The source is not the artifact's source.
        ArtifactError: The artifact is damaged, or contains NaN or Inf.
        DataError: The text cannot be used.
        UsageError: An argument is not valid, the artifact was already tuned, or it does not predict tokens.
        DivergenceError: The loss or a gradient is NaN or Inf, or the training diverges.
        AdapterError: A checkpoint was damaged while the tuning ran.
        VerificationError: The result is not better on the held-out text.
        TargetError: `out` exists, cannot be written, or the disk is full.
    """
    disk = disk or Disk()
    source = find_folder(job.source)
    for folder in (job.artifact, source):
        refuse_nested(folder, job.out)
    if not os.path.lexists(work_folder(job.out)):
        check_target(job.out, replace=force, kind=ARTIFACT)
    device = chosen_device(settings.device)
    with open_artifact(job.artifact) as artifact:
        check_digests(artifact.structure)
        if "tuning" in artifact.manifest.recipe:
            raise UsageError(f"{job.artifact}: was already tuned. Tune the original artifact instead")
        check_predicts_tokens(job.artifact, trust_remote_code=settings.trust_remote_code)
        source_digest = check_whole_source(artifact, source, trust=trust_source)
        tokenizer = load_tokenizer(job.artifact, trust_remote_code=settings.trust_remote_code)
        needed = settings.steps * settings.batch_size + settings.held_out
        everything = read_windows(list(job.data), tokenizer, length=settings.seq_len, n_needed=needed)
        windows, held_out = everything.hold_out(settings.held_out)
        record = _record(settings, everything, cached=job.teacher_cache is not None)
        ready = _Ready(job, settings, artifact, source, source_digest, windows, held_out, record, device, disk, say)
        with Staging.begin(job.out, ready.fingerprint(), disk=disk, replace=force, restart=restart) as staging:
            if staging.sealed_before:
                return None
            refuse_full_disk(job.out, sum(file.nbytes for file in artifact.manifest.files.values()), disk)
            folder = checkpoint_folder(staging.work)
            if restart:
                disk.remove_folder(folder)
            disk.make_folder(folder)
            with naming_weights(artifact):
                return ready.tune(staging, folder, accept_worse=accept_worse, use_best=use_best, on_step=on_step)


@dataclass(frozen=True, slots=True)
class _Ready:
    """A tuning whose inputs are complete and checked."""

    job: TuningJob
    settings: TuningSettings
    artifact: Artifact
    source: Path
    source_digest: str
    windows: TokenWindows
    held_out: TokenWindows
    record: JsonObject
    device: torch.device
    disk: Disk
    say: Callable[[str], None]

    def fingerprint(self) -> str:
        """Return a digest of everything that determines the output bytes."""
        manifest, record = self.artifact.manifest.to_bytes(), strict_json.dumps(self.record).encode()
        return xxh3(manifest + self.source_digest.encode() + record)

    def tune(
        self,
        staging: Staging,
        folder: Path,
        *,
        accept_worse: bool,
        use_best: bool,
        on_step: Callable[[StepLine], None],
    ) -> TuningResult:
        """Run the remaining steps, round and judge the result, and write the output. `folder` has the checkpoints."""
        teacher = self._teacher()
        tunable = self._student(teacher)
        student = split_head(tunable.model)
        aside = HeldOut(self.held_out, teacher, self.settings.batch_size, self.device)
        checkpoints = CheckpointFolder(folder, keep=self.settings.steps + 1, disk=self.disk)
        run = TuningRun(tunable, student, teacher, self.windows, aside, self.settings, checkpoints)
        before = aside.measure(student)
        self.say(f"{len(self.windows)} windows of {self.settings.seq_len} tokens to tune on")
        self.say(f"{len(self.held_out)} held-out windows: {_figures(before)}")
        first = run.resume(lambda damaged: self.say(f"{damaged}. Its steps are repeated"))
        if first:
            self.say(f"resuming after step {first}")
        if use_best and not first:
            raise UsageError(f"{folder}: contains no checkpoint of a tuning that could be written")
        if not use_best:
            run.run(first, before, on_step)
        best, tuned = run.bring_back_best()
        replacements = tunable.rounded(self.artifact)
        after = aside.measure(student)
        if not accept_worse and (best == 0 or not after.mean("kl") < before.mean("kl")):
            raise VerificationError(
                f"{self.job.out}: not written, because tuning did not improve it: on held-out text {_figures(after)}, "
                f"before {_figures(before)}. Use more text or other settings (with ",
                Option("restart", True),
                "), or write it with ",
                Option("accept_worse", True),
            )
        recipe = {**self.artifact.manifest.recipe, "tuning": self.record}
        structure = self.artifact.structure
        rewrite(structure, staging, replaced_by(structure, replacements), recipe=recipe)
        n_tokens = best * self.settings.batch_size * self.settings.seq_len
        return TuningResult(self.job.out, best, before, tuned, after, n_tokens, peak_nbytes(self.device))

    def _load_teacher(self) -> LiveTeacher:
        trust = self.settings.trust_remote_code
        return LiveTeacher(load_checkpoint(self.source, device=self.device, dtype=DTYPE, trust_remote_code=trust))

    def _teacher(self) -> Teacher:
        """Return the 16-bit model, mapped. With a cache, fill the cache and release the model."""
        if self.job.teacher_cache is None:
            return self._load_teacher()
        settings, windows = self.settings, self.windows
        facts: JsonObject = {
            "source": self.source_digest,
            "data_sha256": windows.sha256,
            "seq_len": settings.seq_len,
            "top_k": settings.top_k,
            "dtype": str(DTYPE),
            "tokens_xxh3": xxh3(np.concatenate([windows.ids, self.held_out.ids])),
        }
        cache = TeacherCache(self.job.teacher_cache, facts, length=settings.seq_len, k=settings.top_k, disk=self.disk)
        used = {int(row) for step in range(settings.steps) for row in rows_of_step(step, len(windows), settings)}
        needed = {int(windows.numbers[row]): windows.ids[row] for row in sorted(used)}
        needed |= dict(zip(self.held_out.numbers.tolist(), self.held_out.ids, strict=True))
        missing = cache.missing(np.array(list(needed), np.int64))
        if len(missing):
            self.say(
                f"{cache.folder}: computing the 16-bit model's predictions for {len(missing)} of {len(needed)} windows"
            )
            cache.begin()
            teacher = self._load_teacher()
            for start in range(0, len(missing), settings.batch_size):
                numbers = missing[start : start + settings.batch_size]
                rows = np.stack([needed[int(number)] for number in numbers]).astype(np.int64)
                cache.write(numbers, teacher.top_k(numbers, torch.from_numpy(rows).to(self.device), settings.top_k))
        return cache

    def _student(self, teacher: Teacher) -> TunableModel:
        path, settings = self.job.artifact, self.settings
        model = load_model(path, device=self.device, dtype=DTYPE, trust_remote_code=settings.trust_remote_code)
        largest = int(max(self.windows.ids.max(), self.held_out.ids.max()))
        _check_fits(model, path, largest_token=largest, length=settings.seq_len)
        tunable = make_tunable(model, self.artifact)
        if isinstance(teacher, LiveTeacher):
            share_kept_tensors(tunable, teacher.model)
        if settings.gradient_checkpointing:
            checkpoint_gradients(model)
        return tunable


def _record(settings: TuningSettings, windows: TokenWindows, *, cached: bool) -> JsonObject:
    """Return the manifest's description of the tuning: everything that its bytes depend on except the machine."""
    chosen = settings.binding()
    if not cached:
        del chosen["top_k"]
    return {
        "method": "block scales and norms by KL to the source",
        **chosen,
        "tokens": settings.steps * settings.batch_size * settings.seq_len,
        "data_sha256": windows.sha256,
        "scale_change": LARGEST_CHANGE,
        "dtype": str(DTYPE).removeprefix("torch."),
        "versions": {
            "qformat": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def checkpoint_gradients(model: PreTrainedModel) -> None:
    """Recompute activations in backward. Only the layers are in training mode; their submodules drop nothing out."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def _check_fits(model: PreTrainedModel, path: Path, *, largest_token: int, length: int) -> None:
    config = model.config.get_text_config()
    if largest_token >= config.vocab_size:
        raise UsageError(
            f"{path}: its tokenizer returns token {largest_token}, but the vocabulary has {config.vocab_size} tokens"
        )
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and length > context:
        raise UsageError(f"{path}: has a context of {context} tokens, but windows have {length}. Use shorter windows")


def _figures(closeness: Closeness) -> str:
    """Format the figures of held-out windows."""
    kl, error = closeness.mean("kl"), closeness.error("kl")
    return f"KL {kl:.4f} ± {error:.4f}, top-1 {closeness.mean('top1'):.1%}, loss {closeness.mean('loss'):.4f}"
