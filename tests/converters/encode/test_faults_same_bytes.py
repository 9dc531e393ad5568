"""The same input gives the same bytes, exactly those that the plan predicts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from qformat.artifact import header
from qformat.artifact.layout import alignment
from qformat.artifact.reading.reader import open_artifact
from qformat.artifact.reading.verify import verify_integrity
from qformat.artifact.sources.stand_ins import stand_in
from qformat.converters.convert import ConversionOptions, convert, plan
from qformat.converters.encode.tasks import PackedTask
from qformat.errors import ArtifactError
from tests.converters.faulty_disk import FaultyDisk
from tests.small_models import contents, llama_config, llama_tensors, raw_tensor, weight, write_checkpoint, write_llama

# Hypothesis draws texts of the code, too, such as those that the Hub answers in place of a file.
CONTENTS = st.binary(max_size=99).filter(lambda data: stand_in("tokenizer.json", data) is None)

SMALL_SHARDS = ConversionOptions(max_shard_nbytes=5000)


def converted(source: Path, out: Path, **arguments: object) -> dict[str, bytes]:
    convert(source, out, SMALL_SHARDS, disk=FaultyDisk(), **arguments)  # type: ignore[arg-type]
    return contents(out)


@pytest.mark.parametrize("workers", [1, 2, 7, 64])
def test_the_number_of_workers_does_not_change_any_byte(workers: int, tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source", n_shards=2)
    assert converted(source, tmp_path / "one", workers=1) == converted(source, tmp_path / "n", workers=workers)


def test_a_run_at_another_time_and_place_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_llama(tmp_path / "source", n_shards=2)
    first = converted(source, tmp_path / "first")
    elsewhere = tmp_path / "elsewhere" / "another name"
    elsewhere.mkdir(parents=True)
    for name, data in reversed(contents(source).items()):
        (elsewhere / name).write_bytes(data)
        os.utime(elsewhere / name, (0, 0))
    monkeypatch.chdir(elsewhere.parent)
    monkeypatch.setenv("TZ", "Pacific/Chatham")
    monkeypatch.setenv("LC_ALL", "tr_TR.UTF-8")
    assert converted(Path("another name"), Path("out")) == first


@pytest.mark.parametrize("n_shards", [2, 3, 5])
def test_the_same_tensors_in_other_source_shards_give_the_same_output_shards(n_shards: int, tmp_path: Path) -> None:
    one = converted(write_llama(tmp_path / "source 1"), tmp_path / "out 1")
    other = converted(write_llama(tmp_path / "source n", n_shards=n_shards), tmp_path / "out n")
    assert one.keys() == other.keys()
    assert {name for name in one if one[name] != other[name]} == {"qformat.json"}  # which names the source's files


DTYPES = ("BF16", "F16", "F32")
LEAVES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "mlp.odd_thing", "input_layernorm")


@st.composite
def models(draw: st.DrawFn) -> dict[str, object]:
    """Draw tensors of all kinds: packed and kept, with odd sizes, empty and 0-dimensional ones among them."""
    characters = st.characters(categories=["L", "N", "P", "S"], exclude_characters="[]\\^$*+?{}|()")
    layers = st.integers(0, 11)
    names = draw(
        st.lists(
            st.one_of(
                st.builds(lambda n, leaf: f"model.layers.{n}.{leaf}.weight", layers, st.sampled_from(LEAVES)),
                st.text(characters, min_size=1, max_size=12),
                st.sampled_from(["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]),
            ),
            min_size=1,
            max_size=12,
            unique=True,
        )
    )  # fmt: skip
    tensors = {}
    for seed, name in enumerate(names):
        if draw(st.booleans()) or not name.endswith(".weight"):
            shape = draw(st.lists(st.integers(0, 9), max_size=4))
            shape = [1] if shape == [0] else shape  # an empty vector in the place of a matrix is rejected
            dtype = draw(st.sampled_from(DTYPES))
            if not name.endswith(".weight"):
                dtype = draw(st.sampled_from(["BOOL", "U8", "I8", "I16", "I32", "I64", "F8_E4M3", *DTYPES]))
            tensors[name] = raw_tensor(dtype, shape, seed=seed) if len(shape) != 2 else weight(shape, "BF16", seed=seed)
        else:
            rows, columns = (
                draw(st.integers(1, 70)),
                draw(st.sampled_from([1, 2, 3, 31, 32, 63, 64, 65, 127, 128, 300])),
            )
            tensors[name] = weight((rows, columns), draw(st.sampled_from(DTYPES)), seed=seed)
    assume(any(tensor.data for tensor in tensors.values()))  # a checkpoint of nothing is rejected
    return {
        "tensors": tensors,
        "n_shards": draw(st.integers(1, min(3, len(tensors)))),
        "side_files": draw(st.dictionaries(st.sampled_from(["LICENSE", "tokenizer.json"]), CONTENTS)),
        "options": ConversionOptions(
            block_size=draw(st.sampled_from([32, 64, 128, 256])),
            double_quant=draw(st.booleans()),
            max_shard_nbytes=draw(st.sampled_from([1, 500, 5000, 10**9])),
        ),
    }


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(models())
def test_a_plan_predicts_every_byte_of_a_random_model(
    tmp_path_factory: pytest.TempPathFactory, model: dict[str, object]
) -> None:
    folder = tmp_path_factory.mktemp("model")
    options = model.pop("options")
    assert isinstance(options, ConversionOptions)
    source = write_checkpoint(folder / "source", **model)  # type: ignore[arg-type]
    planned = plan(source, options)
    out = folder / "out"
    convert(source, out, options, disk=FaultyDisk())
    assert planned.nbytes == sum(path.stat().st_size for path in out.iterdir())
    with open_artifact(out) as artifact:
        assert set(artifact) == set(model["tensors"])  # type: ignore[call-overload]
        for task in planned.tasks:
            places = (
                {part.value: place for part, place in task.places.items()}
                if isinstance(task, PackedTask)
                else {"": task.place}
            )
            for suffix, place in places.items():
                located = artifact.located[task.source.name + suffix]
                assert (located.shard, located.entry.start, located.entry.nbytes) == (
                    place.shard,
                    place.start,
                    place.nbytes,
                )
                assert place.start % alignment(place.nbytes) == 0
        for name, tensor in model["tensors"].items():  # type: ignore[attr-defined]
            if not hasattr(artifact[name], "packed"):
                assert artifact[name].data.tobytes() == tensor.data  # type: ignore[union-attr]
    for shard in planned.shards:
        descriptor = os.open(out / shard.name, os.O_RDONLY)
        read = header.read(descriptor, out / shard.name, error=ArtifactError)
        os.close(descriptor)
        assert list(read.tensors) == [placed.tensor.name for placed in shard.tensors]
        assert read.data_start % 4096 == 0
    report = verify_integrity(out, sha256=True)
    assert report.passed, report.findings


def test_a_plan_reads_no_weight(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source")
    path = source / "model.safetensors"
    data = path.read_bytes()
    expected = plan(source)
    start = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[:start] + bytes(len(data) - start))
    assert plan(source) == expected


def test_a_model_without_weights_to_pack_becomes_an_artifact(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in llama_tensors().items() if "proj" not in name}
    source = write_checkpoint(tmp_path / "source", tensors, config=llama_config())
    convert(source, tmp_path / "out")
    assert verify_integrity(tmp_path / "out").passed
    assert plan(source).bits_per_weight == 0
