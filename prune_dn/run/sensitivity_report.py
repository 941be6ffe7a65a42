"""What `prune-dn sensitivity` found, as a table, a page, a heat map and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prune_dn.base.console import finite
from prune_dn.base.files import atomic_path, write_text
from prune_dn.base.intervals import percent
from prune_dn.base.markdown import in_markdown, markdown_table
from prune_dn.page.document import HeatMap, HeatMaps, Page, Section, Table
from prune_dn.page.document import write as write_page
from prune_dn.run.files import PAGE

# Metric: unit of its values, whether higher is better, and the drop that is borne unless given.
METRICS = {"accuracy": ("%", True, 0.5), "loss": ("nats", False, 0.05)}
Facts = Mapping[str, Any]


def write(facts: Facts, folder: Path) -> None:
    """sensitivity.json, sensitivity.md, sensitivity.png and report.html, each whole or not at all."""
    text = json.dumps(finite(facts), indent=1, allow_nan=False) + "\n"
    write_text(folder / "sensitivity.json", text)
    write_text(folder / "sensitivity.md", render(facts))
    plot(facts, folder / "sensitivity.png")
    write_page(page(facts), folder / PAGE)


def table(facts: Facts) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a row per group, its drop by ratio; the one that loses most comes first."""
    ratios = _ratios(facts)
    cells = {(r["name"], r["ratio"]): r for r in facts["rows"]}
    names = sorted(_names(facts), key=lambda name: _worst(cells, name, ratios), reverse=True)
    last = {r["name"]: r for r in facts["rows"]}
    rows = []
    for name in names:
        drops = [cells.get((name, ratio)) for ratio in ratios]
        share = last[name]["macs_saved"] / facts["macs"]
        rows.append(
            [
                name.removeprefix("features."),
                last[name]["kind"],
                str(last[name]["size"]),
                *("" if cell is None else _drop(facts, cell["drop"]) for cell in drops),
                f"{100 * share:.2f} %",
                f"{facts['ratios'][name]:g}" if name in facts["ratios"] else "none",
            ]
        )
    header = ["group", "kind", "units", *(f"drop at {ratio:g}" for ratio in ratios)]
    return [*header, f"MACs saved at {ratios[-1]:g}", "bears"], rows


def render(facts: Facts) -> str:
    """The findings as Markdown."""
    recalibrated = facts["recalibrated_on_batches"]
    one = "" if facts["one_image"] is None else f"; one image is {facts['one_image']:.2f} points"
    norms = f"refreshed on {recalibrated} training batches" if recalibrated else "not refreshed"
    parts = [
        f"# Sensitivity of {in_markdown(Path(facts['checkpoint']).name)}",
        f"Each group of units is cut alone, its least important by `{facts['criterion']}` first, "
        "with real surgery and its exact consequences; nothing is fine-tuned. A drop is what that "
        f"costs in {facts['metric']} ({_drop_unit(facts)}) against the dense net's "
        f"{_dense(facts)}, on {facts['n']:,} images of {facts['data']}, split "
        f"{facts['split']}{one}. No test image was looked at.",
        markdown_table(*table(facts)),
        f"`bears`: the largest of these ratios whose drop is at most {facts['max_drop']:g}. It "
        "holds for the group alone; all together cost more. The same, by module, is `ratios` in "
        "sensitivity.json.",
        "![heat map of the drops](sensitivity.png)",
        f"Norm statistics: {norms}. Protected: {in_markdown(', '.join(facts['protect']) or 'nothing')}. Seed: "
        f"{facts['seed']}. Images for the criterion: {facts['calibration_images'] or 'none'}. The "
        f"dense net has {facts['params']:,} params and {facts['macs']:,} MACs at "
        f"{facts['image_size']} pixels. Machine: {facts['machine']}.",
    ]
    return "\n\n".join(parts) + "\n"


def page(facts: Facts) -> Page:
    """The findings as a page: a map of the drops for each kind of unit, and the table."""
    ratios = {f"{ratio:g}": f"{ratio:g}" for ratio in _ratios(facts)}
    finite_drops = [r["drop"] for r in facts["rows"] if r["drop"] is not None and r["drop"] > 0]
    worst = max((d for d in finite_drops if math.isfinite(d)), default=1.0)
    maps = []
    for kind in dict.fromkeys(r["kind"] for r in facts["rows"]):
        rows = [r for r in facts["rows"] if r["kind"] == kind]
        cells = {
            (r["name"], f"{r['ratio']:g}"): (
                f"{_drop(facts, r['drop'])} {_drop_unit(facts)}",
                max(min(math.sqrt(max(r["drop"], 0.0) / worst), 1.0), 0.001),
            )
            for r in rows
            if r["drop"] is not None and math.isfinite(r["drop"])
        }
        names = {r["name"]: r["name"].removeprefix("features.") for r in rows}
        maps.append(HeatMap(f"{kind} units: drop by ratio", names, ratios, cells))
    header, rows_ = table(facts)
    shown = Table("sensitivity", header, rows_, "Drops, the group that loses most first")
    groups = [HeatMaps(f"map-{i}", "", "group, by ratio", [m]) for i, m in enumerate(maps, start=1)]
    text = [
        f"Each group of units is cut alone, its least important by {facts['criterion']} first; nothing is "
        f"fine-tuned. A drop is what that costs in {facts['metric']} against the dense net's {_dense(facts)}, on "
        f"{facts['n']:,} images of {facts['data']}, split {facts['split']}. No test image was looked at. "
        "The shades follow the square root of the drop."
    ]
    headline = (
        f"{len(facts['ratios'])} of {len(_names(facts))} groups lose at most {facts['max_drop']:g} "
        f"{_drop_unit(facts)} when one of the measured ratios of them is cut alone."
    )
    section = Section("sensitivity", "What each group loses", text, maps=groups, tables=[shown])
    title = f"Sensitivity of {Path(facts['checkpoint']).name}"
    return Page(title, headline, [section], {"format": "prune_dn.page/1", "sensitivity": facts})


def plot(facts: Facts, path: Path) -> None:
    """A heat map, groups x ratios, a panel per kind, in the order of the net."""
    import numpy as np
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    ratios, kinds = _ratios(facts), list(dict.fromkeys(r["kind"] for r in facts["rows"]))
    names = {
        k: list(dict.fromkeys(r["name"] for r in facts["rows"] if r["kind"] == k)) for k in kinds
    }
    drops = {(r["name"], r["ratio"]): r["drop"] for r in facts["rows"]}
    worst = max((d for d in drops.values() if math.isfinite(d)), default=0.0)
    norm = PowerNorm(0.5, vmin=0.0, vmax=worst if worst > 0 else 1.0, clip=True)
    longest = max(len(of_kind) for of_kind in names.values())
    size = ((2.4 + 0.6 * len(ratios)) * len(kinds) + 1.2, max(0.19 * longest + 1.3, 2.8))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        cells = np.array([[drops.get((n, r), math.nan) for r in ratios] for n in names[kind]])
        axes.set_facecolor("#dddddd")
        image = axes.imshow(np.ma.masked_invalid(cells), norm=norm, cmap="YlOrRd", aspect="auto")
        for (row, column), drop in np.ndenumerate(cells):
            if math.isfinite(drop):
                dark = norm(drop) > 0.6
                text = _drop(facts, drop)
                axes.text(
                    column,
                    row,
                    text,
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="white" if dark else "black",
                )
        labels = [n.removeprefix("features.") for n in names[kind]]
        axes.set_yticks(range(len(labels)), labels, fontsize=6)
        axes.set_xticks(range(len(ratios)), [f"{ratio:g}" for ratio in ratios], fontsize=8)
        axes.set_title(f"{kind} units", fontsize=9)
        axes.set_xlabel("ratio cut", fontsize=8)
    label = f"drop in {facts['metric']} ({_drop_unit(facts)}), alone; grey: not measured"
    bar = figure.colorbar(image, ax=list(panels), aspect=40)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def summary(facts: Facts, out: Path) -> dict[str, str]:
    """What is printed below the table."""
    names, one = _names(facts), facts["one_image"]
    lines = {
        "dense": f"{_dense(facts)} {facts['metric']}",
        "images": f"{facts['n']:,}, split {facts['split']}",
        "groups that bear a ratio": f"{len(facts['ratios'])} of {len(names)}, at a drop of at most "
        f"{facts['max_drop']:g} {_drop_unit(facts)} each, alone",
        "written": ", ".join(str(out / f"sensitivity.{end}") for end in ("json", "md", "png"))
        + f", {out / PAGE}",
    }
    if one is not None and one > facts["max_drop"]:
        lines["coarse"] = f"one image is {one:.2f} points; use more images or a larger --max-drop"
    return lines


def _names(facts: Facts) -> list[str]:
    return list(dict.fromkeys(row["name"] for row in facts["rows"]))


def _ratios(facts: Facts) -> list[float]:
    return sorted({row["ratio"] for row in facts["rows"]})


def _worst(
    cells: Mapping[tuple[str, float], Facts], name: str, ratios: Sequence[float]
) -> tuple[float, ...]:
    """Drops from the largest ratio down: what groups are ranked by. No figure counts as worst."""
    found = [cells[name, ratio]["drop"] for ratio in reversed(ratios) if (name, ratio) in cells]
    return tuple(math.inf if math.isnan(drop) else drop for drop in found)


def _drop_unit(facts: Facts) -> str:
    return "points" if facts["metric"] == "accuracy" else str(facts["value_unit"])


def _drop(facts: Facts, drop: float) -> str:
    return f"{drop:.2f}" if facts["metric"] == "accuracy" else f"{drop:.3f}"


def _dense(facts: Facts) -> str:
    if facts["metric"] == "accuracy":
        return percent(facts["dense"] / 100, facts["n"])
    return f"{facts['dense']:.4f} nats"
