"""Read a recipe file, and say everything that is wrong with it, by line."""

from __future__ import annotations

import difflib
import json
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from prune_dn.base.console import plain
from prune_dn.base.files import read_text
from prune_dn.base.yaml_lines import KeyPath, parse
from prune_dn.errors import RecipeError, listed
from prune_dn.run.recipe import Recipe

_MOST_PROBLEMS = 50  # that are shown
_MOST_DETAILS = 500  # of pydantic's that are looked at
_KINDS = {
    "int_type": "is not an integer",
    "int_from_float": "is not an integer",
    "int_parsing": "is not an integer",
    "float_type": "is not a number",
    "float_parsing": "is not a number",
    "bool_type": "is not true or false",
    "bool_parsing": "is not true or false",
    "string_type": "is not a string",
    "tuple_type": "is not a list",
    "list_type": "is not a list",
    "dict_type": "is not a mapping (key: value)",
    "model_type": "is not a mapping (key: value)",
    "model_attributes_type": "is not a mapping (key: value)",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "is not a finite number",
    "too_short": "has {actual_length} items; at least {min_length} are needed",
    "too_long": "has {actual_length} items; at most {max_length} are possible",
    "string_too_short": "is too short; at least {min_length} characters are needed",
    "literal_error": "is not a choice; choose {expected}",
}
# Keys that people look for in the wrong section.
_ELSEWHERE: dict[KeyPath, str] = {
    ("model", "num_classes"): "the number of classes comes from the data",
    ("model", "in_chans"): "the number of channels comes from the data",
    ("model", "in_channels"): "the number of channels comes from the data",
    ("model", "image_size"): "the size of images comes from the data: see data.image_size",
}


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe; `overrides` are texts like `train.epochs=3` (`--set`).

    `output_dir` is `runs/<name of the file>` unless given. Relative paths in a recipe start from
    the working directory. Raises RecipeError with all mistakes at once, each with its line.
    """
    path = Path(path)
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise RecipeError(f"{plain(path)}: there is no such recipe") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{plain(path)}: cannot be read as text: {plain(error)}") from error
    return parse_recipe(text, source=str(path), name=path.stem, overrides=overrides)


def parse_recipe(
    text: str, *, source: str = "recipe.yaml", name: str = "recipe", overrides: Sequence[str] = ()
) -> Recipe:
    """`load_recipe` for a text; `source` stands in the messages, `name` makes `output_dir`.

    >>> parse_recipe("model: {checkpoint: a.pt}\\ndata: {name: digits}\\nprune: {pruning_ratio: 0}")
    Traceback (most recent call last):
    ...
    prune_dn.errors.RecipeError: recipe.yaml:3: prune.pruning_ratio is 0: nothing would be cut; ...
    """
    document, source = parse(text), plain(source)
    problems = [f"{source}:{line}: {message}" for line, message in document.problems]
    where = {path: f"{source}:{line}" for path, line in document.lines.items()}
    data = document.value
    if data is None and not problems:
        raise RecipeError(f"{source}: the recipe is empty; it needs at least model and data")
    if not isinstance(data, dict):
        if not problems:
            problems.append(f"{source}:1: a recipe is a mapping (key: value), not {_show(data)}")
        raise RecipeError(listed(problems, _MOST_PROBLEMS))
    for override in overrides:
        problems += _override(data, where, override)
    data.setdefault("output_dir", f"runs/{name}")
    where.setdefault((), f"{source}:1")
    try:
        recipe = Recipe.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        problems += _messages(error, data, where)
    if problems:
        raise RecipeError(listed(problems, _MOST_PROBLEMS))
    return recipe


def _override(data: dict[str, Any], where: dict[KeyPath, str], override: str) -> list[str]:
    """Put one `a.b=c` into `data`; the places under it now point to the argument."""
    source = f"--set {plain(override) if len(override) <= 80 else f'{plain(override[:77])}...'}"
    dotted, equals, text = override.partition("=")
    keys = tuple(dotted.strip().split("."))
    if not equals or not all(keys):
        return [f"{source}: write it as key.key=value, such as train.epochs=3"]
    document = parse(text)
    if document.problems:
        return [f"{source}: {message}" for _, message in document.problems]
    for depth, key in enumerate(keys[:-1], start=1):
        if data.get(key) is None:
            data[key] = {}
            where[keys[:depth]] = source
        if not isinstance(data[key], dict):
            return [f"{source}: {'.'.join(keys[:depth])} is {_show(data[key])}, not a mapping"]
        data = data[key]
    data[keys[-1]] = document.value
    for path in [path for path in where if path[: len(keys)] == keys]:
        del where[path]
    where[keys] = source
    return []


def _messages(error: ValidationError, data: Any, where: Mapping[KeyPath, str]) -> list[str]:
    """One line per place; what a union's members say about the same place is joined by 'or'."""
    found: dict[KeyPath, list[str]] = {}
    details = error.errors(include_url=False)[:_MOST_DETAILS]
    for detail in details:
        inside = [d for d in details if d["loc"][: len(detail["loc"])] == detail["loc"]]
        if detail["type"] == "too_short" and len(inside) > 1:
            continue  # pydantic counts only the items that are right
        if detail["type"] == "default_factory_not_called":
            continue  # a consequence of another mistake
        if detail["type"] == "missing" and any(_meant(d) == detail["loc"] for d in details):
            continue  # said with the unknown key
        path = _real_path(detail["loc"], data, detail["type"])
        text = _text(path, detail)
        if detail["type"] == "value_error" and isinstance(detail["input"], dict):
            path = _named_first(text, path, detail["input"])
        texts = found.setdefault(path, [])
        if text not in texts:
            texts.append(text)
    lines = []
    for path, texts in sorted(found.items(), key=lambda item: _order(item[0], where)):
        place = next(where[path[:n]] for n in range(len(path), -1, -1) if path[:n] in where)
        said = "; or ".join(texts)
        for depth in range(len(path)):
            named = ".".join(map(str, path[depth:]))
            if not named.isdigit() and said.startswith((f"{named} ", f"{named}: ")):
                said = ".".join((*map(str, path[:depth]), said))
                break
        else:
            said = f"{'.'.join(map(str, path))}: {said}" if path else said
        lines.append(f"{place}: {plain(said)}")
    return lines


def _named_first(text: str, path: KeyPath, data: Any) -> KeyPath:
    """The place that a message about a section begins with, where it is there; else the section."""
    for key in text.partition(" ")[0].rstrip(":").split("."):
        if not isinstance(data, dict) or key not in data:
            break
        path, data = (*path, key), data[key]
    return path


def _order(path: KeyPath, where: Mapping[KeyPath, str]) -> tuple[int, int]:
    place = next(where[path[:n]] for n in range(len(path), -1, -1) if path[:n] in where)
    line = place.rpartition(":")[2]
    return (0, int(line)) if line.isdigit() else (1, 0)


def _real_path(loc: tuple[int | str, ...], data: Any, kind: str) -> KeyPath:
    """`loc` without the names of union members that pydantic puts in."""
    path: list[int | str] = []
    for i, part in enumerate(loc):
        last = i == len(loc) - 1
        inside = (isinstance(data, dict) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and part < len(data)
        )
        if inside:
            data = data[part]
            path.append(part)
        elif last and kind == "missing":
            path.append(part)
    return tuple(path)


def _text(path: KeyPath, detail: ErrorDetails) -> str:
    kind, value = detail["type"], detail["input"]
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        return _unknown_key(path)
    context = detail.get("ctx", {})
    if kind == "value_error":
        message = str(context["error"])
        if isinstance(value, dict) or message.startswith(f"{path[-1]} is "):
            return message
        return f"{_show(value)} {message}{_guess(value, message)}"
    message = _KINDS[kind].format(**context) if kind in _KINDS else detail["msg"]
    if kind == "literal_error":
        message += _guess(value, message)
    if kind in ("int_type", "float_type") and isinstance(value, str) and _is_number(value):
        message += "; write it without quotes"
    return f"{_show(value)} {message}"


def _unknown_key(path: KeyPath) -> str:
    hint = _ELSEWHERE.get(path[-2:])
    if hint:
        return f"unknown key; {hint}"
    close = _close(path)
    guess = f" (did you mean {close!r}?)" if close else ""
    return f"unknown key{guess}; the keys here are {', '.join(_fields(path[:-1]))}"


def _close(path: KeyPath) -> str | None:
    return next(iter(difflib.get_close_matches(str(path[-1]), _fields(path[:-1]), n=1)), None)


def _meant(detail: ErrorDetails) -> KeyPath | None:
    """The key that an unknown key was meant to be."""
    if detail["type"] != "extra_forbidden":
        return None
    return (*detail["loc"][:-1], _close(detail["loc"]) or "")


def _fields(path: KeyPath) -> list[str]:
    """The keys of the section at `path`."""
    section: type[BaseModel] = Recipe
    for part in path:
        annotation = section.model_fields[str(part)].annotation
        members = (
            typing.get_args(annotation)
            if typing.get_origin(annotation) in (typing.Union, types.UnionType)
            else (annotation,)
        )
        section = next(m for m in members if isinstance(m, type) and issubclass(m, BaseModel))
    return list(section.model_fields)


def _guess(value: Any, choices: str) -> str:
    """A did-you-mean from the words of a message that lists choices after `choose`."""
    _, found, listed = choices.partition("choose ")
    if not found or not isinstance(value, str):
        return ""
    words = [word.strip("',") for word in listed.split() if word != "or"]
    close = difflib.get_close_matches(value, words, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if not isinstance(value, (dict, list)) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
