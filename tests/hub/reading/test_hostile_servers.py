"""No answer of a server keeps a request busy for ever: every fault ends in an error after a few attempts.

The time is artificial: it passes by one second for each byte of a server that trickles, and by the pauses. The server
does not wait for the client, so a test of trickling limits one answer, not the task.
"""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from qformat.errors import HubError
from qformat.hub.reading.remote import RemoteRepository, open_repository
from tests.hub.artificial_time import ArtificialTime
from tests.hub.conftest import PATIENT
from tests.hub.fetching import BODY, NAME, SHARD
from tests.hub_stand_in import Hub
from tests.standstill import GUARD_S

pytestmark = pytest.mark.usefixtures("published")

YEAR_S = 31_536_000
ENDLESS = {"task_s": 1e12}


@pytest.fixture
def time() -> ArtificialTime:
    return ArtificialTime()


def opened(time: ArtificialTime, **limits: float) -> RemoteRepository:
    return open_repository(NAME, transfer=time.patient(**limits))


def read(repository: RemoteRepository, start: int, nbytes: int) -> bytes:
    data = bytearray(nbytes)
    repository.read_range(SHARD, start, memoryview(data))
    return bytes(data)


@pytest.mark.parametrize("kind", ["trickle", "trickle_headers"])
@pytest.mark.parametrize("route", ["/revision/", "/tree/"])
def test_small_answers_that_trickle_end_after_three_windows(
    hub: Hub, time: ArtificialTime, kind: str, route: str
) -> None:
    hub.faults.add(kind, route=route, hook=lambda: time.pass_by(1.0))  # type: ignore[arg-type]
    with pytest.raises(HubError, match=r"only \d+ bytes arrived in \d+ s, 3 times in a row"):
        opened(time, **ENDLESS)
    assert len(hub.requests(route)) == 3


def test_huggingface_hub_asks_the_server_nothing_before_the_first_request(
    hub: Hub, time: ArtificialTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", False)
    hub.log.clear()
    opened(time)
    assert not hub.requests("agent-harnesses")


def test_interim_responses_without_end_are_cut_off(hub: Hub, time: ArtificialTime) -> None:
    hub.faults.add("interim", route="/revision/", hook=lambda: time.pass_by(1.0))
    with pytest.raises(HubError, match=r"bytes arrived in \d+ s, 3 times in a row"):
        opened(time, **ENDLESS)


def test_a_range_that_trickles_ends_after_three_windows(hub: Hub, time: ArtificialTime) -> None:
    repository = opened(time, **ENDLESS)
    taken = threading.Event()

    def next_byte() -> None:
        taken.wait(GUARD_S)  # otherwise a server that runs ahead would have sent the range before the client looks
        taken.clear()
        time.pass_by(1.0)

    hub.faults.add("trickle", route=BODY, hook=next_byte)
    with pytest.raises(HubError, match=r"only \d+ bytes arrived in \d+ s, 3 times in a row"):
        repository.read_range(SHARD, 0, memoryview(bytearray(5000)), on_bytes=lambda nbytes: taken.set())
    assert len(hub.requests(BODY)) == 3


def test_the_trickling_body_of_an_error_does_not_hide_its_status(hub: Hub, time: ArtificialTime) -> None:
    hub.faults.add("status", route="/revision/", status=403)
    hub.faults.add("trickle", route="/revision/", hook=lambda: time.pass_by(1.0))
    with pytest.raises(HubError, match=r"access is denied\. Check the permissions"):
        opened(time)
    assert len(hub.requests("/revision/")) == 1


def test_the_large_body_of_an_error_is_not_read(hub: Hub, time: ArtificialTime) -> None:
    hub.faults.add("status", route="/revision/", status=403, nbytes=10_000_000)
    with pytest.raises(HubError, match=r"access is denied\. Check the permissions"):
        opened(time)


@pytest.mark.parametrize("kind", ["endless_pages", "same_page"])
def test_a_listing_whose_pages_never_end_is_rejected(hub: Hub, time: ArtificialTime, kind: str) -> None:
    hub.faults.add(kind, route="/tree/")  # type: ignore[arg-type]
    with pytest.raises(HubError, match="its pages repeat, or are more than 6"):
        opened(time, listing_pages=6)
    assert len(hub.requests("/tree/")) == (6 if kind == "endless_pages" else 1)


@pytest.mark.parametrize("limit", ["listing_entries", "listing_nbytes"])
def test_a_listing_with_too_many_entries_or_bytes_is_rejected(hub: Hub, time: ArtificialTime, limit: str) -> None:
    hub.faults.add("endless_pages", route="/tree/")
    with pytest.raises(HubError, match="it has more than"):
        opened(time, **{limit: 3 if limit == "listing_entries" else 300})
    assert len(hub.requests("/tree/")) <= 5


def test_all_pages_of_a_listing_share_one_budget_of_time(hub: Hub, time: ArtificialTime) -> None:
    hub.faults.add("call", route="/tree/", hook=lambda: time.pass_by(20.0))
    hub.faults.add("endless_pages", route="/tree/")
    with pytest.raises(HubError, match="given up after 120 s"):
        opened(time, task_s=100.0)


def test_a_server_that_ignores_ranges_and_cuts_off_makes_no_progress(hub: Hub, time: ArtificialTime) -> None:
    repository = opened(time, progress_nbytes=500)
    hub.faults.add("whole", route=BODY)
    hub.faults.add("cut", route=BODY, nbytes=4000)
    with pytest.raises(HubError, match="4 times in a row"):
        read(repository, 4000, 2000)  # every attempt sends 4000 bytes before the range, and none of it
    assert len(hub.requests(BODY)) == 4


def test_a_server_without_ranges_may_not_send_the_same_bytes_again_and_again(hub: Hub, time: ArtificialTime) -> None:
    repository = open_repository(NAME, transfer=replace(time.patient(progress_nbytes=10), max_skipped_nbytes=6000))
    hub.faults.add("whole", route=BODY)
    for attempt in range(9):
        hub.faults.add("cut", route=BODY, nbytes=4100 + 20 * attempt, after=attempt, times=1)
    with pytest.raises(HubError, match="bytes that nobody asked for"):
        read(repository, 4000, 4000)
    assert len(hub.requests(BODY)) == 3, "two attempts may throw away 6000 bytes each"


def test_a_server_that_cuts_off_after_a_few_bytes_is_given_up(hub: Hub, time: ArtificialTime) -> None:
    repository = opened(time)
    hub.faults.add("cut", route=BODY, nbytes=1)
    with pytest.raises(HubError, match="4 times in a row"):
        read(repository, 0, 5000)


def test_answers_that_announce_another_length_are_not_used(hub: Hub, time: ArtificialTime) -> None:
    hub.faults.add("wrong_length", route="/tree/", nbytes=10)
    with pytest.raises(HubError, match=r"invalid response .*4 times in a row"):
        opened(time)


@pytest.mark.parametrize(
    ("kind", "message"), [("gzip", "has the Content-Encoding 'gzip'"), ("html", "the response is invalid")]
)
def test_small_answers_of_another_kind_are_not_used(hub: Hub, time: ArtificialTime, kind: str, message: str) -> None:
    hub.faults.add(kind, route="/tree/", nbytes=1_000_000 if kind == "gzip" else 0)  # type: ignore[arg-type]
    with pytest.raises(HubError, match=message):
        opened(time)


def test_redirects_that_lead_in_a_circle_end(hub: Hub, time: ArtificialTime) -> None:
    here = f"/api/models/{NAME}/revision/main"
    hub.faults.add("status", route="/revision/", status=302, headers={"Location": here})
    with pytest.raises(HubError, match="more than 5 redirects"):
        opened(time)
    assert len(hub.requests("/revision/")) == 6


@pytest.mark.parametrize("seconds", [YEAR_S, 10**400])
def test_a_pause_of_a_year_is_not_respected(hub: Hub, time: ArtificialTime, seconds: int) -> None:
    limit = f'"api";r=0;t={seconds}'
    hub.faults.add("status", route="/revision/", status=429, headers={"Retry-After": str(seconds)}, times=1)
    hub.faults.add("status", route="/revision/", status=429, headers={"RateLimit": limit}, times=1)
    opened(time)
    assert sum(time.waits) < 1.0


def test_long_pauses_end_with_the_time_of_the_task(hub: Hub, time: ArtificialTime) -> None:
    hub.faults.add("status", route="/revision/", status=503, headers={"Retry-After": "300"})
    with pytest.raises(HubError, match="given up after 300 s: the server answers 503"):
        opened(time, task_s=500.0)


def test_the_default_budget_bounds_what_a_server_can_cost() -> None:
    limits = PATIENT.patience
    assert limits.slow_attempts * limits.window_s <= 90.0
    assert limits.task_s <= 3600.0
