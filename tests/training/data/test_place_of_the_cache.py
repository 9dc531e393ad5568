"""A cache of tokenised data that cannot be written is named, with the variable that moves it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qformat.artifact.writing.disk import Disk
from qformat.errors import TargetError
from qformat.training.data.token_cache import default_folder, locked


@pytest.mark.parametrize("blocked", ["a/b", "a"])
def test_a_folder_that_cannot_be_made_is_named_with_the_variable(blocked: str, tmp_path: Path) -> None:
    (tmp_path / blocked).parent.mkdir(exist_ok=True)
    (tmp_path / blocked).write_bytes(b"")  # a file, so that root cannot make the folder either
    with pytest.raises(TargetError) as refused, locked(tmp_path / "a" / "b", "key", Disk()):
        pass
    assert str(tmp_path / "a" / "b") in str(refused.value)
    assert "XDG_CACHE_HOME" in str(refused.value)


def test_the_variable_moves_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with locked(default_folder(), "key", Disk()):
        assert (tmp_path / "qformat" / "tokenised" / "key.lock").is_file()


def test_a_user_without_a_home_is_told_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(TargetError, match=r"Could not determine home directory\. .*XDG_CACHE_HOME"):
        default_folder()
