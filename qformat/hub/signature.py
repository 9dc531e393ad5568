"""Signatures of artifacts: OpenSSF model-signing over the manifest and every file that it lists (spec section 7.5).

The digests that a signature covers are known (the manifest has them, or the Hub's listing), so that nothing is read
again. The signature is the one that `model_signing sign key FOLDER --signature FOLDER/model.sig` makes of the folder,
and `model_signing verify key` checks it.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qformat.artifact.limits import MAX_MANIFEST_NBYTES
from qformat.artifact.manifest import Manifest, parse
from qformat.artifact.reading.regular_files import read_small
from qformat.errors import ArtifactError, Reason, UsageError
from qformat.hub.reading.listing import PublishedArtifact
from qformat.names import MANIFEST_NAME, SIGNATURE_NAME

if TYPE_CHECKING:
    import model_signing.hashing
    import model_signing.manifest

MAX_SIGNATURE_NBYTES = 4 * 2**20

_IGNORED = (SIGNATURE_NAME, ".git", ".gitattributes", ".github", ".gitignore")
"""What is no part of a signed folder: the same names that the tool of model-signing leaves out."""

_DIGESTS = re.compile(r": Expected 'Digest\(.*?\)', Actual 'Digest\(.*?\)'")
"""Two digests as Python prints them: forty lines of escapes."""


def sign(digests: Mapping[str, str], name: str, key: Path) -> bytes:
    """Return the signature of files, given their SHA-256 by name, with an elliptic-curve private key (PEM).

    name: of the model, informative. Raises: UsageError for a key that cannot be used, or without model-signing.
    """
    signing, _ = _model_signing()
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / SIGNATURE_NAME
        try:
            config = signing.Config().use_elliptic_key_signer(private_key=key)
        except (OSError, ValueError, TypeError, AttributeError) as problem:
            raise UsageError(
                f"{key}: is no key to sign with: {_reason(problem)}. Make one with: "
                "openssl ecparam -genkey -name prime256v1 -noout -out KEY.pem"
            ) from None
        config.set_hashing_config(_known_digests(digests, name)).sign(Path(folder), written)
        return written.read_bytes()


def public_key_of(key: Path) -> bytes:
    """Return the public key (PEM) that belongs to a private key. Raises UsageError."""
    _model_signing()
    from cryptography.hazmat.primitives import serialization

    try:
        private = serialization.load_pem_private_key(key.read_bytes(), None)
    except (OSError, ValueError, TypeError) as problem:
        raise UsageError(f"{key}: is no private key: {_reason(problem)}") from None
    public = private.public_key()
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def check_signature(signature: bytes, digests: Mapping[str, str], public_key: Path, *, where: Path | str) -> None:
    """Check that a signature is of exactly these files, given their SHA-256 by name, and made with this key.

    Raises: ArtifactError (signature) naming what differs; UsageError for a public key that cannot be used.
    """
    _, verifying = _model_signing()
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (OSError, ValueError, TypeError, AttributeError) as problem:
        raise UsageError(f"{public_key}: is no public key (PEM): {_reason(problem)}") from None
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / SIGNATURE_NAME
        written.write_bytes(signature)
        try:
            config.set_hashing_config(_known_digests(digests, "")).verify(Path(folder), written)
        except _raised_by_bad_signatures() as problem:
            raise ArtifactError(
                Reason.SIGNATURE,
                where,
                f"is no signature of these files with the key {public_key}: {_reason(problem)}",
                next_step="Trust it only if the publisher can explain that",
            ) from None


def check_local_signature(artifact: Path, public_key: Path) -> None:
    """Check the signature beside the manifest of a folder, whose files were compared with the manifest already.

    Raises: ArtifactError (missing_file, signature); UsageError for a public key that cannot be used.
    """
    data = read_small(artifact, MANIFEST_NAME, max_nbytes=MAX_MANIFEST_NBYTES, error=ArtifactError)
    signature = read_small(artifact, SIGNATURE_NAME, max_nbytes=MAX_SIGNATURE_NBYTES, error=ArtifactError)
    digests = signed_digests(parse(data, artifact / MANIFEST_NAME), data)
    check_signature(signature, digests, public_key, where=artifact / SIGNATURE_NAME)


def check_published_signature(published: PublishedArtifact, public_key: Path) -> None:
    """Check the signature of an artifact on the Hub, whose files were compared with the manifest already.

    Raises: ArtifactError (missing_file, signature); HubError; UsageError for a public key that cannot be used.
    """
    signature = published.repository.read_small(SIGNATURE_NAME, max_nbytes=MAX_SIGNATURE_NBYTES)
    digests = signed_digests(published.manifest, published.manifest_bytes)
    check_signature(signature, digests, public_key, where=published.where / SIGNATURE_NAME)


def signed_digests(manifest: Manifest, data: bytes) -> dict[str, str]:
    """Return the SHA-256 of every file that a signature covers, by name. data: the manifest's bytes."""
    digests = {name: record.sha256 for name, record in manifest.files.items()}
    return {**digests, MANIFEST_NAME: hashlib.sha256(data).hexdigest()}


def _model_signing() -> tuple[Any, Any]:
    try:
        from model_signing import signing, verifying
    except ImportError:
        raise UsageError("signatures need model-signing: pip install 'qformat[sign]'") from None
    return signing, verifying


def _raised_by_bad_signatures() -> tuple[type[Exception], ...]:
    """Return what model-signing and its parsers of JSON, base64 and protobuf raise for a stranger's file."""
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from google.protobuf.json_format import ParseError

    plain = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
    return (*plain, InvalidSignature, UnsupportedAlgorithm, ParseError)


def _known_digests(digests: Mapping[str, str], name: str) -> model_signing.hashing.Config:
    """Return a way of hashing for model-signing that hashes nothing: the digests are known."""
    from model_signing import hashing, manifest
    from model_signing._hashing.hashing import Digest

    class Known(hashing.Config):
        def hash(self, model_path: object, *, files_to_hash: object = None) -> model_signing.manifest.Manifest:
            method = manifest.SerializationType.from_args(
                {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": list(_IGNORED)}
            )
            items = [method.new_item(file, Digest("sha256", bytes.fromhex(hexa))) for file, hexa in digests.items()]
            return manifest.Manifest(name, items, method)

    config: model_signing.hashing.Config = cast(Any, Known)()
    return config


def _reason(problem: Exception) -> str:
    """Return what a library says, in one line of a readable length."""
    text = _DIGESTS.sub(" has another SHA-256", " ".join(str(problem).split())) or type(problem).__name__
    return text if len(text) <= 400 else text[:397] + "..."
