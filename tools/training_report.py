"""Tables, exponents and the plot of tools/bench_training.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from results import Row, write_between
from training_variants import VARIANTS

from prune_dn.base.files import atomic_path, write_text
from prune_dn.base.markdown import markdown_table


def exponent(depths: Sequence[float], values: Sequence[float]) -> float:
    """The power of depth with which values grow: the slope of a line through their logarithms."""
    return float(np.polyfit(np.log(depths), np.log(values), 1)[0])


def per_image(row: Row) -> float:
    return float(row["bytes"] / row["batch"])


def exponents(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Precision, then variant, to the exponent of saved bytes against the depth of BC nets."""
    found: dict[str, dict[str, float]] = {}
    for (precision, variant), points in _by_depth(rows).items():
        if len(points) > 1:
            value = exponent(*zip(*points, strict=True))
            found.setdefault(precision, {})[variant] = round(value, 3)
    return found


def memory_table(rows: list[Row]) -> str:
    """Saved bytes per image and the peak of a whole batch, each beside the naive net's."""
    good = [row for row in rows if row["what"] != "time"]
    found = {(r["what"], r["precision"], r["net"], r["variant"]): r for r in good if "bytes" in r}
    kinds = list(dict.fromkeys((r["what"], r["precision"]) for r in good))
    head = ["net, variant", "batch"]
    for what, precision in kinds:
        head += [f"{what}, {precision}, MB" + (" per image" if what == "saved" else ""), "x naive"]
    lines = []
    for net, variant in dict.fromkeys((row["net"], row["variant"]) for row in good):
        batch = next(r["batch"] for r in good if (r["net"], r["variant"]) == (net, variant))
        cells = [f"{net}, {variant}", str(batch)]
        for kind in kinds:
            row, naive = found.get((*kind, net, variant)), found.get((*kind, net, "naive"))
            value = row and (per_image(row) if kind[0] == "saved" else row["bytes"])
            cells.append(f"{value / 1e6:.4g}" if value else "failed")
            cells.append(f"{row['bytes'] / naive['bytes']:.3f}" if row and naive else "")
        lines.append(cells)
    return markdown_table(head, lines) + "\n"


def exponent_table(rows: list[Row]) -> str:
    found = exponents(rows)
    if not found:
        return ""
    depths = sorted({row["depth"] for row in rows if row["depth"]})
    variants = list(dict.fromkeys(name for by_variant in found.values() for name in by_variant))
    head = [f"BC-{depths[0]} to BC-{depths[-1]}", *found]
    lines = [[v, *(f"{by.get(v, float('nan')):.2f}" for by in found.values())] for v in variants]
    return markdown_table(head, lines) + "\n"


def time_table(rows: list[Row]) -> str:
    """Milliseconds of a step and ratios to the fastest plain one of the same net and precision."""
    lines, layouts = [], list(dict.fromkeys(name.split()[1] for r in rows for name in _times(r)))
    for row in (row for row in rows if row["what"] == "time"):
        label = f"{row['net']}, {row['precision']}, batch {row['batch']}"
        if "error" in row:
            lines.append([label, "failed", *[""] * (2 * len(layouts))])
        for variant in dict.fromkeys(name.split()[0] for name in _times(row)):
            cells = [label, variant]
            for layout in layouts:
                t = row["times"][f"{variant} {layout}"]
                cells += [f"{t['median_ms']:.0f}", f"{t['vs_fastest_plain']:.2f}x"]
            lines.append([*cells, str(t["n"])])
    if not lines:
        return ""
    head = ["net", "variant", *(x for name in layouts for x in (f"{name}, ms", "ratio")), "n"]
    return markdown_table(head, lines) + "\n"


def plot(rows: list[Row], path: Path) -> None:
    """Left: saved bytes against depth. Right: of each timed net, variants in their faster format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    memory, times = figure.subplots(1, 2, width_ratios=[1, 1.4])
    variants = [name for name in VARIANTS if any(name == row.get("variant") for row in rows)]
    colour = {name: f"C{number}" for number, name in enumerate(VARIANTS)}
    memory.set(xscale="log", yscale="log", xlabel="depth of DenseNet-BC, k = 12")
    first = rows[0]["precision"]
    for (precision, variant), points in _by_depth(rows).items():
        if precision == first:
            power = exponents(rows).get(precision, {}).get(variant)
            label = variant if power is None else f"{variant}: depth^{power:.2f}"
            depths, values = zip(*((d, v / 1e6) for d, v in points), strict=True)
            style = "-" if variant.startswith("ours") else "--"
            memory.plot(depths, values, style, marker="o", color=colour[variant], label=label)
            memory.set_xticks(depths, depths)
    memory.set(ylabel=f"MB saved per image, {first}")
    memory.set_xticks([], minor=True)
    groups = [row for row in rows if _times(row)]
    for place, row in enumerate(groups):
        ratios: dict[str, float] = {}
        for name, t in _times(row).items():
            variant, ratio = name.split()[0], t["vs_fastest_plain"]
            ratios[variant] = min(ratio, ratios.get(variant, ratio))
        for number, (variant, ratio) in enumerate(ratios.items()):
            at = place + (number - (len(ratios) - 1) / 2) * 0.8 / len(ratios)
            times.bar(at, ratio, 0.8 / len(ratios), color=colour[variant])
    times.axhline(1, color="#888888", lw=0.8)
    labels = [f"{row['net']}\n{row['precision']}" for row in groups]
    times.set_xticks(range(len(groups)), labels, fontsize=7)
    times.set(ylabel="time of a step / fastest plain one")
    for axes in (memory, times):
        axes.spines[["top", "right"]].set_visible(False)
    for variant in variants:
        times.bar(0, 0, color=colour[variant], label=variant)
    for axes in (memory, times) if memory.lines else (times,):
        axes.legend(fontsize=8, frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def write_report(rows: list[Row], out: Path, docs: Path | None) -> None:
    """Tables and plot into a folder; with `docs` also between its markers, the plot beside it."""
    settings = rows[0]["settings"]
    kernels = "compiled kernels" if settings["kernels"] else "no compiled kernels"
    said = f"{settings['machine']}; {kernels}.\n\n"
    tables = {
        "memory": memory_table(rows),
        "exponents": exponent_table(rows),
        "time": time_table(rows),
    }
    tables = {name: said + text for name, text in tables.items() if text}
    plot(rows, out / "training.png")
    for name, text in tables.items():
        write_text(out / f"{name}.md", text)
    if docs is not None:
        for name, text in tables.items():
            write_between(docs, f"training {name}", text)
        picture = docs.with_suffix(".png")
        plot(rows, picture)
        image = f"![Saved bytes against depth, and times of a step]({picture.name})\n"
        write_between(docs, "training plot", image)


def _times(row: Row) -> Row:
    times: Row = row.get("times", {})
    return times


def _by_depth(rows: list[Row]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Saved bytes per image of the BC nets: (precision, variant) to (depth, bytes), rising."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row["what"] == "saved" and row["depth"] and "bytes" in row:
            points = found.setdefault((row["precision"], row["variant"]), [])
            points.append((row["depth"], per_image(row)))
    return {key: sorted(points) for key, points in found.items()}
