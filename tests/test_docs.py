"""README, docs and CONTRIBUTING are true: their commands and their Python run."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from prune_dn.cli import main
from prune_dn.graph.rules import RULES
from prune_dn.models.families import FAMILIES
from prune_dn.pruning import CRITERIA

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
QUICK = ["train.epochs=1", "finetune.epochs=1", "train.max_steps=2", "finetune.max_steps=2"]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands(page: Path) -> list[str]:
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    lines += [line for block in blocks(page, "") for line in block.splitlines()]
    return [line for line in lines if line.startswith(("prune-dn ", "make "))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("made_up_times")
def test_the_commands_of_the_readme_run_in_order(folder: Path, capsys) -> None:
    found = [c for c in commands(ROOT / "README.md") if c.startswith("prune-dn ")]
    assert len(found) >= 10
    for command in found:
        arguments = shlex.split(command, comments=True)[1:]
        if arguments[0] == "run":
            for setting in QUICK:
                arguments += ["--set", setting]
        assert main(arguments) == 0, (command, capsys.readouterr().err)
    assert (folder / "tuned.onnx").stat().st_size > 1000


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_make_targets_exist(page: Path) -> None:
    for command in commands(page):
        if command.startswith("make "):
            target = shlex.split(command, comments=True)[1]
            dry = subprocess.run(
                ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False
            )
            assert dry.returncode == 0, dry.stderr


def test_the_python_runs(folder: Path) -> None:
    registries: tuple[dict[str, Any], ...] = (CRITERIA, RULES, FAMILIES)
    before = {name for registry in registries for name in registry}
    for page in PAGES:
        names: dict[str, object] = {}
        for block in blocks(page, "python"):
            exec(compile(block, page.name, "exec"), names)
    for registry in registries:
        for name in set(registry) - before:
            del registry[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_file_that_is_named_exists(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
    for name in re.findall(r"`((?:tests|tools|docs|recipes)/[\w/.]+)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(\w+\.yaml)`", text):
        assert (ROOT / "recipes" / name).exists(), name
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        assert recipe.name in (ROOT / "README.md").read_text()
