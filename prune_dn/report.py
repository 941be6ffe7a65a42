"""The page that a run leaves: what was removed, what it cost, what it brought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prune_dn.files import atomic_path, write_text

STAGES = ("dense", "pruned", "recalibrated", "fine-tuned")
_UNITS = {"channels": "channels", "params": "params", "macs": "MACs", "latency": "milliseconds"}
Metrics = Mapping[str, Any]


def write_report(
    folder: Path, metrics: Metrics, environment: Metrics, plans: Sequence[Metrics]
) -> Path:
    """Write report.md and its plots into `folder`; `plans` are plans' JSON plus their `layers`."""
    plot_training(metrics.get("history", {}), folder / "training.png")
    if plans:
        plot_widths(_widths(plans), folder / "widths.png")
    path = folder / "report.md"
    write_text(path, render(metrics, environment, plans))
    return path


def render(metrics: Metrics, environment: Metrics, plans: Sequence[Metrics]) -> str:
    """The report as Markdown."""
    header, rows = stage_table(metrics)
    data, stages = metrics["data"], metrics["stages"]
    last = list(stages)[-1]
    parts = [
        f"# {metrics['name']}",
        f"{data['name']}, {len(data['classes'])} classes, {data['image_size']}x"
        f"{data['image_size']} pixels; accuracy on {stages['dense']['n_test']:,} test images, "
        "which no choice has seen. Latency: median of eager PyTorch runs, dense and pruned in "
        "turn. One multiply-add is one MAC.",
        markdown_table(header, rows),
    ]
    if len(stages) > 1:
        parts += ["## What it brought", "\n".join(f"- {x}" for x in gains(metrics, last))]
    for plan in plans:
        parts += _plan_parts(plan, len(plans))
    parts += ["## Training", "![training curves](training.png)"]
    parts += [f"Notice ({x['name']}): {x['text']}" for x in metrics.get("notices", [])]
    parts += ["## Where and with what", _environment(metrics, environment)]
    return "\n\n".join(parts) + "\n"


def stage_table(metrics: Metrics) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row per stage of the run."""
    latency = metrics.get("latency", {})
    batches = [x["batch_size"] for x in latency.get("dense", [])]
    header = ["net", "test accuracy", "params", "MACs"]
    header += [f"latency, batch {b}" for b in batches] + ["file"]
    rows = []
    for stage in STAGES:
        if stage not in metrics["stages"]:
            continue
        figures = metrics["stages"][stage]
        measured = latency.get("dense" if stage == "dense" else "pruned", [])
        rows.append(
            [
                stage,
                f"{100 * figures['test_accuracy']:.2f} %",
                f"{figures['params']:,}",
                human(figures["macs"]),
                *(f"{x['median_ms']:.2f} ms" for x in measured),
                f"{human(figures['file_bytes'])}B",
            ]
        )
    return header, rows


def gains(metrics: Metrics, stage: str) -> list[str]:
    """What `stage` has against dense, in words."""
    dense, small = metrics["stages"]["dense"], metrics["stages"][stage]
    lines = [
        f"asked: {100 * r['requested']:g} % fewer {_UNITS[r['unit']]}; "
        f"achieved: {100 * r['achieved']:.2f} %"
        for r in metrics.get("rounds", [])[-1:]
    ]
    for key, name in (("params", "params"), ("macs", "MACs"), ("file_bytes", "bytes on disk")):
        lines.append(f"{name}: {100 * (1 - small[key] / dense[key]):.1f} % fewer")
    latency = metrics.get("latency", {})
    for before, after in zip(latency.get("dense", []), latency.get("pruned", []), strict=False):
        lines.append(
            f"latency, batch {before['batch_size']}: {before['median_ms']:.2f} -> "
            f"{after['median_ms']:.2f} ms ({before['median_ms'] / after['median_ms']:.2f} times "
            "as fast)"
        )
    points = 100 * (small["test_accuracy"] - dense["test_accuracy"])
    lines.append(f"test accuracy: {points:+.2f} points (n = {small['n_test']:,})")
    return lines


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the rest to the right."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines)


def human(number: float) -> str:
    """12345678 -> '12.3 M'."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:g}"


def _plan_parts(plan: Metrics, count: int) -> list[str]:
    name = "The plan" if count == 1 else f"Plan of round {plan['round']}"
    requested = ", ".join(f"{k} {_plain(v)}" for k, v in plan["requested"].items())
    rows = [
        [r["name"], r["kind"], str(r["before"]), str(r["after"]), _share(r)]
        for r in plan["layers"]
        if r["before"] != r["after"]
    ]
    same = len(plan["layers"]) - len(rows)
    parts = [
        f"## {name}",
        f"Asked: {requested}.",
        markdown_table(["unit group", "kind", "before", "after", "kept"], rows),
        f"{same} more groups keep all their channels.",
    ]
    if plan["protected"]:
        parts += [
            "Protected:",
            "\n".join(f"- {unit}: {reason}" for unit, reason in plan["protected"].items()),
        ]
    if count == 1 or plan["round"] == count:
        parts.append("![widths before and after](widths.png)")
    return parts


def _share(row: Metrics) -> str:
    return f"{100 * row['after'] / row['before']:.0f} %"


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " + ".join(map(str, value)) or "none"
    return str(value)


def _environment(metrics: Metrics, environment: Metrics) -> str:
    seconds = sum(p["seconds"] for p in metrics["phases"].values())
    phases = ", ".join(f"{k} {p['seconds']:.1f}" for k, p in metrics["phases"].items())
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items())
    measured = [x for rows in metrics.get("latency", {}).values() for x in rows]
    lines = [
        f"- machine: {environment['machine']}",
        f"- versions: {versions}",
        f"- seed: {environment['seed']}; processes: {environment['processes']}",
        f"- time: {seconds:.0f} s ({phases})",
        f"- command: `{environment['command']}`",
    ]
    if measured:
        lines.append(f"- latency: {measured[0]['n']} runs per figure, {measured[0]['runtime']}")
    return "\n".join(lines)


def _widths(plans: Sequence[Metrics]) -> list[dict[str, Any]]:
    """Rows of the first plan with what the last one leaves (a group that is gone has 0)."""
    last = {row["name"]: row["after"] for row in plans[-1]["layers"]}
    return [{**row, "after": last.get(row["name"], 0)} for row in plans[0]["layers"]]


def plot_widths(layers: Sequence[Metrics], path: Path) -> None:
    """Bars: each group's channels before and after, one panel per kind."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(row["kind"] for row in layers))
    figure = Figure(figsize=(10, 2.2 * len(kinds) + 0.6), layout="constrained")
    for axes, kind in zip(figure.subplots(len(kinds), squeeze=False)[:, 0], kinds, strict=True):
        rows = [row for row in layers if row["kind"] == kind]
        places = range(len(rows))
        axes.bar(places, [r["before"] for r in rows], color="#c8d3df", label="before")
        axes.bar(places, [r["after"] for r in rows], color="#1f5fa8", label="after")
        axes.set(ylabel=f"{kind} channels", xlim=(-0.6, len(rows) - 0.4))
        ends = [row["name"].removeprefix("features.") for row in (rows[0], rows[-1])]
        axes.set_xticks([0, len(rows) - 1], ends, fontsize=7)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_training(history: Mapping[str, Sequence[Metrics]], path: Path) -> None:
    """Validation accuracy and training loss by epoch, one line per fit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    names = (("loss", "training loss"), ("val_accuracy", "validation accuracy"))
    for axes, (key, label) in zip(figure.subplots(1, 2), names, strict=True):
        for name, rows in history.items():
            points = [(i, r[key]) for i, r in enumerate(rows, start=1) if r.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=name)
                axes.legend(fontsize=8, frameon=False)
        axes.set(xlabel="epoch", ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
