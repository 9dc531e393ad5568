"""Servers that fail, reject requests or send damaged bytes: each case gives the same bytes or a clear error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qformat.converters.convert import ConversionOptions
from qformat.errors import HubError, QformatError, Reason, SourceError
from qformat.hub.reading import remote
from qformat.hub.reading.budget import Budget
from tests.converters.sources.hub.serving import (
    IMPATIENT,
    NAME,
    SMALL,
    TOKEN,
    convert,
    fetched_ranges,
    plan,
    serving,
    without_source,
)
from tests.hub_stand_in import Hub
from tests.standstill import GUARD_S

SHARD = "model-00002-of-00003.safetensors"


PASSING = {
    "503 on every third request": {"kind": "status", "every": 3},
    "429 that asks for a pause": {"kind": "status", "every": 9, "status": 429, "headers": {"Retry-After": "0"}},
    "connections dropped": {"kind": "drop", "every": 4},
    "answers cut in the middle": {"kind": "cut", "route": "cdn/", "every": 3, "nbytes": 3000},
    "answers cut before the first byte": {"kind": "cut", "route": "cdn/", "every": 3},
    "the whole file for a range": {"kind": "whole", "route": "cdn/", "every": 2},
    "no Content-Range": {"kind": "no_content_range", "route": "cdn/", "every": 3},
    "a wrong Content-Range": {"kind": "wrong_content_range", "route": "cdn/", "every": 3},
    "half of the range": {"kind": "short_range", "route": "cdn/", "every": 2},
    "an expired address": {"kind": "status", "route": "cdn/", "every": 4, "status": 403},
    "a stall in the middle": {"kind": "stall", "route": "cdn/", "every": 12, "times": 2, "nbytes": 2000, "seconds": 3},
    "a slow answer": {"kind": "slow", "route": "cdn/", "every": 12, "times": 2, "seconds": 2.5},
}


@pytest.mark.parametrize("fault", PASSING)
def test_temporary_faults_are_retried_and_give_the_same_bytes(
    hub: Hub, expected: dict[str, object], tmp_path: Path, fault: str
) -> None:
    hub.faults.add(**PASSING[fault])  # type: ignore[arg-type]
    transfer = IMPATIENT if "seconds" in PASSING[fault] else SMALL
    # Connections share the count of requests, so one piece may meet the fault many times in a row.
    patience = replace(transfer.patience, attempts=50, factor=1.0)
    convert(NAME, tmp_path / "out", transfer=replace(transfer, patience=patience))
    assert without_source(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"RateLimit": '"api";r=0;t=55', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}, 56.0),
        ({"RateLimit": '"api";r=3;t=55'}, None),
        ({"Retry-After": "301"}, None),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),
    ],
)
def test_the_pause_requested_by_a_busy_server_is_respected(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str], seconds: float | None
) -> None:
    pauses: list[float | None] = []
    monkeypatch.setattr(Budget, "failed", lambda self, problem, *, wait_s: pauses.append(wait_s))
    hub.faults.add("status", route="revision/", times=1, status=429, headers=headers)
    remote.open_repository(NAME, transfer=SMALL)
    assert pauses == [seconds]


LASTING = {
    "503": ({"kind": "status"}, "the server answers 503"),
    "503 of the storage": ({"kind": "status", "route": "cdn/", "after": 9}, "the server answers 503"),
    "cut": ({"kind": "cut", "route": "cdn/", "after": 9, "nbytes": 10}, "invalid response"),
    "no Content-Range": ({"kind": "no_content_range", "route": "cdn/", "after": 9}, "the Content-Range ''"),
    "wrong Content-Range": ({"kind": "wrong_content_range", "route": "cdn/", "after": 9}, "the Content-Range 'bytes"),
}


@pytest.mark.parametrize("fault", LASTING)
def test_permanent_faults_are_reported_after_a_bounded_number_of_attempts_and_the_same_command_resumes(
    hub: Hub, expected: dict[str, object], tmp_path: Path, fault: str
) -> None:
    switches, message = LASTING[fault]
    hub.faults.add(**switches)  # type: ignore[arg-type]
    with pytest.raises(HubError, match=f"owner/model: .*{message}.*5 times in a row.*The same command resumes"):
        convert(NAME, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    hub.faults.clear()

    convert(NAME, tmp_path / "out")

    assert without_source(tmp_path / "out") == expected


def test_a_server_without_ranges_is_rejected_if_it_would_send_too_much(hub: Hub, tmp_path: Path) -> None:
    hub.faults.add("whole", route="cdn/")
    with pytest.raises(HubError, match=r"sends the complete file instead of a range.*keep_source=True"):
        convert(NAME, tmp_path / "out", transfer=replace(SMALL, max_skipped_nbytes=20_000))


def test_a_silent_server_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    with serving(monkeypatch, tmp_path / "home") as hub:
        hub.add_folder(NAME, source)
        hub.faults.add("stall", route="cdn/", after=6, nbytes=10, seconds=GUARD_S)
        with pytest.raises(HubError, match="timeout while waiting for data, 2 times in a row"):
            convert(
                NAME, tmp_path / "out", transfer=replace(IMPATIENT, patience=replace(IMPATIENT.patience, attempts=2))
            )


def test_a_host_that_does_not_answer_at_all_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(monkeypatch, tmp_path / "home"):
        pass
    with pytest.raises(HubError, match=r"owner/model: revision 'main': no connection .*2 times in a row"):
        convert(NAME, tmp_path / "out")


@pytest.mark.parametrize("name", [SHARD, "config.json", "tokenizer.json"])
def test_a_flipped_bit_is_reported_with_the_file_and_the_bytes_are_not_trusted_later(
    plain_hub: Hub, source: Path, expected: dict[str, object], tmp_path: Path, name: str
) -> None:
    n_before = 3 if name == SHARD else 0  # past the requests for the header
    plain_hub.faults.add("flip", route=rf"/{name}$", after=n_before, times=1, nbytes=50)
    with pytest.raises(SourceError, match=f"{name}: has the digest") as raised:
        convert(NAME, tmp_path / "out")
    assert raised.value.reason is Reason.FILE_DIGEST
    assert not (tmp_path / "out").exists()
    n_requests = len(plain_hub.log)

    convert(NAME, tmp_path / "out")

    assert without_source(tmp_path / "out") == expected
    if name == SHARD:  # it is fetched again as a whole
        again = fetched_ranges(plain_hub, [one for one in plain_hub.log[n_requests:] if one.path.endswith(SHARD)])
        assert sum(stop - start for _, start, stop in again) == (source / SHARD).stat().st_size


def test_a_shard_that_changes_between_two_requests_is_reported(plain_hub: Hub, source: Path, tmp_path: Path) -> None:
    changed = bytearray((source / SHARD).read_bytes())
    changed[-1] ^= 1
    plain_hub.faults.add(
        "call",
        route=f"/{SHARD}$",
        after=5,
        times=1,
        hook=lambda: plain_hub.repositories.change_in_place(NAME, SHARD, bytes(changed)),
    )
    with pytest.raises(SourceError, match=f"{SHARD}: was changed in transit or on the server: found ETag") as raised:
        convert(NAME, tmp_path / "out")
    assert raised.value.reason is Reason.SOURCE_CHANGED
    assert not (tmp_path / "out").exists()


def test_an_answer_from_another_commit_or_of_another_size_is_rejected(
    plain_hub: Hub, source: Path, tmp_path: Path
) -> None:
    data = (source / SHARD).read_bytes()
    plain_hub.faults.add(
        "call",
        route=f"/{SHARD}$",
        after=5,
        times=1,
        hook=lambda: plain_hub.repositories.change_in_place(NAME, SHARD, data[:9000]),
    )
    with pytest.raises(QformatError, match=f"{SHARD}: was changed in transit or on the server"):
        convert(NAME, tmp_path / "out")


def test_missing_and_forbidden_repositories_give_the_hubs_reason(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(name: str, **options: str) -> str:
        with pytest.raises(HubError) as raised:
            plan(name, ConversionOptions(**options))  # type: ignore[arg-type]
        return str(raised.value)

    with serving(monkeypatch, tmp_path / "home") as hub:
        hub.add_folder("owner/private", source, private=True)
        hub.add_folder("owner/gated", source, gated=True)
        hub.add_folder(NAME, source)
        assert refused("owner/nothing").startswith("owner/nothing: the repository does not exist or is private")
        assert "Repository not found" in refused("owner/nothing")
        assert "log in with `hf auth login` or set HF_TOKEN" in refused("owner/private")
        gated = refused("owner/gated")
        assert "Access to model owner/gated is restricted and you are not in the authorized list" in gated
        assert f"Request access at {hub.endpoint}/owner/gated" in gated
        assert "revision 'nowhere': the revision does not exist" in refused(NAME, revision="nowhere")
        assert "the revision does not exist" in refused(NAME, revision="0" * 40)
    with serving(monkeypatch, tmp_path / "home", token="hf_of_somebody_else") as hub:
        hub.add_folder(NAME, source)
        assert "the token is invalid: Invalid credentials" in refused(NAME)
        assert "hf_of_somebody_else" not in refused(NAME)


def test_a_token_that_the_server_sends_back_is_not_shown(hub: Hub, tmp_path: Path) -> None:
    hub.faults.add("status", route="revision/", status=403, headers={"X-Error-Message": f"{TOKEN} may not\tread"})
    with pytest.raises(HubError) as raised:
        plan(NAME)
    assert TOKEN not in str(raised.value)
    assert "access is denied: *** may not read" in str(raised.value)


@pytest.mark.parametrize("location", ["ftp://127.0.0.1/x", "javascript:1", "", "http://[", "http://127.0.0.1:x/"])
def test_redirects_lead_only_to_http_hosts_and_end(hub: Hub, tmp_path: Path, location: str) -> None:
    hub.faults.add("status", route="revision/", status=302, headers={"Location": location})
    with pytest.raises(HubError, match=r"redirect|InvalidURL"):
        plan(NAME)


@pytest.mark.parametrize("missing", ["config.json", SHARD, "model.safetensors.index.json"])
def test_a_file_missing_from_the_repository_is_reported(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    with serving(monkeypatch, tmp_path / "home") as hub:
        hub.repositories.create(NAME)
        hub.repositories.commit(NAME, {p.name: p.read_bytes() for p in source.iterdir() if p.name != missing})
        with pytest.raises(SourceError, match=missing) as raised:
            plan(NAME)
    assert raised.value.reason is Reason.MISSING_FILE
