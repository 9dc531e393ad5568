"""Connects huggingface_hub, in this process or in another one, to a stand-in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.hub_stand_in.server import Hub
from tests.standstill import GUARD_S


def environment(hub: Hub, home: Path, token: str | None = None) -> dict[str, str]:
    """Return the environment for a process that connects to the stand-in."""
    settings = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": str(GUARD_S),
    }
    inherited = {name: value for name, value in os.environ.items() if name not in {"HF_TOKEN", "TRANSFORMERS_OFFLINE"}}
    return {**inherited, **settings, **({} if token is None else {"HF_TOKEN": token})}


def point_here(monkeypatch: pytest.MonkeyPatch, hub: Hub, home: Path, token: str | None = None) -> None:
    """Connect this process to the stand-in until the test ends. This also sets constants that are read at import."""
    from huggingface_hub import constants, hf_api
    from huggingface_hub.utils import close_session

    close_session()
    for name, value in environment(hub, home, token).items():
        monkeypatch.setenv(name, value)
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", GUARD_S)
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
