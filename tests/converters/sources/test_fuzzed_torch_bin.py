"""Any .bin file gives tensors that torch gives, too, or an error that names it. The pickle gets a new CRC-32."""

from __future__ import annotations

import io
import pickle
import struct
import warnings
import zipfile
from pathlib import Path
from random import Random

import torch

from qformat.converters.sources.torch_bin import TorchBin
from qformat.errors import SourceError
from tests.converters.sources.decoded_kinds import write_bin
from tests.corpus.fuzzing import RANDOM, edited_bytes, fuzz, lengths

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.weight": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T,
    "c": torch.zeros(0),
}


def zip_with(whole: bytes, suffix: str, data: bytes) -> bytes:
    """Return a zip file with other bytes in one member, laid out anew as torch does: data at multiples of 64 bytes."""
    source, target = io.BytesIO(whole), io.BytesIO()
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for member in old.infolist():
            content = data if member.filename.endswith(suffix) else old.read(member)
            info = zipfile.ZipInfo(member.filename)
            unpadded = target.tell() + 30 + len(member.filename.encode()) + 4
            info.extra = b"FB" + struct.pack("<H", -unpadded % 64) + b"Z" * (-unpadded % 64)
            new.writestr(info, content)
    return target.getvalue()


def pickled(whole: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(whole)) as members:
        return members.read(next(name for name in members.namelist() if name.endswith("/data.pkl")))


def read_all(folder: Path) -> dict[str, bytes] | None:
    """Return the bytes of all tensors, or None if the file is refused with its name."""
    try:
        source = TorchBin(folder)
    except SourceError as error:
        assert "pytorch_model.bin" in str(error)
        return None
    found = {}
    try:
        for name, tensor in source.tensors.items():
            assert tensor.nbytes <= 10_000
            out = bytearray(tensor.nbytes)
            source.read_into(tensor, 0, memoryview(out)) if out else None
            found[name] = bytes(out)
    except SourceError as error:
        assert "pytorch_model.bin" in str(error)
        return None
    finally:
        source.close()
    return found


def check_against_torch(path: Path, found: dict[str, bytes]) -> None:
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    assert found.keys() <= theirs.keys()
    for name, data in found.items():
        whole = theirs[name].contiguous().flatten()
        assert data == (whole.view(torch.uint8).numpy().tobytes() if whole.numel() else b"")


@lengths(60, 8_000)
def test_any_pickle_gives_what_torch_gives_or_is_refused(n_examples: int, tmp_path: Path) -> None:
    path = write_bin(tmp_path / "source", TENSORS) / "pytorch_model.bin"
    whole = path.read_bytes()

    def check(random: Random) -> None:
        path.write_bytes(zip_with(whole, "/data.pkl", edited_bytes(random, pickled(whole))))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if (found := read_all(path.parent)) is not None:
                check_against_torch(path, found)

    fuzz(n_examples, check, RANDOM)


@lengths(60, 8_000)
def test_any_bytes_of_the_zip_file_are_read_or_refused(n_examples: int, tmp_path: Path) -> None:
    path = write_bin(tmp_path / "source", TENSORS) / "pytorch_model.bin"
    whole = path.read_bytes()
    undamaged = read_all(path.parent)

    def check(random: Random) -> None:
        path.write_bytes(edited_bytes(random, whole))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = read_all(path.parent)
        # The CRC-32 covers pickle and data, so what is read is what was written.
        assert found is None or found == undamaged

    fuzz(n_examples, check, RANDOM)


@lengths(60, 8_000)
def test_files_that_are_no_zip_are_refused_without_running_their_pickle(n_examples: int, tmp_path: Path) -> None:
    path = write_bin(tmp_path / "source", TENSORS) / "pytorch_model.bin"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    forms = [path.read_bytes(), pickle.dumps({"a": [1.0]}), b"\x80\x02cos\nsystem\n(S'exit 1'\ntR."]

    def check(random: Random) -> None:
        path.write_bytes(edited_bytes(random, random.choice(forms)))
        assert read_all(path.parent) is None

    fuzz(n_examples, check, RANDOM)
