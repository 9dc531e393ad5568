"""Headers of the shards of a directory in the Hub's layout: `model.safetensors`, or an index and its shards."""

from __future__ import annotations

import os
from pathlib import Path

from qformat import strict_json
from qformat.artifact import header
from qformat.artifact.limits import MAX_INDEX_NBYTES
from qformat.artifact.reading.regular_files import check_plain_name
from qformat.artifact.reading.structure import Located, ShardLayout
from qformat.artifact.sources.source_files import open_source_file, read_source_file
from qformat.errors import InvalidFileError, Reason
from qformat.names import INDEX_NAME, SINGLE_SHARD_NAME


def read_headers(path: Path, *, error: type[InvalidFileError]) -> ShardLayout:
    """Read and check the headers of all shards of a directory, which is not an artifact.

    Args:
        path: Directory.
        error: Class of the error to raise.

    Raises:
        InvalidFileError: A file is damaged, or a tensor occurs twice. The class is `error`.
    """
    located: dict[str, Located] = {}
    shard_nbytes: dict[str, int] = {}
    for shard in _shard_names(path, error):
        with open_source_file(path, shard, error=error) as descriptor:
            shard_nbytes[shard] = os.fstat(descriptor).st_size
            entries = header.read(descriptor, path / shard, error=error, of_artifact=False).tensors
        for name, entry in entries.items():
            if name in located:
                raise error(Reason.DUPLICATE_TENSOR, path / shard, f"also occurs in {located[name].shard}", tensor=name)
            located[name] = Located(shard, entry)
    return ShardLayout(path, shard_nbytes, located, {})


def _shard_names(path: Path, error: type[InvalidFileError]) -> list[str]:
    if not path.is_dir():
        raise error(Reason.MISSING_FILE, path, "does not exist or is not a directory")
    index_path = path / INDEX_NAME
    if not os.path.lexists(index_path):
        return [SINGLE_SHARD_NAME]
    data = read_source_file(path, INDEX_NAME, max_nbytes=MAX_INDEX_NBYTES, error=error)
    index = strict_json.loads(data, path=index_path, max_nbytes=MAX_INDEX_NBYTES, error=error)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise error(Reason.INDEX_MISMATCH, index_path, "is missing or is not an object", field="weight_map")
    names = set()
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise error(
                Reason.INDEX_MISMATCH, index_path, f"{shard!r} is not a file name", tensor=tensor, field="weight_map"
            )
        check_plain_name(shard, path=index_path, error=error)
        names.add(shard)
    return sorted(names)
