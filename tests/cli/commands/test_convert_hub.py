"""`qformat convert owner/name` as a process: killed, run twice at once, offline, rejected; the token is never shown."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.converters.sources.hub.serving import (
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
from tests.hub_stand_in import Hub, Request, environment, running
from tests.repository import ROOT
from tests.standstill import GUARD_S, wait_until_held

SMALL_PIECES = """
import sys
from qformat.hub.reading import transfer
transfer.DEFAULT_TRANSFER = transfer.Transfer(piece_nbytes=8192, window_nbytes=5 * 8192)
from qformat.cli.main import main
from tests.standstill import hold_writes
if sys.argv[1]:
    hold_writes(after=int(sys.argv[1]))
main(sys.argv[2:])
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
    hub: Hub,
    home: Path,
    *arguments: str | Path,
    token: str | None = TOKEN,
    timeout_s: int = GUARD_S,
    hold_after: int | None = None,
) -> subprocess.Popen[str]:
    """Start the command; timeout_s: of silence, after which it asks again; hold_after: see `hold_writes`."""
    process = subprocess.Popen(
        [sys.executable, "-c", SMALL_PIECES, "" if hold_after is None else str(hold_after), "convert"]
        + [str(argument) for argument in arguments]
        + ["--no-model-check"],
        cwd=ROOT,
        env={
            **environment(hub, home, token),
            "HF_HUB_DOWNLOAD_TIMEOUT": str(timeout_s),
            "HF_HUB_USER_AGENT_ORIGIN": f"process{len(STARTED)}",
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    STARTED.append(process)
    return process


def requests_of(hub: Hub, process: subprocess.Popen[str]) -> list[Request]:
    """Return what one process asked for. The stand-in may still note requests of another that was killed."""
    origin = f"process{STARTED.index(process)}"
    return [one for one in list(hub.log) if one.headers.get("user-agent", "").endswith(origin)]


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=GUARD_S)
    assert TOKEN not in output + errors
    return process.returncode, output, errors


class Gate:
    """Holds back an answer of the stand-in, and what comes after it, until the test opens it."""

    def __init__(self, hub: Hub, *, after: int) -> None:
        self._reached, self._open = threading.Event(), threading.Event()
        hub.faults.add("call", route="cdn/", after=after, hook=self._hold)

    def _hold(self) -> None:
        self._reached.set()
        self._open.wait(GUARD_S)

    def wait_until_reached(self) -> None:
        assert self._reached.wait(GUARD_S)

    def open(self) -> None:
        self._open.set()


def test_a_dry_run_downloads_headers_and_shows_the_exact_size(
    hub: Hub, source: Path, expected: dict[str, object], tmp_path: Path
) -> None:
    code, output, errors = finish(start(hub, tmp_path / "home", NAME, tmp_path / "out", "--dry-run", "--json"))
    assert (code, errors) == (0, "")
    assert len(hub.requests(r"cdn/")) == 6  # of three shards
    code, _, _ = finish(start(hub, tmp_path / "home", NAME, tmp_path / "out"))
    assert code == 0
    assert json.loads(output)["nbytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert without_source(tmp_path / "out") == expected


def test_after_kill_9_the_same_command_downloads_nothing_that_is_encoded(
    hub: Hub, source: Path, expected: dict[str, object], tmp_path: Path
) -> None:
    process = start(hub, tmp_path / "home", NAME, tmp_path / "out", "--workers", "2", hold_after=20)
    wait_until_held(process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    sealed, _ = sealed_ranges(tmp_path / "out.partial", source)
    assert len(sealed) >= 4
    assert not (tmp_path / "out").exists()

    again = start(hub, tmp_path / "home", NAME, tmp_path / "out")
    code, _, errors = finish(again)

    assert code == 0, errors
    assert without_source(tmp_path / "out") == expected
    fetched = by_shard(hub, source, requests_of(hub, again))
    assert fetched
    assert overlap(fetched, sealed) == 0
    for path in (tmp_path / "out").iterdir():
        assert TOKEN.encode() not in path.read_bytes()


def test_ctrl_c_stops_while_the_hub_is_silent_and_says_that_the_same_command_continues(
    hub: Hub, source: Path, expected: dict[str, object], tmp_path: Path
) -> None:
    gate = Gate(hub, after=20)
    process = start(hub, tmp_path / "home", NAME, tmp_path / "out", timeout_s=5)
    gate.wait_until_reached()
    process.send_signal(signal.SIGINT)
    code, _, errors = finish(process)  # while no answer comes
    assert code == 130
    assert "Run the same command again to continue" in errors
    gate.open()
    hub.faults.clear()

    code, _, errors = finish(start(hub, tmp_path / "home", NAME, tmp_path / "out"))

    assert code == 0, errors
    assert without_source(tmp_path / "out") == expected


def test_of_two_processes_one_writes_and_the_other_says_so(
    hub: Hub, source: Path, expected: dict[str, object], tmp_path: Path
) -> None:
    gate = Gate(hub, after=10)
    first = start(hub, tmp_path / "home", NAME, tmp_path / "out")
    gate.wait_until_reached()
    hub.faults.clear()
    code, _, errors = finish(start(hub, tmp_path / "home", NAME, tmp_path / "out"))
    assert code == 1
    assert "another process is writing to it" in errors
    gate.open()
    assert finish(first)[0] == 0
    assert without_source(tmp_path / "out") == expected


def test_a_private_repository_without_a_token_says_what_to_do_and_exits_with_1(hub: Hub, tmp_path: Path) -> None:
    code, output, errors = finish(start(hub, tmp_path / "home", NAME, tmp_path / "out", token=None))
    assert (code, output) == (1, "")
    assert errors.startswith("Error: owner/model: the repository does not exist or is private")
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
    assert "is not a Hub repository" in errors
