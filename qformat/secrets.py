"""Hides secrets in messages: tokens of the Hub that this process uses, in every form that a server may send back.

Errors and log messages pass through `masked`. A server knows the token that it receives, and may repeat it in the
reason of a refusal, in a file name or in an address.
"""

from __future__ import annotations

import base64
import json
import os
import re
from urllib.parse import quote

MASK = "***"

_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_MIN_LENGTH = 4
"""Shorter values would hide ordinary words. No service issues such tokens."""

_ANY_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")
_SIGNED_PART = re.compile(r"(https?://[^\s'\"?]*\?)[^\s'\"]+")
"""The query of an address. That of an upload is a permission to write which is valid for hours."""

_known: set[str] = set()


def hide(secret: str) -> None:
    """Hide a value in all further messages of this process."""
    _known.add(secret)


def masked(text: str) -> str:
    """Return a text without the known tokens, what looks like a token, and the queries of addresses."""
    if not text:
        return text
    secrets = {secret.strip() for secret in (*_known, *map(os.environ.get, _VARIABLES)) if secret}
    forms = {form for secret in secrets if len(secret) >= _MIN_LENGTH for form in _forms(secret)}
    if forms:
        longest_first = sorted(forms, key=lambda form: (-len(form), form))
        text = re.sub("|".join(map(re.escape, longest_first)), MASK, text, flags=re.IGNORECASE)
    return _SIGNED_PART.sub(rf"\1{MASK}", _ANY_TOKEN.sub(MASK, text))


def _forms(secret: str) -> set[str]:
    """Return the forms of a value in a text: plain, quoted for addresses and for JSON, base64, hexadecimal."""
    data = secret.encode("utf-8", "surrogatepass")
    escaped = json.dumps(secret)[1:-1]
    every_byte = "".join(f"%{byte:02X}" for byte in data)
    every_character = "".join(f"\\u{ord(character):04x}" for character in secret)
    plain = {secret, quote(secret), quote(secret, safe=""), every_byte, every_character, escaped, data.hex()}
    return {form for form in (*plain, *_base64_forms(data)) if len(form) >= _MIN_LENGTH}


def _base64_forms(data: bytes) -> set[str]:
    """Return the characters of base64 that depend only on these bytes, wherever they begin in the encoded data."""
    forms = set()
    for before in range(3):
        encoded = base64.b64encode(bytes(before) + data)
        first = -(-8 * before // 6)  # the first character without a bit of the bytes before
        last = 8 * (before + len(data)) // 6
        forms |= {encoded[first:last].decode(), encoded[first:last].translate(bytes.maketrans(b"+/", b"-_")).decode()}
    return forms
