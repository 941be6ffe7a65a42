"""Imports point down only (the order of the design), and the command line starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import prune_dn

PACKAGE = Path(prune_dn.__file__).parent
# Each floor may import from the floors above it in this list; two rooms on one floor, one of them the other.
FLOORS = [
    {"errors", "base"},
    {"graph"},
    {"models"},
    {"data", "deploy"},
    {"measure"},
    {"training", "pruning"},
    {"page"},
    {"checkpoints", "run"},
    {"cli", "__main__"},
]
FLOOR = {name: number for number, floor in enumerate(FLOORS) for name in floor}


def unit(path: Path) -> str:
    """The module or subpackage of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """First steps below `prune_dn` of everything that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("prune_dn.")}
    return found


def files() -> list[Path]:
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


def test_every_module_has_a_floor() -> None:
    known = set(FLOOR) | {p.name for p in PACKAGE.rglob("__pycache__")}
    found = {unit(path) for path in files()}
    assert found - known == set(), "add the module to FLOORS"


def test_imports_point_down() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in files()
        for name in imports(path)
        if name in FLOOR and FLOOR[name] > FLOOR[unit(path)]
    ]
    assert wrong == []


def test_neighbours_on_a_floor_do_not_import_in_a_circle() -> None:
    graph = {path: imports(path) - {unit(path)} for path in files()}
    edges = {(unit(path), name) for path, names in graph.items() for name in names if name in FLOOR}
    assert [pair for pair in edges if pair[::-1] in edges] == []


def test_modules_stay_readable() -> None:
    long = {p.name: n for p in files() if (n := len(p.read_text().splitlines())) > 400}
    assert long == {}, "a module that outgrows about 300 lines is two ideas: split it"


def test_help_loads_no_torch() -> None:
    code = (
        "import sys\n"
        "from prune_dn.cli import main\n"
        "assert main(['run', '--help']) == 0 == main(['prune', '--help'])\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "prune-dn run recipes/quickstart.yaml" in done.stdout


def typed_homes() -> dict[str, tuple[str, ...]]:
    """What type checkers are told: the names that the package imports for them, by module."""
    tree = ast.parse(Path(prune_dn.__file__).read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {
        node.module.removeprefix("prune_dn."): tuple(alias.name for alias in node.names)
        for node in found
        if node.module is not None and node.module.startswith("prune_dn.")
    }


def test_the_public_names_are_listed_once_and_resolve() -> None:
    assert typed_homes() == prune_dn._HOMES
    assert sorted(sum(prune_dn._HOMES.values(), ())) == sorted(prune_dn.__all__)
    for name in prune_dn.__all__:
        assert getattr(prune_dn, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'prune_dn' has no attribute 'plan'"):
        _ = prune_dn.plan


def test_type_checkers_reject_unknown_names(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api", reason="mypy is not installed")
    code = "import prune_dn\nprune_dn.no_such_thing\nprune_dn.fit\nprune_dn.__version__\n"
    (tmp_path / "mine.py").write_text(code)
    config = str(PACKAGE.parent / "setup.cfg")
    out, _, status = api.run(["--config-file", config, str(tmp_path / "mine.py")])
    assert status == 1, out
    wrong = [line for line in out.splitlines() if ": error: " in line]
    assert len(wrong) == 1 and 'has no attribute "no_such_thing"' in wrong[0], out


@pytest.mark.parametrize("package", ["models", "pruning", "training"])
def test_every_name_of_a_subpackage_resolves(package: str) -> None:
    module = getattr(prune_dn, package)
    assert [name for name in module.__all__ if not hasattr(module, name)] == []
    public = {n for n, x in vars(module).items() if n[0] != "_" and not isinstance(x, ModuleType)}
    assert public == set(module.__all__)


def test_modules_are_attributes_that_no_function_hides() -> None:
    """Also before anybody imported them, and all are listed by `dir`."""
    paths = [path.relative_to(PACKAGE.parent).with_suffix("") for path in files()]
    names = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    names = [name for name in names if not name.endswith("__main__")]
    assert len(names) > 40
    code = (
        "import importlib, sys, types, prune_dn\n"
        "assert 'torch' not in sys.modules\n"
        f"names = {names}\n"
        "first = {name.split('.')[1] for name in names}\n"
        "assert {*first, *prune_dn.__all__, '__version__'} <= set(dir(prune_dn))\n"
        "assert 'torch' not in sys.modules\n"
        "for name in sorted(first):\n"
        "    assert getattr(prune_dn, name) is sys.modules['prune_dn.' + name], name\n"
        "for name in names:\n"
        "    module, parent = importlib.import_module(name), name.rpartition('.')[0]\n"
        "    assert getattr(sys.modules[parent], name.rpartition('.')[2]) is module, name\n"
        "import prune_dn.models.dense_net as d\n"
        "assert isinstance(d, types.ModuleType)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
