"""KL and its gradient in chunks, compared with float64 over whole logits, for all tokens and for the k most likely."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qformat.model.checkpoint import load_checkpoint
from qformat.quality.output_head import SplitModel, split_head
from qformat.quality.tuning.distillation import DenseTarget, Target, TopKTarget, distil, measure
from tests.rounding import kl_error, log_softmax_error, rounds_like, sum_error

VOCABULARY = 50


def linear_model(*, seed: int = 0, chunk_nbytes: int = 16 << 20) -> tuple[nn.ModuleDict, SplitModel]:
    """Return a float32 model of an embedding and a head: its hidden states are the embeddings."""
    torch.manual_seed(seed)
    parts = nn.ModuleDict({"body": nn.Embedding(VOCABULARY, 12), "head": nn.Linear(12, VOCABULARY, bias=False)})
    return parts, SplitModel(parts["body"], parts["head"], VOCABULARY, chunk_nbytes)


def target_of(teacher: SplitModel, ids: Tensor, k: int | None) -> Target:
    with torch.no_grad():
        hidden = teacher.body(ids).flatten(0, 1)
        if k is None:
            return DenseTarget(hidden, teacher.head)
        top = torch.log_softmax(teacher.head(hidden), -1).topk(k, -1)
    return TopKTarget(top.values, top.indices)


def kl_of_all(logits: Tensor, teacher: Tensor, k: int | None) -> Tensor:
    """Return the KL [N], differentiable, by torch's own function; with k, of k + 1 outcomes."""
    log_p, log_q = torch.log_softmax(teacher, -1), torch.log_softmax(logits, -1)
    if k is not None and k < teacher.shape[-1]:
        kept = log_p.topk(k, -1).indices
        rest = torch.ones_like(log_p).scatter(-1, kept, 0).bool()

        def bucketed(log: Tensor) -> Tensor:
            others = torch.logsumexp(log.masked_fill(~rest, -torch.inf), -1, keepdim=True)
            return torch.cat([log.gather(-1, kept), others], -1)

        log_p, log_q = bucketed(log_p), bucketed(log_q)
    return functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def error_of_kl(logits: Tensor, teacher: Tensor, k: int | None, off: float) -> Tensor:
    """Return how far a KL [N] in float32 may lie from exact; with k, of k + 1 outcomes. off: of the logits.

    The probability r of all other outcomes is 1 less a sum of k. Its error d moves r (log r - log s) by d times the
    derivative, for either model. Where there is no other outcome, r is that error alone, and counts as 1e-9 at least.
    """
    whole = kl_error(teacher, logits, off)
    if k is None:
        return whole
    d, e = (log_softmax_error(x, off)[..., 0] + sum_error(k + 4) for x in (teacher, logits))
    if k == logits.shape[-1]:
        return whole + d * (torch.maximum(d, e) / 1e-9).log()
    kept = teacher.topk(k, -1).indices
    r, s = (1 - torch.softmax(x.double(), -1).gather(-1, kept).sum(-1) for x in (teacher, logits))
    return whole + d * ((r / s).log().abs() + 1) + e * r / s


def error_of_head(hidden: Tensor, head: nn.Module) -> float:
    """Return how far a float32 logit may be from the exact one."""
    weight = head.weight
    assert isinstance(weight, Tensor)
    return float(sum_error(weight.shape[1]) * (hidden.detach().abs() @ weight.detach().abs().t()).max())


KINDS = {"all": None, "k": 8, "every one of k": VOCABULARY}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_nbytes", [16 << 20, 1200])
def test_the_gradient_is_that_of_the_kl_for_all_chunk_sizes(kind: str, chunk_nbytes: int) -> None:
    teacher_parts, teacher = linear_model(seed=1, chunk_nbytes=chunk_nbytes)
    student_parts, student = linear_model(seed=2, chunk_nbytes=chunk_nbytes)
    student_parts["head"].requires_grad_(False)
    ids = torch.randint(0, VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(3))
    assert (len(student.chunks(26)) > 3) == (chunk_nbytes == 1200)
    k = KINDS[kind]
    kl = distil(student, ids, target_of(teacher, ids, k))
    found = student_parts["body"].weight.grad.clone()
    (peer, _, _), (exact, exact_kl, error) = (
        by_autograd(student_parts.to(dtype), teacher_parts.to(dtype), ids, k)
        for dtype in (torch.float32, torch.float64)
    )
    assert abs(kl - exact_kl) <= error
    assert rounds_like(found, peer, exact)


def by_autograd(
    student: nn.ModuleDict, teacher: nn.ModuleDict, ids: Tensor, k: int | None
) -> tuple[Tensor, float, float]:
    """Return the gradient of the mean KL by what is embedded, the KL, and how far it may lie from exact in float32."""
    student.zero_grad()
    hidden, other = (parts["body"](ids).flatten(0, 1) for parts in (student, teacher))
    logits, whole = student["head"](hidden), teacher["head"](other).detach()
    kl = kl_of_all(logits, whole, k).mean()
    kl.backward()
    off = max(error_of_head(hidden, student["head"]), error_of_head(other, teacher["head"]))
    return (
        student["body"].weight.grad.clone(),
        float(kl.detach()),
        float(error_of_kl(logits.detach(), whole, k, off).mean()),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_figures_of_windows_are_those_of_whole_logits(kind: str) -> None:
    teacher_parts, teacher = linear_model(seed=1, chunk_nbytes=1200)  # 6 positions: chunks cross windows
    student_parts, student = linear_model(seed=2, chunk_nbytes=1200)
    ids = torch.randint(0, VOCABULARY, (3, 13), generator=torch.Generator().manual_seed(3))
    k = KINDS[kind]
    found = measure(student, ids, target_of(teacher, ids, k))
    with torch.no_grad():
        hidden, other = (parts.double()["body"](ids) for parts in (student_parts, teacher_parts))
        off = max(error_of_head(hidden, student_parts["head"]), error_of_head(other, teacher_parts["head"]))
        logits, whole = student_parts["head"](hidden), teacher_parts["head"](other)
        kl, error = kl_of_all(logits, whole, k), error_of_kl(logits, whole, k, off)
        agrees = (logits.argmax(-1) == whole.argmax(-1)).double().mean(1)
        loss = -torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    assert ((found.kl - kl.mean(1)).abs() <= error.mean(1)).all()
    assert torch.equal(found.top1, agrees)
    assert ((found.loss - loss.mean(1)).abs() <= log_softmax_error(logits, off).mean((1, 2))).all()
    assert found.error("kl") == pytest.approx(float(found.kl.std() / 3**0.5))


@pytest.mark.parametrize("k", [None, VOCABULARY])
def test_equal_models_have_no_kl_and_no_gradient(k: int | None) -> None:
    parts, model = linear_model()
    ids = torch.arange(20).view(2, 10)
    kl = distil(model, ids, target_of(model, ids, k))
    hidden = parts["body"](ids).detach().flatten(0, 1)
    logits, off = parts["head"](hidden).detach(), error_of_head(hidden, parts["head"])
    assert abs(kl) <= error_of_kl(logits, logits, k, off).mean()
    # Each position has a token of its own, whose gradient is the sum of (q - p) times the head's rows over 20.
    errors = 2 * log_softmax_error(logits, off) * torch.softmax(logits, -1) @ parts["head"].weight.abs().double() / 20
    assert (parts["body"].weight.grad[:20].abs() <= errors).all()
    assert not parts["body"].weight.grad[20:].any()


def test_a_llama_is_split_at_its_output_layer(source: Path) -> None:
    model = load_checkpoint(source, device="cpu")
    split = split_head(model)
    ids = torch.arange(30).view(2, 15)
    with torch.no_grad():
        assert torch.equal(split.head(split.body(ids)), model(input_ids=ids).logits)
        assert split.body(ids).shape[-1] == 64
    assert split.vocabulary == model.config.vocab_size


def test_a_model_that_caps_its_logits_is_not_split() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 40, "final_logit_softcapping": 0.01}  # fmt: skip
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**sizes)).eval()
    split = split_head(model)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(split.head(split.body(ids)), model(input_ids=ids).logits)
        assert split.body(ids).shape[-1] == 40
