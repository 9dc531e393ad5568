"""Hub repositories as sources, served by the stand-in: streamed, pinned, and byte-identical to the local conversion."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from qformat.cli.main import run
from qformat.converters.convert import ConversionOptions
from qformat.converters.sources.open_source import open_source
from qformat.errors import HubError, SourceError, UsageError
from tests.converters.sources.hub.serving import (
    NAME,
    SIZES,
    SMALL,
    TOKEN,
    convert,
    converted,
    fetched_ranges,
    plan,
    serving,
    without_source,
)
from tests.hub_stand_in import Hub
from tests.small_models import llama_config, llama_tensors, tiny_tensors, weight, write_checkpoint, write_tiny
from tests.standstill import GUARD_S


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in without repositories."""
    with serving(monkeypatch, tmp_path / "home") as hub:
        yield hub


def test_a_repository_gives_the_bytes_of_the_local_conversion_and_each_of_its_bytes_is_fetched_once(
    hub: Hub, source: Path, expected: dict[str, object], tmp_path: Path
) -> None:
    hub.add_folder(NAME, source)

    convert(NAME, tmp_path / "out")

    assert without_source(tmp_path / "out") == expected
    ranges = fetched_ranges(hub)
    assert all(stop <= start for (one, _, stop), (other, start, _) in pairwise(ranges) if one == other)
    nbytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert sum(stop - start for _, start, stop in ranges) == nbytes


def test_the_manifest_records_repository_commit_and_sha256_of_each_shard(
    hub: Hub, source: Path, tmp_path: Path
) -> None:
    repository = hub.add_folder(NAME, source)

    convert(NAME, tmp_path / "out")

    recorded = json.loads((tmp_path / "out" / "qformat.json").read_bytes())["source"]
    shards = {path.name: repository.head.files[path.name] for path in source.glob("*.safetensors")}
    files = {name: {"nbytes": file.nbytes, "sha256": file.sha256} for name, file in shards.items()}
    assert recorded == {"kind": "safetensors", "repository": NAME, "commit": repository.head.oid, "files": files}


def test_a_plan_of_thirty_shards_takes_two_requests_a_shard_several_at_a_time_and_no_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"model.layers.{i}.self_attn.o_proj.weight": weight((64, 64), seed=i) for i in range(60)}
    source = write_checkpoint(tmp_path / "source", tensors, n_shards=30, config=llama_config(n_layers=60))
    with serving(monkeypatch, tmp_path / "home", with_cdn=False) as hub:
        hub.add_folder(NAME, source)
        # Four requests at a time let each other through, or all fail.
        together = threading.Barrier(4, timeout=GUARD_S)
        hub.faults.add("call", route=r"\.safetensors$", times=40, hook=together.wait)

        planned = plan(NAME)

    assert planned.nbytes > plan(source).nbytes  # the manifest tells more
    assert planned.shards == plan(source).shards
    assert len(hub.requests("safetensors$")) == 60
    assert sum(stop - start for _, start, stop in fetched_ranges(hub, hub.requests("safetensors$"))) < 60_000


@pytest.mark.parametrize("with_cdn", [True, False])
def test_the_token_goes_to_the_hub_and_to_no_other_host_and_into_no_file(
    with_cdn: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    with serving(monkeypatch, tmp_path / "home", with_cdn=with_cdn) as hub:
        repository = hub.add_folder(NAME, source, private=True)
        repository.readers.add(TOKEN)
        hub.faults.add("status", every=4)

        convert(NAME, tmp_path / "out")

        assert bool(hub.requests("cdn/")) == with_cdn
        for request in hub.log:
            expected = f"Bearer {TOKEN}" if request.server == "hub" else None
            assert request.headers.get("authorization") == expected, request.path
    assert "retrying in" in caplog.text
    assert TOKEN not in caplog.text
    for path in (tmp_path / "out").iterdir():
        assert TOKEN.encode() not in path.read_bytes()


def test_several_pieces_are_fetched_at_a_time(
    hub: Hub, source: Path, expected: dict[str, object], tmp_path: Path
) -> None:
    hub.add_folder(NAME, source)
    together = threading.Barrier(4, timeout=GUARD_S)
    hub.faults.add("call", route="cdn/", after=6, times=20, hook=together.wait)

    # With a window in which no piece waits for another one's buffer.
    convert(NAME, tmp_path / "out", transfer=replace(SMALL, window_nbytes=64 * 8192))

    assert without_source(tmp_path / "out") == expected


def test_requests_go_directly_to_the_storage_once_its_address_is_known(hub: Hub, source: Path, tmp_path: Path) -> None:
    hub.add_folder(NAME, source)

    convert(NAME, tmp_path / "out")

    assert len(hub.requests("GET hub/.*safetensors$")) <= 3 + 8  # those in flight when the first answer comes
    assert len(hub.requests("GET cdn/")) > 30


@pytest.mark.parametrize("order", ["forwards", "backwards"])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_stream_never_stalls_for_any_order_and_size_of_tensors(
    hub: Hub, tmp_path: Path, workers: int, order: str
) -> None:
    tensors = {
        **{f"model.layers.{i}.self_attn.o_proj.weight": weight((24, 64), seed=i) for i in range(12)},
        "model.layers.12.self_attn.o_proj.weight": weight((2048, 64), seed=20),  # six times the window
        "lm_head.weight": weight((1024, 64), seed=21),
        "model.layers.3.input_layernorm.weight": weight((64,), seed=22),
        "model.empty": weight((0, 64), seed=23),
    }
    names = sorted(tensors, reverse=order == "backwards")
    source = write_checkpoint(tmp_path / "source", {name: tensors[name] for name in names}, n_shards=2)
    if order == "backwards":  # safetensors_bytes sorts by name: write the shards' data the other way round
        reverse_data(source)
    hub.add_folder(NAME, source)

    convert(NAME, tmp_path / "out", workers=workers)

    assert without_source(tmp_path / "out") == converted(source, tmp_path / "local")


def reverse_data(folder: Path) -> None:
    from tests.small_models import header_bytes

    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        record = json.loads(data[8 : 8 + length])
        entries = sorted((e for e in record.items() if e[0] != "__metadata__"), key=lambda e: -e[1]["data_offsets"][0])
        position, parts = 0, []
        for _, entry in entries:
            start, stop = entry["data_offsets"]
            parts.append(data[8 + length + start : 8 + length + stop])
            entry["data_offsets"] = [position, position := position + stop - start]
        path.write_bytes(header_bytes(dict(entries)) + b"".join(parts))


def test_a_shard_outside_of_large_file_storage_is_checked_by_gits_hash(hub: Hub, tmp_path: Path) -> None:
    from tests.hub_stand_in import StoredFile

    source = write_tiny(tmp_path / "source", n_shards=2)
    files = {p.name: StoredFile(p.read_bytes(), lfs="00001" in p.name) for p in source.iterdir()}
    hub.repositories.create(NAME)
    hub.repositories.commit(NAME, files)

    convert(NAME, tmp_path / "out")

    assert without_source(tmp_path / "out") == converted(source, tmp_path / "local")


def test_a_revision_is_pinned_and_a_resumed_conversion_stays_at_its_commit(
    hub: Hub, source: Path, expected: dict[str, object], tmp_path: Path
) -> None:
    repository = hub.add_folder(NAME, source)
    first = repository.head.oid
    hub.faults.add("status", route="cdn/", after=20, status=404)
    hub.faults.add("status", route="hub/.*safetensors", after=20, status=404)
    with pytest.raises(HubError):
        convert(NAME, tmp_path / "out")
    hub.faults.clear()
    write_checkpoint(tmp_path / "other", llama_tensors(**SIZES, seed=9), n_shards=3, config=llama_config(**SIZES))
    hub.add_folder(NAME, tmp_path / "other")
    assert repository.head.oid != first

    convert(NAME, tmp_path / "out")

    assert without_source(tmp_path / "out") == expected
    assert json.loads((tmp_path / "out" / "qformat.json").read_bytes())["source"]["commit"] == first


def test_restart_uses_the_current_state_of_the_branch(hub: Hub, source: Path, tmp_path: Path) -> None:
    repository = hub.add_folder(NAME, source)
    first = repository.head.oid
    hub.faults.add("status", route="cdn/", after=20, status=404)
    hub.faults.add("status", route="hub/.*safetensors", after=20, status=404)
    with pytest.raises(HubError):
        convert(NAME, tmp_path / "out")
    hub.faults.clear()
    hub.repositories.commit(NAME, {"README.md": b"changed"})
    del repository.commits[first]  # the history was squashed
    with pytest.raises(
        HubError, match=f"commit {first}, which the interrupted .* no longer exists. Start over with restart=True"
    ):
        convert(NAME, tmp_path / "out")

    convert(NAME, tmp_path / "out", restart=True)

    assert json.loads((tmp_path / "out" / "qformat.json").read_bytes())["source"]["commit"] == repository.head.oid


@pytest.mark.parametrize("revision", ["a-branch", "refs/pr/1", "commit"])
def test_a_revision_may_be_a_branch_a_pull_request_or_a_commit(
    hub: Hub, source: Path, expected: dict[str, object], tmp_path: Path, revision: str
) -> None:
    hub.repositories.create(NAME)
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    commit = hub.repositories.commit(NAME, files, ref="refs/pr/1" if revision == "refs/pr/1" else "a-branch")

    convert(NAME, tmp_path / "out", ConversionOptions(revision=commit if revision == "commit" else revision))

    assert without_source(tmp_path / "out") == expected


def test_keep_nonfinite_is_rejected_because_it_would_fetch_everything_twice(hub: Hub, source: Path) -> None:
    hub.add_folder(NAME, source)
    with pytest.raises(UsageError, match="keep_source=True"):
        plan(NAME, ConversionOptions(keep_nonfinite=True))


def test_a_non_finite_weight_is_reported_and_ends_the_stream(hub: Hub, tmp_path: Path) -> None:
    from tests.small_models import tensor_of

    bad = np.ones((64, 64), np.float32)
    bad[3, 5] = np.inf
    tensors = {**llama_tensors(hidden=64, n_layers=2), "model.layers.1.self_attn.o_proj.weight": tensor_of(bad, "BF16")}
    hub.add_folder(NAME, write_checkpoint(tmp_path / "source", tensors))

    with pytest.raises(SourceError, match=r"o_proj.weight': the weight at \[3, 5\] is inf"):
        convert(NAME, tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_tensors_of_a_repository_can_be_read_in_any_order_outside_of_a_conversion(hub: Hub, tmp_path: Path) -> None:
    hub.add_folder(NAME, write_tiny(tmp_path / "source"))
    source = open_source(NAME)
    for name, tensor in sorted(tiny_tensors().items(), reverse=True):
        out = bytearray(len(tensor.data) - 2)
        source.read_into(source.tensors[name], 2, memoryview(out))
        assert out == tensor.data[2:]
    source.close()


def test_an_artifact_is_compared_with_its_source_commit(
    hub: Hub, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add_folder(NAME, source)
    convert(NAME, tmp_path / "out")
    write_checkpoint(tmp_path / "other", llama_tensors(**SIZES, seed=9), n_shards=3, config=llama_config(**SIZES))
    hub.add_folder(NAME, tmp_path / "other")

    assert run(["verify", str(tmp_path / "out"), "--source", NAME]) == 0

    assert "codes and scales as the recipe gives: 21 of 21" in capsys.readouterr().out
