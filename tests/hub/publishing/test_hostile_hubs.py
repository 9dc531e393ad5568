"""publish to Hubs that want the token on another host, or would keep it busy for ever."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

import pytest

from qformat.errors import HubError, UsageError
from qformat.hub.client import Watch, watched
from qformat.hub.publishing.upload import Uploader
from tests.hub.artificial_time import ArtificialTime
from tests.hub.conftest import TOKEN
from tests.hub.publishing.published import NAME, do_publish, n_commits
from tests.hub_stand_in import Hub


@pytest.fixture
def time() -> ArtificialTime:
    return ArtificialTime()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that huggingface_hub makes between its attempts, which take no time."""
    made: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", made.append)
    return made


def test_the_token_is_not_sent_to_another_host_that_the_hub_names(hub: Hub, artifact: Path) -> None:
    assert hub.cdn_endpoint is not None
    hub.verify_endpoint = hub.cdn_endpoint
    with pytest.raises(HubError, match=r"asks for a request with the token to another host, 'localhost'"):
        do_publish(artifact)
    assert not hub.requests(" cdn/")
    assert n_commits(hub) == 0


@pytest.mark.parametrize("header", ["Retry-After", "RateLimit"])
def test_huggingface_hub_does_not_sleep_for_a_year(hub: Hub, artifact: Path, pauses: list[float], header: str) -> None:
    value = "31536000" if header == "Retry-After" else '"api";r=0;t=31536000'
    hub.faults.add("status", route="preupload", status=429, headers={header: value}, times=2)
    do_publish(artifact)
    assert n_commits(hub) == 1
    assert sum(pauses) <= 10.0


def test_a_short_pause_is_respected(hub: Hub, artifact: Path, pauses: list[float]) -> None:
    hub.faults.add("status", route="preupload", status=429, headers={"Retry-After": "7"}, times=1)
    do_publish(artifact)
    assert pauses == [8.0]


@pytest.mark.parametrize("route", ["repos/create", "preupload", "objects/batch"])
def test_answers_to_huggingface_hub_that_trickle_are_cut_off(
    hub: Hub, artifact: Path, time: ArtificialTime, route: str
) -> None:
    hub.faults.add("trickle", route=route, hook=lambda: time.pass_by(1.0))
    with pytest.raises(HubError, match=r"bytes arrived in \d+ s"):
        do_publish(artifact, transfer=time.patient(task_s=1e12))
    assert len(hub.requests(route)) <= 24, "4 attempts, each with up to 6 by huggingface_hub"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gzip", "has the Content-Encoding 'gzip'"),
        ("wrong_length", "incomplete|peer closed|uploading"),
        ("html", "uploading: the response is invalid"),
    ],
)
def test_answers_to_huggingface_hub_of_another_kind_are_not_used(
    hub: Hub, artifact: Path, kind: str, message: str
) -> None:
    hub.faults.add(kind, route="preupload", nbytes=1_000_000)  # type: ignore[arg-type]
    with pytest.raises(HubError, match=message):
        do_publish(artifact)


def test_large_answers_to_huggingface_hub_are_not_read(hub: Hub, artifact: Path, time: ArtificialTime) -> None:
    hub.faults.add("status", route="repos/create", status=403, nbytes=2_000_000)
    with pytest.raises(HubError, match="a response has more than 1000000 bytes"):
        do_publish(artifact, transfer=time.patient(answer_nbytes=1_000_000))


def test_a_list_of_pull_requests_without_end_is_not_followed(
    hub: Hub, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.hub_stand_in import read_routes, server
    from tests.hub_stand_in.answers import as_json

    page = {"discussions": [{"num": 1, "title": "another"}], "count": 10**9, "start": 0}
    routes = [
        (m, p, (lambda *a, **k: as_json(page)) if f is read_routes.discussions else f) for m, p, f in server.ROUTES
    ]
    monkeypatch.setattr(server, "ROUTES", tuple(routes))
    hub.repositories.create(NAME)
    do_publish(artifact, create_pr=True)
    assert len(hub.requests("/discussions")) == 20


def test_the_listing_that_huggingface_hub_reads_has_a_limit_of_pages(hub: Hub, published: dict[str, bytes]) -> None:
    from huggingface_hub import HfApi

    time = ArtificialTime()
    patience = time.patient(listing_pages=5).patience
    hub.faults.add("endless_pages", route="/tree/")
    api = HfApi(endpoint=hub.endpoint, library_name="qformat")
    with (
        pytest.raises(HubError, match="more than 5 pages"),
        watched(Watch("owner/small-nf4", hub.endpoint, TOKEN, patience, 10**6, 60.0)),
    ):
        list(api.list_repo_tree("owner/small-nf4", recursive=True))
    assert len(hub.requests("/tree/")) == 5


def test_files_that_start_over_again_and_again_are_given_up(hub: Hub, published: dict[str, bytes]) -> None:
    """huggingface_hub resets its count of attempts with every piece, although it throws the file away."""
    from huggingface_hub.utils import http_backoff

    hub.faults.add("whole", route="/resolve/")
    url = f"{hub.endpoint}/owner/small-nf4/resolve/main/config.json"
    headers = {"Range": "bytes=10-", "User-Agent": "qformat/1"}
    patience = ArtificialTime().patient().patience
    with watched(Watch("owner/small-nf4", hub.endpoint, TOKEN, patience, 10**6, 60.0)):
        for _ in range(patience.attempts - 1):
            assert http_backoff("GET", url, headers=headers).status_code == 200
        with pytest.raises(HubError, match="complete files instead of ranges"):
            http_backoff("GET", url, headers=headers)


def test_a_token_that_cannot_be_one_is_refused_before_any_request(hub: Hub) -> None:

    with pytest.raises(UsageError, match="left double quotation mark"):
        Uploader(NAME, token=f"\N{LEFT DOUBLE QUOTATION MARK}{TOKEN}\N{RIGHT DOUBLE QUOTATION MARK}")
    assert not hub.log


def test_a_redirect_of_a_read_request_to_another_host_is_followed_without_the_token(hub: Hub) -> None:
    import httpx2

    watch = Watch(NAME, hub.endpoint, TOKEN, ArtificialTime().patient().patience, 10**6, 60.0)
    elsewhere = httpx2.Request("HEAD", "https://elsewhere.example/x", headers={"Authorization": f"Bearer {TOKEN}"})
    watch.check_request(elsewhere)
    assert "Authorization" not in elsewhere.headers
    here = httpx2.Request("HEAD", f"{hub.endpoint}/x", headers={"Authorization": f"Bearer {TOKEN}"})
    watch.check_request(here)
    assert here.headers["Authorization"] == f"Bearer {TOKEN}"


@pytest.mark.parametrize("refused", [False, True])
def test_remarks_about_the_card_are_short_lines_without_the_token(
    hub: Hub, artifact: Path, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    from tests.hub_stand_in import server, write_routes
    from tests.hub_stand_in.answers import as_json

    remark = {"message": f"\x1b[31mno: {TOKEN}\x1b]0;title\x07\n" + "x" * 5000}
    page = {"errors" if refused else "warnings": [remark] * 100}
    answer = as_json(page, 400 if refused else 200)
    routes = [(m, p, (lambda *a, **k: answer) if f is write_routes.validate_yaml else f) for m, p, f in server.ROUTES]
    monkeypatch.setattr(server, "ROUTES", tuple(routes))
    with pytest.raises(UsageError) if refused else pytest.warns(UserWarning, match="Warnings while") as caught:
        do_publish(artifact)
    texts = [str(caught.value)] if refused else [str(one.message) for one in caught.list]
    for text in texts:
        assert TOKEN not in text
        assert "\x1b" not in text
        assert len(text) < 8000


def test_the_log_of_huggingface_hub_shows_no_token_and_no_signed_address(
    hub: Hub, artifact: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    warning = {"X-HF-Warning": f"topic; no: {TOKEN} \x1b[31m"}
    hub.faults.add("status", route="preupload", times=1, status=200, headers=warning)
    with suppress(HubError):
        do_publish(artifact)
    hub.faults.add("status", route="PUT hub/-/lfs", times=1)
    do_publish(artifact)
    ours = [one.getMessage() for one in caplog.records if one.name.startswith("huggingface_hub")]
    assert [text for text in ours if "PUT" in text]
    assert [text for text in ours if text.startswith("no: ***")]
    for text in ours:
        assert TOKEN not in text
        assert "of-the-stand-in" not in text
        assert "\x1b" not in text
