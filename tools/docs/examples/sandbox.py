"""The directory and the environment that a page's examples run in, and the running of one command."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SOURCE_NAME = "SmolLM2-135M-Instruct"
REPOSITORY = f"HuggingFaceTB/{SOURCE_NAME}"
TOKEN = "hf_stand_in"
HOME_SHOWN = "/home/me"
HUB_SHOWN = "https://huggingface.co"
GUARD_S = 600
"""Ends what hangs; examples take seconds."""
ENDS_IN_HEAD = re.compile(r"\|\s*head\b[^|;&]*$")
COLD_CACHE_NOTE = "Compiling kernels, once on this machine"
"""A line that a command prints only if no command ran on this machine before."""
LEFT_OUT = (
    "HF_TOKEN",
    "HF_HUB_OFFLINE",
    "HF_HUB_CACHE",
    "TRANSFORMERS_OFFLINE",
    "PYTEST_CURRENT_TEST",
    "QFORMAT_BACKEND",
)


@dataclass(frozen=True, slots=True)
class Ran:
    """What a command printed, stdout and stderr together, and its exit code; None if it was ended after `GUARD_S`."""

    output: tuple[str, ...]
    exit_code: int | None


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A working directory with the source checkpoint, and an environment with a Hub of its own."""

    folder: Path
    environment: Mapping[str, str]
    replaced: tuple[tuple[str, str], ...]
    """Texts of this machine, and what a reader's machine would print in their place."""

    def shell(self, command: str) -> Ran:
        """Run a command with bash. It fails if any part of a pipeline fails, except before `head`, which closes it."""
        pipefail = [] if ENDS_IN_HEAD.search(command) else ["-o", "pipefail"]
        return self._run(["bash", *pipefail, "-c", command])

    def python(self, script: str) -> Ran:
        """Run a script as a file, so that it may start processes."""
        path = self.folder.parent / "example.py"
        path.write_text(script, encoding="utf-8")
        return self._run([sys.executable, str(path)])

    def write(self, name: str, text: str) -> None:
        """Write a file that the page shows."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def _run(self, command: Sequence[str]) -> Ran:
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        try:
            printed, _ = process.communicate(timeout=GUARD_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            printed, _ = process.communicate()
            return Ran(self._lines(printed), None)
        return Ran(self._lines(printed), process.returncode)

    def _lines(self, printed: str) -> tuple[str, ...]:
        for here, shown in self.replaced:
            printed = printed.replace(here, shown)
        lines = [line.rstrip() for line in printed.split("\n") if not line.startswith(COLD_CACHE_NOTE)]
        while lines and not lines[-1]:
            lines.pop()
        return tuple(lines)


@contextmanager
def sandbox(source: Path) -> Iterator[Sandbox]:
    """Make a working directory with the source checkpoint and a stand-in of the Hub; remove both at the end.

    Examples get a copy of the source: a hard link would change its files' times, and a conversion that another process
    runs at the same time would stop because its source changed.

    Raises:
        RuntimeError: The stand-in did not start.
    """
    with tempfile.TemporaryDirectory(prefix="docs-check-") as name, _hub(source) as endpoint:
        home = Path(name)
        folder = home / "models"
        shutil.copytree(source, folder / SOURCE_NAME)
        replaced = ((str(home), HOME_SHOWN), (endpoint, HUB_SHOWN))
        yield Sandbox(folder, _environment(home, endpoint), replaced)


@contextmanager
def _hub(source: Path) -> Iterator[str]:
    """Serve the source as a repository of a stand-in of the Hub, in another process; yield the endpoint."""
    command = [sys.executable, "-m", "tests.hub_stand_in", f"{REPOSITORY}={source}", "--token", TOKEN]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        try:
            endpoint = process.stdout.readline().strip()
            if not endpoint:
                raise RuntimeError("the stand-in of the Hub did not start")
            yield endpoint
        finally:
            process.kill()
            process.wait()


def _environment(home: Path, endpoint: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
    return inherited | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": str(ROOT),
        "QFORMAT_DEMO": str(ROOT / "demo"),  # for setups that need another file of the demo
        "PYTHONUNBUFFERED": "1",  # stdout and stderr come in the order in which they were printed
        "HOME": str(home),
        "HF_HOME": str(home / ".cache" / "huggingface"),
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
        "COLUMNS": "110",
        "LC_ALL": "C.UTF-8",
        "NO_COLOR": "1",
    }
