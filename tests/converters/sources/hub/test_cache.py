"""The local cache of the Hub's client: files in it are used, but never trusted without a check."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from qformat.converters.convert import ConversionOptions
from qformat.converters.sources.open_source import open_source
from qformat.errors import SourceError, UsageError
from tests.converters.sources.hub.serving import (
    DATA,
    NAME,
    convert,
    converted,
    plan,
    serving,
    without_source,
)
from tests.hub_stand_in import Hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in without repositories."""
    with serving(monkeypatch, tmp_path / "home") as hub:
        yield hub


def test_the_cache_is_filled_by_keep_source_and_read_without_any_request_offline(
    hub: Hub, source: Path, expected: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub.add_folder(NAME, source)
    hub.repositories.commit(NAME, {"a-large-file-that-no-conversion-needs.bin": b"x" * 1000})
    convert(NAME, tmp_path / "kept", ConversionOptions(keep_source=True))
    assert without_source(tmp_path / "kept") == expected
    assert not hub.requests("no-conversion-needs")
    fetched = len(hub.requests(DATA))

    convert(NAME, tmp_path / "again")
    assert without_source(tmp_path / "again") == expected
    assert len(hub.requests(DATA)) == fetched  # headers and weights came from the cache

    hub.log.clear()
    convert(NAME, tmp_path / "offline", ConversionOptions(offline=True))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    convert(NAME, tmp_path / "by environment")
    assert not hub.log
    names = ("kept", "again", "offline", "by environment")
    manifests = {(tmp_path / name / "qformat.json").read_bytes() for name in names}
    assert len(manifests) == 1


def test_a_repository_missing_from_the_cache_is_reported_offline(hub: Hub, source: Path, tmp_path: Path) -> None:
    hub.add_folder(NAME, source)
    with pytest.raises(SourceError, match=r"is not in the local Hub cache.*leave out offline,"):
        convert(NAME, tmp_path / "out", ConversionOptions(offline=True))
    convert(NAME, tmp_path / "kept", ConversionOptions(keep_source=True))
    snapshot = next((tmp_path / "home" / "hub" / "models--owner--model" / "snapshots").iterdir())
    (snapshot / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(SourceError, match=r"model-00002-of-00003.safetensors: .*leave out offline,"):
        convert(NAME, tmp_path / "out", ConversionOptions(offline=True))

    convert(NAME, tmp_path / "out")  # online, what the cache lacks is streamed

    assert hub.requests(DATA)


def test_a_cached_blob_with_a_flipped_bit_is_reported_and_gives_no_artifact(
    hub: Hub, source: Path, tmp_path: Path
) -> None:
    hub.add_folder(NAME, source)
    convert(NAME, tmp_path / "kept", ConversionOptions(keep_source=True))
    snapshot = next((tmp_path / "home" / "hub" / "models--owner--model" / "snapshots").iterdir())
    blob = (snapshot / "model-00002-of-00003.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-5] ^= 16
    blob.write_bytes(data)

    with pytest.raises(SourceError, match=r"model-00002-of-00003.safetensors: has the digest"):
        convert(NAME, tmp_path / "out", ConversionOptions(offline=True))

    assert not (tmp_path / "out").exists()


def test_a_local_directory_takes_precedence_and_a_path_is_never_a_repository(
    hub: Hub, source: Path, expected: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="does not exist"):
        open_source(Path("owner/model"))
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "model").symlink_to(source)

    convert("owner/model", tmp_path / "out")

    assert without_source(tmp_path / "out") == expected
    assert not hub.log


@pytest.mark.parametrize(
    "options",
    [ConversionOptions(revision="main"), ConversionOptions(offline=True), ConversionOptions(keep_source=True)],
)
def test_options_for_repositories_are_rejected_for_directories(source: Path, options: ConversionOptions) -> None:
    with pytest.raises(UsageError, match="is not a Hub repository"):
        plan(source, options)


@pytest.mark.parametrize("keep_source", [False, True])
def test_another_encoding_is_decoded_from_the_cache_and_rejected_as_a_stream(
    hub: Hub, tmp_path: Path, keep_source: bool
) -> None:
    from tests.converters.sources.decoded_kinds import fp8_source

    hub.add_folder(NAME, fp8_source(tmp_path / "source"))
    options = ConversionOptions(keep_source=keep_source)
    if not keep_source:
        with pytest.raises(SourceError, match=r"cannot be streamed.*keep_source=True"):
            convert(NAME, tmp_path / "out", options)
        assert not hub.requests("tokenizer")
        return

    convert(NAME, tmp_path / "out", options)

    assert without_source(tmp_path / "out") == converted(tmp_path / "source", tmp_path / "local")
    recorded = json.loads((tmp_path / "out" / "qformat.json").read_bytes())["source"]
    assert (recorded["kind"], recorded["repository"]) == ("fp8", NAME)


def test_pytorch_files_are_converted_from_the_cache_compared_with_their_digests_and_pinned(
    hub: Hub, tmp_path: Path
) -> None:
    from tests.converters.sources.decoded_kinds import torch_llama, write_bin

    source = write_bin(tmp_path / "source", torch_llama())
    repository = hub.add_folder(NAME, source)
    first = repository.head.oid
    with pytest.raises(SourceError, match=r"cannot be streamed.*keep_source=True"):
        convert(NAME, tmp_path / "out")

    def stop(nbytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(NAME, tmp_path / "out", ConversionOptions(keep_source=True), on_progress=stop)
    hub.repositories.commit(NAME, {"README.md": b"the branch moves"})

    convert(NAME, tmp_path / "out", ConversionOptions(keep_source=True))

    assert without_source(tmp_path / "out") == converted(source, tmp_path / "local")
    recorded = json.loads((tmp_path / "out" / "qformat.json").read_bytes())["source"]
    assert (recorded["kind"], recorded["repository"], recorded["commit"]) == ("torch_bin", NAME, first)
    blob = next(path for path in (tmp_path / "home" / "hub").rglob("pytorch_model.bin")).resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    with pytest.raises(SourceError, match=r"pytorch_model.bin: has the digest"):
        convert(NAME, tmp_path / "again", ConversionOptions(offline=True))
