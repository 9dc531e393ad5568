"""The states of all parameters in their pages: where each lies, and which parts of which a window shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import Tensor

from qformat.training.optimizer.page_layout import PageLayout, Span
from qformat.training.optimizer.page_store import Window
from qformat.training.optimizer.state_formats import FloatStates, StateFormat


@dataclass(eq=False, slots=True)
class PlacedParameter:
    """A parameter that has states, and, during a step, its gradient and group."""

    param: Tensor
    format: StateFormat
    span: Span
    step: Tensor
    grad: Tensor | None = None
    group: int = 0


@dataclass(frozen=True, slots=True)
class StateViews:
    """The states of elements [first, stop) of a parameter within a window."""

    placed: PlacedParameter
    first: int
    stop: int
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @property
    def whole(self) -> bool:
        """Whether these are all elements of the parameter."""
        return self.stop - self.first == self.placed.span.size


class PlacedStates:
    """Parameters that have states, by the pages that hold these. No memory is here: that is `PageStore`'s."""

    def __init__(self, page_nbytes: int) -> None:
        self._layout = PageLayout(page_nbytes)
        self._placed: dict[Tensor, PlacedParameter] = {}
        self._page_parameters: list[list[PlacedParameter]] = []
        self._resident_views: WeakKeyDictionary[Window, list[StateViews]] = WeakKeyDictionary()

    @property
    def n_pages(self) -> int:
        """Pages that hold anything."""
        return self._layout.n_pages

    def __contains__(self, param: Tensor) -> bool:
        return param in self._placed

    def __getitem__(self, param: Tensor) -> PlacedParameter:
        return self._placed[param]

    def place(self, params: Sequence[Tensor], formats: Sequence[StateFormat], steps: Sequence[Tensor]) -> None:
        """Give parameters room in pages of their own. steps: float32 [], one each."""
        spans = self._layout.place(
            [(p.numel(), f.unit_size, f.unit_nbytes) for p, f in zip(params, formats, strict=True)]
        )
        self._page_parameters += [[] for _ in range(self.n_pages - len(self._page_parameters))]
        for param, state_format, span, step in zip(params, formats, spans, steps, strict=True):
            placed = self._placed[param] = PlacedParameter(param, state_format, span, step)
            for page in self._layout.pages(span):
                self._page_parameters[page].append(placed)

    def pages_of(self, work: Sequence[PlacedParameter]) -> list[int]:
        """Return the numbers of the pages that hold any of these, ascending."""
        return sorted({page for placed in work for page in self._layout.pages(placed.span)})

    def forget_gradients(self) -> None:
        """Let go of what a step looked at."""
        for placed in self._placed.values():
            placed.grad = None

    def views(self, window: Window) -> list[StateViews]:
        """Return the states in a window, kept if it is resident: making views takes longer than small updates."""
        if not window.resident:
            return self._make_views(window)
        views = self._resident_views.get(window)
        if views is None:
            views = self._resident_views[window] = self._make_views(window)
        return views

    def _make_views(self, window: Window) -> list[StateViews]:
        views = []
        row_nbytes = self._layout.row_nbytes
        pages = range(window.start // row_nbytes, window.stop // row_nbytes)
        # A parameter over several pages comes once.
        for placed in dict.fromkeys(placed for page in pages for placed in self._page_parameters[page]):
            part = placed.span.part(window.start, window.stop)
            assert part is not None
            data = window.memory[:, part.offset - window.start : part.offset - window.start + part.nbytes]
            size = part.stop - part.first
            moments = [placed.format.view(row, size) for row in data]
            if size == placed.span.size and isinstance(placed.format, FloatStates):
                moments = [moment.as_strided(placed.param.shape, placed.param.stride()) for moment in moments]
            views.append(StateViews(placed, part.first, part.stop, moments[0], moments[1]))
        return views
