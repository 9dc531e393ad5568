"""Hub datasets through `datasets`: first from a stand-in on loopback, later offline from the cache."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qformat.training.data.prepare import DataSettings, prepare_data
from tests.repository import ROOT
from tests.training import runs

COMMIT = "0" * 40

SCRIPT = """
import json, sys
from pathlib import Path
import datasets
from transformers import PreTrainedTokenizerFast
from qformat.errors import QformatError
from qformat.training.data.prepare import DataSettings, prepare_data
datasets.disable_progress_bars()
home, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
tokenizer = PreTrainedTokenizerFast.from_pretrained(home / "tokenizer")
for names, split in jobs:
    try:
        data = prepare_data(names, tokenizer, DataSettings(max_length=64), split=split, cache=home / "tokenised")
    except QformatError as problem:
        print(json.dumps(f"{type(problem).__name__}: {problem}"))
    else:
        print(json.dumps([data[i]["input_ids"].tolist() for i in range(len(data))]))
"""


class _Hub(http.server.BaseHTTPRequestHandler):
    """A stand-in for the Hub with one dataset, `some/data`: its metadata, its list of files, and the files."""

    folder: Path

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        files = sorted(self.folder.iterdir())
        if path.startswith("/api/datasets/some/data/tree/"):
            inside = path.count("/") > 6
            entries = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "1" * 40} for f in files]
            self.send(json.dumps([] if inside else entries).encode())
        elif path.startswith("/api/datasets/some/data"):
            record = {"id": "some/data", "sha": COMMIT, "siblings": [{"rfilename": f.name} for f in files]}
            self.send(json.dumps(record).encode())
        elif (
            path.startswith("/datasets/some/data/resolve/") and (file := self.folder / path.rpartition("/")[2]) in files
        ):
            self.send(file.read_bytes(), ETag=f'"{file.name}"')
        else:
            self.send(b"", 404, **{"X-Error-Code": "EntryNotFound"})

    def send(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def hub_of(folder: Path) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"folder": folder})) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def prepare(home: Path, *jobs: tuple[list[str], str], endpoint: str | None) -> list[Any]:
    """Prepare data in a separate process, because `datasets` reads the address of the Hub when it is imported."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"HF_HUB_OFFLINE": "1"} if endpoint is None else {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint}
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        environment |= {name: "", name.lower(): ""}
    command = [sys.executable, "-c", SCRIPT, str(home), json.dumps(jobs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_hub_datasets_are_read_by_split_with_local_files_and_later_offline(tmp_path: Path) -> None:
    hub_folder, home = tmp_path / "repository", tmp_path / "home"
    hub_folder.mkdir()
    train = runs.write_examples(hub_folder / "train.jsonl", 12)
    test = runs.write_examples(hub_folder / "test.jsonl", 5, seed=1)
    more = runs.write_examples(tmp_path / "more.jsonl", 3, seed=2)
    tokenizer = runs.small_tokenizer()
    tokenizer.save_pretrained(home / "tokenizer")
    here = []
    for file in (train, test):
        data = prepare_data([file, more], tokenizer, DataSettings(max_length=64), cache=tmp_path / "tokenised")
        here.append([data[i]["input_ids"].tolist() for i in range(len(data))])
    with hub_of(hub_folder) as endpoint:
        jobs = [(["some/data", str(more)], "train"), (["some/data"], "validation")]
        found, told = prepare(home, *jobs, endpoint=endpoint)
    assert found == here[0]
    assert told.startswith(
        "UsageError: some/data: does not exist as a local path, and `datasets` cannot load its split 'validation'"
    )
    assert "['train', 'test']" in told
    offline = [(["some/data:default", str(more)], "test"), (["some/other"], "train")]
    found, told = prepare(home, *offline, endpoint=None)
    assert found == here[1]
    assert told.startswith("UsageError: some/other: does not exist as a local path")
