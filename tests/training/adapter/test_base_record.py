"""The record of an adapter's base: what is no record of qformat is refused with the name of the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qformat.errors import AdapterError
from qformat.names import BASE_RECORD_NAME
from qformat.training.adapter.base_record import BaseRecord, read_base_record

DIGEST = "tensors-xxh3:" + "0" * 32


def test_a_record_is_read_back(tmp_path: Path) -> None:
    (tmp_path / BASE_RECORD_NAME).write_bytes(BaseRecord(DIGEST, "model-nf4").to_bytes())
    assert read_base_record(tmp_path) == BaseRecord(DIGEST, "model-nf4")
    assert read_base_record(tmp_path / "missing") is None


@pytest.mark.parametrize(
    "record",
    [
        [],
        {"digest": DIGEST},
        {"digest": DIGEST, "name": 3},
        {"digest": "..", "name": "model-nf4"},
        {"digest": DIGEST + "0", "name": "model-nf4"},
        {"digest": "a" * 5000, "name": "model-nf4"},
    ],
)
def test_another_record_is_refused_with_its_file(record: object, tmp_path: Path) -> None:
    (tmp_path / BASE_RECORD_NAME).write_text(json.dumps(record))
    with pytest.raises(AdapterError, match=rf"{BASE_RECORD_NAME}: is damaged: digest or name is missing or not valid"):
        read_base_record(tmp_path)
