"""For all faults of the connection, fetch creates the published files, or raises an error and does not create OUT."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from qformat.artifact.manifest_seal import seal
from qformat.artifact.reading.verify import verify_integrity
from qformat.errors import ArtifactError, HubError, Reason, TargetError, UsageError
from qformat.hub.fetch import fetch
from tests.hub.conftest import PATIENT, TOKEN
from tests.hub.fetching import BODY, NAME, SHARD, do_fetch
from tests.hub_stand_in import Hub, environment
from tests.repository import ARTIFACT_VECTORS, ROOT
from tests.small_models import contents, names_beside
from tests.spec import corpus, edits
from tests.standstill import GUARD_S


def test_a_fetched_artifact_has_the_published_bytes_and_the_token_goes_to_the_hub_alone(
    hub: Hub, published: dict[str, bytes], tmp_path: Path
) -> None:
    hub.repositories.commit(NAME, {"notes/extra.txt": b"more", "notes.md": b"more"})
    progress: list[int] = []
    summary = do_fetch(tmp_path / "out", on_progress=progress.append)

    assert contents(tmp_path / "out") == published
    assert verify_integrity(tmp_path / "out", sha256=True).passed
    assert names_beside(tmp_path / "out") == {"out", "small-nf4"}
    assert summary.others == ("notes.md", "notes/extra.txt")
    assert sum(progress) == summary.nbytes - len(published["qformat.json"]) == summary.nbytes_fetched
    assert hub.requests(" cdn/")
    assert not [one for one in hub.requests(" cdn/") if "authorization" in one.headers]
    ranges = Counter((one.path, one.headers.get("range")) for one in hub.requests(BODY) if one.status == 206)
    assert set(ranges.values()) == {1}, "no range is fetched twice"


@pytest.mark.parametrize("every", [3, 4, 7])
@pytest.mark.parametrize("kind", ["status", "drop"])
def test_rejected_and_dropped_requests_are_repeated(
    hub: Hub, published: dict[str, bytes], tmp_path: Path, every: int, kind: str
) -> None:
    hub.faults.add(kind, every=every)  # type: ignore[arg-type]
    do_fetch(tmp_path / "out", connections=1)
    assert contents(tmp_path / "out") == published


@pytest.mark.parametrize(
    "switches",
    [
        {"kind": "cut", "nbytes": 1000},
        {"kind": "cut", "nbytes": 0},
        {"kind": "whole"},
        {"kind": "no_content_range"},
        {"kind": "wrong_content_range"},
        {"kind": "short_range"},
        {"kind": "stall", "nbytes": 100, "seconds": 3.0, "times": 2},
        {"kind": "slow", "seconds": 3.0, "times": 2},
        {"kind": "flip", "nbytes": 70, "times": 1},
        {"kind": "flip", "nbytes": 3, "times": 3},
    ],
    ids=lambda switches: f"{switches['kind']} {switches.get('nbytes', '')}",
)
def test_broken_responses_give_the_same_bytes(
    hub: Hub, published: dict[str, bytes], tmp_path: Path, switches: dict[str, object]
) -> None:
    fault = hub.faults.add(**{"route": BODY, "every": 2, **switches})  # type: ignore[arg-type]
    silent = "seconds" in switches  # longer than the timeout of the client
    do_fetch(tmp_path / "out", timeout_s=1 if silent else GUARD_S, connections=1)
    assert contents(tmp_path / "out") == published
    assert fault.n_done


def test_several_connections_that_break_at_once_give_the_same_bytes(
    hub: Hub, published: dict[str, bytes], tmp_path: Path
) -> None:
    for kind in ("status", "drop", "cut"):
        hub.faults.add(kind, route=BODY, nbytes=700, times=1)  # type: ignore[arg-type]
    do_fetch(tmp_path / "out", connections=8)
    assert contents(tmp_path / "out") == published


def test_a_flipped_bit_in_a_small_file_is_fetched_again(hub: Hub, published: dict[str, bytes], tmp_path: Path) -> None:
    hub.faults.add("flip", route="resolve/.*/LICENSE", nbytes=3, times=1)
    do_fetch(tmp_path / "out")
    assert contents(tmp_path / "out") == published


def test_bytes_that_stay_wrong_raise_an_error_and_only_their_file_is_fetched_again_later(
    hub: Hub, published: dict[str, bytes], tmp_path: Path
) -> None:
    hub.faults.add("flip", route=BODY, nbytes=5)
    with pytest.raises(
        ArtifactError,
        match=r"model-0000\d-of-00002\.safetensors: does not match the manifest after two downloads: found SHA",
    ) as caught:
        do_fetch(tmp_path / "out")
    assert caught.value.reason is Reason.FILE_DIGEST
    assert names_beside(tmp_path / "out") == {"out.partial", "small-nf4"}
    hub.faults.clear()
    hub.log.clear()
    do_fetch(tmp_path / "out")
    assert contents(tmp_path / "out") == published
    assert not hub.requests("resolve/.*/LICENSE")


def test_a_file_that_does_not_match_the_manifest_is_rejected_before_it_is_fetched(
    hub: Hub, published: dict[str, bytes], tmp_path: Path
) -> None:
    changed = bytearray(published[SHARD])
    changed[-1] ^= 1
    hub.repositories.commit(NAME, {SHARD: bytes(changed)})
    with pytest.raises(ArtifactError, match=f"{SHARD}: does not match the manifest: found SHA-256"):
        do_fetch(tmp_path / "out")
    assert not hub.requests(BODY)
    hub.repositories.commit(NAME, {SHARD: published[SHARD], "config.json": b"{}"})
    with pytest.raises(ArtifactError, match=r"config\.json: found 2 bytes, expected"):
        do_fetch(tmp_path / "out")


def test_a_shard_that_changes_under_its_commit_is_detected(
    hub: Hub, published: dict[str, bytes], tmp_path: Path
) -> None:
    hub.cdn_endpoint = None
    changed = bytearray(published[SHARD])
    changed[-1] ^= 1
    hub.faults.add(
        "call",
        route=f"resolve/.*{SHARD}",
        after=2,
        times=1,
        hook=lambda: hub.repositories.change_in_place(NAME, SHARD, bytes(changed)),
    )
    with pytest.raises(ArtifactError, match=f"{SHARD}: was changed"):
        do_fetch(tmp_path / "out")
    hub.repositories.change_in_place(NAME, SHARD, published[SHARD])
    do_fetch(tmp_path / "out")
    assert contents(tmp_path / "out") == published


def test_an_interrupted_fetch_resumes_with_its_commit_and_fetches_only_missing_pieces(
    hub: Hub, published: dict[str, bytes], tmp_path: Path
) -> None:
    hub.faults.add("status", route=BODY, after=5, status=404)
    with pytest.raises(HubError):
        do_fetch(tmp_path / "out", connections=1)
    first = sum(one.nbytes_sent for one in hub.log if one.status == 206)
    hub.faults.clear()
    hub.log.clear()
    hub.repositories.commit(NAME, {"LICENSE": b"another one\n"})
    summary = do_fetch(tmp_path / "out")

    assert contents(tmp_path / "out") == published
    assert summary.nbytes_fetched < summary.nbytes - len(published["qformat.json"])
    manifest_again = len(published["qformat.json"])
    sent = sum(one.nbytes_sent for one in hub.log if one.status == 206)
    assert first + sent == sum(map(len, published.values())) + manifest_again


def test_another_revision_does_not_resume_an_interrupted_fetch(
    hub: Hub, published: dict[str, bytes], tmp_path: Path
) -> None:
    hub.repositories.commit(NAME, {"notes.txt": b""}, ref="other")
    hub.repositories.by_name[NAME].refs["other"] = hub.repositories.commit(NAME, {"x.txt": b"x"})
    hub.faults.add("status", route=BODY, status=404)
    with pytest.raises(HubError):
        do_fetch(tmp_path / "out", revision=hub.repositories.by_name[NAME].head.parent)
    hub.faults.clear()
    with pytest.raises(TargetError, match="restart=True"):
        do_fetch(tmp_path / "out", revision="other")
    do_fetch(tmp_path / "out", revision="other", restart=True)
    assert contents(tmp_path / "out") == published


def damaged_pieces(work: Path) -> None:
    """Change a byte in every staged file."""
    for path in (work / "folder").iterdir():
        data = bytearray(path.read_bytes())
        if data:
            data[len(data) // 2] ^= 1
            path.write_bytes(data)


def cut_files(work: Path) -> None:
    for path in (work / "folder").iterdir():
        path.write_bytes(path.read_bytes()[:-1])


def removed_files(work: Path) -> None:
    for path in (work / "folder").iterdir():
        path.unlink()


@pytest.mark.parametrize("damage", [damaged_pieces, cut_files, removed_files])
def test_staged_bytes_are_checked_before_a_fetch_resumes(
    hub: Hub, published: dict[str, bytes], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    hub.faults.add("status", route=BODY, after=5, status=404)
    with pytest.raises(HubError):
        do_fetch(tmp_path / "out", connections=1)
    hub.faults.clear()
    damage(tmp_path / "out.partial")
    do_fetch(tmp_path / "out")
    assert contents(tmp_path / "out") == published


def test_an_older_artifact_is_replaced_atomically_on_request(
    hub: Hub, published: dict[str, bytes], tmp_path: Path
) -> None:
    do_fetch(tmp_path / "out")
    with pytest.raises(TargetError, match="force=True"):
        do_fetch(tmp_path / "out")
    hub.repositories.commit(NAME, {"unrelated.txt": b""})
    do_fetch(tmp_path / "out", force=True)
    assert contents(tmp_path / "out") == published
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    with pytest.raises(TargetError, match="is not an artifact"):
        do_fetch(tmp_path / "mine", force=True)


def test_missing_repositories_revisions_and_artifacts_raise_clear_errors(
    hub: Hub, published: dict[str, bytes], tmp_path: Path
) -> None:
    hub.repositories.create("owner/empty")
    hub.add_folder("owner/gated", tmp_path / "small-nf4", gated=True)
    out = tmp_path / "out"
    with pytest.raises(HubError, match="owner/missing: the repository does not exist or is private"):
        fetch("owner/missing", out, transfer=PATIENT)
    with pytest.raises(HubError, match="the revision does not exist"):
        fetch(NAME, out, revision="missing", transfer=PATIENT)
    with pytest.raises(ArtifactError, match=r"the repository has no qformat artifact.*qformat convert owner/empty OUT"):
        fetch("owner/empty", out, transfer=PATIENT)
    with pytest.raises(HubError, match=r"access is gated: .*not in the authorized list"):
        fetch("owner/gated", out, transfer=PATIENT)
    with pytest.raises(UsageError, match="owner/name"):
        fetch("../elsewhere", out, transfer=PATIENT)
    assert not out.exists()
    assert not out.with_name("out.partial").exists()


@pytest.mark.parametrize("name", ["../evil.txt", "/etc/evil", "a\\b", "..", "%2e%2e/evil"])
def test_names_in_a_manifest_that_leave_the_directory_are_rejected(
    hub: Hub, published: dict[str, bytes], tmp_path: Path, name: str
) -> None:
    record = json.loads(published["qformat.json"])
    lines = published["qformat.json"].decode().splitlines(keepends=True)
    at = next(number for number, line in enumerate(lines) if line.startswith('    "LICENSE"'))
    lines[at] = lines[at].replace('"LICENSE"', json.dumps(name))
    unsealed = "".join(lines).encode().replace(record["manifest_sha256"].encode(), b"0" * 64)
    hub.repositories.commit(NAME, {"qformat.json": seal(unsealed)})
    with pytest.raises(ArtifactError, match=r"is not the plain name|the file does not exist in the repository"):
        do_fetch(tmp_path / "out")


def test_an_inconsistent_artifact_is_not_finished_although_every_digest_is_right(
    hub: Hub, published: dict[str, bytes], tmp_path: Path
) -> None:
    vector = next(one for one in corpus.edited() if one.get("reason") == "codebook")
    base = ARTIFACT_VECTORS / vector["base"]
    edits.apply(vector["edits"], Path(shutil.copytree(base, tmp_path / "bad")))
    hub.add_folder("owner/bad", tmp_path / "bad")
    with pytest.raises(ArtifactError, match="codebook"):
        fetch("owner/bad", tmp_path / "out", transfer=PATIENT)
    assert not (tmp_path / "out").exists()


SCRIPT = """
import sys
from qformat.hub.fetch import fetch
from qformat.hub.reading.transfer import Transfer
from tests.standstill import on_stop
on_stop(lambda: print("stopping", flush=True))
fetch("owner/small-nf4", sys.argv[1], transfer=Transfer(piece_nbytes=4096, connections=1))
"""


def start(hub: Hub, tmp_path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "out")],
        cwd=ROOT,
        env=environment(hub, tmp_path / "hub_home", TOKEN),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_fetch_resumes_and_a_second_process_is_rejected_meanwhile(
    hub: Hub, published: dict[str, bytes], tmp_path: Path, how: signal.Signals
) -> None:
    held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        go_on.wait(GUARD_S)

    hub.faults.add("call", route=BODY, after=6, times=1, hook=hold)  # six pieces arrive, the seventh never does
    with start(hub, tmp_path) as process:
        assert held.wait(GUARD_S)
        with pytest.raises(TargetError, match="another process"):
            do_fetch(tmp_path / "out")
        process.send_signal(how)
        if how == signal.SIGINT:
            assert process.stdout is not None
            assert process.stdout.readline() == "stopping\n"
            go_on.set()
        process.communicate(timeout=GUARD_S)
        go_on.set()
    assert process.returncode != 0
    assert not (tmp_path / "out").exists()
    hub.faults.clear()
    summary = do_fetch(tmp_path / "out")
    assert contents(tmp_path / "out") == published
    assert summary.nbytes_fetched < summary.nbytes - 20_000


def test_the_command_line_fetches_and_prints_a_summary(
    hub: Hub, published: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qformat.cli.main import run

    hub.repositories.commit(NAME, {"model.sig": b"{}", "notes.txt": b"x"})
    assert run(["fetch", NAME, str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert "9 files, " in shown.out
    assert "all digests checked" in shown.out
    assert "signed; check the signature: qformat verify" in shown.out
    assert "also holds files that are not in the manifest: notes.txt" in shown.err
    assert (tmp_path / "out" / "model.sig").read_bytes() == b"{}"
    assert run(["fetch", NAME, str(tmp_path / "out")]) == 1
    assert run(["fetch", NAME, str(tmp_path / "out"), "--force", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["commit"] == hub.repositories.by_name[NAME].head.oid
    assert TOKEN not in json.dumps(facts)
    assert run(["fetch", "no-repository", str(tmp_path / "other")]) == 2
