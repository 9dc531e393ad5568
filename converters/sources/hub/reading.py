"""Reads a repository during a conversion: one stream in the order of the files that verifies each SHA-256 on the way.

Besides the encoded tensors, the journal of the conversion records how far each shard is verified:

    {"hashed": TENSOR, "shard": FILE, "source_xxh3": DIGEST, "sha256_state": STATE}   before {"tensor": TENSOR, ...}
    {"distrusted": FILE}                                                              its SHA-256 does not match

The state is that of the shard's SHA-256 after the tensor's last byte. A later run therefore fetches neither what is
encoded nor, to verify a shard, what comes before its last state. Only a tensor that was hashed but not encoded when the
run ended is fetched again; its XXH3-128 shows that the bytes are the same. If the SHA-256 of a shard does not match,
nothing that came from this shard is trusted any more.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qformat.artifact.digests import Xxh3
from qformat.artifact.header import TensorEntry
from qformat.artifact.layout import natural_order
from qformat.artifact.manifest import JsonObject
from qformat.converters.sources.hub.files import HubFiles
from qformat.converters.sources.reading import Reading, Record
from qformat.converters.sources.source import SourceTensor
from qformat.errors import SourceError
from qformat.hub.reading.repository import digest_error
from qformat.hub.reading.resumable_sha256 import ResumableSha256
from qformat.hub.reading.stream import ByteStream, Span, telling


@dataclass(slots=True)
class _Proofs:
    """What the journal says: the XXH3-128 of each hashed tensor, and the latest SHA-256 state of each shard."""

    xxh3: dict[str, str] = field(default_factory=dict)
    states: dict[str, ResumableSha256] = field(default_factory=dict)


class HubReading(Reading):
    """Reads a repository during one run.

    Args:
        files: The files of the repository.
        entries: Shard and byte range of every tensor, keyed by name.
        ignored: Shard and byte range of the tensors that do not count. They are hashed only, for the SHA-256 of their
            shards.
    """

    def __init__(
        self,
        files: HubFiles,
        entries: Mapping[str, tuple[str, TensorEntry]],
        ignored: Sequence[tuple[str, TensorEntry]] = (),
    ) -> None:
        self._files = files
        self._entries = entries
        # No name of a tensor has a line break.
        self._ignored = {f"{shard}\n{entry.name}": (shard, entry) for shard, entry in ignored}
        self._proofs = _Proofs()
        self._proved = threading.Condition()
        self._record: Record = lambda entry: None
        self._stream: ByteStream | None = None
        self._hasher: threading.Thread | None = None
        self._failure: BaseException | None = None

    def trusted(self, entries: Sequence[JsonObject]) -> list[JsonObject]:
        """Return the entries of encoded tensors whose source bytes were hashed, without those of distrusted shards."""
        tensors: dict[str, JsonObject] = {}
        proofs = _Proofs()
        for entry in entries:
            if "distrusted" in entry:
                shard = str(entry["distrusted"])
                proofs.states.pop(shard, None)
                for name in [name for name in proofs.xxh3 if self._shard_of(name) == shard]:
                    del proofs.xxh3[name]
                    tensors.pop(name, None)
            elif "hashed" in entry:
                proofs.xxh3[str(entry["hashed"])] = str(entry["source_xxh3"])
                proofs.states[str(entry["shard"])] = ResumableSha256.from_text(str(entry["sha256_state"]))
            elif "tensor" in entry:
                name = str(entry["tensor"])
                if self._is_whole(name) or proofs.xxh3.get(name) == entry.get("source_xxh3"):
                    tensors[name] = entry
        self._proofs = proofs
        return list(tensors.values())

    def begin(self, tensors: Sequence[SourceTensor], record: Record) -> list[str]:
        """Start to fetch exactly what these tensors and the verification of their shards need.

        Args:
            tensors: Tensors that the run will read.
            record: Appends an entry to the journal.

        Returns:
            Their names in the order in which they must be started.
        """
        wanted = {tensor.name for tensor in tensors}
        spans, kept = [], []
        places = {**self._entries, **self._ignored}
        for name in sorted(places, key=lambda name: _order(*places[name])):
            shard, entry = places[name]
            hashed = self._proofs.states.get(shard)
            if self._files.shards[shard].whole is not None:
                kept += [name] if name in wanted else []
            elif name in wanted:
                in_order = hashed is None or entry.stop > hashed.nbytes or name not in self._proofs.xxh3
                spans.append(Span(name, shard, entry.start, entry.stop, in_order))
            elif name in self._ignored and (hashed is None or entry.stop > hashed.nbytes):
                spans.append(Span(name, shard, entry.start, entry.stop, in_order=True))
        self._record = record
        self._stream = self._files.stream = ByteStream(self._files.repository, spans, self._files.transfer)
        self._hasher = threading.Thread(target=self._hash, name="qformat-hub-sha256", daemon=True)
        self._hasher.start()
        return kept + [span.key for span in spans if span.key in wanted]

    def settle(self, tensor: SourceTensor, source_xxh3: str) -> None:
        """Wait until a tensor is hashed, and compare the hashed bytes with the encoded ones.

        Args:
            tensor: A tensor that was read to its end.
            source_xxh3: XXH3-128 of the bytes that were encoded.

        Raises:
            SourceError: The bytes differ, or a shard's SHA-256 does not match.
        """
        if self._is_whole(tensor.name):
            return
        with self._proved:
            while tensor.name not in self._proofs.xxh3 and self._failure is None:
                self._proved.wait()
            if self._failure is not None:
                raise self._failure
            expected = self._proofs.xxh3[tensor.name]
            if source_xxh3 != expected:  # one of the two is damaged, and it is unknown which
                shown = f"{self._files.path / tensor.file}: tensor {tensor.name!r}"
                self._failure = digest_error(shown, source_xxh3, expected, SourceError)
                self._record({"distrusted": tensor.file})
                raise self._failure

    def finish(self) -> None:
        """Wait for the SHA-256 of the last shard.

        Raises:
            SourceError: A shard's SHA-256 does not match the commit.
        """
        assert self._hasher is not None
        self._hasher.join()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Close the stream and wait for the hashing thread, which then no longer writes to the journal."""
        if self._stream is not None and self._hasher is not None:
            self._stream.close()
            self._hasher.join()
        self._files.stream = None

    def _hash(self) -> None:
        assert self._stream is not None
        with telling(self._fail):
            self._hash_all(self._stream)

    def _fail(self, failure: BaseException) -> None:
        assert self._stream is not None
        self._stream.fail(failure)
        with self._proved:
            self._failure = self._failure or failure
            self._proved.notify_all()

    def _hash_all(self, stream: ByteStream) -> None:
        sha256 = dict(self._proofs.states)
        for name, state in sorted(sha256.items()):
            self._compare_complete(name, state)  # in case an earlier run ended before its comparison
        xxh3 = Xxh3()
        for span, data in stream.in_order():
            if span.file not in sha256:
                sha256[span.file] = ResumableSha256()
                sha256[span.file].update(self._files.shards[span.file].head)
            state = sha256[span.file]
            if len(data):
                if span.key in self._ignored:  # no one else takes these bytes
                    stream.read_into(span.key, state.nbytes - span.start, memoryview(bytearray(len(data))))
                state.update(data)
                xxh3.update(data)
                continue
            assert state.nbytes == span.stop, f"{span.key}: hashed up to byte {state.nbytes}, expected {span.stop}"
            digest, xxh3 = xxh3.hexdigest(), Xxh3()
            entry: JsonObject = {"hashed": span.key, "shard": span.file, "source_xxh3": digest}
            with self._proved:
                if self._failure is not None:  # no entry about a shard may follow the one that distrusts it
                    return
                self._record({**entry, "sha256_state": state.to_text()})
                self._proofs.xxh3[span.key] = digest
                self._proved.notify_all()
            self._compare_complete(span.file, state)

    def _compare_complete(self, name: str, state: ResumableSha256) -> None:
        """Compare a shard's SHA-256 with the commit's once every byte was hashed."""
        file = self._files.shards[name].file
        if state.nbytes == file.nbytes and (found := state.hexdigest()) != file.sha256:
            self._record({"distrusted": name})
            raise digest_error(str(self._files.path / name), found, str(file.sha256), SourceError)

    def _shard_of(self, name: str) -> str | None:
        return self._entries[name][0] if name in self._entries else None

    def _is_whole(self, name: str) -> bool:
        shard = self._shard_of(name)
        return shard is not None and self._files.shards[shard].whole is not None


def _order(shard: str, entry: TensorEntry) -> tuple[object, int, int]:
    return natural_order(shard), entry.start, entry.stop
