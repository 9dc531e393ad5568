"""AdamW with paged optimizer states.

    step()
      │  gather     parameters that have a gradient; new ones get zeros as states     placed_states, page_layout
      │  reserve    workspace and ring of three buffers, before any update            page_store
      ▼
    sweep           resident pages │ streamed pages, three at a time                  page_store, page_device
      │             ┌──────┬──────┐│┌──────┬──────┬──────┬──────┐
      │             │  0   │  1   │││  2   │  3   │  4   │ ...  │
      ▼             └──────┴──────┘│└──────┴──────┴──────┴──────┘
    update          every piece of a parameter in the window                          adamw_updates, eight_bit_update

`page_store` draws the pages, the resident set and the three streaming buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NoReturn, get_args, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from qformat.errors import UsageError
from qformat.training.optimizer.adamw_updates import (
    AdamSettings,
    FusedUpdate,
    Piece,
    SingleUpdate,
    Update,
    in_memory_order,
)
from qformat.training.optimizer.eight_bit_update import MIN_BLOCK_STATES_SIZE, EightBitUpdate
from qformat.training.optimizer.page_device import PageDevice, page_device
from qformat.training.optimizer.page_layout import PAGE_GRAIN_NBYTES, page_nbytes_near
from qformat.training.optimizer.page_store import Budget, PageStore, PagingStatistics, Window
from qformat.training.optimizer.placed_states import PlacedParameter, PlacedStates
from qformat.training.optimizer.saved_states import check_saved, read_states, write_states
from qformat.training.optimizer.state_formats import BlockStates, FloatStates, StateFormat

UpdateName = Literal["fused", "single"]

PAGE_NBYTES = 4 * 2**20
"""Default page size. Copies of this size reach the bandwidth of PCIe, and three buffers take little memory."""

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class PagedAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW with states in host memory and a budget of device memory.

    With 32-bit states (in the parameter's dtype, as in torch), parameters and states are bit-identical to those of
    torch.optim.AdamW, for every budget: to AdamW(fused=True) with `update="fused"`, and to AdamW(foreach=False) with
    `update="single"`. With 8-bit states (`EightBitUpdate`), a moment takes 1.016 bytes per element.

    All parameters must be dense floating-point tensors on one device. A parameter gets its states with its first
    gradient.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_bits: Literal[8, 32] = 32,
        update: UpdateName = "fused",
        page_budget: Budget = "auto",
        page_nbytes: int = PAGE_NBYTES,
        device: PageDevice | None = None,
    ) -> None:
        """Create the optimizer for parameters or parameter groups, as torch.optim.AdamW does.

        Args:
            params: Parameters or parameter groups to train.
            lr: Learning rate.
            betas: Decay rates of the two moments.
            eps: Number added to the denominator.
            weight_decay: Decoupled weight decay.
            state_bits: 32 for states in the parameter's dtype, 8 for 8-bit blocks.
            update: Implementation for 32-bit states, "fused" or "single". Ignored for 8-bit states.
            page_budget: Bytes of device memory for pages between steps. A step needs three more pages and a workspace
                of a few MiB. "auto": the memory that the first step finds unused at the peak so far.
            page_nbytes: Size of a page in bytes, rounded down to a multiple of 8320 (`PAGE_GRAIN_NBYTES`).
            device: Allocates and copies pages. Defaults to the implementation for the parameters' device.

        Raises:
            UsageError: An argument is out of range, or a parameter cannot be updated.
        """
        if state_bits not in (8, 32):
            raise UsageError(f"state_bits is {state_bits!r}, expected 8 or 32")
        if update not in get_args(UpdateName):
            raise UsageError(f"update is {update!r}, expected one of {', '.join(get_args(UpdateName))}")
        if page_budget != "auto" and (not isinstance(page_budget, int) or page_budget < 0):
            raise UsageError(f"page_budget is {page_budget!r}, expected a number of bytes or 'auto'")
        if page_nbytes < PAGE_GRAIN_NBYTES:
            raise UsageError(f"page_nbytes is {page_nbytes}, expected at least {PAGE_GRAIN_NBYTES}")
        self._state_bits = state_bits
        self._update_name: UpdateName = update
        self._update: Update = FusedUpdate() if update == "fused" else SingleUpdate()
        if state_bits == 8:
            self._update = EightBitUpdate()
        self._param_device: torch.device | None = None
        # Include the other settings of torch.optim.AdamW, so that each optimizer can load the groups of the other.
        others = {"amsgrad": False, "maximize": False, "capturable": False, "differentiable": False}
        ours = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, ours | others | _path(update) | {"decoupled_weight_decay": True})
        assert self._param_device is not None
        self._page_nbytes: int = page_nbytes_near(page_nbytes)
        self._page_budget: Budget = page_budget
        self._pages: PageDevice = device if device is not None else page_device(self._param_device)
        self._forget_states()

    @property
    def page_device(self) -> PageDevice:
        """Device that allocates and copies the pages."""
        return self._pages

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as torch does.

        Raises:
            UsageError: The group has settings or parameters that this optimizer does not support.
        """
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except UsageError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient. Return the loss if a closure computes it.

        Raises:
            torch.OutOfMemoryError: Not even one page fits on the device. Nothing was updated, so the step can be
                repeated.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            work = self._gather_work()
            if work:
                self._run(work)
        finally:
            self._placed.forget_gradients()
        return loss

    def page_out(self) -> None:
        """Move all states to host memory. The next step brings back as many pages as the budget holds."""
        self._store.page_out()

    def paging_statistics(self) -> PagingStatistics:
        """Return the counts of paging so far. Loading states resets them."""
        return self._store.statistics()

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the states and groups in host memory.

        32-bit states have the format of torch.optim.AdamW, which can load them. 8-bit states are `exp_avg_codes`, uint8
        in the parameter's shape, and `exp_avg_absmax`, float32 [n_blocks], and the same for `exp_avg_sq`. A block is
        256 elements in the memory order of the parameter.
        """
        saved = super().state_dict()
        saved["state"] = {
            number: self._saved(self._placed[param])
            for number, param in enumerate(self._parameters())
            if param in self._placed
        }
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load states and groups saved by this optimizer or by torch.optim.AdamW. All states are paged out afterwards.

        Raises:
            UsageError: The states do not fit the parameters or `state_bits`. Nothing was changed.
        """
        groups, states = state_dict["param_groups"], state_dict["state"]
        if any(group.get("amsgrad") or group.get("maximize") for group in groups):
            raise UsageError("PagedAdamW does not support amsgrad and maximize, which the saved groups use")
        numbers = [number for group in groups for number in group["params"]]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
            raise UsageError("the saved parameter groups and those of this optimizer have different sizes")
        loaded = {param: states[n] for n, param in zip(numbers, self._parameters(), strict=True) if n in states}
        for number, (param, state) in enumerate(loaded.items()):
            check_saved(state, number, param, self._format_of(param))
        # Leave out the moments, because torch would move all of them to the parameters' device.
        steps = {number: {"step": state["step"]} for number, state in states.items()}
        super().load_state_dict({"state": steps, "param_groups": groups})
        for group in self.param_groups:
            group.update(_path(self._update_name))
        self._store.discard()
        self._forget_states()
        self._place(list(loaded))
        for param, state in loaded.items():
            placed = self._placed[param]
            placed.step.copy_(torch.as_tensor(state["step"]))
            write_states(self._store, param, placed.format, placed.span, state)

    def __getstate__(self) -> NoReturn:
        """Prevent pickling and copying, because pages belong to a device.

        Raises:
            UsageError: Always.
        """
        raise UsageError("PagedAdamW cannot be pickled or copied. Save its state_dict() instead")

    def _parameters(self) -> list[Tensor]:
        """Return all parameters in torch's order of numbering."""
        return [param for group in self.param_groups for param in group["params"]]

    def _check_group(self, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        numbers = {"lr": group["lr"], "eps": group["eps"], "weight_decay": group["weight_decay"]}
        for name, value in numbers.items():
            if isinstance(value, Tensor) or not value >= 0:
                raise UsageError(f"{name} is {value!r}, expected a number of at least 0")
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise UsageError(f"betas are {group['betas']!r}, expected numbers in [0, 1)")
        if group.get("amsgrad") or group.get("maximize"):
            raise UsageError("PagedAdamW does not support amsgrad and maximize")
        dtypes = FLOAT_DTYPES if self._state_bits == 8 else (*FLOAT_DTYPES, torch.float64)
        for number, param in enumerate(group["params"]):
            title = f"parameter {number} of a group, shape {tuple(param.shape)}:"
            if self._param_device is None:
                self._param_device = param.device
            if param.device != self._param_device:
                raise UsageError(
                    f"{title} is on {param.device}, but other parameters are on {self._param_device}. "
                    "Use one optimizer per device"
                )
            if param.dtype not in dtypes:
                raise UsageError(
                    f"{title} dtype is not supported (found {param.dtype}, expected one of "
                    f"{', '.join(map(str, dtypes))})"
                )
            if torch.empty_like(param, device="meta").stride() != param.stride():
                raise UsageError(f"{title} has gaps or overlaps in memory (strides {param.stride()})")

    def _format_of(self, param: Tensor) -> StateFormat:
        if self._state_bits == 32:
            return FloatStates(param.dtype)
        return BlockStates() if param.numel() >= MIN_BLOCK_STATES_SIZE else FloatStates(torch.float32)

    def _forget_states(self) -> None:
        self.state.clear()
        self._placed = PlacedStates(self._page_nbytes)
        self._store = PageStore(self._pages, self._page_nbytes, self._page_budget)

    def _saved(self, placed: PlacedParameter) -> dict[str, Tensor]:
        states = read_states(self._store, placed.param, placed.format, placed.span)
        return {"step": placed.step.clone()} | states

    def _place(self, params: list[Tensor]) -> None:
        """Create states of zeros for parameters."""
        on_device = self._update.steps_on_device
        steps = [torch.zeros((), dtype=torch.float32, device=p.device if on_device else None) for p in params]
        self._placed.place(params, [self._format_of(param) for param in params], steps)
        self._store.grow(self._placed.n_pages)
        for param, step in zip(params, steps, strict=True):
            self.state[param]["step"] = step

    def _gather_work(self) -> list[PlacedParameter]:
        """Return the parameters that have a gradient. Create states for those that had none before."""
        with_grad = [
            (param, number)
            for number, group in enumerate(self.param_groups)
            for param in group["params"]
            if param.grad is not None
        ]
        grads = [_matching_grad(param) for param, _ in with_grad]
        if new := [param for param, _ in with_grad if param not in self._placed]:
            self._place(new)
        work = []
        for (param, number), grad in zip(with_grad, grads, strict=True):
            placed = self._placed[param]
            placed.grad, placed.group = grad, number
            work.append(placed)
        return work

    def _run(self, work: list[PlacedParameter]) -> None:
        pages = self._placed.pages_of(work)
        workspace_nbytes = self._update.workspace_nbytes({placed.param.dtype for placed in work})
        reservation = self._store.reserve(pages, workspace_nbytes)
        try:
            # Nothing is allocated on the device from here on.
            torch._foreach_add_([placed.step for placed in work], 1)
            settings = [AdamSettings.of(group) for group in self.param_groups]
            for window in self._store.sweep(pages, reservation):
                self._update_window(window, settings, reservation.workspace)
        finally:
            self._store.release(reservation)

    def _update_window(self, window: Window, settings: list[AdamSettings], workspace: Tensor | None) -> None:
        batches: dict[tuple[int, StateFormat], list[Piece]] = {}
        for views in self._placed.views(window):
            placed = views.placed
            param, grad = placed.param, placed.grad
            if grad is None:
                continue
            if not views.whole:
                param = in_memory_order(param)[views.first : views.stop]
                grad = in_memory_order(grad)[views.first : views.stop]
            piece = Piece(param, grad, views.exp_avg, views.exp_avg_sq, placed.step)
            batches.setdefault((placed.group, placed.format), []).append(piece)
        for (group, _), pieces in batches.items():
            self._update.apply(pieces, settings[group], workspace)


def _path(update: UpdateName) -> dict[str, bool | None]:
    """Return the settings with which torch.optim.AdamW uses the same implementation, for groups that it loads."""
    return {"foreach": None, "fused": True} if update == "fused" else {"foreach": False, "fused": None}


def _matching_grad(param: Tensor) -> Tensor:
    """Return the gradient in the memory order of the parameter, copying it if necessary."""
    grad = param.grad
    assert grad is not None
    if grad.is_sparse:
        raise UsageError("PagedAdamW does not support sparse gradients")
    if grad.stride() == param.stride():
        return grad
    return torch.empty_like(param).copy_(grad)
