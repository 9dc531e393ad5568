"""Fuzzing of artifacts: random changes to the objects in the JSON files, with updated digests, and to raw bytes.

Only an ArtifactError may be raised, and every tensor of an artifact that opens must be usable. Unusual artifacts that
follow the rules must open: generating them is as important as generating damage.
"""

from __future__ import annotations

import copy
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qformat.artifact.reading.reader import open_artifact
from qformat.artifact.reading.verify import verify_integrity
from qformat.errors import ArtifactError
from tests.artifact.damaged import ACCOMPANYING, make_tiny_artifact, reseal
from tests.artifact.reading.unusual_artifacts import Json, unusual_tensors, write_artifact
from tests.corpus.damage.odd_json import places_in
from tests.small_models import contents

FUZZ = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SOAK = settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))

ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 300),
    st.sampled_from(
        [
            2**31,
            2**48,
            2**63,
            2**64,
            -(2**63),
            0.0,
            -0.0,
            64.0,
            1e308,
            5e-324,
            "",
            "nf4",
            "kept",
            "..",
            "\ud800",
            "🦙",
            "a" * 600,
        ]
    ),
    st.text(max_size=4),
    st.builds(list),
    st.builds(dict),
    st.lists(st.integers(-1, 50), max_size=10),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return contents(make_tiny_artifact(tmp_path_factory.mktemp("tiny")))


def restore(folder: Path, files: dict[str, bytes]) -> None:
    for path in folder.iterdir():
        if path.name not in files:
            path.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def use(folder: Path) -> bool:
    """Open the artifact and read all of it. Only an ArtifactError may be raised. Return whether it opened."""
    report = verify_integrity(folder, sha256=True, workers=1)
    for finding in report.findings:
        finding.message.encode("utf-8")
    try:
        with open_artifact(folder) as artifact:
            for name in artifact:
                tensor = artifact[name]
                assert tensor.decode().shape == tensor.shape
    except ArtifactError as error:
        str(error).encode("utf-8")
        assert not report.passed
        return False
    return True


def mutate(data: st.DataObject, record: Json) -> Json:
    """Change one to three values at any level."""
    record = copy.deepcopy(record)
    for _ in range(data.draw(st.integers(1, 3))):
        places = places_in(record)
        if not places:
            break
        *parents, last = data.draw(st.sampled_from(places))
        holder = record
        for key in parents:
            holder = holder[key]
        match data.draw(st.integers(0, 4)):
            case 0:
                holder[last] = data.draw(ODD_VALUES)
            case 1:
                del holder[last]
            case 2:
                source = data.draw(st.sampled_from(places))
                value = record
                for key in source:
                    value = value[key] if not isinstance(value, dict) or key in value else {}
                    if not isinstance(value, (dict, list)):
                        break
                holder[last] = copy.deepcopy(value)
            case 3 if isinstance(holder, dict):
                holder[
                    data.draw(
                        st.text(max_size=4)
                        | st.sampled_from(["qformat.json", "lm_head.weight", "encoding", "header_xxh3"])
                    )
                ] = holder[last]
            case 4 if isinstance(holder[last], int) and not isinstance(holder[last], bool):
                holder[last] += data.draw(st.sampled_from([-1, 1, 64, 2**32]))
    return record


def write_json(path: Path, record: Json) -> None:
    path.write_bytes(json.dumps(record, indent=1).encode("utf-8"))


def fuzz_objects(folder: Path, pristine: dict[str, bytes], data: st.DataObject) -> None:
    restore(folder, pristine)
    name = data.draw(st.sampled_from(["qformat.json", "qformat.json", "model.safetensors.index.json", "config.json"]))
    record = mutate(data, json.loads(pristine[name]))
    if name == "qformat.json":
        record.pop("manifest_sha256", None)
        if record:
            reseal(folder, record, update_files=False)
    else:
        write_json(folder / name, record)
        reseal(folder)
    use(folder)


def fuzz_quant_state(folder: Path, pristine: dict[str, bytes], data: st.DataObject) -> None:
    restore(folder, pristine)
    name = data.draw(st.sampled_from(sorted(name for name in pristine if name.endswith(".safetensors"))))
    whole = pristine[name]
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    states = [entry for key, entry in header.items() if key.endswith("nf4")]
    if not states:
        return
    start, stop = (8 + length + at for at in states[0]["data_offsets"])
    record = mutate(data, json.loads(whole[start:stop]))
    text = json.dumps(record).encode()[: stop - start].ljust(stop - start)
    (folder / name).write_bytes(whole[:start] + text + whole[stop:])
    reseal(folder)
    use(folder)


def fuzz_bytes(folder: Path, pristine: dict[str, bytes], data: st.DataObject) -> None:
    restore(folder, pristine)
    name = data.draw(st.sampled_from(sorted(pristine)))
    changed = bytearray(pristine[name])
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, max(0, len(changed) - 1)))
        match data.draw(st.integers(0, 3)):
            case 0:
                changed[position : position + 1] = data.draw(st.binary(max_size=3))
            case 1:
                del changed[position : position + data.draw(st.integers(1, 5000))]
            case 2:
                changed[position:position] = changed[: data.draw(st.integers(0, 300))]
            case 3:
                changed[position : position + 8] = struct.pack(
                    "<Q", data.draw(st.sampled_from([0, 1, 2**25, 2**63, 2**64 - 1]))
                )
    (folder / name).write_bytes(changed)
    sealed = data.draw(st.booleans()) and name != "qformat.json" and len(changed) > 8
    if sealed:
        reseal(folder)
    use(folder)
    if not sealed:
        report = verify_integrity(folder, workers=1)
        differs = {finding.file for finding in (report.findings, report.notices)[name == ACCOMPANYING]}
        assert (name in differs) == (bytes(changed) != pristine[name])
        assert report.passed == (name == ACCOMPANYING or not differs)


@FUZZ
@given(st.data())
def test_changed_objects_in_manifest_index_and_config_raise_only_an_artifact_error(
    folder: Path, pristine: dict[str, bytes], data: st.DataObject
) -> None:
    fuzz_objects(folder, pristine, data)


@FUZZ
@given(st.data())
def test_changed_objects_in_quant_states_raise_only_an_artifact_error(
    folder: Path, pristine: dict[str, bytes], data: st.DataObject
) -> None:
    fuzz_quant_state(folder, pristine, data)


@FUZZ
@given(st.data())
def test_changed_bytes_of_any_file_raise_only_an_artifact_error(
    folder: Path, pristine: dict[str, bytes], data: st.DataObject
) -> None:
    fuzz_bytes(folder, pristine, data)


@pytest.mark.slow
@pytest.mark.parametrize("fuzz", [fuzz_objects, fuzz_quant_state, fuzz_bytes])
def test_long_fuzzing_raises_only_an_artifact_error(folder: Path, pristine: dict[str, bytes], fuzz: Any) -> None:
    @SOAK
    @given(st.data())
    def soak(data: st.DataObject) -> None:
        fuzz(folder, pristine, data)

    soak()


@settings(FUZZ, max_examples=120)
@given(unusual_tensors(), st.data())
def test_an_unusual_artifact_that_follows_the_rules_is_opened(
    folder: Path, tensors: list[tuple[str, Json]], data: st.DataObject
) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    write_artifact(folder, tensors, data)
    report = verify_integrity(folder, sha256=True, workers=1)
    assert report.passed, report.findings
    with open_artifact(folder) as artifact:
        assert set(artifact) == {name for name, _ in tensors}
        for name, what in tensors:
            assert artifact[name].shape == tuple(what["shape"])
            assert artifact[name].decode().shape == tuple(what["shape"])
        assert artifact.manifest.extra == {"optional_thing": [1, {"a": "b"}]}
