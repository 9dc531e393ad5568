"""Responses of the stand-in, and the faults that change them in transit."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tests.hub_stand_in.faults import Fault
from tests.hub_stand_in.repositories import StoredFile


@dataclass
class Answer:
    """Status, headers and a body: bytes, or a file that supports ranges."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | StoredFile = b""


def as_json(record: object, status: int = 200, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, {"Content-Type": "application/json", **named}, json.dumps(record).encode())


def refusal(status: int, code: str, message: str) -> Answer:
    """Return the Hub's response to a missing or forbidden request."""
    return as_json({"error": message}, status, X_Error_Code=code, X_Error_Message=message)


@dataclass
class Sending:
    """The data that is sent: status, headers, announced length, and the pieces of the body."""

    status: int
    headers: dict[str, str]
    nbytes: int
    pieces: Iterable[bytes]


def sending(answer: Answer, asked_range: str | None, faults: Iterable[Fault]) -> Sending:
    """Select the requested range of a file, and apply the faults that change headers or bytes."""
    kinds = {fault.kind: fault for fault in faults}
    headers = dict(answer.headers)
    answer = _replaced(answer, kinds, headers)
    if isinstance(answer.body, bytes):
        result = Sending(answer.status, headers, len(answer.body), [answer.body])
    else:
        result = _file(answer.body, answer.status, headers, None if "whole" in kinds else asked_range, kinds)
    if "flip" in kinds:
        result.pieces = _flipped(result.pieces, kinds["flip"].nbytes)
    return result


def _replaced(answer: Answer, kinds: dict[str, Fault], headers: dict[str, str]) -> Answer:
    """Return another answer if a fault replaces it, and set its headers."""
    if "html" in kinds:
        headers["Content-Type"] = "text/html"
        return Answer(200, body=b"<!DOCTYPE html><html><body>Please log in to the network</body></html>")
    if "gzip" in kinds:
        headers["Content-Encoding"] = "gzip"
        return Answer(200, body=gzip.compress(bytes(kinds["gzip"].nbytes)))
    if "endless_pages" in kinds:
        number = kinds["endless_pages"].n_done
        headers["Link"] = f'<?recursive=true&cursor={number}>; rel="next"'
        return as_json([{"type": "directory", "oid": "0" * 40, "size": 0, "path": f"folder-{number}"}])
    if "same_page" in kinds:
        headers["Link"] = '<?recursive=true&expand=false>; rel="next"'
        return as_json([{"type": "directory", "oid": "0" * 40, "size": 0, "path": "folder"}])
    return answer


def _file(
    file: StoredFile, status: int, headers: dict[str, str], asked: str | None, kinds: dict[str, Fault]
) -> Sending:
    headers["Accept-Ranges"] = "bytes"
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", asked or "")
    if found is None or found.group(0) == "bytes=-":
        return Sending(status, headers, file.nbytes, file.pieces(0, file.nbytes))
    first, last = found.groups()
    if first == "":
        start, stop = max(0, file.nbytes - int(last)), file.nbytes
    else:
        start, stop = int(first), min(file.nbytes, int(last) + 1) if last else file.nbytes
    if start >= stop:
        return Sending(416, {**headers, "Content-Range": f"bytes */{file.nbytes}"}, 0, [])
    if "short_range" in kinds:
        stop = start + max(1, (stop - start) // 2)
    if "no_content_range" not in kinds:
        shift = "wrong_content_range" in kinds
        headers["Content-Range"] = f"bytes {start + shift}-{stop - 1 + shift}/{file.nbytes}"
    return Sending(206, headers, stop - start, file.pieces(start, stop))


def _flipped(pieces: Iterable[bytes], position: int) -> Iterator[bytes]:
    begin = 0
    for piece in pieces:
        if begin <= position < begin + len(piece):
            changed = bytearray(piece)
            changed[position - begin] ^= 1
            yield bytes(changed)
        else:
            yield piece
        begin += len(piece)
