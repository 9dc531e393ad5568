"""Several processes of a launcher: refused at once, by every command that writes and by a training from Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qformat import errors
from qformat.cli.main import WRITING, run
from qformat.processes import LAUNCHED, check_single_process
from qformat.training.run import TrainingJob, train
from qformat.training.settings import TrainingSettings
from tests.training import runs


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", LAUNCHED)
def test_several_processes_are_refused_with_the_variable_that_says_so(name: str) -> None:
    with pytest.raises(errors.UsageError, match=rf"^a test runs in one process, but 16 were started \({name}=16\)\. "):
        check_single_process("a test", {name: "16"})


@pytest.mark.parametrize("value", ["", "0", "1", "two", "-2"])
def test_one_process_of_a_launcher_is_accepted(value: str) -> None:
    check_single_process("a test", dict.fromkeys(LAUNCHED, value))


def test_the_variables_are_those_that_accelerate_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.utils.environment import get_cpu_distributed_information

    for name in LAUNCHED:
        with monkeypatch.context() as patched:
            patched.setenv(name, "3")
            assert get_cpu_distributed_information().world_size == 3


@pytest.mark.parametrize("command", WRITING)
def test_every_command_that_writes_is_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)
    assert run([command, "art", "out"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"Error: qformat {command} runs in one process, but 2 were started (WORLD_SIZE=2). ")
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_training_from_python_is_refused_before_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(errors.UsageError, match="a training runs in one process"):
        train(TrainingJob(tmp_path / "art", ["data.jsonl"], tmp_path / "out"), TrainingSettings())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "n_processes"),
    # Without a GPU, accelerate starts several processes only through MPI.
    [("torch.distributed.run", 1), ("torch.distributed.run", 2), ("accelerate.commands.launch", 1)],
)
def test_launchers_run_one_process_and_end_with_two(launcher: str, n_processes: int, tmp_path: Path) -> None:
    artifact, data = runs.make_artifact(tmp_path / "made"), runs.write_examples(tmp_path / "data.jsonl")
    options = {
        "torch.distributed.run": ["--no-python", f"--nproc-per-node={n_processes}"],
        "accelerate.commands.launch": ["--no_python", "--cpu", f"--num_processes={n_processes}"],
    }[launcher]
    script = "import sys; from qformat.cli.main import main; main(sys.argv[1:])"
    arguments = ["train", artifact, tmp_path / "out", "--data", data, "--max-steps", "1", "--device", "cpu"]
    ran = subprocess.run(
        [sys.executable, "-m", launcher, *options, sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    if n_processes == 1:
        assert ran.returncode == 0, ran.stderr
        assert (tmp_path / "out" / "adapter_model.safetensors").exists()
        return
    assert ran.returncode != 0
    assert "forcefully" not in ran.stderr  # torchrun's word for a process that did not end when it was asked to
    assert ran.stderr.count("Error: qformat train runs in one process, but 2 were started (WORLD_SIZE=2)") == 2
    assert not (tmp_path / "out").exists()
