"""What a sweep leaves: a table with mean and spread over seeds, the best, a plot, and a line for each trial."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_dn.base.console import finite
from prune_dn.base.files import atomic_path, write_text
from prune_dn.base.markdown import in_markdown, markdown_table
from prune_dn.run.sweep import ERROR, FIGURES, FOLDER, Sweep
from prune_dn.run.sweep_section import MAXIMISED, SEED, Objective

_SHOWN = ("test_accuracy", "macs", "params")  # beside the objectives


@dataclass(frozen=True)
class Row:
    """The trials with the same parameters but for the seed: how many, and mean and spread of each figure.

    The spread is the standard deviation of a sample (n - 1), None of one trial. `best` says whether no other row
    is at least as good in every objective and better in one.
    """

    parameters: Mapping[str, Any]
    n: int
    mean: Mapping[str, float]
    spread: Mapping[str, float | None]
    best: bool


def rows_of(records: Iterable[Mapping[str, Any]], objectives: Sequence[Objective]) -> list[Row]:
    """One row for each combination of parameters, in the order of the trials."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if record["figures"] is not None:
            rest = {k: v for k, v in record["parameters"].items() if k != SEED}
            groups.setdefault(json.dumps(rest, sort_keys=True), []).append(record)
    names = dict.fromkeys((*objectives, *_SHOWN))
    found = []
    for same in groups.values():
        values = {name: [float(r["figures"][name]) for r in same] for name in names}
        mean = {name: statistics.fmean(v) for name, v in values.items()}
        spread = {n: statistics.stdev(v) if len(v) > 1 else None for n, v in values.items()}
        rest = {k: v for k, v in same[0]["parameters"].items() if k != SEED}
        found.append(Row(rest, len(same), mean, spread, False))
    return [
        Row(r.parameters, r.n, r.mean, r.spread, not any(_beats(o, r, objectives) for o in found))
        for r in found
    ]


def _beats(one: Row, other: Row, objectives: Sequence[Objective]) -> bool:
    signs = {name: 1 if MAXIMISED[name] else -1 for name in objectives}
    gains = [sign * (one.mean[name] - other.mean[name]) for name, sign in signs.items()]
    return all(gain >= 0 for gain in gains) and any(gain > 0 for gain in gains)


def records_of(trials: Iterable[Any]) -> list[dict[str, Any]]:
    """Each trial as data: its number, parameters, state, figures, folder and error."""
    return [
        {
            "number": t.number,
            "parameters": t.params,
            "state": t.state.name.lower(),
            "figures": t.user_attrs.get(FIGURES),
            "folder": t.user_attrs.get(FOLDER),
            "error": t.user_attrs.get(ERROR),
        }
        for t in trials
    ]


def write_sweep_report(sweep: Sweep, records: Sequence[Mapping[str, Any]]) -> Path:
    """Write sweep.md, sweep.jsonl and, of two objectives or more, sweep.png into the folder of the sweep."""
    lines = [json.dumps(finite(record), allow_nan=False) for record in records]
    write_text(sweep.folder / "sweep.jsonl", "".join(f"{line}\n" for line in lines))
    objectives = sweep.section.objectives
    rows = rows_of(records, objectives)
    header, cells = table_of(rows, objectives)
    failed = [r for r in records if r["error"]]
    parts = [
        f"# {in_markdown(sweep.folder.name)}",
        f"{len(records)} trials by {sweep.section.sampler}; mean and standard deviation over n trials that differ by "
        "the seed. `*`: no other row is as good in every objective "
        f"({', '.join(objectives)}) and better in one. Objectives are measured on validation images.",
        markdown_table(header, cells),
        *(
            f"Failed ({in_markdown(str(r['parameters']))}): {in_markdown(r['error'])}"
            for r in failed
        ),
    ]
    if len(objectives) > 1 and rows:
        _plot(rows, objectives, sweep.folder / "sweep.png")
        parts.append("![objectives](sweep.png)")
    path = sweep.folder / "sweep.md"
    write_text(path, "\n\n".join(parts) + "\n")
    return path


def table_of(
    rows: Sequence[Row], objectives: Sequence[Objective]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text, best first."""
    if not rows:
        return ["trials"], [["none has ended well"]]
    first = objectives[0]
    sign = -1 if MAXIMISED[first] else 1
    shown = list(dict.fromkeys((*objectives, *_SHOWN)))
    header = [*rows[0].parameters, "n", *shown, ""]
    cells = [
        [
            *(str(value) for value in row.parameters.values()),
            str(row.n),
            *(_number(name, row.mean[name], row.spread[name]) for name in shown),
            "*" if row.best else "",
        ]
        for row in sorted(rows, key=lambda row: sign * row.mean[first])
    ]
    return header, cells


def _number(name: str, mean: float, spread: float | None) -> str:
    if name.endswith("accuracy"):
        return f"{100 * mean:.2f} %" + ("" if spread is None else f" ± {100 * spread:.2f}")
    digits = 3 if name == "latency" else 0
    return f"{mean:,.{digits}f}" + ("" if spread is None else f" ± {spread:,.{digits}f}")


def _plot(rows: Sequence[Row], objectives: Sequence[Objective], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    y, x = objectives[:2]
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for best, marker in ((False, "o"), (True, "*")):
        some = [row for row in rows if row.best is best]
        axes.errorbar(
            [row.mean[x] for row in some],
            [row.mean[y] for row in some],
            yerr=[row.spread[y] or 0 for row in some],
            fmt=marker,
            label="best" if best else "others",
        )
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
