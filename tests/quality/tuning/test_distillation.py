"""KL and its gradient in chunks: against autograd over whole logits, for all tokens and for the k most likely."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qformat.model.checkpoint import load_checkpoint
from qformat.quality.output_head import SplitModel, split_head
from qformat.quality.tuning.distillation import DenseTarget, Target, TopKTarget, distil, measure


def linear_model(
    vocabulary: int = 50, width: int = 12, *, seed: int = 0, chunk_nbytes: int = 16 << 20
) -> tuple[nn.Module, SplitModel]:
    """Return a model of an embedding and a head, in float32: its hidden states are what is embedded."""
    torch.manual_seed(seed)
    parts = nn.ModuleDict({"body": nn.Embedding(vocabulary, width), "head": nn.Linear(width, vocabulary, bias=False)})
    return parts, SplitModel(parts["body"], parts["head"], vocabulary, chunk_nbytes)


def targets(teacher: SplitModel, ids: Tensor, k: int) -> dict[str, Target]:
    with torch.no_grad():
        hidden = teacher.body(ids).flatten(0, 1)
        top = torch.log_softmax(teacher.head(hidden), -1).topk(k, -1)
    return {"all": DenseTarget(hidden, teacher.head), "k": TopKTarget(top.values, top.indices)}


def kl_of_all(logits: Tensor, teacher: Tensor, k: int | None) -> Tensor:
    """Return the KL [N], differentiable, by torch's own function; with k, of k + 1 outcomes."""
    log_p, log_q = torch.log_softmax(teacher, -1), torch.log_softmax(logits, -1)
    if k is not None:
        kept = log_p.topk(k, -1).indices
        rest = torch.ones_like(log_p).scatter(-1, kept, 0).bool()

        def bucketed(log: Tensor) -> Tensor:
            others = torch.logsumexp(log.masked_fill(~rest, -torch.inf), -1, keepdim=True)
            return torch.cat([log.gather(-1, kept), others], -1)

        log_p, log_q = bucketed(log_p), bucketed(log_q)
    return functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


@pytest.mark.parametrize("kind", ["all", "k"])
@pytest.mark.parametrize("chunk_nbytes", [16 << 20, 1200])
def test_the_gradient_is_that_of_the_kl_however_it_is_cut(kind: str, chunk_nbytes: int) -> None:
    _, teacher = linear_model(seed=1, chunk_nbytes=chunk_nbytes)
    student_parts, student = linear_model(seed=2, chunk_nbytes=chunk_nbytes)
    student_parts["head"].requires_grad_(False)
    ids = torch.randint(0, 50, (2, 13), generator=torch.Generator().manual_seed(3))
    assert (len(student.chunks(26)) > 3) == (chunk_nbytes == 1200)
    kl = distil(student, ids, targets(teacher, ids, 8)[kind])
    found = student_parts["body"].weight.grad.clone()
    student_parts["body"].weight.grad = None
    logits = student.head(student.body(ids)).flatten(0, 1)
    with torch.no_grad():
        whole = teacher.head(teacher.body(ids)).flatten(0, 1)
    expected = kl_of_all(logits, whole, 8 if kind == "k" else None).mean()
    expected.backward()
    assert kl == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(found, student_parts["body"].weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["all", "k"])
def test_the_figures_of_windows_are_those_of_whole_logits(kind: str) -> None:
    _, teacher = linear_model(seed=1, chunk_nbytes=1200)  # 6 positions: chunks cross windows
    _, student = linear_model(seed=2, chunk_nbytes=1200)
    ids = torch.randint(0, 50, (3, 13), generator=torch.Generator().manual_seed(3))
    found = measure(student, ids, targets(teacher, ids, 8)[kind])
    with torch.no_grad():
        logits, whole = student.head(student.body(ids)), teacher.head(teacher.body(ids))
        kl = kl_of_all(logits, whole, 8 if kind == "k" else None).mean(1)
        agrees = (logits.argmax(-1) == whole.argmax(-1)).double().mean(1)
        loss = torch.stack(
            [functional.cross_entropy(row[:-1], window[1:]) for row, window in zip(logits, ids, strict=True)]
        )
    torch.testing.assert_close(found.kl, kl.double(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.top1, agrees)
    torch.testing.assert_close(found.loss, loss.double(), rtol=1e-5, atol=1e-6)
    assert found.error("kl") == pytest.approx(float(kl.double().std() / 3**0.5), rel=1e-4)


def test_equal_models_have_no_kl_and_no_gradient() -> None:
    parts, model = linear_model()
    ids = torch.arange(20).view(2, 10)
    for target in targets(model, ids, 50).values():
        parts["body"].weight.grad = None
        assert abs(distil(model, ids, target)) < 1e-5
        assert float(parts["body"].weight.grad.abs().max()) < 1e-6


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
