"""Charts as inline SVG: drawn by matplotlib, coloured by the styles of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prune_dn.page.document import Chart

# What matplotlib draws with, and the style of the page that takes its place.
_STYLES = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--before)",
    "#050505": "var(--after)",
    "#060606": "var(--third)",
    "#070707": "var(--fourth)",
}
INK, MUTED, LINE, BEFORE, AFTER, THIRD, FOURTH = _STYLES
SERIES = (BEFORE, AFTER, THIRD, FOURTH)


@dataclass(frozen=True)
class Point:
    """A net in a chart: its cost, its accuracy and the interval of that, in per cent."""

    name: str
    cost: float
    accuracy: float
    low: float
    high: float


def scatter(title: str, points: Sequence[Point], cost: str) -> Chart:
    """Accuracy against a cost, with intervals."""
    figure, axes = _axes(cost, "accuracy, %")
    for i, point in enumerate(points):
        colour = BEFORE if i == 0 else AFTER
        errors = [[max(point.accuracy - point.low, 0.0)], [max(point.high - point.accuracy, 0.0)]]
        axes.errorbar(
            point.cost,
            point.accuracy,
            yerr=errors,
            fmt="o" if i in (0, len(points) - 1) else ".",
            color=colour,
            capsize=3,
        )
    highest = max(p.cost for p in points)
    axes.set_xlim(0, 1.3 * highest)
    seen: list[Point] = []
    for point in reversed(points):
        near = [p for p in seen if abs(p.accuracy - point.accuracy) < 3 and p.cost == point.cost]
        if not near:
            axes.annotate(
                point.name,
                (point.cost, point.accuracy),
                xytext=(6, 3),
                textcoords="offset points",
                color=INK,
            )
            seen.append(point)
    told = "; ".join(f"{p.name}: {p.accuracy:.2f} % at {p.cost:,.4g}" for p in points)
    return Chart(title, svg(figure, title), f"{title}. {told}.")


def lines(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    x: str,
    y: str,
    marks: Mapping[str, Sequence[float]] | None = None,
) -> Chart:
    """Lines with a legend; `marks` are places on the x axis with a name, such as where a run went on."""
    figure, axes = _axes(x, y)
    for (name, points), colour in zip(series.items(), SERIES * len(series), strict=False):
        axes.plot(*zip(*points, strict=True), marker=".", color=colour, label=name)
    for name, places in (marks or {}).items():
        for i, place in enumerate(places):
            axes.axvline(place, color=MUTED, linestyle="--", label=name if i == 0 else None)
    if all(float(place).is_integer() for points in series.values() for place, _ in points):
        axes.xaxis.get_major_locator().set_params(integer=True)
    if len(series) + len(marks or {}) > 1:
        _legend(axes)
    told = "; ".join(f"{name} from {p[0][1]:.4g} to {p[-1][1]:.4g}" for name, p in series.items())
    return Chart(title, svg(figure, title), f"{title}, {y} by {x}: {told}.")


def before_after(
    title: str, names: Sequence[str], before: Sequence[float], after: Sequence[float], y: str
) -> Chart:
    """Bars in the order of the net: what each part had, and what is left."""
    figure, axes = _axes("in the order of the net", y)
    places = range(len(names))
    axes.bar(places, before, color=BEFORE, width=0.9, label="before")
    axes.bar(places, after, color=AFTER, width=0.55, label="after")
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_xticks([])
    _legend(axes)
    told = f"{sum(before):,.0f} before, {sum(after):,.0f} after, in {len(names)} parts"
    return Chart(title, svg(figure, title), f"{title}: {told}; the table has each.")


def svg(figure: Any, salt: str) -> str:
    """A figure as SVG in which text is text, ids are its own, and colours are those of the page."""
    import matplotlib

    file = io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    slug = re.sub(r"\W+", "-", salt.lower())
    text = re.sub(r'id="', f'id="{slug}-', text)
    text = re.sub(r'href="#', f'href="#{slug}-', text)
    text = text.replace("url(#", f"url(#{slug}-")
    for colour, style in _STYLES.items():
        text = text.replace(colour, style)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1">', text, count=1)
    return re.sub(r'style="font: ([\d.]+)px [^;"]*', r'style="font: \1px var(--font)', text)


def _axes(x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.1), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x, color=MUTED)
    axes.set_ylabel(y, color=MUTED)
    axes.tick_params(colors=MUTED, labelcolor=MUTED)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _legend(axes: Any) -> None:
    axes.legend(frameon=False, labelcolor=INK, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
