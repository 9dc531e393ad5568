"""Tracks the position of each parameter's states in the pages, and finds the states within a window."""

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
    """A parameter that has states.

    Attributes:
        param: The parameter.
        format: Storage format of its moments.
        span: Position of its moments in the address space.
        step: Number of steps so far, float32 [].
        grad: Gradient, set during a step only.
        group: Number of its parameter group, set during a step.
    """

    param: Tensor
    format: StateFormat
    span: Span
    step: Tensor
    grad: Tensor | None = None
    group: int = 0


@dataclass(frozen=True, slots=True)
class StateViews:
    """States of elements [first, stop) of a parameter within a window.

    Attributes:
        placed: The parameter.
        first: First element.
        stop: First element after the range.
        exp_avg: View of the first moment.
        exp_avg_sq: View of the second moment.
    """

    placed: PlacedParameter
    first: int
    stop: int
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @property
    def whole(self) -> bool:
        """Whether the range covers all elements of the parameter."""
        return self.stop - self.first == self.placed.span.size


class PlacedStates:
    """The parameters that have states, and the pages that hold them. `PageStore` owns the memory.

    Args:
        page_nbytes: Size of a page in bytes.
    """

    def __init__(self, page_nbytes: int) -> None:
        self._layout = PageLayout(page_nbytes)
        self._placed: dict[Tensor, PlacedParameter] = {}
        self._page_parameters: list[list[PlacedParameter]] = []
        self._resident_views: WeakKeyDictionary[Window, list[StateViews]] = WeakKeyDictionary()

    @property
    def n_pages(self) -> int:
        """Number of pages in use."""
        return self._layout.n_pages

    def __contains__(self, param: Tensor) -> bool:
        return param in self._placed

    def __getitem__(self, param: Tensor) -> PlacedParameter:
        return self._placed[param]

    def place(self, params: Sequence[Tensor], formats: Sequence[StateFormat], steps: Sequence[Tensor]) -> None:
        """Assign positions in new pages to parameters.

        Args:
            params: Parameters without states so far.
            formats: Storage format of each parameter's moments.
            steps: Step count of each parameter, float32 [].
        """
        spans = self._layout.place(
            [(p.numel(), f.unit_size, f.unit_nbytes) for p, f in zip(params, formats, strict=True)]
        )
        self._page_parameters += [[] for _ in range(self.n_pages - len(self._page_parameters))]
        for param, state_format, span, step in zip(params, formats, spans, steps, strict=True):
            placed = self._placed[param] = PlacedParameter(param, state_format, span, step)
            for page in self._layout.pages(span):
                self._page_parameters[page].append(placed)

    def pages_of(self, work: Sequence[PlacedParameter]) -> list[int]:
        """Return the numbers of the pages that hold states of these parameters, in ascending order."""
        return sorted({page for placed in work for page in self._layout.pages(placed.span)})

    def forget_gradients(self) -> None:
        """Drop the references to gradients that a step used."""
        for placed in self._placed.values():
            placed.grad = None

    def views(self, window: Window) -> list[StateViews]:
        """Return the states in a window. Views of resident windows are cached, since creating them is slow."""
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
        # List a parameter on several pages once.
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
