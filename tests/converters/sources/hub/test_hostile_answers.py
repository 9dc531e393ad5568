"""Answers that would lead out of a directory or to another host, or that are inconsistent, are rejected."""

from __future__ import annotations

from pathlib import Path

import pytest

from qformat.errors import HubError, Reason, SourceError, UsageError
from qformat.hub.reading import remote
from tests.converters.sources.hub.serving import (
    NAME,
    plan,
)
from tests.hub_stand_in import Hub
from tests.small_models import write_index


@pytest.mark.parametrize(
    "name",
    ["../up", "/etc/passwd", "a/../../up", "..\\up", "%2e%2e/up", "a/%2e%2e/up", "%252e%252e/up", "a//b", "a\nb"],
)
def test_hostile_names_in_a_listing_are_rejected(hub: Hub, name: str) -> None:
    hub.repositories.commit(NAME, {name: b"data"})
    with pytest.raises(SourceError, match="is not the plain name of a file") as raised:
        plan(NAME)
    assert raised.value.reason is Reason.PATH_ESCAPES


@pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors", "sub/model.safetensors", "a\\b"])
def test_hostile_names_in_an_index_are_rejected(hub: Hub, tmp_path: Path, name: str) -> None:
    (tmp_path / "index").mkdir()
    write_index(tmp_path / "index", {"lm_head.weight": name})
    index = "model.safetensors.index.json"
    hub.repositories.commit(NAME, {index: (tmp_path / "index" / index).read_bytes()})
    with pytest.raises(SourceError, match="is not the plain name of a file"):
        plan(NAME)


@pytest.mark.parametrize("name", ["owner/..", "owner/a--b", "owner", "a/b/c", "owner/na me", "-x/y"])
def test_an_invalid_repository_name_makes_no_request(hub: Hub, name: str) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        plan(name)
    assert not hub.log


@pytest.mark.parametrize("revision", ["a/../b", "", "/x", "a\nb"])
def test_an_invalid_revision_makes_no_request(hub: Hub, revision: str) -> None:
    with pytest.raises(UsageError, match="is not a revision"):
        remote.open_repository(NAME, revision=revision or " /")
    assert not hub.log


@pytest.mark.parametrize("listing", [{}, [{}], [{"type": "file", "path": "x", "size": -1, "oid": "0" * 40}], "twice"])
def test_an_inconsistent_listing_is_rejected(hub: Hub, listing: object, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"type": "file", "path": "x", "size": 1, "oid": "0" * 40}
    page = [entry, entry] if listing == "twice" else listing
    from tests.hub_stand_in import read_routes, server
    from tests.hub_stand_in.answers import as_json

    routes = [(m, p, (lambda *a, **k: as_json(page)) if f is read_routes.tree else f) for m, p, f in server.ROUTES]
    monkeypatch.setattr(server, "ROUTES", tuple(routes))
    with pytest.raises(HubError, match="the response is invalid"):
        plan(NAME)


def test_a_next_page_on_another_host_is_not_requested(hub: Hub) -> None:
    hub.page_size = 2
    assert plan(NAME)
    hub.faults.add("status", route="tree/", status=200, headers={"Link": '<http://elsewhere.invalid/x>; rel="next"'})
    with pytest.raises(HubError, match="the response is invalid"):
        plan(NAME)
