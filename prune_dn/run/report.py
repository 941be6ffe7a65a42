"""The page that a run leaves: what was removed, what it cost, what it brought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prune_dn.base.files import atomic_path, write_text
from prune_dn.base.intervals import percent
from prune_dn.base.markdown import code, in_markdown, markdown_table

_UNITS = {"channels": "channels", "params": "params", "macs": "MACs", "latency": "milliseconds"}
Metrics = Mapping[str, Any]


def write_report(
    folder: Path, metrics: Metrics, environment: Metrics, plans: Sequence[Metrics]
) -> Path:
    """Write report.md and its plots into `folder`; `plans` are plans' JSON plus their `layers`."""
    plot_training(metrics.get("history", {}), folder / "training.png")
    if plans:
        plot_widths(widths(plans), folder / "widths.png")
    path = folder / "report.md"
    write_text(path, render(metrics, environment, plans))
    return path


def render(metrics: Metrics, environment: Metrics, plans: Sequence[Metrics]) -> str:
    """The report as Markdown."""
    header, rows = stage_table(metrics)
    data, stages = metrics["data"], metrics["stages"]
    last = list(stages)[-1]
    parts = [
        f"# {in_markdown(metrics['name'])}",
        f"{in_markdown(data['name'])}, {len(data['classes'])} classes, {data['image_size']}x"
        f"{data['image_size']} pixels; accuracy on {stages['dense']['n_test']:,} test images, "
        "which no choice has seen, with its 95 % interval (Wilson). One multiply-add is one MAC.",
        markdown_table(header, rows),
    ]
    if len(stages) > 1:
        parts += ["## What it brought", "\n".join(f"- {x}" for x in gains(metrics, last))]
    parts += [
        f"**Notice** ({notice['name']}): {in_markdown(notice['text'])}"
        for notice in metrics.get("notices", [])
    ]
    if "search" in metrics:
        parts += ["## As far as the accuracy allows", *_search_parts(metrics["search"])]
    if metrics.get("files"):
        parts += ["## Deployed files", *_file_parts(metrics)]
    if any(metrics.get("latency", {}).values()):
        parts += ["## Latency", *_latency_parts(metrics)]
    for plan in plans:
        parts += _plan_parts(plan, len(plans))
    parts += ["## Training", "![training curves](training.png)"]
    parts += ["## Where and with what", _environment(metrics, environment)]
    return "\n\n".join(parts) + "\n"


def stage_table(metrics: Metrics) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row per stage of the run, in the order in which they were made."""
    latency = metrics.get("latency", {})
    n = metrics["stages"]["dense"]["n_test"]
    header = ["net", f"test accuracy (n = {n:,})", "params", "MACs"]
    header += [_timed(x) for x in latency.get("dense", [])] + ["file"]
    rows = []
    for stage, figures in metrics["stages"].items():
        measured = latency.get("dense" if stage == "dense" else "pruned", [])
        rows.append(
            [
                stage,
                percent(figures["test_accuracy"], figures["n_test"]),
                f"{figures['params']:,}",
                human(figures["macs"]),
                *(f"{x['median_ms']:.2f} ms" for x in measured),
                f"{human(figures['file_bytes'])}B",
            ]
        )
    return header, rows


def below_table(metrics: Metrics) -> dict[str, str]:
    """What a reader of the table must know: what its numbers are, and the notices."""
    machines = dict.fromkeys(x["machine"] for x in _latencies(metrics))
    runs = sorted({x["n"] for x in _latencies(metrics)})
    lines = {"in brackets": "95 % interval of the accuracy (Wilson)"}
    if machines:
        n = " to ".join(str(n) for n in dict.fromkeys((runs[0], runs[-1])))
        lines["latency"] = f"median of {n} runs, nets in turn; {'; '.join(machines)}"
    for notice in metrics.get("notices", []):
        key = f"notice ({notice['name']})"
        lines[key] = f"{lines[key]}; {notice['text']}" if key in lines else notice["text"]
    return lines


def gains(metrics: Metrics, stage: str) -> list[str]:
    """What `stage` has against dense, in words."""
    dense, small = metrics["stages"]["dense"], metrics["stages"][stage]
    lines = [asked(r) for r in metrics.get("rounds", [])[-1:]]
    for key, name in (("params", "params"), ("macs", "MACs"), ("file_bytes", "bytes on disk")):
        lines.append(f"{name}: {100 * (1 - small[key] / dense[key]):.1f} % fewer")
    for before, after in _pairs(metrics):
        lines.append(
            f"latency, {_timed(before)}: {before['median_ms']:.2f} -> {after['median_ms']:.2f} ms "
            f"({before['median_ms'] / after['median_ms']:.2f} times as fast; "
            f"{100 * (1 - after['median_ms'] / before['median_ms']):.1f} % fewer ms, n = {after['n']})"
        )
    points = 100 * (small["test_accuracy"] - dense["test_accuracy"])
    lines.append(f"test accuracy: {points:+.2f} points (n = {small['n_test']:,})")
    return lines


def asked(done: Metrics) -> str:
    asked = f"asked: {100 * done['requested']:g} % fewer {_UNITS[done['unit']]}"
    achieved = f"achieved: {100 * done['achieved']:.2f} %"
    if "runtime" in done:
        asked += f", {_runtime(done)}, batch {done['batch_size']}"
        achieved += " as timed while planning"
    return f"{asked}; {achieved}"


def _latencies(metrics: Metrics) -> list[Metrics]:
    return [row for rows in metrics.get("latency", {}).values() for row in rows]


def _pairs(metrics: Metrics) -> list[tuple[Metrics, Metrics]]:
    latency = metrics.get("latency", {})
    return list(zip(latency.get("dense", []), latency.get("pruned", []), strict=False))


def _timed(row: Metrics) -> str:
    return f"{_runtime(row)}, batch {row['batch_size']}"


def _runtime(row: Metrics) -> str:
    precision = row.get("precision", "fp32")
    return str(row["runtime"]) + ("" if precision == "fp32" else f" {precision}")


def _file_parts(metrics: Metrics) -> list[str]:
    files = metrics["files"]
    batches = [row["batch_size"] for row in next(iter(files.values()))["latency"]]
    rows = [
        [
            code(name),
            _runtime(file["latency"][0]) if file["latency"] else "",
            percent(file["test_accuracy"], file["n_test"]),
            f"{human(file['file_bytes'])}B",
            *(f"{row['median_ms']:.2f} ms" for row in file["latency"]),
        ]
        for name, file in files.items()
    ]
    header = ["file", "runtime", "test accuracy", "bytes", *(f"batch {n}" for n in batches)]
    return [
        "Each file run by its own runtime: on the test images, and timed in turns with the others (medians).",
        markdown_table(header, rows),
    ]


def _search_parts(search: Metrics) -> list[str]:
    """The path of a search: each trial as it was measured."""
    rows = [
        [
            f"{trial['pruning_ratio']:.4f}",
            percent(trial["value"], search["images"]),
            f"{100 * trial['drop']:.2f} ({100 * trial['interval'][0]:.2f} to "
            f"{100 * trial['interval'][1]:.2f})",
            f"{trial['macs']:,}",
            "-"
            if trial["latency_ms"] is None
            else f"{trial['latency_ms']:.3f} of {trial['dense_latency_ms']:.3f}",
            "yes" if trial["holds"] else "no",
        ]
        for trial in search["trials"]
    ]
    header = ["ratio", "validation accuracy", "points lost (95 %)", "MACs", "ms of dense", "holds"]
    return [
        f"The largest cut that loses at most {search['max_drop']:g} points on {search['images']:,} validation "
        "images, by bisection.",
        markdown_table(header, rows),
    ]


def _latency_parts(metrics: Metrics) -> list[str]:
    rows = [
        [
            net,
            _runtime(row),
            str(row["batch_size"]),
            *(f"{row[key]:.2f}" for key in ("median_ms", "p10_ms", "p90_ms")),
            str(row["n"]),
            in_markdown(row["machine"]),
        ]
        for net, measured in metrics["latency"].items()
        for row in measured
    ]
    header = ["net", "runtime", "batch", "median, ms", "10 %", "90 %", "n", "machine"]
    return [
        "Milliseconds for one batch, the nets timed in turns. In onnxruntime and OpenVINO it is the "
        "exported file that runs, where there is one.",
        markdown_table(header, rows),
    ]


def human(number: float) -> str:
    """12345678 -> '12.3 M'."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:g}"


def _plan_parts(plan: Metrics, count: int) -> list[str]:
    name = "The plan" if count == 1 else f"Plan of round {plan['round']}"
    requested = ", ".join(f"{k} {_words(v)}" for k, v in plan["requested"].items())
    rows = [
        [in_markdown(r["name"]), r["kind"], str(r["before"]), str(r["after"]), _share(r)]
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
            "\n".join(
                f"- {in_markdown(unit)}: {in_markdown(why)}"
                for unit, why in plan["protected"].items()
            ),
        ]
    if count == 1 or plan["round"] == count:
        parts.append("![widths before and after](widths.png)")
    return parts


def _share(row: Metrics) -> str:
    return f"{100 * row['after'] / row['before']:.0f} %"


def _words(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return in_markdown(" + ".join(map(str, value)) or "none")
    return in_markdown(value)


def _environment(metrics: Metrics, environment: Metrics) -> str:
    seconds = sum(p["seconds"] for p in metrics["phases"].values())
    phases = ", ".join(f"{k} {p['seconds']:.1f}" for k, p in metrics["phases"].items())
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items())
    data = metrics["data"]
    lines = [
        f"- machine: {in_markdown(environment['machine'])}",
        f"- versions: {versions}",
        f"- pixels: mean {_words(data.get('mean'))}, std {_words(data.get('std'))} of values in [0, 1]",
        f"- seed: {environment['seed']}; processes: {environment['processes']}",
        f"- time: {seconds:.0f} s ({phases})",
        f"- command: {code(environment['command'])}",
    ]
    return "\n".join(lines)


def widths(plans: Sequence[Metrics]) -> list[dict[str, Any]]:
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
