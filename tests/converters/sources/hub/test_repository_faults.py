"""Everything that can go wrong while a repository is read: each ends in the same bytes or in a clear error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from qformat.converters.convert import convert, plan
from qformat.errors import HubError, QformatError, Reason, SourceError, TargetError, UsageError
from qformat.hub.reading import remote
from qformat.hub.reading.transport import Patience, Retries, Transport, Unusable
from tests.converters.faulty_disk import FaultyDisk, Killed
from tests.converters.sources.hub.hub_sources import (
    DATA,
    NAME,
    TOKEN,
    by_shard,
    fetched_ranges,
    overlap,
    sealed_ranges,
    serving,
    without_source,
)
from tests.hub_stand_in import Hub
from tests.small_models import write_index

SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path) -> Iterator[Hub]:
    with serving(monkeypatch, tmp_path / "home") as hub:
        hub.add_folder(NAME, source)
        yield hub


@pytest.fixture
def plain_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path) -> Iterator[Hub]:
    """A stand-in that sends files itself, without a second host."""
    with serving(monkeypatch, tmp_path / "home", with_cdn=False) as hub:
        hub.add_folder(NAME, source)
        yield hub


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
def test_what_passes_is_waited_out_and_the_bytes_are_the_same(
    hub: Hub, expected: dict[str, object], tmp_path: Path, fault: str
) -> None:
    hub.faults.add(**PASSING[fault])  # type: ignore[arg-type]
    convert(NAME, tmp_path / "out")
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
def test_the_pause_that_a_busy_server_asks_for_is_made(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str], seconds: float | None
) -> None:
    pauses: list[float | None] = []
    monkeypatch.setattr(Retries, "failed", lambda self, problem, *, wait_s: pauses.append(wait_s))
    hub.faults.add("status", route="revision/", times=1, status=429, headers=headers)
    remote.open_repository(NAME)
    assert pauses == [seconds]


LASTING = {
    "503": ({"kind": "status"}, "the server answers 503"),
    "503 of the storage": ({"kind": "status", "route": "cdn/", "after": 9}, "the server answers 503"),
    "cut": ({"kind": "cut", "route": "cdn/", "after": 9, "nbytes": 10}, "broken answer"),
    "no Content-Range": ({"kind": "no_content_range", "route": "cdn/", "after": 9}, "the Content-Range ''"),
    "wrong Content-Range": ({"kind": "wrong_content_range", "route": "cdn/", "after": 9}, "the Content-Range 'bytes"),
}


@pytest.mark.parametrize("fault", LASTING)
def test_what_lasts_is_named_after_a_bounded_number_of_attempts_and_the_same_command_continues(
    hub: Hub, expected: dict[str, object], tmp_path: Path, fault: str
) -> None:
    switches, message = LASTING[fault]
    hub.faults.add(**switches)  # type: ignore[arg-type]
    with pytest.raises(HubError, match=f"owner/model: .*{message}.*5 times in a row.*the same command continues"):
        convert(NAME, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    hub.faults.clear()

    convert(NAME, tmp_path / "out")

    assert without_source(tmp_path / "out") == expected


def test_a_server_without_ranges_is_refused_where_it_would_send_too_much(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_MAX_SKIPPED_NBYTES", 20_000)
    hub.faults.add("whole", route="cdn/")
    with pytest.raises(HubError, match=r"sends the whole file instead of a range.*--keep-source"):
        convert(NAME, tmp_path / "out")


def test_a_silent_server_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    with serving(monkeypatch, tmp_path / "home", attempts=2) as hub:
        hub.add_folder(NAME, source)
        hub.faults.add("stall", route="cdn/", after=6, nbytes=10, seconds=1.5)
        with pytest.raises(HubError, match="silence for too long, 2 times in a row"):
            convert(NAME, tmp_path / "out")


def test_a_host_that_does_not_answer_at_all_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(monkeypatch, tmp_path / "home"):
        pass
    with pytest.raises(HubError, match=r"owner/model: revision 'main': no connection .*2 times in a row"):
        convert(NAME, tmp_path / "out")


@pytest.mark.parametrize("name", [SHARD, "config.json", "tokenizer.json"])
def test_a_flipped_bit_names_the_file_and_leaves_no_artifact_and_is_not_believed_later(
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


def test_a_shard_that_changes_between_two_requests_is_named(plain_hub: Hub, source: Path, tmp_path: Path) -> None:
    changed = bytearray((source / SHARD).read_bytes())
    changed[-1] ^= 1
    plain_hub.faults.add(
        "call",
        route=f"/{SHARD}$",
        after=5,
        times=1,
        hook=lambda: plain_hub.repositories.change_in_place(NAME, SHARD, bytes(changed)),
    )
    with pytest.raises(SourceError, match=f"{SHARD}: was changed on the way or on the server: its ETag") as raised:
        convert(NAME, tmp_path / "out")
    assert raised.value.reason is Reason.SOURCE_CHANGED
    assert not (tmp_path / "out").exists()


def test_an_answer_of_another_commit_or_another_size_is_refused(plain_hub: Hub, source: Path, tmp_path: Path) -> None:
    data = (source / SHARD).read_bytes()
    plain_hub.faults.add(
        "call",
        route=f"/{SHARD}$",
        after=5,
        times=1,
        hook=lambda: plain_hub.repositories.change_in_place(NAME, SHARD, data[:9000]),
    )
    with pytest.raises(QformatError, match=f"{SHARD}: was changed on the way or on the server"):
        convert(NAME, tmp_path / "out")


def test_missing_and_forbidden_repositories_give_the_hubs_reason(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(name: str, **options: str) -> str:
        from qformat.converters.convert import ConversionOptions

        with pytest.raises(HubError) as raised:
            plan(name, ConversionOptions(**options))  # type: ignore[arg-type]
        return str(raised.value)

    with serving(monkeypatch, tmp_path / "home") as hub:
        hub.add_folder("owner/private", source, private=True)
        hub.add_folder("owner/gated", source, gated=True)
        hub.add_folder(NAME, source)
        assert refused("owner/nothing").startswith("owner/nothing: there is no such repository, or it is private")
        assert "Repository not found" in refused("owner/nothing")
        assert "log in with `hf auth login` or set HF_TOKEN" in refused("owner/private")
        gated = refused("owner/gated")
        assert "Access to model owner/gated is restricted and you are not in the authorized list" in gated
        assert f"Ask for access at {hub.endpoint}/owner/gated" in gated
        assert "revision 'nowhere': there is no such revision" in refused(NAME, revision="nowhere")
        assert "there is no such revision" in refused(NAME, revision="0" * 40)
    with serving(monkeypatch, tmp_path / "home", token="hf_of_somebody_else") as hub:
        hub.add_folder(NAME, source)
        assert "the token is not accepted: Invalid credentials" in refused(NAME)
        assert "hf_of_somebody_else" not in refused(NAME)


def test_a_token_that_the_server_sends_back_is_not_shown(hub: Hub, tmp_path: Path) -> None:
    hub.faults.add("status", route="revision/", status=403, headers={"X-Error-Message": f"{TOKEN} may not\tread"})
    with pytest.raises(HubError) as raised:
        plan(NAME)
    assert TOKEN not in str(raised.value)
    assert "access is refused: *** may not read" in str(raised.value)


@pytest.mark.parametrize("location", ["ftp://127.0.0.1/x", "javascript:1", "", "http://[", "http://127.0.0.1:x/"])
def test_redirects_lead_to_http_hosts_and_nowhere_else_and_end(hub: Hub, tmp_path: Path, location: str) -> None:
    hub.faults.add("status", route="revision/", status=302, headers={"Location": location})
    with pytest.raises(HubError, match=r"redirect|InvalidURL"):
        plan(NAME)


@pytest.mark.parametrize("missing", ["config.json", SHARD, "model.safetensors.index.json"])
def test_a_file_that_the_repository_lacks_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    with serving(monkeypatch, tmp_path / "home") as hub:
        hub.repositories.create(NAME)
        hub.repositories.commit(NAME, {p.name: p.read_bytes() for p in source.iterdir() if p.name != missing})
        with pytest.raises(SourceError, match=missing) as raised:
            plan(NAME)
    assert raised.value.reason is Reason.MISSING_FILE


@pytest.mark.parametrize(
    "name",
    ["../up", "/etc/passwd", "a/../../up", "..\\up", "%2e%2e/up", "a/%2e%2e/up", "%252e%252e/up", "a//b", "a\nb"],
)
def test_hostile_names_in_a_listing_are_refused(hub: Hub, name: str) -> None:
    hub.repositories.commit(NAME, {name: b"data"})
    with pytest.raises(SourceError, match="is not the plain name of a file") as raised:
        plan(NAME)
    assert raised.value.reason is Reason.PATH_ESCAPES


@pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors", "sub/model.safetensors", "a\\b"])
def test_hostile_names_in_an_index_are_refused(hub: Hub, tmp_path: Path, name: str) -> None:
    (tmp_path / "index").mkdir()
    write_index(tmp_path / "index", {"lm_head.weight": name})
    index = "model.safetensors.index.json"
    hub.repositories.commit(NAME, {index: (tmp_path / "index" / index).read_bytes()})
    with pytest.raises(SourceError, match="is not the plain name of a file"):
        plan(NAME)


@pytest.mark.parametrize("name", ["owner/..", "owner/a--b", "owner", "a/b/c", "owner/na me", "-x/y"])
def test_what_can_be_no_name_of_a_repository_makes_no_request(hub: Hub, name: str) -> None:
    with pytest.raises(SourceError, match="no such folder"):
        plan(name)
    assert not hub.log


@pytest.mark.parametrize("revision", ["a/../b", "", "/x", "a\nb"])
def test_what_can_be_no_revision_makes_no_request(hub: Hub, revision: str) -> None:
    with pytest.raises(UsageError, match="is no revision"):
        remote.open_repository(NAME, revision=revision or " /")
    assert not hub.log


@pytest.mark.parametrize("listing", [{}, [{}], [{"type": "file", "path": "x", "size": -1, "oid": "0" * 40}], "twice"])
def test_a_listing_that_makes_no_sense_is_refused(hub: Hub, listing: object, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"type": "file", "path": "x", "size": 1, "oid": "0" * 40}
    page = [entry, entry] if listing == "twice" else listing
    from tests.hub_stand_in import read_routes, server
    from tests.hub_stand_in.answers import as_json

    routes = [(m, p, (lambda *a, **k: as_json(page)) if f is read_routes.tree else f) for m, p, f in server.ROUTES]
    monkeypatch.setattr(server, "ROUTES", tuple(routes))
    with pytest.raises(HubError, match="the answer makes no sense"):
        plan(NAME)


def test_a_next_page_on_another_host_is_not_asked_for(hub: Hub) -> None:
    hub.page_size = 2
    assert plan(NAME)
    hub.faults.add("status", route="tree/", status=200, headers={"Link": '<http://elsewhere.invalid/x>; rel="next"'})
    with pytest.raises(HubError, match="makes no sense"):
        plan(NAME)


# Interruptions.


@pytest.mark.parametrize("stop_after", range(1, 29, 3))
def test_a_run_that_is_stopped_anywhere_goes_on_without_fetching_what_is_encoded(
    hub: Hub, source: Path, expected: dict[str, object], tmp_path: Path, stop_after: int
) -> None:
    calls = 0

    def stop(nbytes: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(NAME, tmp_path / "out", on_progress=stop, workers=3)
    sealed, _ = sealed_ranges(tmp_path / "out.partial", source)
    hub.log.clear()

    convert(NAME, tmp_path / "out", workers=2)

    assert without_source(tmp_path / "out") == expected
    assert overlap(by_shard(hub, source), sealed) == 0
    assert len(sealed) > 0 or stop_after < 10


def test_a_full_disk_is_named_and_the_same_command_goes_on_without_fetching_what_is_encoded(
    hub: Hub, source: Path, expected: dict[str, object], tmp_path: Path
) -> None:
    with pytest.raises(TargetError, match="no space left"):
        convert(NAME, tmp_path / "out", disk=FaultyDisk(60, "full from here on"))
    sealed, _ = sealed_ranges(tmp_path / "out.partial", source)
    assert sealed
    hub.log.clear()

    convert(NAME, tmp_path / "out")

    assert without_source(tmp_path / "out") == expected
    assert overlap(by_shard(hub, source), sealed) == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("fail_at", range(15, 180, 33))
def test_a_process_that_dies_at_any_change_of_the_disk_leaves_what_the_next_one_goes_on_with(
    hub: Hub, source: Path, expected: dict[str, object], tmp_path: Path, fail_at: int
) -> None:
    disk = FaultyDisk(fail_at, "kill")
    with pytest.raises(Killed):
        convert(NAME, tmp_path / "out", disk=disk)
    assert not (tmp_path / "out").exists()

    convert(NAME, tmp_path / "out")

    assert without_source(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("nbytes", "seconds", "is_too_slow"), [(999, 1.1, True), (2000, 1.1, False), (0, 0.9, False), (10**6, 2000.0, True)]
)
def test_an_answer_that_trickles_is_cut_off(nbytes: int, seconds: float, is_too_slow: bool) -> None:
    transport = Transport(NAME, token=False, patience=Patience(timeout_s=1))
    with pytest.raises(Unusable) if is_too_slow else nullcontext():
        transport.refuse_trickle(nbytes, seconds)


def test_staged_bytes_that_were_damaged_are_fetched_again_and_compared_with_what_was_hashed(
    hub: Hub, source: Path, expected: dict[str, object], tmp_path: Path
) -> None:
    hub.faults.add("status", route="cdn/", after=30, status=404)
    hub.faults.add("status", route=DATA, after=60, status=404)
    with pytest.raises(HubError):
        convert(NAME, tmp_path / "out")
    hub.faults.clear()
    sealed, _ = sealed_ranges(tmp_path / "out.partial", source)
    staged = tmp_path / "out.partial" / "folder" / "model-00001-of-00001.safetensors"
    staged.write_bytes(staged.read_bytes()[:5000].ljust(staged.stat().st_size, b"\0"))
    hub.log.clear()

    convert(NAME, tmp_path / "out")

    assert without_source(tmp_path / "out") == expected
    assert overlap(by_shard(hub, source), sealed) > 0


def test_a_tensor_that_is_fetched_again_must_have_the_bytes_that_were_hashed(
    plain_hub: Hub, source: Path, expected: dict[str, object], tmp_path: Path
) -> None:
    plain_hub.faults.add("status", route=r"00003-of-00003\.safetensors$", after=3, status=404)
    with pytest.raises(HubError):
        convert(NAME, tmp_path / "out", workers=1)
    plain_hub.faults.clear()
    sealed, _ = sealed_ranges(tmp_path / "out.partial", source)
    assert [one for one in sealed if "00001" in one[0]]
    staged = tmp_path / "out.partial" / "folder" / "model-00001-of-00001.safetensors"
    staged.write_bytes(staged.read_bytes()[:5000].ljust(staged.stat().st_size, b"\0"))
    plain_hub.faults.add("flip", route=r"00001-of.*\.safetensors$", after=2, times=1, nbytes=3)

    with pytest.raises(SourceError, match=r"00001-of-00003.safetensors: tensor '.*': has the digest"):
        convert(NAME, tmp_path / "out")

    assert not (tmp_path / "out").exists()
    plain_hub.log.clear()
    convert(NAME, tmp_path / "out")
    assert without_source(tmp_path / "out") == expected
    assert overlap(by_shard(plain_hub, source), sealed) > 80_000  # the shard that one of the two came from, whole
