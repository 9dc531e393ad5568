"""Unusual entries in place of a plain file or directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def as_folder(path: Path) -> None:
    path.mkdir()


def as_fifo(path: Path) -> None:
    os.mkfifo(path)


def as_device(path: Path) -> None:
    try:
        os.mknod(path, 0o020666, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("making a device needs root")


def as_link_to_zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def as_link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def as_dangling_link(path: Path) -> None:
    path.symlink_to("nothing")


def as_file(path: Path) -> None:
    path.write_bytes(b"mine")


def as_link_to_a_file(path: Path) -> None:
    path.with_name("target").write_bytes(b"mine")
    path.symlink_to("target")


def as_link_to_an_empty_folder(path: Path) -> None:
    path.with_name("target").mkdir()
    path.symlink_to("target")
