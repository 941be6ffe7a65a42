"""Imports point down only (the order of the design), and the command line starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import prune_dn

PACKAGE = Path(prune_dn.__file__).parent
# Each floor may import from the floors above it in this list, and from its own.
FLOORS = [
    {"limits", "errors", "files", "yaml_lines", "console", "processes", "signals"},
    {"losses", "sound"},
    {"models"},
    {"profiling"},
    {"export"},
    {"latency"},
    {"augment", "images"},
    {"sources"},
    {"data"},
    {"training", "pruning"},
    {"checkpoint"},
    {"recipe"},
    {"recipe_file"},
    {"report"},
    {"sensitivity_report"},
    {"run_folder"},
    {"rounds"},
    {"phases"},
    {"pipeline", "data_options"},
    {"jobs"},
    {"cli_options"},
    {"cli_checkpoints", "cli_sensitivity"},
    {"cli"},
    {"__main__"},
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


def test_help_is_quick_and_loads_no_torch() -> None:
    code = (
        "import sys\n"
        "from prune_dn.cli import main\n"
        "assert main(['run', '--help']) == 0\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    assert "prune-dn run recipes/quickstart.yaml" in done.stdout
    assert seconds < 3.0
