"""Any seal of a checkpoint is read or refused, whether its digest of itself is right or not."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from qformat import strict_json
from qformat.artifact.digests import xxh3
from qformat.errors import AdapterError
from qformat.training.checkpoints import CheckpointFolder, read_checkpoint
from tests.corpus.damage.odd_json import odd_edit
from tests.corpus.fuzzing import RANDOM, edited_bytes, fuzz, lengths


@lengths(150, 10_000)
def test_any_seal_is_read_or_refused_with_its_checkpoint(n_examples: int, tmp_path: Path) -> None:
    with CheckpointFolder(tmp_path, keep=1).writing(5, {"data": "x", "settings": {"rank": 4}}) as folder:
        (folder / "optimizer.pt").write_bytes(b"state")
    checkpoint = tmp_path / "checkpoint-5"
    path = checkpoint / "checkpoint.json"
    whole = json.loads(path.read_bytes())

    def check(random: Random) -> None:
        seal = json.loads(json.dumps(whole))
        for _ in range(random.randint(0, 2)):
            odd_edit(random, seal)
        if random.random() < 0.8:
            seal.pop("seal_xxh3", None)
            seal["seal_xxh3"] = xxh3(strict_json.dumps(seal).encode("utf-8", "surrogatepass"))
        data = strict_json.dumps(seal).encode("utf-8", "surrogatepass")
        path.write_bytes(edited_bytes(random, data) if random.random() < 0.3 else data)
        try:
            found = read_checkpoint(checkpoint)
        except AdapterError as error:
            assert "checkpoint-5" in str(error)
        else:
            assert type(found.step) is int

    fuzz(n_examples, check, RANDOM)
