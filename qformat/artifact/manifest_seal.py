"""Bytes of a manifest and its last member, the SHA-256 of the manifest itself (spec sections 7.3 and 7.4)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from qformat import strict_json
from qformat.errors import ArtifactError, Reason

_SEAL = re.compile(rb'  "manifest_sha256": "([0-9a-f]{64})"\n}\n\Z')

_UNSEALED = b'  "manifest_sha256": "' + b"0" * 64 + b'"\n}\n'
"""Last bytes of a manifest before its digest is inserted."""


def sealed(record: Mapping[str, object]) -> bytes:
    """Return the bytes of a manifest, including its digest (spec section 7.4).

    Args:
        record: All members except the last one, in their order.
    """
    # One line per member and per tensor keeps the file small and readable with ordinary tools.
    lines = ["{"]
    for key, value in record.items():
        if key in {"tensors", "files"}:
            assert isinstance(value, dict)
            entries = [f"    {strict_json.dumps(k)}: {strict_json.dumps(v)}" for k, v in value.items()]
            lines += [f"  {strict_json.dumps(key)}: {{", ",\n".join(entries), "  },"]
        else:
            lines.append(f"  {strict_json.dumps(key)}: {strict_json.dumps(value)},")
    return seal("\n".join(lines).encode("utf-8") + b"\n" + _UNSEALED)


def seal(unsealed: bytes) -> bytes:
    """Insert the digest of a manifest that has 64 zeros in place of its digest."""
    digest = hashlib.sha256(unsealed).hexdigest().encode("ascii")
    return unsealed[: -len(_UNSEALED)] + _UNSEALED.replace(b"0" * 64, digest)


def check_seal(data: bytes, path: Path) -> None:
    """Check that a manifest ends with its own SHA-256.

    Args:
        data: Bytes of the manifest.
        path: Path of the manifest, for error messages.

    Raises:
        ArtifactError: The digest is missing or wrong (manifest_digest).
    """
    match = _SEAL.search(data)
    if match is None:
        raise ArtifactError(Reason.MANIFEST_DIGEST, path, "does not end with its own digest", field="manifest_sha256")
    found = match[1].decode("ascii")
    expected = hashlib.sha256(data[: match.start()] + _UNSEALED).hexdigest()
    if found != expected:
        raise ArtifactError(
            Reason.MANIFEST_DIGEST,
            path,
            f"the manifest was changed: it contains the digest {found}, expected {expected}",
            field="manifest_sha256",
            next_step="Fetch or convert the artifact again",
        )
