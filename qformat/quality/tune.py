"""`tune`: an artifact with the same codes and better scales and norms, by the 16-bit model's own predictions.

    artifact ─┐                         ┌─ held out: measured before and after
    source ───┼─► checked by digests ─► tokens ─► steps (checkpoints in OUT.partial/) ─► rounded ─► rewritten as OUT
    data ─────┘                         └─ trained on

OUT appears whole or not at all; the same command goes on where it was stopped, and ends in the same bytes.
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

import qformat
from qformat import strict_json
from qformat.artifact.digests import xxh3
from qformat.artifact.disk import Disk
from qformat.artifact.manifest import JsonObject
from qformat.artifact.reader import Artifact, open_artifact
from qformat.artifact.rewrite import rewrite_artifact
from qformat.artifact.staging import Staging, check_target, refuse_full_disk, refuse_nested, work_folder
from qformat.errors import UsageError, VerificationError
from qformat.model.checkpoint import find_folder, load_checkpoint
from qformat.model.load import chosen_device, load_model, load_tokenizer
from qformat.model.memory import peak_nbytes
from qformat.quality.distillation import Closeness
from qformat.quality.output_head import split_head
from qformat.quality.teacher import LiveTeacher, Teacher, TeacherCache
from qformat.quality.tunable import LARGEST_CHANGE, TunableModel, make_tunable, share_kept_tensors
from qformat.quality.tuning_settings import TuningSettings
from qformat.quality.tuning_source import check_whole_source
from qformat.quality.tuning_steps import HeldOut, StepLine, TuningRun, checkpoint_folder, rows_of_step
from qformat.quality.windows import TokenWindows, read_windows
from qformat.training.checkpoints import CheckpointFolder

DTYPE = torch.bfloat16
"""Of the arithmetic; what is trained, and the losses, are float32."""


@dataclass(frozen=True, slots=True)
class TuningJob:
    """What is tuned towards what, on which text, and where to. teacher_cache: keep the 16-bit model's word there.

    source: a folder, or owner/name that the Hub's cache has. data: see `qformat.quality.windows.read_windows`.
    """

    artifact: Path
    source: Path | str
    data: Sequence[str]
    out: Path
    teacher_cache: Path | None = None


@dataclass(frozen=True, slots=True)
class TuningResult:
    """What came out, on held-out windows: of the artifact before, of the tuned one before its rounding, and after.

    step: of the checkpoint that was best and is written. kl of TopKTarget where the teacher was cached.
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
    """Tune an artifact and write the result to `job.out`; None if an earlier run had finished this very output.

    force: replace an artifact of that name. restart: drop what an interrupted run left. accept_worse: write it even
    where held-out text says that it did not get better. use_best: train no further, write the best checkpoint of an
    interrupted run. trust_source: take tensors of the source on trust whose digests the artifact does not know.
    say: is told what happens, in sentences.

    Raises: SourceError for a source that is not the artifact's; ArtifactError, DataError, UsageError for what cannot be
    used; DivergenceError; VerificationError where it did not get better; TargetError. On any error nothing stands under
    `out` that was not there before, and the same call continues where this one stopped.
    """
    disk = disk or Disk()
    source = find_folder(job.source)
    for folder in (job.artifact, source):
        refuse_nested(folder, job.out)
    if not os.path.lexists(work_folder(job.out)):
        check_target(job.out, replace=force)
    device = chosen_device(settings.device)
    with open_artifact(job.artifact) as artifact:
        if "tuning" in artifact.manifest.recipe:
            raise UsageError(f"{job.artifact}: was tuned already. Tune the artifact that it was made from")
        source_digest = check_whole_source(artifact, source, trust=trust_source)
        tokenizer = load_tokenizer(job.artifact, trust_remote_code=settings.trust_remote_code)
        everything = read_windows(list(job.data), tokenizer, length=settings.seq_len)
        windows, held_out = everything.hold_out(settings.held_out)
        record = _record(settings, everything, cached=job.teacher_cache is not None)
        fingerprint = _fingerprint(artifact, source_digest, record)
        nbytes = sum(file.nbytes for file in artifact.manifest.files.values())
        with Staging.begin(job.out, fingerprint, disk=disk, replace=force, restart=restart) as staging:
            if staging.sealed_before:
                return None
            refuse_full_disk(job.out, nbytes)
            checkpoints = CheckpointFolder(
                checkpoint_folder(staging.work), keep=settings.steps + 1, disk=disk,
                to_continue="run the same command again: it continues",
            )  # fmt: skip
            if restart:
                disk.remove_folder(checkpoints.output)
            disk.make_folder(checkpoints.output)
            teacher = _teacher(job, settings, source, source_digest, windows, held_out, device, disk, say)
            tunable = _student(job.artifact, artifact, teacher, settings, device)
            _check_vocabulary(tunable.model, everything, job.artifact)
            student = split_head(tunable.model)
            aside = HeldOut(held_out, teacher, settings.batch_size, device)
            run = TuningRun(tunable, student, teacher, windows, aside, settings, checkpoints)
            before = aside.measure(student)
            say(f"{len(windows)} windows of {settings.seq_len} tokens to tune on")
            say(f"{len(held_out)} windows held out: {_figures(before)}")
            first = run.resume()
            if first:
                say(f"going on after step {first}")
            if not use_best:
                run.run(first, before, on_step)
            elif not first:
                raise UsageError(f"{checkpoints.output}: holds no checkpoint of a tuning that could be written")
            best, tuned = run.bring_back_best()
            replacements = tunable.rounded(artifact)
            after = aside.measure(student)
            if not accept_worse and (best == 0 or not after.mean("kl") < before.mean("kl")):
                raise VerificationError(
                    f"{job.out}: not written, since it did not get better: on held-out text {_figures(after)}, before "
                    f"{_figures(before)}. Give more text or other settings (with --restart), or write it with "
                    "--accept-worse"
                )
            rewrite_artifact(artifact, staging, replacements, recipe={**artifact.manifest.recipe, "tuning": record})
    n_tokens = best * settings.batch_size * settings.seq_len
    return TuningResult(job.out, best, before, tuned, after, n_tokens, peak_nbytes(device))


def _record(settings: TuningSettings, windows: TokenWindows, *, cached: bool) -> JsonObject:
    """Return what the manifest tells about the tuning: all that its bytes depend on, but for the machine."""
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
            "qformat": qformat.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _fingerprint(artifact: Artifact, source_digest: str, record: JsonObject) -> str:
    return xxh3(artifact.manifest.to_bytes() + source_digest.encode() + strict_json.dumps(record).encode())


def _teacher(
    job: TuningJob,
    settings: TuningSettings,
    source: Path,
    source_digest: str,
    windows: TokenWindows,
    held_out: TokenWindows,
    device: torch.device,
    disk: Disk,
    say: Callable[[str], None],
) -> Teacher:
    """Return the 16-bit model, mapped; or, with a cache, fill that first and let go of the model."""

    def load() -> LiveTeacher:
        return LiveTeacher(
            load_checkpoint(source, device=device, dtype=DTYPE, trust_remote_code=settings.trust_remote_code)
        )

    if job.teacher_cache is None:
        return load()
    facts: JsonObject = {
        "source": source_digest,
        "data_sha256": windows.sha256,
        "seq_len": settings.seq_len,
        "top_k": settings.top_k,
        "dtype": str(DTYPE),
        "tokens_xxh3": xxh3(np.concatenate([windows.ids, held_out.ids])),
    }
    cache = TeacherCache(job.teacher_cache, facts, length=settings.seq_len, k=settings.top_k, disk=disk)
    used = {int(row) for step in range(settings.steps) for row in rows_of_step(step, len(windows), settings)}
    needed = {int(windows.numbers[row]): windows.ids[row] for row in sorted(used)}
    needed |= dict(zip(held_out.numbers.tolist(), held_out.ids, strict=True))
    missing = cache.missing(np.array(list(needed), np.int64))
    if len(missing):
        say(f"{cache.folder}: the 16-bit model's word on {len(missing)} of {len(needed)} windows is computed first")
        cache.begin()
        teacher = load()
        for start in range(0, len(missing), settings.batch_size):
            numbers = missing[start : start + settings.batch_size]
            ids = torch.from_numpy(np.stack([needed[int(number)] for number in numbers]).astype(np.int64)).to(device)
            cache.write(numbers, teacher.top_k(numbers, ids, settings.top_k))
    return cache


def _student(
    path: Path, artifact: Artifact, teacher: Teacher, settings: TuningSettings, device: torch.device
) -> TunableModel:
    model = load_model(path, device=device, dtype=DTYPE, trust_remote_code=settings.trust_remote_code)
    tunable = make_tunable(model, artifact)
    if isinstance(teacher, LiveTeacher):
        share_kept_tensors(tunable, teacher.model)
    if settings.gradient_checkpointing:
        checkpoint_gradients(model)
    return tunable


def checkpoint_gradients(model: PreTrainedModel) -> None:
    """Compute activations again in backward. Only the layers themselves "train": nothing in them drops out."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def _check_vocabulary(model: PreTrainedModel, windows: TokenWindows, path: Path) -> None:
    largest, n = int(windows.ids.max()), int(model.config.get_text_config().vocab_size)
    if largest >= n:
        raise UsageError(f"{path}: its tokenizer gives token {largest}, but the model has a vocabulary of {n}")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and windows.length > context:
        raise UsageError(f"{path}: takes at most {context} tokens, and windows have {windows.length}. Shorten them")


def _figures(closeness: Closeness) -> str:
    """Return the figures of held-out windows in words."""
    kl, error = closeness.mean("kl"), closeness.error("kl")
    return f"KL {kl:.4f} ± {error:.4f}, top-1 {closeness.mean('top1'):.1%}, loss {closeness.mean('loss'):.4f}"
