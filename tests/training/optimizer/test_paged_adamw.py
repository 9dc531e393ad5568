"""PagedAdamW against torch.optim.AdamW, byte for byte, on an artificial device with queued copies and a budget."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from qformat.errors import UsageError
from qformat.training.optimizer.page_layout import PAGE_GRAIN_NBYTES
from qformat.training.optimizer.paged_adamw import PagedAdamW
from tests.rounding import rounds_like
from tests.training.optimizer.artificial_device import ArtificialDevice

SHAPES = [(1,), (7,), (64, 33), (129, 65), (5, 7, 11), (4096,), (3, 4001), (16, 16), (9001,)]
N_STEPS = 5
UPDATES: tuple[Literal["fused", "single"], ...] = ("fused", "single")
PAGE = PAGE_GRAIN_NBYTES


def parameters(dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=random).to(dtype)) for shape in shapes]
    params.append(nn.Parameter(torch.randn(40, 30, generator=random).to(dtype).t()))  # not contiguous
    return params


def set_gradients(params: Sequence[Tensor], step: int) -> None:
    random = torch.Generator().manual_seed(100 + step)
    for number, param in enumerate(params):
        # Use the memory order of the parameter, as autograd does: torch's fused update ignores strides.
        gradient = torch.empty_like(param).copy_(torch.randn(param.shape, generator=random))
        # One parameter gets its first gradient late, and one has no gradient in a later step.
        param.grad = None if (number, step) in {(2, 0), (4, 2)} else gradient


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": params[:4], "weight_decay": 0.1},
        {"params": params[4:], "weight_decay": 0.0, "lr": 3e-3, "betas": (0.8, 0.99)},
    ]


def torch_adamw(params: list[nn.Parameter], update: str, **settings: Any) -> torch.optim.AdamW:
    path: dict[str, Any] = {"fused": True} if update == "fused" else {"foreach": False}
    return torch.optim.AdamW(groups(params), **{"lr": 1e-2, **settings}, **path)


def paged(params: list[nn.Parameter], update: Any, **settings: Any) -> PagedAdamW:
    options = {"lr": 1e-2, "page_nbytes": PAGE, "device": ArtificialDevice(), **settings}
    return PagedAdamW(groups(params), update=update, **options)


def train(
    optimizer: torch.optim.Optimizer,
    params: Sequence[Tensor],
    steps: range = range(N_STEPS),
    after_step: Callable[[], None] = lambda: None,
) -> None:
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in steps:
        set_gradients(params, step)
        optimizer.step()
        schedule.step()
        after_step()


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_same(
    ours: PagedAdamW, our_params: list[nn.Parameter], peer: torch.optim.Optimizer, params: list[nn.Parameter]
) -> None:
    """Compare bytes, because NaN differs from itself. With float16, torch also produces NaN."""
    for mine, theirs in zip(our_params, params, strict=True):
        assert as_bytes(mine) == as_bytes(theirs)
    states = ours.state_dict()["state"]
    expected = peer.state_dict()["state"]
    assert states.keys() == expected.keys()
    for number, state in expected.items():
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert as_bytes(states[number][name]) == as_bytes(state[name]), (number, name)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("budget", [0, 3 * PAGE, "auto"])
@pytest.mark.parametrize("page_nbytes", [PAGE, 5 * PAGE, 2**22])
def test_the_result_is_byte_identical_to_torch(update: Any, dtype: torch.dtype, budget: Any, page_nbytes: int) -> None:
    params, our_params = parameters(dtype), parameters(dtype)
    peer, ours = torch_adamw(params, update), paged(our_params, update, page_budget=budget, page_nbytes=page_nbytes)
    train(peer, params)
    train(ours, our_params)
    assert_same(ours, our_params, peer, params)


def test_a_gradient_is_converted_to_the_memory_order_of_the_parameter() -> None:
    params, our_params = parameters(), parameters()
    peer, ours = torch_adamw(params, "single"), paged(our_params, "single")
    for chosen in (params, our_params):
        set_gradients(chosen, 1)
        gradient = chosen[-1].grad
        assert gradient is not None
        chosen[-1].grad = gradient.contiguous()
        assert chosen[-1].grad.stride() != chosen[-1].stride()
    peer.step()
    ours.step()
    assert_same(ours, our_params, peer, params)


@pytest.mark.parametrize("update", UPDATES)
def test_paging_out_between_steps_changes_nothing(update: Any) -> None:
    params, our_params = parameters(), parameters()
    peer, ours = torch_adamw(params, update), paged(our_params, update, page_budget=8 * PAGE)
    train(peer, params)
    train(ours, our_params, after_step=ours.page_out)
    assert_same(ours, our_params, peer, params)
    assert ours.paging_statistics().resident == 0
    assert ours.paging_statistics().evictions > 0


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("budget", [0, 4 * PAGE, "auto"])
def test_a_state_dict_continues_in_torch_and_comes_back(update: Any, budget: Any) -> None:
    params, our_params = parameters(), parameters()
    peer, ours = torch_adamw(params, update), paged(our_params, update, page_budget=budget)
    train(peer, params, range(2))
    train(ours, our_params, range(2))
    back_in_torch = torch_adamw(our_params, update)
    back_in_torch.load_state_dict(copy.deepcopy(ours.state_dict()))
    train(peer, params, range(2, 4))
    train(back_in_torch, our_params, range(2, 4))
    other = paged(our_params, update, page_budget=PAGE, page_nbytes=3 * PAGE)
    other.load_state_dict(back_in_torch.state_dict())
    train(peer, params, range(4, 6))
    train(other, our_params, range(4, 6))
    assert_same(other, our_params, peer, params)


def test_loading_a_state_dict_takes_no_device_memory() -> None:
    params = parameters()
    saved = paged(params, "fused")
    train(saved, params)
    device = ArtificialDevice(budget_nbytes=0)
    paged(params, "fused", device=device).load_state_dict(saved.state_dict())
    assert device.n_allocations == 0


@pytest.mark.parametrize("budget_pages", [0, 1, 7, 1000])
def test_the_bytes_moved_match_a_fixed_resident_set(budget_pages: int) -> None:
    params = [nn.Parameter(torch.zeros(PAGE // 8 * 20))]  # two float32 moments: 20 pages
    optimizer = PagedAdamW(params, page_budget=budget_pages * PAGE, page_nbytes=PAGE, device=ArtificialDevice())
    n_resident = min(budget_pages, 20)
    for step in range(1, 6):
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
        statistics = optimizer.paging_statistics()
        assert (statistics.pages, statistics.resident) == (20, n_resident)
        assert statistics.hits == step * n_resident
        assert statistics.misses == step * (20 - n_resident)
        assert statistics.nbytes_to_device == statistics.nbytes_to_host == step * (20 - n_resident) * PAGE


def test_small_parameters_share_a_page() -> None:
    params = [nn.Parameter(torch.zeros(10)) for _ in range(50)]
    optimizer = PagedAdamW(params, page_nbytes=PAGE, device=ArtificialDevice())
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.paging_statistics().pages == 1


def test_a_step_needs_at_most_budget_ring_and_workspace() -> None:
    device = ArtificialDevice()
    params = [nn.Parameter(torch.zeros(PAGE // 8 * 20))]
    optimizer = PagedAdamW(params, page_budget=4 * PAGE, page_nbytes=PAGE, device=device)
    for _ in range(3):
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
    assert device.peak_nbytes == 7 * PAGE
    assert device.used_nbytes == 4 * PAGE


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("state_bits", [32, 8])
def test_the_bytes_are_the_same_whichever_allocation_fails(update: Any, state_bits: Any) -> None:
    """A step that raises has changed nothing, and succeeds when it is repeated."""
    expected_params = parameters()
    expected = paged(expected_params, update, state_bits=state_bits)
    train(expected, expected_params)
    for failing in range(0, 40, 3):
        device = ArtificialDevice(failing={failing, failing + 1, failing + 5})
        params = parameters()
        optimizer = paged(params, update, state_bits=state_bits, page_budget=6 * PAGE, device=device)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(N_STEPS):
            set_gradients(params, step)
            before = [as_bytes(param) for param in params]
            for _ in range(4):
                try:
                    optimizer.step()
                    break
                except torch.OutOfMemoryError:
                    assert before == [as_bytes(param) for param in params]
            else:
                pytest.fail("four steps in a row found no memory")
            schedule.step()
            if step == 2:
                optimizer.page_out()
        assert [as_bytes(param) for param in params] == [as_bytes(param) for param in expected_params]


def test_a_device_too_small_for_a_page_raises_and_changes_nothing() -> None:
    params = parameters()
    optimizer = paged(params, "fused", device=ArtificialDevice(budget_nbytes=PAGE - 1))
    before = [as_bytes(param) for param in params]
    set_gradients(params, 1)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    assert before == [as_bytes(param) for param in params]


def test_a_budget_that_turns_out_too_large_shrinks() -> None:
    params, expected = parameters(), parameters()
    optimizer = paged(params, "fused", page_budget=50 * PAGE, device=ArtificialDevice(budget_nbytes=9 * PAGE))
    peer = torch_adamw(expected, "fused")
    train(optimizer, params)
    train(peer, expected)
    assert_same(optimizer, params, peer, expected)
    assert 0 < optimizer.paging_statistics().resident < optimizer.paging_statistics().pages


def test_an_automatic_budget_uses_the_unused_memory_of_the_device() -> None:
    params = parameters()
    optimizer = paged(params, "fused", page_budget="auto", device=ArtificialDevice(spare=5 * PAGE + 17))
    train(optimizer, params)
    assert optimizer.paging_statistics().resident == 5


@pytest.mark.parametrize("budget", [0, 3 * PAGE, "auto"])
def test_8_bit_states_give_the_same_bytes_at_any_budget(budget: Any) -> None:
    expected, params = parameters(), parameters()
    train(paged(expected, "fused", state_bits=8), expected)
    train(paged(params, "fused", state_bits=8, page_budget=budget, page_nbytes=2 * PAGE), params)
    assert [as_bytes(param) for param in params] == [as_bytes(param) for param in expected]


def test_8_bit_states_survive_a_state_dict() -> None:
    expected, params = parameters(), parameters()
    whole = paged(expected, "fused", state_bits=8)
    train(whole, expected, range(2))
    train(whole, expected, range(2, 4))
    first = paged(params, "fused", state_bits=8)
    train(first, params, range(2))
    second = paged(params, "fused", state_bits=8, page_budget=0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, params, range(2, 4))
    assert [as_bytes(param) for param in params] == [as_bytes(param) for param in expected]


def test_8_bit_states_take_a_quarter_of_the_bytes() -> None:
    param = nn.Parameter(torch.zeros(2**20))
    param.grad = torch.ones_like(param)
    pages = {}
    for bits in (8, 32):
        optimizer = PagedAdamW([param], state_bits=bits, page_nbytes=PAGE, device=ArtificialDevice())  # type: ignore[arg-type]
        optimizer.step()
        pages[bits] = optimizer.paging_statistics().pages
    # Each moment has half of the bytes of a page. A block of 256 elements takes 260 bytes in 8 bit, or 1024 in 32 bit.
    assert pages == {bits: math.ceil(2**12 * nbytes / (PAGE // 2)) for bits, nbytes in ((8, 260), (32, 1024))}


def test_8_bit_states_train_as_close_to_32_bit_as_bitsandbytes() -> None:
    def eight_of_bitsandbytes(params: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(params, lr=3e-3)
        return optimizer

    ours, peers, exact = (
        losses_of(make)
        for make in (
            lambda params: PagedAdamW(params, lr=3e-3, state_bits=8, page_nbytes=PAGE),
            eight_of_bitsandbytes,
            lambda params: PagedAdamW(params, lr=3e-3, state_bits=32, page_nbytes=PAGE),
        )
    )
    # Both round the states equally often and to the same number of bits, so the losses deviate by similar errors.
    assert rounds_like(ours, peers, exact)
    assert exact[-1] < exact[0]


def losses_of(make: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]) -> Tensor:
    """Train a small network to imitate another one, and return the losses of the steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 8))
    target = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8))
    x = torch.randn(512, 64)
    optimizer = make(model.parameters())
    with torch.no_grad():
        y = target(x)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize(
    "wrong", [{"state_bits": 16}, {"update": "foreach"}, {"page_budget": -1}, {"lr": -1.0}], ids=str
)
def test_invalid_settings_are_rejected(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        PagedAdamW([nn.Parameter(torch.zeros(3))], **wrong)


def test_states_of_another_kind_or_shape_are_rejected_before_any_change() -> None:
    params = parameters()
    optimizer = paged(params, "fused")
    train(optimizer, params)
    before = optimizer.state_dict()
    wrong = copy.deepcopy(before)
    wrong["state"][1]["exp_avg"] = torch.zeros(3)
    with pytest.raises(UsageError, match="parameter 1: the saved state exp_avg does not fit"):
        optimizer.load_state_dict(wrong)
    eight = paged(params, "fused", state_bits=8)
    with pytest.raises(UsageError, match="32-bit states into one with state_bits=32"):
        eight.load_state_dict(before)
    after = optimizer.state_dict()
    for number, state in before["state"].items():
        assert as_bytes(state["exp_avg"]) == as_bytes(after["state"][number]["exp_avg"])


def test_it_cannot_be_pickled() -> None:
    with pytest.raises(UsageError, match="state_dict"):
        copy.deepcopy(PagedAdamW([nn.Parameter(torch.zeros(3))]))
