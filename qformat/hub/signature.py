"""OpenSSF Model Signing signatures over the manifest and every file that it lists (spec section 7.5).

The manifest or the listing of the Hub has the digests that a signature covers, so no file is read again. A signature
is the same as that of `model_signing sign key FOLDER --signature FOLDER/model.sig`, and `model_signing verify key`
checks it.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qformat.artifact.limits import MAX_MANIFEST_NBYTES
from qformat.artifact.manifest import Manifest
from qformat.artifact.reading.manifest_parser import parse
from qformat.artifact.reading.regular_files import read_small
from qformat.errors import ArtifactError, Reason, UsageError, install_extra
from qformat.hub.reading.listing import PublishedArtifact
from qformat.named_files import MAX_OPTION_FILE_NBYTES, read_named
from qformat.names import MANIFEST_NAME, SIGNATURE_NAME

if TYPE_CHECKING:
    import model_signing.hashing
    import model_signing.manifest

MAX_SIGNATURE_NBYTES = 4 * 2**20

_IGNORED = (SIGNATURE_NAME, ".git", ".gitattributes", ".github", ".gitignore")
"""Names that a signature does not cover: the same as those that the command of model-signing ignores."""

_DIGESTS = re.compile(r": Expected 'Digest\(.*?\)', Actual 'Digest\(.*?\)'")
"""Two digests in Python's notation, which would fill forty lines with escapes."""


def sign(digests: Mapping[str, str], name: str, key: Path) -> bytes:
    """Return the signature of files.

    Args:
        digests: SHA-256 per name of file.
        name: Name of the model. It is informative.
        key: Elliptic-curve private key (PEM).

    Raises:
        UsageError: The key cannot be used, or model-signing is not installed.
    """
    signing, _ = _model_signing()
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / SIGNATURE_NAME
        try:
            read_named(key, max_nbytes=MAX_OPTION_FILE_NBYTES)
            config = signing.Config().use_elliptic_key_signer(private_key=key)
        except (OSError, ValueError, TypeError, AttributeError) as problem:
            raise UsageError(
                f"{key}: is not a private key that can sign: {_reason(problem)}. Create one with: "
                "openssl ecparam -genkey -name prime256v1 -noout -out KEY.pem"
            ) from None
        config.set_hashing_config(_known_digests(digests, name)).sign(Path(folder), written)
        return read_named(written, max_nbytes=MAX_SIGNATURE_NBYTES)


def public_key_of(key: Path) -> bytes:
    """Return the public key (PEM) of a private key.

    Raises:
        UsageError: The file is not a private key (PEM), or model-signing is not installed.
    """
    _model_signing()
    from cryptography.hazmat.primitives import serialization

    try:
        private = serialization.load_pem_private_key(read_named(key, max_nbytes=MAX_OPTION_FILE_NBYTES), None)
    except (OSError, ValueError, TypeError) as problem:
        raise UsageError(f"{key}: is not a private key (PEM): {_reason(problem)}") from None
    public = private.public_key()
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def check_signature(signature: bytes, digests: Mapping[str, str], public_key: Path, *, where: Path | str) -> None:
    """Check that a signature covers exactly the given files and was made with the given key.

    Args:
        signature: Content of the signature file.
        digests: SHA-256 per name of file.
        public_key: Public key of the publisher (PEM).
        where: Path of the signature, for messages.

    Raises:
        ArtifactError: The signature is invalid (signature). The message lists what differs.
        UsageError: The public key cannot be used, or model-signing is not installed.
    """
    _, verifying = _model_signing()
    try:
        read_named(public_key, max_nbytes=MAX_OPTION_FILE_NBYTES)
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (OSError, ValueError, TypeError, AttributeError) as problem:
        raise UsageError(f"{public_key}: is not a public key (PEM): {_reason(problem)}") from None
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / SIGNATURE_NAME
        written.write_bytes(signature)
        try:
            config.set_hashing_config(_known_digests(digests, "")).verify(Path(folder), written)
        except _raised_by_bad_signatures() as problem:
            raise ArtifactError(
                Reason.SIGNATURE,
                where,
                f"is not a signature of these files by the key {public_key}: {_reason(problem)}",
                next_step="Do not trust these files unless the publisher can explain the difference",
            ) from None


def check_local_signature(artifact: Path, public_key: Path) -> None:
    """Check the signature in the directory of an artifact. The caller has compared the files with the manifest.

    Args:
        artifact: Directory of the artifact.
        public_key: Public key of the publisher (PEM).

    Raises:
        ArtifactError: The signature is missing (missing_file) or invalid (signature).
        UsageError: The public key cannot be used, or model-signing is not installed.
    """
    data = read_small(artifact, MANIFEST_NAME, max_nbytes=MAX_MANIFEST_NBYTES, error=ArtifactError)
    signature = read_small(artifact, SIGNATURE_NAME, max_nbytes=MAX_SIGNATURE_NBYTES, error=ArtifactError)
    digests = signed_digests(parse(data, artifact / MANIFEST_NAME), data)
    check_signature(signature, digests, public_key, where=artifact / SIGNATURE_NAME)


def check_published_signature(published: PublishedArtifact, public_key: Path) -> None:
    """Check the signature of an artifact on the Hub. The caller has compared the files with the manifest.

    Args:
        published: The artifact on the Hub.
        public_key: Public key of the publisher (PEM).

    Raises:
        ArtifactError: The signature is missing (missing_file) or invalid (signature).
        HubError: The signature cannot be downloaded.
        UsageError: The public key cannot be used, or model-signing is not installed.
    """
    signature = published.repository.read_small(SIGNATURE_NAME, max_nbytes=MAX_SIGNATURE_NBYTES)
    digests = signed_digests(published.manifest, published.manifest_bytes)
    check_signature(signature, digests, public_key, where=published.where / SIGNATURE_NAME)


def signed_digests(manifest: Manifest, data: bytes) -> dict[str, str]:
    """Return the SHA-256 per name of every file that a signature covers.

    Args:
        manifest: Manifest of the artifact.
        data: Content of the manifest file.
    """
    digests = {name: record.sha256 for name, record in manifest.files.items()}
    return {**digests, MANIFEST_NAME: hashlib.sha256(data).hexdigest()}


def _model_signing() -> tuple[Any, Any]:
    try:
        from model_signing import signing, verifying
    except ImportError:
        raise UsageError(f"signatures need model-signing. {install_extra('sign')}") from None
    return signing, verifying


def _raised_by_bad_signatures() -> tuple[type[Exception], ...]:
    """Return the exceptions that model-signing and its parsers raise for an invalid signature."""
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from google.protobuf.json_format import ParseError

    plain = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
    return (*plain, InvalidSignature, UnsupportedAlgorithm, ParseError)


def _known_digests(digests: Mapping[str, str], name: str) -> model_signing.hashing.Config:
    """Return a hashing configuration for model-signing that uses known digests instead of reading files."""
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
    """Return the message of a library in one line of at most 400 characters."""
    text = _DIGESTS.sub(" has another SHA-256", " ".join(str(problem).split())) or type(problem).__name__
    return text if len(text) <= 400 else text[:397] + "..."
