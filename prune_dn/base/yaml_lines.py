"""YAML read with the line of every value, and without YAML 1.1's surprises.

Scalars follow YAML 1.2's core schema: `1e-4` is a number, `no`, `on` and `1:30` are strings.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]

_MOST_TEXT = 100_000  # characters
_MOST_VALUES = 10_000
_MOST_BRACKETS = 1_000
_DIGITS = 40  # of the longest integers that are read

_SCALARS = [
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own convention)


class _Dumper(yaml.SafeDumper):
    """Keeps YAML 1.1's rules too, so that a string that is special in either version is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_kind}",
            re.compile(rf"(?:{_pattern})$"),
            ["" if c == "\0" else c for c in _first],
        )


class _TooMuch(Exception):
    """More than a document may hold."""


@dataclass
class Document:
    """A YAML value, the line (from 1) of each key path in it, and what was wrong: (line, text)."""

    value: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)


def parse(text: str) -> Document:
    """Read one YAML document. Never raises for bad input: see `problems`.

    >>> parse("a: 1e-4\\nb: no").value
    {'a': 0.0001, 'b': 'no'}
    >>> parse("a: 1\\nb: 2\\na: 3").problems
    [(3, "duplicate key 'a'; it was given before on line 1")]
    """
    document = Document()
    if len(text) > _MOST_TEXT:
        problem = f"it has {len(text):,} characters; at most {_MOST_TEXT:,} are read"
        document.problems.append((1, problem))
        return document
    try:
        if (
            text.count("[") + text.count("{") > _MOST_BRACKETS
        ):  # PyYAML takes the square of the time
            raise RecursionError
        node = yaml.compose(text, Loader=_Loader)
        if node is not None:
            document.value = _value(node, (), document, ())
    except _TooMuch as error:
        document.problems.append((1, str(error)))
    except RecursionError:
        document.problems.append((1, "it has too many lists and mappings in each other"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        document.problems.append((mark.line + 1 if mark else 1, _syntax(error)))
    except yaml.YAMLError as error:
        document.problems.append((1, f"not valid YAML: {str(error).splitlines()[0]}"))
    return document


def dump(data: Any) -> str:
    """Block-style YAML that `parse` reads back equal."""
    how: Any = {"Dumper": _Dumper, "sort_keys": False, "default_flow_style": None}
    text = str(yaml.dump(data, allow_unicode=True, **how))
    # What a terminal acts on is escaped; PyYAML knows some of it only as not ASCII.
    if not all(line.isprintable() for line in text.split("\n")):
        text = str(yaml.dump(data, allow_unicode=False, **how))
    return text


def _syntax(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or error.context or "syntax error"
    if "\\t" in problem:
        return "not valid YAML: a tab cannot indent or begin a value; use spaces"
    context = f" ({error.context})" if error.context and error.context != problem else ""
    return f"not valid YAML: {problem}{context}"


def _value(node: yaml.Node, path: KeyPath, document: Document, above: tuple[int, ...]) -> Any:
    line = node.start_mark.line + 1
    document.lines.setdefault(path, line)
    if len(document.lines) > _MOST_VALUES:
        raise _TooMuch(f"it has more than {_MOST_VALUES:,} values, with those that aliases repeat")
    if id(node) in above:
        document.problems.append((line, "an alias that contains itself"))
        return None
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        return [_value(x, (*path, i), document, above) for i, x in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, document, above)
    return _scalar(node, document)


def _mapping(
    node: yaml.MappingNode, path: KeyPath, document: Document, above: tuple[int, ...]
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = key_node.value
        if not isinstance(key, str) or key_node.tag != "tag:yaml.org,2002:str":
            shown = key if isinstance(key, str) else "a list or mapping"
            document.problems.append((line, f"the key {shown!r} is not a string"))
            continue
        if not _is_unicode(key):
            document.problems.append((line, f"the key {key!r} is no Unicode text"))
            continue
        place = (*path, key)
        if key in result:
            first = document.lines[place]
            document.problems.append(
                (line, f"duplicate key {key!r}; it was given before on line {first}")
            )
            continue
        document.lines[place] = line
        result[key] = _value(value_node, place, document, above)
    return result


def _scalar(node: yaml.Node, document: Document) -> Any:
    text, kind = node.value, node.tag.removeprefix("tag:yaml.org,2002:")
    if kind == "int" and len(text) > _DIGITS:
        problem = f"'{text[:_DIGITS]}...' is too large: it has {len(text)} characters"
        document.problems.append((node.start_mark.line + 1, problem))
        return None
    try:
        if kind == "null":
            return None
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        if kind == "int":
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        if kind == "float":
            return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
    except (KeyError, ValueError):
        document.problems.append((node.start_mark.line + 1, f"{text!r} is not a {kind}"))
        return None
    if not _is_unicode(text):
        document.problems.append((node.start_mark.line + 1, f"{text!r} is no Unicode text"))
        return None
    if kind != "str":
        document.problems.append((node.start_mark.line + 1, f"the tag {node.tag!r} is not allowed"))
    return text


def _is_unicode(text: str) -> bool:
    """Whether it has no half of a surrogate pair, which an escape can put there."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
