"""Streamed repositories whose tensors have names of wrappers, or more tensors than their index: read on demand."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from qformat.cli.main import run
from qformat.converters.convert import ConversionOptions
from qformat.errors import Reason, SourceError
from tests.converters.sources.hub.serving import NAME, SIZES, convert, fetched_ranges, serving, without_source
from tests.hub_stand_in import Hub
from tests.small_models import (
    llama_config,
    llama_tensors,
    safetensors_bytes,
    weight,
    write_checkpoint,
)

STRIP = ConversionOptions(strip_wrappers=True)
INDEX_WINS = ConversionOptions(index_wins=True)
STALE = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small repository as DDP names it."""
    tensors = {f"module.{name}": tensor for name, tensor in llama_tensors(**SIZES).items()}
    folder = tmp_path_factory.mktemp("wrapped") / "source"
    return write_checkpoint(folder, tensors, n_shards=3, config=llama_config(**SIZES))


@pytest.fixture(scope="module")
def overlaid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small repository with two stale tensors in its second shard; one is larger than the window of the stream."""
    tensors = llama_tensors(**SIZES)
    folder = tmp_path_factory.mktemp("overlaid") / "source"
    write_checkpoint(folder, tensors, n_shards=3, config=llama_config(**SIZES))
    members = dict(list(tensors.items())[1::3])
    stale = {"lm_head.weight": weight(tensors["lm_head.weight"].shape, seed=5), "a.stale": weight((512, 64), seed=6)}
    assert members.keys().isdisjoint(stale)
    (folder / STALE).write_bytes(safetensors_bytes({**members, **stale}))
    return folder


def check_each_byte_is_fetched_once(hub: Hub, source: Path) -> None:
    ranges = fetched_ranges(hub)
    assert all(stop <= start for (one, _, stop), (other, start, _) in pairwise(ranges) if one == other)
    assert sum(b - a for _, a, b in ranges) == sum(path.stat().st_size for path in source.glob("*.safetensors"))


@pytest.mark.parametrize("case", ["wrapped", "overlaid"])
@pytest.mark.parametrize("stop_after", [None, 1, 11, 21])
def test_a_streamed_repository_gives_the_bytes_of_a_checkpoint_without_them(
    case: str,
    stop_after: int | None,
    expected: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    source: Path = request.getfixturevalue(case)
    options, recorded = {"wrapped": (STRIP, ("stripped", ["module"])), "overlaid": (INDEX_WINS, ("index_wins", True))}[
        case
    ]
    calls = 0

    def stop(nbytes: int) -> None:
        nonlocal calls
        calls += 1
        if calls == stop_after:
            raise KeyboardInterrupt

    with serving(monkeypatch, tmp_path / "home") as hub:
        hub.add_folder(NAME, source)
        if stop_after is None:
            convert(NAME, tmp_path / "out", options)
            check_each_byte_is_fetched_once(hub, source)
        else:
            with pytest.raises(KeyboardInterrupt):
                convert(NAME, tmp_path / "out", options, on_progress=stop)
            convert(NAME, tmp_path / "out", options)
        assert without_source(tmp_path / "out") == expected
        source_record = json.loads((tmp_path / "out" / "qformat.json").read_bytes())["source"]
        assert source_record[recorded[0]] == recorded[1]
        if stop_after is None:
            assert run(["verify", str(tmp_path / "out"), "--source", NAME]) == 0


@pytest.mark.parametrize("case", ["wrapped", "overlaid"])
def test_without_the_option_such_a_repository_is_rejected(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    with serving(monkeypatch, tmp_path / "home") as hub:
        hub.add_folder(NAME, request.getfixturevalue(case))
        with pytest.raises(SourceError) as refused:
            convert(NAME, tmp_path / "out")
    wanted = {"wrapped": (Reason.UNKNOWN_TENSOR, "strip_wrappers"), "overlaid": (Reason.DUPLICATE_TENSOR, "index_wins")}
    reason, option = wanted[case]
    assert refused.value.reason is reason
    assert option in str(refused.value)


def test_a_damaged_shard_is_found_although_its_damage_lies_in_an_ignored_tensor(
    overlaid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(monkeypatch, tmp_path / "home", with_cdn=False) as hub:
        hub.add_folder(NAME, overlaid)
        # Two requests read the header. The next eight pieces are `a.stale`, whose name is the first.
        hub.faults.add("flip", route=rf"/{STALE}$", after=4, times=1, nbytes=50)
        with pytest.raises(SourceError, match=f"{STALE}: has the digest") as refused:
            convert(NAME, tmp_path / "out", INDEX_WINS)
    assert refused.value.reason is Reason.FILE_DIGEST
    assert not (tmp_path / "out").exists()
