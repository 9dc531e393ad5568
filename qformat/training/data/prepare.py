"""Tokenises training data through a cache: the entry point `prepare_data`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from qformat import strict_json
from qformat.artifact.digests import xxh3
from qformat.artifact.writing.disk import Disk
from qformat.errors import DataError, Option, UsageError
from qformat.strict_json import Json
from qformat.training.data.place import MAX_ROW_NBYTES
from qformat.training.data.reading.read_rows import BadRows, read_rows
from qformat.training.data.reading.sources import (
    DataFile,
    FileState,
    Source,
    check_unchanged,
    find_files,
    read_state,
)
from qformat.training.data.render import LossOn, Rendered, Renderer
from qformat.training.data.statistics import DataStatistics, Dropped
from qformat.training.data.token_cache import (
    CACHE_VERSION,
    CachedTokens,
    CacheWriter,
    default_folder,
    locked,
    open_cache,
)
from qformat.training.data.tokenise import Tokens, in_batches, own_tokenizer, tokenise
from qformat.training.data.tokenised_data import TokenisedData

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


class TooLong(StrEnum):
    """How to treat an example of more than max_length tokens."""

    TRUNCATE = "truncate"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class DataSettings:
    """All settings that the tokens depend on.

    Attributes:
        max_length: Largest number of tokens in an example.
        too_long: "truncate" keeps the first max_length tokens of a longer example, "drop" drops the example.
        loss_on: "completions" trains on completions and assistant turns, "all" on every token.
        skip_bad_lines: Whether to skip and count unusable rows instead of stopping at the first one.
        max_row_nbytes: Largest size of a row in bytes.
    """

    max_length: int
    too_long: TooLong | str = TooLong.TRUNCATE
    loss_on: LossOn | str = LossOn.COMPLETIONS
    skip_bad_lines: bool = False
    max_row_nbytes: int = MAX_ROW_NBYTES

    def __post_init__(self) -> None:
        for name, choices in (("too_long", TooLong), ("loss_on", LossOn)):
            if getattr(self, name) not in list(choices):
                raise UsageError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(choices)}")
        if self.max_length < 2:
            raise UsageError(
                f"max_length={self.max_length}: expected at least 2, because nothing predicts the first token"
            )
        if self.max_row_nbytes < 1:
            raise UsageError(f"max_row_nbytes={self.max_row_nbytes}: expected at least 1")

    def to_json(self) -> dict[str, Json]:
        """Return the settings as JSON."""
        return {
            "max_length": self.max_length,
            "too_long": str(self.too_long),
            "loss_on": str(self.loss_on),
            "skip_bad_lines": self.skip_bad_lines,
            "max_row_nbytes": self.max_row_nbytes,
        }


def prepare_data(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    *,
    cache: Path | None = None,
    split: str = "train",
    on_rows: Callable[[int], None] | None = None,
) -> TokenisedData:
    """Return the tokenised examples of a source, from the cache if it has them.

    An existing cache is verified byte by byte, at several GB/s, and rebuilt if it is damaged. If a template prints the
    date, the examples show the day on which the cache was built.

    Args:
        source: Files, folders or Hub datasets (see `find_files`).
        tokenizer: Fast tokenizer of the model.
        settings: Settings that the tokens depend on.
        cache: Directory of the cache. Defaults to `default_folder()`.
        split: Split to read from Hub datasets.
        on_rows: Receives the number of rows read so far while the cache is built.

    Returns:
        The tokenised examples.

    Raises:
        DataError: A row cannot be used, no example is left, or a file changed while it was read.
        UsageError: The source does not exist, or the tokenizer cannot be used.
        TargetError: The cache cannot be written.
    """
    files = find_files(source, split=split)
    states = [read_state(file) for file in files]
    backend = own_tokenizer(tokenizer)
    content_digest = _content_digest(files, states)
    key = _key(content_digest, tokenizer, backend, settings)
    folder = default_folder() if cache is None else cache
    cached = open_cache(folder, key, every_byte=True)
    if cached is None:
        cached = _build(folder, key, files, states, content_digest, tokenizer, backend, settings, on_rows)
    return TokenisedData(cached)


def _build(
    folder: Path,
    key: str,
    files: list[DataFile],
    states: list[FileState],
    content_digest: str,
    tokenizer: PreTrainedTokenizerBase,
    backend: Tokenizer,
    settings: DataSettings,
    on_rows: Callable[[int], None] | None,
) -> CachedTokens:
    disk = Disk()
    with locked(folder, key, disk):
        # Another process may have built the cache while this one waited for the lock.
        cached = open_cache(folder, key, every_byte=True)
        if cached is not None:
            return cached
        writer = CacheWriter(folder, key, disk)
        try:
            build = _Build(tokenizer, backend, settings)
            for examples in build.examples(files, on_rows):
                writer.append(examples)
            for file, state in zip(files, states, strict=True):
                check_unchanged(file, state)
            statistics = build.statistics()
            if not statistics.examples:
                raise _nothing_left(files, statistics)
            writer.finish(statistics, content_digest)
        finally:
            writer.close()
        cached = open_cache(folder, key)
        assert cached is not None, f"{folder / key}: cannot be read back"
        return cached


class _Build:
    """Tokenises rows batch by batch and counts the outcomes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, backend: Tokenizer, settings: DataSettings) -> None:
        self._renderer = Renderer(tokenizer, LossOn(settings.loss_on))
        self._backend = backend
        self._bos_id = tokenizer.bos_token_id
        self._settings = settings
        self._bad = BadRows(skip=settings.skip_bad_lines)
        self._dropped: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._converted: Counter[str] = Counter()
        self._longest = 0

    def examples(self, files: list[DataFile], on_rows: Callable[[int], None] | None) -> Iterator[list[Tokens]]:
        """Yield the examples of all rows, in order, a batch at a time."""
        for batch in in_batches(self._rendered(files)):
            tokens = tokenise(self._backend, batch, bos_id=self._bos_id)
            kept = [example for example in map(self._fit, tokens) if example is not None]
            self._counts["rows"] += len(batch)
            self._counts["examples"] += len(kept)
            for example in kept:
                self._counts["tokens"] += len(example.ids)
                self._counts["trained_tokens"] += int(example.trained.sum())
                self._longest = max(self._longest, len(example.ids))
            if on_rows is not None:
                on_rows(self._counts["rows"] + self._bad.counts.total())
            yield kept

    def statistics(self) -> DataStatistics:
        """Return the counts so far."""
        return DataStatistics(
            rows=self._counts["rows"] + self._bad.counts.total(),
            examples=self._counts["examples"],
            tokens=self._counts["tokens"],
            trained_tokens=self._counts["trained_tokens"],
            longest=self._longest,
            truncated=self._counts["truncated"],
            dropped=dict(self._dropped),
            bad=dict(self._bad.counts),
            converted=dict(self._converted),
        )

    def _rendered(self, files: list[DataFile]) -> Iterator[Rendered]:
        rows = read_rows(files, self._bad, max_row_nbytes=self._settings.max_row_nbytes)
        for row, rendered in self._renderer.render_all(rows):
            if isinstance(rendered, DataError):
                self._bad.refuse(rendered)
                continue
            if row.converted_from is not None:
                self._converted[row.converted_from] += 1
            yield rendered

    def _fit(self, tokens: Tokens) -> Tokens | None:
        """Return an example within the limit that has trained tokens. Otherwise count the reason and return None."""
        limit = self._settings.max_length
        if not tokens.trained.any():
            self._dropped[Dropped.NOTHING_TO_TRAIN] += 1
            return None
        if len(tokens.ids) <= limit:
            return tokens
        if self._settings.too_long == TooLong.DROP:
            self._dropped[Dropped.TOO_LONG] += 1
            return None
        cut = Tokens(tokens.ids[:limit], tokens.trained[:limit])
        if not cut.trained.any():
            self._dropped[Dropped.CUT_TO_NOTHING] += 1
            return None
        self._counts["truncated"] += 1
        return cut


def _content_digest(files: list[DataFile], states: list[FileState]) -> str:
    """Return a digest of the formats, sizes and bytes of the files in reading order, but not of their names."""
    record = [[file.kind.value, state.nbytes, state.digest] for file, state in zip(files, states, strict=True)]
    return xxh3(strict_json.dumps(record).encode("utf-8"))


def _key(content_digest: str, tokenizer: PreTrainedTokenizerBase, backend: Tokenizer, settings: DataSettings) -> str:
    """Return a digest of everything that the tokens depend on, including the versions of the libraries."""
    record = {
        "cache_version": CACHE_VERSION,
        "data": content_digest,
        "tokenizer": xxh3(backend.to_str().encode("utf-8")),
        "special_tokens": tokenizer.special_tokens_map,
        "chat_template": tokenizer.chat_template,
        "settings": settings.to_json(),
        "libraries": [version(library) for library in ("tokenizers", "transformers", "trl")],
    }
    return xxh3(strict_json.dumps(record).encode("utf-8"))


def _nothing_left(files: list[DataFile], statistics: DataStatistics) -> DataError:
    reasons = chain(statistics.bad.items(), statistics.dropped.items())
    counted = ", ".join(f"{reason}: {count}" for reason, count in reasons) or "the data have no rows"
    return DataError(
        "no_example",
        ", ".join(str(file.path) for file in files[:3]) + (", ..." if len(files) > 3 else ""),
        f"no examples are left to train on ({counted})",
        place=None,
        next_step=("Check the data, ", Option("seq_len"), " and ", Option("too_long")),
    )
