"""The wheel and the sdist can be built, and an installation adds only `qformat` to site-packages."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from tests.repository import ROOT


def test_wheel_and_sdist_build_and_the_wheel_contains_only_qformat(tmp_path: Path) -> None:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    copy = tmp_path / "copy"
    for name in filter(None, listing.stdout.split("\0")):
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(copy)]
    subprocess.run(command, check=True, capture_output=True)
    wheel = next((tmp_path / "dist").glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"qformat"}
    assert "qformat/converters/encode/plan.py" in names
    assert "qformat/py.typed" in names
    with tarfile.open(next((tmp_path / "dist").glob("*.tar.gz"))) as archive:
        assert any(name.endswith("converters/encode/plan.py") for name in archive.getnames())
