"""Kernels run whatever state their cache is in: missing, read-only, full, damaged or of another user."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import pytest
from numba.core.caching import CacheImpl, IndexDataCacheFile

from qformat.codec.cpu.code_cache import cached_callback
from qformat.codec.cpu.kernels import jit
from tests.repository import ROOT


def plus_one(x: int) -> int:
    return x + 1


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def cached_files(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file())


def test_the_machine_code_is_kept_and_found_again(cache: Path) -> None:
    assert jit(plus_one)(1) == 2
    files = cached_files(cache)
    assert {path.suffix for path in files} == {".nbi", ".nbc"}
    again = jit(plus_one)
    assert again(1) == 2
    assert sum(again.stats.cache_hits.values()) == 1


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def replace_by_folder(path: Path) -> None:  # which nobody can read, not even root
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("damage", [empty, cut, replace_by_folder])
def test_a_damaged_or_unreadable_file_of_the_cache_is_compiled_again(
    damage: Callable[[Path], None], suffix: str, cache: Path
) -> None:
    jit(plus_one)(1)
    (path,) = (path for path in cached_files(cache) if path.suffix == suffix)
    damage(path)
    assert jit(plus_one)(1) == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_a_cache_that_cannot_be_written_is_not_needed(
    number: int, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(IndexDataCacheFile, "_open_for_write", fail)
    assert jit(plus_one)(1) == 2
    assert jit(plus_one)(1.5) == 2.5


def test_a_callback_is_compiled_whatever_state_its_cache_is_in(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signature = numba.int64(numba.int64)
    assert cached_callback(signature, plus_one).ctypes(1) == 2
    for path in cached_files(cache):
        path.write_bytes(b"")
    assert cached_callback(signature, plus_one).ctypes(1) == 2
    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    assert cached_callback(signature, plus_one).ctypes(1) == 2


def test_without_any_folder_for_a_cache_functions_are_compiled_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    compiled = jit(plus_one)
    assert compiled(1) == 2
    assert not sum(compiled.stats.cache_hits.values())


def test_every_module_with_kernels_can_be_imported_without_a_folder_for_a_cache() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for folder in ("qformat/codec", "qformat/quality/calibration")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "cpu.kernels import" in path.read_text("utf-8")
    ]
    assert len(modules) >= 5
    script = f"import numba.core.caching as c; c.CacheImpl._locator_classes = []; import {', '.join(modules)}"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_no_kernel_has_a_cache_of_another_kind() -> None:
    asking = [path.name for path in (ROOT / "qformat").rglob("*.py") if "cache=True" in path.read_text("utf-8")]
    assert asking == ["code_cache.py"]
