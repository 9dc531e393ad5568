"""The command line as a whole: help, exit codes, messages without tracebacks, interruptions."""

from __future__ import annotations

import errno
import importlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import qformat
from qformat.cli import main as cli_main
from qformat.cli.main import COMMANDS, GROUPS, RESUMED, run
from tests.repository import ROOT
from tests.small_models import contents, names_beside, write_llama
from tests.standstill import GUARD_S, wait_until_held

SCRIPT = "import sys; from qformat.cli.main import main; main(sys.argv[1:])"


def qformat_process(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_command_keeps_libraries_from_importing_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", sys)
    monkeypatch.setattr(cli_main, "choose_how_to_wait", lambda: None)
    with pytest.raises(SystemExit):
        cli_main.main(["--version"])
    with pytest.raises(ImportError):
        importlib.import_module("bitsandbytes")


def test_help_lists_every_command_with_its_summary_on_one_line_under_its_heading(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["--help"]) == 0
    *_, make, check, run_, train, share = capsys.readouterr().out.rstrip().split("\n\n")
    for shown, (heading, commands) in zip((make, check, run_, train, share), GROUPS.items(), strict=True):
        first, *lines = shown.splitlines()
        assert first == f"{heading}:"
        assert lines == [f"  {name:8}  {summary}" for name, summary in commands.items()]


def test_the_table_has_every_command_once() -> None:
    modules = {path.stem for path in (ROOT / "qformat" / "cli" / "commands").glob("*/[!_]*.py")}
    assert sorted(name for commands in GROUPS.values() for name in commands) == sorted(modules)
    assert {*RESUMED} < modules


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    shown = capsys.readouterr().out
    examples = shown.split("Example")[1]
    assert f"qformat {name} " in examples
    assert max(map(len, examples.splitlines())) <= 80
    assert "--json" in shown


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert qformat.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["convert"], ["convert", "a", "b", "--workers", "many"], ["inspect", "a", "--nonsense"], []],
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_invalid_file_exits_with_1_and_is_named_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_llama(tmp_path / "source")
    (source / "config.json").write_text("{")
    assert run(["convert", str(source), str(tmp_path / "out")]) == 1
    shown = capsys.readouterr()
    assert "config.json" in shown.err
    assert "Traceback" not in shown.err
    assert not shown.out


def test_a_file_that_cannot_be_used_is_named_without_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "cache/file")

    monkeypatch.setattr(cli_main.cli, "main", refuse)
    assert run(["info"]) == 2
    assert capsys.readouterr().err == ("Error: cache/file: Permission denied. Check the path and its permissions\n")


def test_no_progress_is_shown_if_stderr_is_not_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", str(write_llama(tmp_path / "source")), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == ""


def test_a_closed_pipe_gets_no_traceback(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source", n_layers=20)
    process = qformat_process("inspect", source, "--json")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    assert process.wait() in {0, 1}
    process.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["inspect", "SOURCE"], ["inspect", "SOURCE", "--json"]]
)
def test_a_full_disk_behind_the_output_gets_a_message(arguments: list[str], tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source", n_layers=20)
    given = [str(source) if argument == "SOURCE" else argument for argument in arguments]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *given], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: the output cannot be written: No space left on device")
    assert done.stderr.count("\n") == 1


def test_an_interrupted_command_that_does_not_resume_promises_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qformat.cli.commands.check.verify.verified", stopped)
    assert run(["verify", str(tmp_path)]) == 130
    assert capsys.readouterr().err.strip() == "Interrupted."


HELD_CONVERSION = """
import sys
from qformat.cli.main import main
from tests.standstill import hold_writes
hold_writes(after=7)
main(["convert", *sys.argv[1:], "--workers", "1", "--no-model-check"])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_conversion_says_so_leaves_nothing_and_continues(tmp_path: Path, number: signal.Signals) -> None:
    source = write_llama(tmp_path / "source", n_layers=4)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", HELD_CONVERSION, str(source), str(out)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until_held(process)
    process.send_signal(number)
    _, error = process.communicate(timeout=GUARD_S)
    assert process.returncode == 130
    assert "Interrupted. Run the same command again to continue." in error
    assert "Traceback" not in error
    assert not out.exists()
    assert run(["convert", str(source), str(out)]) == 0
    other = tmp_path / "other"
    assert run(["convert", str(source), str(other)]) == 0
    assert contents(out) == contents(other)
    assert names_beside(out) == {"source", "out", "other"}
