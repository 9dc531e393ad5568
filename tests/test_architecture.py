"""The layering of the design: every import points one way, and the package list is what lies on disk."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.repository import ROOT

BASE = {"qformat.errors", "qformat.strict_json", "qformat.cores", "qformat.names", "qformat.sizes", "qformat.version"}

ALLOWED = {
    "qformat.errors": set(),
    "qformat.cores": set(),
    "qformat.names": set(),
    "qformat.version": set(),
    "qformat.sizes": {"qformat.errors"},
    "qformat.strict_json": {"qformat.errors"},
    "qformat.codec": BASE,
    "qformat.artifact": BASE | {"qformat.codec"},
    "qformat.hub": BASE | {"qformat.codec", "qformat.artifact"},
    "qformat.kernels": BASE | {"qformat.codec"},
    "qformat.model": BASE | {"qformat.codec", "qformat.artifact", "qformat.kernels"},
    "qformat.report": BASE | {"qformat.codec", "qformat.artifact"},
    "qformat.training": BASE | {"qformat.codec", "qformat.artifact", "qformat.kernels", "qformat.model"},
    "qformat.quality": BASE
    | {"qformat.codec", "qformat.artifact", "qformat.kernels", "qformat.model", "qformat.training"},
    "qformat.converters": BASE | {"qformat.codec", "qformat.artifact", "qformat.hub", "qformat.quality"},
    "qformat.cli": BASE
    | {"qformat.codec", "qformat.artifact", "qformat.report", "qformat.converters", "qformat.kernels", "qformat.model"}
    | {"qformat.training", "qformat.hub", "qformat.quality"},
}
"""What each layer may import besides itself. `qformat` itself (version, lazy public names) is free to all."""

NO_TORCH = (
    "qformat.errors",
    "qformat.strict_json",
    "qformat.codec",
    "qformat.artifact",
    "qformat.converters",
    "qformat.hub",
)


MAY_IMPORT = {
    "qformat.converters.sources.torch_bin": {"torch"},  # reads the pickle of a .bin file
    "qformat.converters.sources.gguf.tokenizer": {"transformers"},  # converts a vocabulary
}
"""The exceptions: the source whose files nothing but the library itself should read, when one is converted."""


def layer_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def modules() -> dict[str, Path]:
    found = {}
    for folder, package in ((ROOT / "qformat", "qformat"), (ROOT / "converters", "qformat.converters")):
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imports_of(path: Path) -> set[str]:
    """Every absolute module that a file imports, those inside functions included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("module", sorted(set(modules()) - {"qformat"}))
def test_every_import_points_down_the_layers(module: str) -> None:
    layer = layer_of(module)
    for imported in imports_of(modules()[module]):
        if imported.startswith("qformat.") and imported != "qformat.__version__":
            target = layer_of(imported)
            assert target == layer or target in ALLOWED[layer], f"{module} imports {imported}"


@pytest.mark.parametrize("module", [name for name in sorted(modules()) if layer_of(name) in NO_TORCH])
def test_the_conversion_path_imports_no_torch(module: str) -> None:
    heavy = {"torch", "transformers", "safetensors", "bitsandbytes"} - MAY_IMPORT.get(module, set())
    assert not {name.split(".")[0] for name in imports_of(modules()[module])} & heavy


def test_converters_reach_for_quality_in_one_place_and_for_its_settings() -> None:
    found = {
        (module, imported.rpartition(".")[0])
        for module, path in modules().items()
        if layer_of(module) == "qformat.converters"
        for imported in imports_of(path)
        if imported.startswith("qformat.quality")
    }
    settings = "qformat.quality.calibration.settings"
    assert {module for module, imported in found if imported != settings} == {"qformat.converters.encode.calibrated"}
    assert not any(name.startswith("qformat.model") for name in imports_of(modules()[settings]))


@pytest.mark.parametrize(
    ("module", "library"), [(module, name) for module in MAY_IMPORT for name in MAY_IMPORT[module]]
)
def test_what_only_one_kind_of_source_needs_is_imported_inside_its_functions(module: str, library: str) -> None:
    script = f"import sys, {module}, qformat.converters.sources.open_source; assert {library!r} not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_a_conversion_loads_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys, qformat; from pathlib import Path\n"
        "from tests.small_models import write_llama\n"
        f"source = write_llama(Path({str(tmp_path)!r}) / 'source')\n"
        f"qformat.convert(source, {str(tmp_path / 'out')!r})\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from qformat.cli.main import run; run(['--help'])\n"
        "heavy = {'numpy', 'numba', 'torch', 'tqdm', 'xxhash'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_the_package_list_equals_the_folders_on_disk() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {name if path.name == "__init__.py" else name.rpartition(".")[0] for name, path in modules().items()}
    assert set(setuptools["packages"]) == folders


def test_every_public_name_can_be_imported() -> None:
    import qformat

    for name in qformat.__all__:
        assert getattr(qformat, name) is not None
    assert set(qformat.__all__) == set(qformat._PUBLIC)
