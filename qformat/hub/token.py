"""The token for the Hub: which one is sent, whether it can be sent, and that no message shows it."""

from __future__ import annotations

import os
import unicodedata

from qformat.errors import UsageError
from qformat.secrets import hide

_MAX_LENGTH = 8192
_NEVER_IN_TOKENS = frozenset("\"'`\\<>,;(){}")


def token_to_send(token: str | bool | None) -> str | None:
    """Return the token for requests, or None to send none. From now on, messages of this process hide it.

    Args:
        token: The token. None uses HF_TOKEN or the stored token, if there is one, True requires one, False sends none.

    Raises:
        UsageError: The token has characters that no token has, or there is none although one is required.
    """
    from huggingface_hub.errors import LocalTokenNotFoundError
    from huggingface_hub.utils import get_token_to_send  # type: ignore[attr-defined]

    try:
        found: str | None = get_token_to_send(token)
    except LocalTokenNotFoundError:
        raise UsageError("no token for the Hub was found: log in with `hf auth login` or set HF_TOKEN") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(f"the stored token cannot be read: {problem}. Log in with `hf auth login`") from None
    if found is None:
        return None
    hide(found)
    _check(found, _source(token))
    return found


def _source(token: str | bool | None) -> str:
    if isinstance(token, str):
        return "the token for the Hub"
    is_set = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
    return "the token in HF_TOKEN" if is_set else "the stored token for the Hub"


def _check(token: str, source: str) -> None:
    if not token:
        raise UsageError(f"{source} is empty. Copy it again")
    if len(token) > _MAX_LENGTH:
        raise UsageError(f"{source} has {len(token)} characters, at most {_MAX_LENGTH} are allowed. Copy it again")
    for position, character in enumerate(token, 1):
        if not character.isascii() or not "!" <= character <= "~" or character in _NEVER_IN_TOKENS:
            name = unicodedata.name(character, "a control character").lower()
            raise UsageError(
                f"{source} has a character that no token has: {name} (U+{ord(character):04X}) at position {position}. "
                "Copy it again, without quotation marks and spaces"
            )
