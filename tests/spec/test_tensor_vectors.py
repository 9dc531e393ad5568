"""spec/vectors/tensors.json: every implementation gives the same codes, scales, records and decoded bits."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from qformat.codec import nested, nf4, quant_state
from qformat.codec.codebooks import DYNAMIC_MAP
from qformat.codec.cpu import blocks
from qformat.codec.floats import FloatFormat, Raw, narrow, widen
from qformat.errors import ArtifactError, UsageError
from tests.spec import corpus, encoder

ALL = corpus.tensors()
REFUSED = [vector for vector in ALL if "reason" in vector]
DECODED = [vector for vector in ALL if "reason" not in vector]
ENCODED = [vector for vector in DECODED if vector["input"] is not None]

Array = NDArray[Any]


def array(text: str, dtype: str) -> Array:
    return np.frombuffer(bytes.fromhex(text), dtype)


def raw_input(vector: corpus.Vector) -> tuple[Raw, FloatFormat]:
    float_format = FloatFormat(vector["dtype"])
    raw: Raw = np.frombuffer(bytes.fromhex(vector["input"]), np.uint8).view(float_format.raw_dtype)
    return raw, float_format


def second_level(vector: corpus.Vector) -> tuple[Array, Array, Array, np.float32]:
    """Return the codes, the nested absmax values, the map and the offset."""
    stored_map = array(vector["nested_quant_map"], "<f4") if "nested_quant_map" in vector else DYNAMIC_MAP
    offset: np.float32 = np.uint32(int(vector["nested_offset_bits"], 16)).view(np.float32)
    return array(vector["absmax"], "u1"), array(vector["nested_absmax"], "<f4"), stored_map, offset


@pytest.mark.parametrize("vector", ENCODED, ids=corpus.name_of)
def test_reference_encodes_the_expected_bytes(vector: corpus.Vector) -> None:
    raw, float_format = raw_input(vector)
    packed, absmax = nf4.encode(widen(raw, float_format), block_size=vector["block_size"])
    assert packed.tobytes().hex() == vector["packed"]
    if not vector["double_quant"]:
        assert absmax.tobytes().hex() == vector["absmax"]
        return
    second = nested.encode_absmax(absmax)
    assert second.codes.tobytes().hex() == vector["absmax"]
    assert second.nested_absmax.tobytes().hex() == vector["nested_absmax"]
    assert f"{second.offset.view(np.uint32):08X}" == vector["nested_offset_bits"]


@pytest.mark.parametrize("vector", ENCODED, ids=corpus.name_of)
def test_kernels_encode_the_expected_bytes(vector: corpus.Vector) -> None:
    raw, float_format = raw_input(vector)
    packed = np.empty(nf4.packed_nbytes(raw.size), np.uint8)
    absmax = np.empty(nf4.block_count(raw.size, vector["block_size"]), np.float32)
    assert blocks.encode_into(raw, float_format, block_size=vector["block_size"], packed=packed, absmax=absmax)
    assert packed.tobytes().hex() == vector["packed"]
    if not vector["double_quant"]:
        assert absmax.tobytes().hex() == vector["absmax"]
        return
    offset = np.float32(blocks.add_in_order(absmax, 0.0) / absmax.size)
    codes = np.empty(absmax.size, np.uint8)
    nested_absmax = np.empty(nf4.block_count(absmax.size, nested.NESTED_BLOCK_SIZE), np.float32)
    blocks.encode_absmax_into(absmax, offset, codes=codes, nested_absmax=nested_absmax)
    assert f"{offset.view(np.uint32):08X}" == vector["nested_offset_bits"]
    assert codes.tobytes().hex() == vector["absmax"]
    assert nested_absmax.tobytes().hex() == vector["nested_absmax"]


@pytest.mark.parametrize("vector", ENCODED, ids=corpus.name_of)
def test_an_encoder_written_from_the_specification_gives_the_expected_bytes(vector: corpus.Vector) -> None:
    data = bytes.fromhex(vector["input"])
    encoded = encoder.encode(data, vector["dtype"], vector["block_size"], double_quant=vector["double_quant"])
    assert encoded.packed.hex() == vector["packed"]
    assert encoded.absmax.hex() == vector["absmax"]
    assert encoded.nested_absmax.hex() == vector.get("nested_absmax", "")
    assert encoded.offset_bits == vector.get("nested_offset_bits", "")


@pytest.mark.parametrize("vector", REFUSED, ids=corpus.name_of)
def test_kernels_reject_non_finite_weights(vector: corpus.Vector) -> None:
    assert vector["reason"] == "nonfinite_weight"
    raw, float_format = raw_input(vector)
    packed = np.empty(nf4.packed_nbytes(raw.size), np.uint8)
    absmax = np.empty(nf4.block_count(raw.size, vector["block_size"]), np.float32)
    assert not blocks.encode_into(raw, float_format, block_size=vector["block_size"], packed=packed, absmax=absmax)


@pytest.mark.parametrize("vector", DECODED, ids=corpus.name_of)
def test_reference_decodes_the_expected_bits(vector: corpus.Vector) -> None:
    n_elements = int(np.prod(vector["shape"]))
    if vector["double_quant"]:
        codes, nested_absmax, stored_map, offset = second_level(vector)
        scales = nested.decode_absmax(codes, nested_absmax, offset, nested_quant_map=stored_map)
    else:
        scales = array(vector["absmax"], "<f4")
    packed = array(vector["packed"], "u1")
    values = nf4.decode(packed, scales, n_elements=n_elements, block_size=vector["block_size"])
    assert vector["decoded"]
    for name, expected in vector["decoded"].items():
        assert narrow(values, FloatFormat(name)).tobytes().hex() == expected, name


@pytest.mark.parametrize("decoder", ["avx512", "avx2", "plain"])
@pytest.mark.parametrize("vector", DECODED, ids=corpus.name_of)
def test_kernels_decode_the_expected_bits(vector: corpus.Vector, decoder: Literal["avx512", "avx2", "plain"]) -> None:
    n_elements = int(np.prod(vector["shape"]))
    scales = np.empty(nf4.block_count(n_elements, vector["block_size"]), np.float32)
    if vector["double_quant"]:
        blocks.decode_scales_into(*second_level(vector), scales)
    else:
        scales[:] = array(vector["absmax"], "<f4")
    for name, expected in vector["decoded"].items():
        out = np.empty(n_elements, FloatFormat(name).raw_dtype)
        try:
            blocks.decode_into(
                array(vector["packed"], "u1"),
                scales,
                n_elements=n_elements,
                block_size=vector["block_size"],
                float_format=FloatFormat(name),
                out=out,
                decoder=decoder,
            )
        except UsageError as missing:
            pytest.skip(str(missing))
        assert out.tobytes().hex() == expected, name


@pytest.mark.parametrize("vector", DECODED, ids=corpus.name_of)
def test_quant_state_records_have_the_values_of_the_vector(vector: corpus.Vector) -> None:
    text = vector["quant_state"].encode("ascii")
    try:
        state = quant_state.parse(text, path="vector", tensor=vector["name"])
    except ArtifactError as error:  # pragma: no cover
        pytest.fail(str(error))
    assert (state.block_size, list(state.shape)) == (vector["block_size"], vector["shape"])
    assert state.float_format.value == vector["dtype"]
    assert (state.nested_offset is not None) == vector["double_quant"]
    if state.nested_offset is not None:
        assert f"{np.float32(state.nested_offset).view(np.uint32):08X}" == vector["nested_offset_bits"]
    assert state.to_padded_json() == text
    assert len(text) % quant_state.ALIGNMENT == 0
