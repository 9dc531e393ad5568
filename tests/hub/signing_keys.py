"""Key pairs for signatures, if model-signing is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from qformat.hub.signature import public_key_of

pytest.importorskip("model_signing")


def write_key(folder: Path, name: str = "key") -> Path:
    """Write a key pair as NAME.pem and NAME.pub, and return the path of the private key."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    path = folder / f"{name}.pem"
    form = serialization.PrivateFormat.PKCS8
    path.write_bytes(private.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    path.with_suffix(".pub").write_bytes(public_key_of(path))
    return path
