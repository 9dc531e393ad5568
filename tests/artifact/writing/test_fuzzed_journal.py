"""Whatever the journal of an interrupted run holds, a run goes on with its intact entries or refuses it."""

from __future__ import annotations

import copy
from itertools import takewhile
from pathlib import Path
from random import Random
from typing import Any

from qformat import strict_json
from qformat.artifact.digests import xxh3
from qformat.artifact.writing.disk import Disk
from qformat.artifact.writing.staging import Staging, begun_with, work_folder
from qformat.errors import QformatError
from tests.corpus.damage.odd_json import odd_edit
from tests.corpus.fuzzing import RANDOM, edited_bytes, fuzz, lengths

ENTRIES: list[Any] = [{"fingerprint": "x"}, {"part": "a", "digest": "b"}, {"sealing": {"config.json": "c"}}]


def journal(entries: list[Any]) -> bytes:
    texts = [strict_json.dumps(entry).encode() for entry in entries]
    return b"".join(xxh3(text).encode() + b" " + text + b"\n" for text in texts)


@lengths(150, 10_000)
def test_damaged_bytes_end_the_journal_at_the_last_intact_entry(n_examples: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    work = work_folder(out)
    work.mkdir()

    def check(random: Random) -> None:
        (work / "journal").write_bytes(edited_bytes(random, journal(ENTRIES)))
        assert begun_with(out) in ({}, *ENTRIES)

    fuzz(n_examples, check, RANDOM)


@lengths(100, 3_000)
def test_any_entries_with_right_digests_are_taken_or_refused(n_examples: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    work = work_folder(out)

    def check(random: Random) -> None:
        entries = copy.deepcopy(ENTRIES)
        odd_edit(random, entries)
        objects = list(takewhile(lambda entry: isinstance(entry, dict), entries))
        work.mkdir(exist_ok=True)
        (work / "lock").touch()
        (work / "journal").write_bytes(journal(entries))
        try:
            with Staging.begin(out, "x", disk=Disk()) as staging:
                assert staging.entries == objects[1:]
        except QformatError:
            assert (work / "journal").read_bytes() == journal(entries)

    fuzz(n_examples, check, RANDOM)
