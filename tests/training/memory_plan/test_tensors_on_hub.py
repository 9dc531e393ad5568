"""Plans of Hub repositories, from their headers alone."""

from __future__ import annotations

import contextlib
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qformat.errors import UsageError
from qformat.training.memory_plan.plan import plan_memory
from qformat.training.memory_plan.tensors import read_model_tensors
from tests.training.memory_plan.plans import small_settings


def test_without_a_network_the_error_explains_what_to_check() -> None:
    with pytest.raises(UsageError, match="nobody/nothing: does not exist as a local folder, and cannot be read"):
        plan_memory("nobody/nothing", small_settings())


class _Hub(http.server.BaseHTTPRequestHandler):
    """A stand-in for the part of the Hub that a client needs: `/REPOSITORY/resolve/REVISION/FILE`, with ranges."""

    folder: Path
    ranges: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.folder / self.path.rpartition("/")[2]
        if not self.path.startswith("/some/model/resolve/") or not path.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data, status = path.read_bytes(), 200
        if (wanted := self.headers.get("Range")) and body:
            first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            self.ranges.append(path.name)
            data, status = data[first : last + 1], 206
        elif body and path.suffix == ".safetensors":
            self.ranges.append("everything")
        self.send_response(status)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{path.name}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def hub_of(folder: Path) -> Iterator[tuple[str, list[str]]]:
    ranges: list[str] = []
    handler = type("Hub", (_Hub,), {"folder": folder, "ranges": ranges})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", ranges
        finally:
            server.shutdown()
            thread.join()


def read_from_hub(endpoint: str, home: Path, repository: str) -> str:
    """Read a repository in a separate process, because the Hub client reads its address when it is imported."""
    script = (
        "import sys; from qformat.training.memory_plan.tensors import read_model_tensors as read\n"
        "from qformat.errors import QformatError\n"
        "try:\n"
        "    t = read(sys.argv[1], conversion=lambda tensors, config: {})\n"
        "    print(t.folder.joinpath('config.json').is_file(), len(t.packed), len(t.kept), 'torch' in sys.modules)\n"
        "except QformatError as problem: print(type(problem).__name__, problem)"
    )
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        environment |= {name: "", name.lower(): ""}
    command = [sys.executable, "-c", script, repository]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("kind", ["nf4", "source"])
def test_only_the_headers_of_a_hub_repository_are_read(artifact: Path, tmp_path: Path, kind: str) -> None:
    folder = artifact.parent / kind
    here = read_model_tensors(folder, conversion=lambda tensors, config: {})
    with hub_of(folder) as (endpoint, ranges):
        said = read_from_hub(endpoint, tmp_path / "home", "some/model")
        assert said.split() == ["True", str(len(here.packed)), str(len(here.kept)), "False"]
        assert ranges
        assert "everything" not in ranges
        assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_a_repository_without_safetensors_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "config.json").write_text("{}")
    with hub_of(tmp_path / "files") as (endpoint, _):
        assert "is not a safetensors repo" in read_from_hub(endpoint, tmp_path / "home", "some/model")
        assert "UsageError some/other: does not exist as a local folder" in read_from_hub(
            endpoint, tmp_path / "home", "some/other"
        )
