"""The command `recipes`: those that come with the package, and a copy of one."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from prune_dn.base.console import plain
from prune_dn.base.console import show as _show
from prune_dn.base.files import write_text
from prune_dn.cli import options
from prune_dn.cli.options import example
from prune_dn.errors import RecipeError


@example("recipes", "recipes copy quickstart")
def recipes(
    action: Annotated[
        str | None, typer.Argument(metavar="[copy NAME]", help="Write a copy.", show_default=False)
    ] = None,
    name: Annotated[str | None, typer.Argument(hidden=True)] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Of copy.  [default: NAME.yaml]")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """The recipes that come with prune-dn; `copy NAME` writes one, to be changed and run."""
    found = shipped()
    if action is None:
        if output is not None:
            raise RecipeError("--output has no effect without copy NAME; leave it out")
        _show({key: _summary(text) for key, text in found.items()}, as_json)
        return
    if action != "copy" or name is None:
        raise RecipeError(
            f"recipes {plain(action)}: say `recipes copy NAME`; the names are {', '.join(found)}"
        )
    name = name.removesuffix(".yaml")
    if name not in found:
        raise RecipeError(f"{plain(name)} is no recipe of prune-dn; choose {', '.join(found)}")
    path = Path(f"{Path(name).name}.yaml") if output is None else output
    if path.exists():
        raise RecipeError(f"{plain(path)} is there already; give another name with --output")
    write_text(path, found[name])
    _show({"recipe": str(path), "next": f"prune-dn run {path}"}, as_json)


def shipped() -> dict[str, str]:
    """The text of each recipe in the package, by its name."""
    folder = files("prune_dn") / "recipes"
    found = {}
    for prefix, place in (("", folder), ("mfm_table/", folder / "mfm_table")):
        for file in sorted(place.iterdir(), key=lambda one: one.name):
            if file.name.endswith(".yaml"):
                text = file.read_text(encoding="utf-8")
                found[prefix + file.name.removesuffix(".yaml")] = text
    return found


def _summary(text: str) -> str:
    """The first comment of a recipe, in one line."""
    lines: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#") or line == "#":
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines)
