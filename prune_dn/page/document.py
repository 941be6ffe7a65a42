"""What a page is made of, and how it becomes one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from prune_dn.base.console import finite
from prune_dn.base.files import write_text

MOST_BYTES = 2_000_000
MOST_CELLS = 12_000  # of all maps together


@dataclass(frozen=True)
class Table:
    """A table that can be sorted and saved as CSV; numbers are kept as numbers, None is an empty cell.

    `bars` are columns of shares in [0, 1] that are drawn as bars too. `folded`: closed until it is opened.
    """

    name: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""
    bars: frozenset[int] = frozenset()
    folded: bool = False


@dataclass(frozen=True)
class HeatMap:
    """Cells of rows x columns: a text and a shade in [0, 1] for each pair; other places are empty.

    `rows` and `columns` map names to short labels.
    """

    title: str
    rows: Mapping[str, str]
    columns: Mapping[str, str]
    cells: Mapping[tuple[str, str], tuple[str, float]]


@dataclass(frozen=True)
class HeatMaps:
    """Maps of the same rows and columns, shown side by side."""

    name: str
    title: str
    corner: str
    maps: Sequence[HeatMap]


@dataclass(frozen=True)
class Chart:
    """A drawing: SVG that begins with <svg, and what it shows, in words."""

    title: str
    svg: str
    description: str


@dataclass(frozen=True)
class Sample:
    """An image with what the nets say of it; `image` is a data URI."""

    image: str
    label: str
    dense: str
    pruned: str
    note: str


@dataclass(frozen=True)
class Section:
    """A part of the page, in this order: text, charts, maps, tables, samples, code."""

    name: str
    title: str
    text: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    maps: Sequence[HeatMaps] = ()
    tables: Sequence[Table] = ()
    samples: Sequence[Sample] = ()
    code: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """A whole page; `data` is kept in it as JSON."""

    title: str
    headline: str
    sections: Sequence[Section]
    data: Mapping[str, Any]


def render(page: Page) -> str:
    """The page as HTML: one file with its styles, its script and its data."""
    environment = Environment(
        loader=PackageLoader("prune_dn", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = shown
    return environment.get_template("page.html").render(page=page, data=finite(dict(page.data)))


def write(page: Page, path: Path) -> None:
    """Write the page, whole or not at all."""
    write_text(path, render(page))


def shown(value: Any) -> str:
    """A cell as it is read.

    >>> shown(1234567), shown(0.123456), shown(None)
    ('1,234,567', '0.1235', '')
    """
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
