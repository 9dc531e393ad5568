"""A token that no service can have issued is refused before any request, and never shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from qformat.errors import UsageError
from qformat.hub.fetch import fetch
from qformat.hub.reading.remote import open_repository
from qformat.hub.remote_verify import verify_remote
from qformat.hub.token import token_to_send
from tests.hub.conftest import PATIENT, TOKEN
from tests.hub_stand_in import Hub


@pytest.mark.parametrize(
    ("token", "problem"),
    [
        (
            f"\N{LEFT DOUBLE QUOTATION MARK}{TOKEN}\N{RIGHT DOUBLE QUOTATION MARK}",
            r"left double quotation mark \(U\+201C\) at",
        ),
        (f'"{TOKEN}"', "quotation mark"),
        (f"{TOKEN}\N{RIGHT SINGLE QUOTATION MARK}", "right single quotation mark"),
        (f" {TOKEN}", r"space \(U\+0020\) at position 1"),
        (f"{TOKEN}\n", "a control character"),
        (f"{TOKEN}\r\nX-Other: 1", "a control character"),
        (f"{TOKEN}\N{NO-BREAK SPACE}", "no-break space"),
        (f"{TOKEN}\N{ZERO WIDTH SPACE}", "zero width space"),
        ("", "is empty"),
        ("x" * 10_000, "has 10000 characters"),
    ],
)
def test_a_token_with_characters_that_no_token_has_is_refused_before_any_request(
    hub: Hub, published: dict[str, bytes], token: str, problem: str
) -> None:
    with pytest.raises(UsageError, match=problem) as caught:
        open_repository("owner/small-nf4", token=token, transfer=PATIENT)
    assert TOKEN not in str(caught.value)
    assert not hub.log


def test_every_command_refuses_a_quoted_token_of_the_environment_in_one_line(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qformat.cli.main import run

    monkeypatch.setenv("HF_TOKEN", f"\N{LEFT DOUBLE QUOTATION MARK}{TOKEN}\N{RIGHT DOUBLE QUOTATION MARK}")
    for arguments in (
        ["verify", "owner/small-nf4"],
        ["fetch", "owner/small-nf4", str(tmp_path / "out")],
        ["convert", "owner/small", str(tmp_path / "out")],
        ["diff", "owner/small-nf4", "owner/small-nf4"],
    ):
        assert run(arguments) == 2
        shown = capsys.readouterr().err
        assert shown.startswith("Error: the token in HF_TOKEN has a character that no token has")
        assert TOKEN not in shown
    assert not hub.log


def test_tokens_of_all_services_are_accepted() -> None:
    for token in (TOKEN, "api_org_aBc123", "eyJhbGciOi.eyJzdWIiOi_-.c2ln", "Zm9v+/==", "a~b"):
        assert token_to_send(token) == token
    assert token_to_send(False) is None


def test_a_file_name_that_contains_the_token_is_not_shown(
    hub: Hub, published: dict[str, bytes], tmp_path: Path
) -> None:
    hub.repositories.commit("owner/small-nf4", {f"notes-{TOKEN}.txt": b"x"})
    for call in (
        lambda: verify_remote("owner/small-nf4", transfer=PATIENT),
        lambda: fetch("owner/small-nf4", tmp_path / "out", transfer=PATIENT),
    ):
        with pytest.raises(Exception, match="the name of a file contains the token") as caught:
            call()
        assert TOKEN not in str(caught.value)


def test_a_server_that_repeats_the_token_encoded_does_not_reveal_it(hub: Hub, published: dict[str, bytes]) -> None:
    import base64

    encoded = base64.b64encode(f"user:{TOKEN}".encode()).decode()
    hub.faults.add("status", route="revision/", status=403, headers={"X-Error-Message": f"no: {encoded}"})
    with pytest.raises(Exception, match=r"\*\*\*") as caught:
        open_repository("owner/small-nf4", transfer=PATIENT)
    assert encoded[8:40] not in str(caught.value)
