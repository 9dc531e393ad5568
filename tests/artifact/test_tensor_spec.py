"""Sizes that follow from dtype and shape."""

from __future__ import annotations

import pytest

from qformat.artifact.tensor_spec import TensorSpec


@pytest.mark.parametrize(
    ("dtype", "shape", "n_elements", "nbytes"),
    [("BF16", (3, 5), 15, 30), ("F32", (), 1, 4), ("F64", (0, 4), 0, 0), ("BOOL", (7,), 7, 7)],
)
def test_elements_and_bytes_follow_from_dtype_and_shape(
    dtype: str, shape: tuple[int, ...], n_elements: int, nbytes: int
) -> None:
    spec = TensorSpec("w", dtype, shape)
    assert (spec.n_elements, spec.nbytes) == (n_elements, nbytes)


def test_an_unsupported_dtype_has_no_size() -> None:
    with pytest.raises(KeyError):
        _ = TensorSpec("w", "F4", (8,)).nbytes
