"""The layering of the design: every import points one way, and the package list is what lies on disk."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.repository import ROOT

BASE = {
    "qformat.errors",
    "qformat.strict_json",
    "qformat.cores",
    "qformat.markdown",
    "qformat.names",
    "qformat.named_files",
    "qformat.printable",
    "qformat.processes",
    "qformat.secrets",
    "qformat.sizes",
    "qformat.version",
}

ALLOWED = {
    "qformat.secrets": set(),
    "qformat.printable": set(),
    "qformat.errors": {"qformat.printable", "qformat.secrets"},
    "qformat.cores": set(),
    "qformat.markdown": set(),
    "qformat.names": set(),
    "qformat.named_files": set(),
    "qformat.version": set(),
    "qformat.processes": {"qformat.errors"},
    "qformat.sizes": {"qformat.errors"},
    "qformat.strict_json": {"qformat.errors"},
    "qformat.codec": BASE,
    "qformat.artifact": BASE | {"qformat.codec"},
    "qformat.hub": BASE | {"qformat.codec", "qformat.artifact"},
    "qformat.kernels": BASE | {"qformat.codec"},
    "qformat.model": BASE | {"qformat.codec", "qformat.artifact", "qformat.kernels"},
    "qformat.report": BASE | {"qformat.codec", "qformat.artifact"},
    "qformat.training": BASE | {"qformat.codec", "qformat.artifact", "qformat.kernels", "qformat.model", "qformat.hub"},
    "qformat.quality": BASE
    | {"qformat.codec", "qformat.artifact", "qformat.kernels", "qformat.model", "qformat.training"},
    "qformat.converters": BASE | {"qformat.codec", "qformat.artifact", "qformat.hub", "qformat.quality"},
    "qformat.cli": BASE
    | {"qformat.codec", "qformat.artifact", "qformat.report", "qformat.converters", "qformat.kernels", "qformat.model"}
    | {"qformat.training", "qformat.hub", "qformat.quality"},
}
"""What each layer may import besides itself. Nothing imports `qformat` itself, whose public names are lazy."""

ROOMS_BELOW = {
    "qformat.codec": ("qformat.codec.cpu", "qformat.codec.foreign"),
    "qformat.codec.cpu": ("qformat.codec.foreign",),
    "qformat.artifact": ("qformat.artifact.writing",),
    "qformat.artifact.reading": ("qformat.artifact.writing",),
    "qformat.artifact.sources": ("qformat.artifact.writing",),
    "qformat.hub": ("qformat.hub.card", "qformat.hub.publishing"),
    "qformat.hub.reading": ("qformat.hub.card", "qformat.hub.publishing"),
    "qformat.hub.card": ("qformat.hub.publishing",),
    "qformat.quality.calibration": ("qformat.quality.evaluation", "qformat.quality.tuning"),
    "qformat.quality.evaluation": ("qformat.quality.calibration", "qformat.quality.tuning"),
    "qformat.quality.tuning": ("qformat.quality.calibration", "qformat.quality.evaluation"),
    "qformat.training.adapter": (
        "qformat.training.data",
        "qformat.training.memory_plan",
        "qformat.training.optimizer",
    ),
    "qformat.training.data": (
        "qformat.training.adapter",
        "qformat.training.memory_plan",
        "qformat.training.optimizer",
    ),
    "qformat.training.optimizer": (
        "qformat.training.adapter",
        "qformat.training.data",
        "qformat.training.memory_plan",
    ),
    "qformat.training": ("qformat.training.memory_plan",),
    "qformat.converters.sources": (
        "qformat.converters.rules",
        "qformat.converters.encode",
        "qformat.converters.decode",
        "qformat.converters.compare",
    ),
    "qformat.converters.rules": (
        "qformat.converters.encode",
        "qformat.converters.decode",
        "qformat.converters.compare",
    ),
    "qformat.converters.encode": ("qformat.converters.decode", "qformat.converters.compare"),
    "qformat.converters.decode": ("qformat.converters.compare",),
    "qformat.converters.compare": ("qformat.converters.decode",),
    "qformat.cli": ("qformat.cli.commands",),
    "qformat.cli.commands": ("qformat.cli.commands",),
}
"""What the modules of a folder may not import: the rooms of the same layer that build on it, or stand beside it."""

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
    "qformat.converters.rules.architectures": {"transformers"},  # knows the model class of a config without one
}
"""The exceptions: the source whose files nothing but the library itself should read, when one is converted."""


def layer_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


@functools.cache
def modules() -> dict[str, Path]:
    found = {}
    for folder, package in ((ROOT / "qformat", "qformat"), (ROOT / "converters", "qformat.converters")):
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


@functools.cache
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


def test_every_import_points_down_the_layers() -> None:
    for module in modules().keys() - {"qformat"}:
        layer = layer_of(module)
        for imported in imports_of(modules()[module]):
            if imported.startswith("qformat."):
                target = layer_of(imported)
                assert target == layer or target in ALLOWED[layer], f"{module} imports {imported}"


def may_not_import(module: str) -> tuple[str, ...]:
    """The rooms that a module may not import: of its folder, or of the nearest one around it that has any."""
    room = module if modules()[module].name == "__init__.py" else module.rpartition(".")[0]
    below = ROOMS_BELOW.get(room)
    while below is None and "." in room:
        inner, room = room, room.rpartition(".")[0]
        if inner in ROOMS_BELOW.get(room, ()):
            return ()
        below = ROOMS_BELOW.get(room)
    return below or ()


def test_every_room_is_there() -> None:
    named = {*ROOMS_BELOW, *(room for rooms in ROOMS_BELOW.values() for room in rooms)}
    assert named <= modules().keys()


def test_every_import_points_down_the_rooms_of_a_layer() -> None:
    for module, path in modules().items():
        forbidden = tuple(f"{room}." for room in may_not_import(module))
        assert {name for name in imports_of(path) if f"{name}.".startswith(forbidden)} == set(), module


def test_the_package_itself_imports_only_its_version() -> None:
    body = ast.parse((ROOT / "qformat" / "__init__.py").read_text()).body
    at_import = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
    imported = {node.module for node in at_import if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in at_import if isinstance(node, ast.Import) for alias in node.names}
    assert {name for name in imported if name is not None and name.startswith("qformat")} <= {"qformat.version"}


def test_tools_do_not_import_tests() -> None:
    for path in (ROOT / "tools").rglob("*.py"):
        assert {name for name in imports_of(path) if name.split(".")[0] == "tests"} == set(), path


def test_the_conversion_path_imports_no_torch() -> None:
    for module, path in modules().items():
        if layer_of(module) in NO_TORCH:
            heavy = {"torch", "transformers", "safetensors", "bitsandbytes"} - MAY_IMPORT.get(module, set())
            assert not {name.split(".")[0] for name in imports_of(path)} & heavy, module


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


def test_checking_digests_alone_loads_no_kernels() -> None:
    script = (
        "import sys; from qformat.cli.main import run\n"
        "assert run(['verify', 'spec/vectors/artifacts/double_quant']) == 0\n"
        "assert 'numba' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


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
