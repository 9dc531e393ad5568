"""How threads wait: asleep beside other programs, spinning on an idle machine, or as the user chose."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qformat.cli import waiting


@pytest.mark.parametrize(
    ("load", "loaded"),
    [
        ("0.00 0.00 0.00 1/100 4711", False),  # this process is the one that runs
        ("9.00 9.00 9.00 1/100 4711", False),  # what ran before this process
        ("0.00 0.00 0.00 2/100 4711", True),
        (None, False),
    ],
)
def test_threads_sleep_if_other_programs_run(
    load: str | None, loaded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "loadavg"
    if load is not None:
        path.write_text(load + "\n")
    monkeypatch.setattr(waiting, "_LOAD", path)
    for name in waiting.CHOICES:
        monkeypatch.setenv(name, "")  # so that it is as it was afterwards
        monkeypatch.delenv(name)
    waiting.choose_how_to_wait()
    assert os.environ.get("OMP_WAIT_POLICY") == ("passive" if loaded else None)


@pytest.mark.parametrize("name", waiting.CHOICES)
def test_the_users_own_choice_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "others_are_running", lambda: True)
    for other in waiting.CHOICES:
        monkeypatch.setenv(other, "")
        monkeypatch.delenv(other)
    monkeypatch.setenv(name, "1")
    waiting.choose_how_to_wait()
    assert {other: os.environ.get(other) for other in waiting.CHOICES if other != name} == {
        other: None for other in waiting.CHOICES if other != name
    }
