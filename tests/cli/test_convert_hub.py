"""`qformat convert owner/name` as a process: killed, in two at once, offline, refused; the token is never shown."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.converters.sources.hub.hub_sources import (
    DATA,
    NAME,
    TOKEN,
    by_shard,
    converted,
    fetched_ranges,
    overlap,
    sealed_ranges,
    without_source,
    write_source,
)
from tests.hub_stand_in import Hub, environment, running
from tests.repository import ROOT

SMALL_PIECES = """
import sys
from qformat.cli.main import main
from qformat.hub.reading import stream
stream.PIECE_NBYTES, stream.WINDOW_NBYTES = 8192, 5 * 8192
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("hub processes") / "source")


@pytest.fixture(scope="module")
def expected(source: Path) -> dict[str, object]:
    return converted(source, source.parent / "local")


@pytest.fixture
def hub(source: Path) -> Iterator[Hub]:
    with running(Hub(with_cdn=True, tokens={TOKEN: "user"})) as hub:
        repository = hub.add_folder(NAME, source, private=True)
        repository.readers.add(TOKEN)
        yield hub


@pytest.fixture(autouse=True)
def started() -> Iterator[None]:
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.communicate()


STARTED: list[subprocess.Popen[str]] = []


def start(
    hub: Hub, home: Path, *arguments: str | Path, token: str | None = TOKEN, timeout_s: int = 2
) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SMALL_PIECES, "convert", *map(str, arguments)],
        cwd=ROOT,
        env={**environment(hub, home, token), "HF_HUB_DOWNLOAD_TIMEOUT": str(timeout_s)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    STARTED.append(process)
    return process


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=60)
    assert TOKEN not in output + errors
    return process.returncode, output, errors


def wait_for_sealed(process: subprocess.Popen[str], work: Path, source: Path, count: int) -> None:
    for _ in range(3000):
        if (work / "journal").exists() and len(sealed_ranges(work, source)[0]) >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("nothing was encoded within half a minute")


def test_a_dry_run_fetches_headers_and_shows_the_exact_size(
    hub: Hub, source: Path, expected: dict[str, object], tmp_path: Path
) -> None:
    code, output, errors = finish(start(hub, tmp_path / "home", NAME, tmp_path / "out", "--dry-run", "--json"))
    assert (code, errors) == (0, "")
    assert len(hub.requests(r"cdn/")) == 6  # of three shards
    code, _, _ = finish(start(hub, tmp_path / "home", NAME, tmp_path / "out"))
    assert code == 0
    assert json.loads(output)["nbytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert without_source(tmp_path / "out") == expected


def test_after_kill_9_the_same_command_fetches_nothing_that_is_encoded(
    hub: Hub, source: Path, expected: dict[str, object], tmp_path: Path
) -> None:
    hub.bytes_per_second = 20_000
    process = start(hub, tmp_path / "home", NAME, tmp_path / "out", "--workers", "2")
    wait_for_sealed(process, tmp_path / "out.partial", source, 8)
    process.send_signal(signal.SIGKILL)
    process.wait()
    sealed, _ = sealed_ranges(tmp_path / "out.partial", source)
    assert not (tmp_path / "out").exists()
    hub.bytes_per_second = None
    time.sleep(1)  # the stand-in notes requests when they end, and at this rate a piece takes 0.4 s
    hub.log.clear()

    code, _, errors = finish(start(hub, tmp_path / "home", NAME, tmp_path / "out"))

    assert code == 0, errors
    assert without_source(tmp_path / "out") == expected
    assert overlap(by_shard(hub, source), sealed) == 0
    for path in (tmp_path / "out").iterdir():
        assert TOKEN.encode() not in path.read_bytes()


def test_ctrl_c_stops_within_a_moment_and_says_that_the_same_command_continues(
    hub: Hub, source: Path, expected: dict[str, object], tmp_path: Path
) -> None:
    hub.bytes_per_second = 20_000
    process = start(hub, tmp_path / "home", NAME, tmp_path / "out")
    wait_for_sealed(process, tmp_path / "out.partial", source, 2)
    hub.faults.add("stall", route="cdn/", seconds=1.5)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, _, errors = finish(process)
    assert code == 130
    assert "the same command continues" in errors
    assert time.monotonic() - started < 5
    hub.faults.clear()
    hub.bytes_per_second = None

    code, _, errors = finish(start(hub, tmp_path / "home", NAME, tmp_path / "out"))

    assert code == 0, errors
    assert without_source(tmp_path / "out") == expected


def test_of_two_processes_one_writes_and_the_other_says_so(
    hub: Hub, source: Path, expected: dict[str, object], tmp_path: Path
) -> None:
    gate = threading.Event()  # holds one request for a piece, and with it the first process
    hub.faults.add("call", route="cdn/", after=10, times=1, hook=lambda: gate.wait(60))
    first = start(hub, tmp_path / "home", NAME, tmp_path / "out", timeout_s=60)
    wait_for_sealed(first, tmp_path / "out.partial", source, 1)
    code, _, errors = finish(start(hub, tmp_path / "home", NAME, tmp_path / "out"))
    assert code == 1
    assert "another process is writing there" in errors
    gate.set()
    assert finish(first)[0] == 0
    assert without_source(tmp_path / "out") == expected


def test_a_private_repository_without_a_token_says_what_to_do_and_exits_with_1(hub: Hub, tmp_path: Path) -> None:
    code, output, errors = finish(start(hub, tmp_path / "home", NAME, tmp_path / "out", token=None))
    assert (code, output) == (1, "")
    assert errors.startswith("Error: owner/model: there is no such repository, or it is private")
    assert "HF_TOKEN" in errors
    assert not hub.requests(DATA)
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "home"])


def test_offline_makes_no_request_and_reads_what_keep_source_stored(
    hub: Hub, expected: dict[str, object], tmp_path: Path
) -> None:
    code, _, errors = finish(start(hub, tmp_path / "home", NAME, tmp_path / "kept", "--keep-source"))
    assert code == 0, errors
    hub.log.clear()
    code, _, errors = finish(start(hub, tmp_path / "home", NAME, tmp_path / "out", "--offline"))
    assert code == 0, errors
    assert not hub.log
    assert without_source(tmp_path / "out") == without_source(tmp_path / "kept") == expected
    assert fetched_ranges(hub) == []


def test_a_revision_of_a_folder_is_wrong_usage(hub: Hub, source: Path, tmp_path: Path) -> None:
    code, _, errors = finish(start(hub, tmp_path / "home", source, tmp_path / "out", "--revision", "main"))
    assert code == 2
    assert "is no repository of the Hub" in errors
