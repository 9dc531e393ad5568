"""Messages never show a token that this process uses, whatever its form."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from urllib.parse import quote

import pytest

from qformat import secrets
from qformat.cli.messages import failure_record
from qformat.errors import HubError, Option, QformatError, Reason, SourceError, UsageError
from qformat.secrets import hide, masked

TOKEN = "an+unusual/token=of~this.process"


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(secrets, "_known", set())
    monkeypatch.delenv("HF_TOKEN", raising=False)
    hide(TOKEN)
    return TOKEN


def base64_of(text: str, *, url_safe: bool = False) -> str:
    encode = base64.urlsafe_b64encode if url_safe else base64.b64encode
    return encode(text.encode()).decode()


@pytest.mark.parametrize(
    "form",
    [
        TOKEN,
        TOKEN.upper(),
        f"Bearer {TOKEN}",
        quote(TOKEN),
        quote(TOKEN, safe=""),
        quote(TOKEN, safe="").lower(),
        "".join(f"%{byte:02x}" for byte in TOKEN.encode()),
        json.dumps(TOKEN),
        "".join(f"\\u{ord(character):04x}" for character in TOKEN),
        TOKEN.encode().hex(),
    ],
)
def test_every_form_of_the_token_is_hidden(form: str) -> None:
    shown = masked(f"the server says: {form}, twice: {form}")
    assert shown.count("***") == 2
    assert "unusual" not in shown.lower()


@pytest.mark.parametrize("url_safe", [False, True])
@pytest.mark.parametrize("before", ["", "a", "ab", "Bearer ", "user:"])
@pytest.mark.parametrize("after", ["", "x", ":password"])
def test_base64_is_hidden_at_every_position(before: str, after: str, url_safe: bool) -> None:
    encoded = base64_of(before + TOKEN + after, url_safe=url_safe)
    shown = masked(f"no: {encoded}")
    assert "***" in shown
    left = shown.removeprefix("no: ").replace("***", "")
    assert len(left) <= -(-8 * (len(before) + len(after)) // 6) + 4


def test_the_value_of_the_environment_is_hidden_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "only-in-the-environment\n")
    assert masked("it is only-in-the-environment") == "it is ***"


def test_tokens_of_others_and_signed_addresses_are_hidden() -> None:
    assert masked(f"hf_{'aB3' * 11}x") == "***"
    assert masked("PUT https://bucket.example/x?X-Amz-Signature=1&b=2 failed") == (
        "PUT https://bucket.example/x?*** failed"
    )


def test_other_texts_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "abc")  # too short for a token: it would hide words
    for text in ("", "abcdef", "what is that?", "hf_checkpoints/model.safetensors", "a/b?.bin"):
        assert masked(text) == text


@pytest.mark.parametrize(
    "make",
    [
        lambda: HubError("owner/model", f"refused: {TOKEN}", next_step=f"Do not use {TOKEN}"),
        lambda: SourceError(Reason.PATH_ESCAPES, f"owner/{TOKEN}", f"lists {TOKEN!r}", tensor=TOKEN),
        lambda: UsageError(f"{TOKEN} is no option, use ", Option("revision")),
    ],
)
def test_no_error_of_the_library_or_of_the_command_line_shows_it(make: Callable[[], QformatError]) -> None:
    problem = make()
    record = json.dumps(failure_record(problem))
    for text in (str(problem), repr(problem), record):
        assert TOKEN not in text
        assert "***" in text
