"""Components and quant_states that match every digest but are invalid.

Each case changes an intact artifact and updates its digests, as a faulty or hostile writer would. Opening must reject
the result with the reason, the file and the tensor. Other readers load most of these without an error, or crash.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qformat.artifact.reading.reader import open_artifact
from qformat.errors import Reason
from tests.artifact.damaged import edit_json, reseal, rewrite_shard, shard_of, shards, verify
from tests.artifact.reading.resealed import Json, W, patch, refusal
from tests.small_models import INDEX

STATE = ".quant_state.bitsandbytes__nf4"


def test_updating_digests_without_a_change_keeps_an_artifact_intact(artifact: Path) -> None:
    reseal(artifact)
    assert verify(artifact).passed
    for path in shards(artifact):
        rewrite_shard(path, lambda header, parts: None)
    reseal(artifact)
    assert verify(artifact).passed


# Missing components, and components of the wrong size or dtype. Other readers crash or load garbage.


@pytest.mark.parametrize("suffix", ["", ".absmax", ".nested_absmax", ".nested_quant_map", ".quant_map", STATE])
def test_a_missing_component_is_reported(suffix: str, artifact: Path) -> None:
    def drop(header: Json, parts: dict[str, bytes]) -> None:
        del header[W + suffix], parts[W + suffix]

    rewrite_shard(shard_of(artifact, W + suffix), drop)
    edit_json(artifact / INDEX, lambda index: index["weight_map"].pop(W + suffix))  # type: ignore[attr-defined]
    reseal(artifact)
    error = refusal(artifact)
    assert error.reason is Reason.MISSING_COMPONENT
    assert error.tensor == W


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_a_missing_kept_tensor_is_reported(name: str, artifact: Path) -> None:
    def drop(header: Json, parts: dict[str, bytes]) -> None:
        del header[name], parts[name]

    rewrite_shard(shard_of(artifact, name), drop)
    reseal(artifact)
    error = refusal(artifact)
    assert error.reason is Reason.MISSING_COMPONENT
    assert error.tensor == name


@pytest.mark.parametrize("suffix", ["", ".absmax", ".nested_absmax", ".nested_quant_map", ".quant_map", STATE])
@pytest.mark.parametrize("factor", [0, 0.5, 2])
def test_a_component_of_the_wrong_length_is_reported(factor: float, suffix: str, artifact: Path) -> None:
    name = W + suffix

    def resize(header: Json, parts: dict[str, bytes]) -> None:
        shape = header[name]["shape"]
        element = len(parts[name]) // max(1, int(np.prod(shape)))
        shape[0] = int(shape[0] * factor)
        parts[name] = (parts[name] * 2)[: element * int(np.prod(shape))]

    rewrite_shard(shard_of(artifact, name), resize)
    reseal(artifact)
    error = refusal(artifact)
    assert error.reason is Reason.COMPONENT_SHAPE
    assert error.tensor == name


@pytest.mark.parametrize(
    ("suffix", "dtype", "shape"),
    [
        ("", "I8", [160, 1]),
        ("", "U8", [160]),
        ("", "U8", [1, 160]),
        ("", "U8", [8, 20]),
        ("", "F32", [40, 1]),
        (".absmax", "I8", [5]),
        (".absmax", "U8", [5, 1]),
        (".nested_quant_map", "I32", [256]),
        (".nested_quant_map", "F32", [16, 16]),
        (".nested_absmax", "I32", [1]),
        (".nested_absmax", "F32", []),
        (".quant_map", "F16", [32]),
        (STATE, "I8", [192]),
    ],
)
def test_a_component_of_the_wrong_dtype_or_shape_is_reported(
    suffix: str, dtype: str, shape: list[int], artifact: Path
) -> None:
    name = W + suffix
    rewrite_shard(shard_of(artifact, name), lambda header, _: header[name].update(dtype=dtype, shape=shape))
    reseal(artifact)
    error = refusal(artifact)
    assert error.reason in {Reason.COMPONENT_DTYPE, Reason.COMPONENT_SHAPE}
    assert error.tensor == name


# Values


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("suffix", [".nested_absmax", ".nested_quant_map"])
def test_a_non_finite_scale_is_reported(suffix: str, value: float, artifact: Path) -> None:
    patch(artifact, W + suffix, np.float32(value).tobytes())
    error = refusal(artifact)
    assert error.reason is Reason.NONFINITE_SCALE
    assert error.tensor == W
    assert error.field == suffix[1:]


@pytest.mark.parametrize("entry", range(16))
@pytest.mark.parametrize("change", [np.nan, -0.0, 5.0])
def test_a_codebook_that_is_not_bit_identical_to_nf4_is_rejected(entry: int, change: float, artifact: Path) -> None:
    if entry == 7 and np.float32(change) == 0:
        change = -0.0  # the entry is 0.0: its sign is also a bit
    patch(artifact, W + ".quant_map", np.float32(change).tobytes(), offset=4 * entry)
    error = refusal(artifact)
    assert error.reason is Reason.CODEBOOK
    assert error.tensor == W


def state_with(**changes: object) -> Callable[[bytes], bytes]:
    def change(part: bytes) -> bytes:
        record = json.loads(part)
        for key, value in changes.items():
            if value is ...:
                del record[key]
            else:
                record[key] = value
        text = json.dumps(record).encode()
        return text[: len(part)].ljust(len(part))

    return change


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quant_type": "x"}, Reason.QUANT_STATE),
        ({"quant_type": "fp4"}, Reason.QUANT_STATE),
        ({"quant_type": None}, Reason.QUANT_STATE),
        ({"quant_type": ["nf4"]}, Reason.QUANT_STATE),
        ({"quant_type": ...}, Reason.QUANT_STATE),
        ({"blocksize": 0}, Reason.QUANT_STATE),
        ({"blocksize": 1}, Reason.QUANT_STATE),
        ({"blocksize": -64}, Reason.QUANT_STATE),
        ({"blocksize": 128}, Reason.QUANT_STATE),
        ({"blocksize": 64.0}, Reason.QUANT_STATE),
        ({"blocksize": "64"}, Reason.QUANT_STATE),
        ({"blocksize": True}, Reason.QUANT_STATE),
        ({"blocksize": 2**63}, Reason.QUANT_STATE),
        ({"blocksize": ...}, Reason.QUANT_STATE),
        ({"dtype": "load"}, Reason.QUANT_STATE),
        ({"dtype": "hub"}, Reason.QUANT_STATE),
        ({"dtype": "__doc__"}, Reason.QUANT_STATE),
        ({"dtype": "float16"}, Reason.QUANT_STATE),
        ({"dtype": "int8"}, Reason.QUANT_STATE),
        ({"dtype": []}, Reason.QUANT_STATE),
        ({"dtype": {}}, Reason.QUANT_STATE),
        ({"shape": [40, 8]}, Reason.QUANT_STATE),
        ({"shape": [320]}, Reason.QUANT_STATE),
        ({"shape": [8, 40, 1]}, Reason.QUANT_STATE),
        ({"shape": [8, 40.0]}, Reason.QUANT_STATE),
        ({"shape": [-8, -40]}, Reason.QUANT_STATE),
        ({"shape": "8x40"}, Reason.QUANT_STATE),
        ({"shape": 320}, Reason.QUANT_STATE),
        ({"shape": []}, Reason.QUANT_STATE),
        ({"nested_blocksize": 1}, Reason.QUANT_STATE),
        ({"nested_blocksize": 0}, Reason.QUANT_STATE),
        ({"nested_blocksize": 256.0}, Reason.QUANT_STATE),
        ({"nested_blocksize": ...}, Reason.QUANT_STATE),
        ({"nested_dtype": "float16"}, Reason.QUANT_STATE),
        ({"nested_dtype": "bfloat16"}, None),
        ({"nested_dtype": 5}, Reason.QUANT_STATE),
        ({"nested_dtype": {}}, Reason.QUANT_STATE),
        ({"nested_offset": "0.05"}, Reason.QUANT_STATE),
        ({"nested_offset": 1e300}, Reason.QUANT_STATE),
        ({"nested_offset": -1e39}, Reason.QUANT_STATE),
        ({"nested_offset": True}, Reason.QUANT_STATE),
        ({"nested_offset": None}, Reason.QUANT_STATE),
        ({"nested_offset": 0}, None),
        ({"nested_offset": -1}, None),
        ({"nested_offset": ..., "nested_dtype": ..., "nested_blocksize": ...}, Reason.QUANT_STATE),
        ({"absmax": 5}, Reason.QUANT_STATE),
        ({"quant_map": []}, Reason.QUANT_STATE),
        ({"": ""}, Reason.QUANT_STATE),
    ],
)
def test_a_quant_state_with_wrong_values_is_rejected(changes: Json, reason: Reason | None, artifact: Path) -> None:
    patch(artifact, W + STATE, state_with(**changes))
    if reason is None:
        open_artifact(artifact).close()
        return
    error = refusal(artifact)
    assert error.reason is reason
    assert error.tensor == W
    assert error.field is not None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", Reason.JSON_SYNTAX),
        (b"\0" * 192, Reason.JSON_SYNTAX),
        (b"null", Reason.QUANT_STATE),
        (b"[]", Reason.QUANT_STATE),
        (b"5", Reason.QUANT_STATE),
        (b"[" * 192, Reason.JSON_LIMIT),
        (b'{"quant_type": "nf4", "quant_type": "nf4"}', Reason.JSON_DUPLICATE_KEY),
        (b'{"nested_offset": NaN}', Reason.JSON_SYNTAX),
        (b'{"nested_offset": Infinity}', Reason.JSON_SYNTAX),
        (b'{"nested_offset": 1e999}', Reason.JSON_LIMIT),
        (b'{"blocksize": ' + b"9" * 150 + b"}", Reason.JSON_LIMIT),
        (b'{"a": "\\ud800"}', Reason.JSON_SYNTAX),
        (b"\xff\xfe", Reason.JSON_SYNTAX),
        (b"\xef\xbb\xbf{}", Reason.JSON_SYNTAX),
    ],
)
def test_a_quant_state_that_is_not_a_json_object_is_rejected(text: bytes, reason: Reason, artifact: Path) -> None:
    patch(artifact, W + STATE, lambda part: text[: len(part)].ljust(len(part)))
    error = refusal(artifact)
    assert error.reason is reason
    assert error.tensor == W
