"""The recipes in the package: listed, copied, and valid as copies; and the version."""
# ruff: noqa: F811  (fixtures are imported)

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
from commands import Run, bad, document, run  # noqa: F401  (fixtures)

from prune_dn.run.recipe_file import load_recipe

ROOT = Path(__file__).parents[2]


def test_all_recipes_are_listed(run: Run) -> None:
    found = document(run("recipes", "--json"))
    folder = ROOT / "recipes"
    files = {p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml")}
    assert set(found) == files
    assert all(found.values())


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "mfm_table/plain"])
def test_a_copy_is_the_recipe(run: Run, tmp_path: Path, name: str) -> None:
    code, out, err = run("recipes", "copy", name, "-o", tmp_path / "mine.yaml")
    assert code == 0, err
    assert f"prune-dn run {tmp_path / 'mine.yaml'}" in out
    original = ROOT / "recipes" / f"{name.removesuffix('.yaml')}.yaml"
    assert (tmp_path / "mine.yaml").read_bytes() == original.read_bytes()
    load_recipe(tmp_path / "mine.yaml")
    bad(run("recipes", "copy", name, "-o", tmp_path / "mine.yaml"), "is there already")


def test_what_cannot_be_copied_is_refused(run: Run) -> None:
    bad(
        run("recipes", "copy", "nothing"),
        r"nothing is no recipe of prune-dn; choose .*quickstart",
    )
    bad(run("recipes", "copy"), "say `recipes copy NAME`")
    bad(run("recipes", "-o", "a.yaml"), "--output has no effect without copy NAME")


def test_the_version_is_that_of_the_package(run: Run) -> None:
    code, out, _ = run("--version")
    assert (code, out) == (0, f"prune-dn {metadata.version('prune_dn')}\n")
