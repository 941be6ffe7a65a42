"""The page of a run, of a cut, or of a net: its sections, from the figures that were left."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import nn

from prune_dn.base.intervals import percent, wilson
from prune_dn.errors import PruneDNError
from prune_dn.page.charts import Point, lines, scatter
from prune_dn.page.document import Page, Sample, Section, Table
from prune_dn.page.nets import (
    View,
    chain_section,
    connection_rows,
    map_section,
    mfm_section,
    protected_section,
    views_of,
    width_section,
)
from prune_dn.pruning import Plan
from prune_dn.run.report import asked, human, widths

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Nets:
    """The nets before and after, as far as they can be shown."""

    before: View | None
    after: View | None

    @staticmethod
    def of(dense: nn.Module | None, pruned: nn.Module | None, **inputs: Any) -> Nets:
        """Nets that can be followed on these inputs; others are left out."""
        found: list[View | None] = []
        for model in (dense, pruned):
            view = None
            if model is not None:
                with suppress(PruneDNError):
                    view = View.of(model, **inputs)
            found.append(view)
        return Nets(found[0], found[1])

    def sections(self, plans: Sequence[Facts]) -> Iterator[Section]:
        """What a page tells of the nets and of what was cut; `plans` have their `layers`."""
        mapped = map_section(self.before, self.after)
        if mapped is not None:
            yield mapped
        elif (first := self.before or self.after) is not None:
            yield chain_section(first, self.after if self.before else None)
        if plans:
            yield width_section(widths(plans), self.before, self.after)
            yield protected_section(plans)
        competitions = mfm_section(self.before or self.after, self.after if self.before else None)
        if competitions is not None:
            yield competitions

    def data(self) -> list[dict[str, Any]]:
        """The connections, for the JSON of the page."""
        first = self.before or self.after
        return [] if first is None else list(connection_rows(first, self.after))


def plan_facts(plan: Plan) -> dict[str, Any]:
    """A plan as the reports read it: its JSON with its `layers`."""
    return {"layers": plan.layers, **json.loads(plan.to_json())}


def run_page(
    metrics: Facts,
    environment: Facts,
    plans: Sequence[Facts],
    nets: Nets,
    *,
    recipe: str,
    samples: Facts | None,
) -> Page:
    """The page of a run; `recipe` is its text, `samples` what `samples.collect` found."""
    sections = [_results(metrics)]
    if "search" in metrics:
        sections.append(_search(metrics["search"]))
    sections += nets.sections(plans)
    if any(metrics.get("history", {}).values()):
        sections.append(_training(metrics["history"]))
    if samples is not None:
        sections.append(_samples(samples))
    sections.append(_provenance(metrics, environment, recipe))
    data = {
        "format": "prune_dn.page/1",
        "metrics": metrics,
        "environment": environment,
        "plans": plans,
        "connections": nets.data(),
        "samples": {} if samples is None else {k: v for k, v in samples.items() if k != "samples"},
    }
    title = f"{metrics['name']}: what was cut"
    return Page(title, run_headline(metrics, samples), sections, data)


def cut_page(name: str, plan: Plan, nets: Nets | None, figures: Facts | None = None) -> Page:
    """The page of one cut: of its plan, and of the nets where they are there."""
    before, after = views_of(plan)
    shown = Nets(before, after) if nets is None else nets
    done = plan.achieved
    facts = plan_facts(plan)
    sections = []
    if done:
        rows = [
            [key, done["before"][key], done["after"][key], done["after"][key] / done["before"][key]]
            for key in done["before"]
            if done["before"][key]
        ]
        header = ["", "before", "after", "kept"]
        table = Table("results", header, rows, "What the net costs", frozenset({3}))
        asked_for = ", ".join(f"{k} {_words(v)}" for k, v in plan.requested.items() if v)
        warned = [f"Notice: {text}" for text in done.get("warnings", [])]
        sections.append(
            Section("results", "What it brought", [f"Asked: {asked_for}.", *warned], tables=[table])
        )
    sections += shown.sections([facts])
    data = {
        "format": "prune_dn.page/1",
        "plans": [facts],
        "connections": shown.data(),
        "figures": dict(figures or {}),
    }
    return Page(f"{name}: what was cut", _cut_headline(plan), sections, data)


def net_page(name: str, nets: Nets, facts: Facts) -> Page:
    """The page of one net, or of two without a plan: what they cost, and who reads whom."""
    costs = [facts[key] for key in ("dense", "net") if key in facts]
    keys = [key for key in ("params", "macs", "channels") if key in costs[-1]]
    compared = len(costs) > 1
    rows = [[key, *(cost[key] for cost in costs)] for key in keys]
    if compared:
        rows = [[*row, row[2] / row[1]] for row in rows]
    header = ["", "before", "after", "kept"] if compared else ["", "net"]
    table = Table("results", header, rows, "What the net costs", frozenset({3}))
    sections = [Section("results", "What it costs", tables=[table]), *nets.sections([])]
    last = costs[-1]
    headline = f"{human(last['params'])} params and {human(last['macs'])} MACs"
    if compared:
        headline += (
            f", {_fewer(costs[0]['macs'], last['macs'])} MACs than the net that it is compared with"
        )
    data = {"format": "prune_dn.page/1", "facts": facts, "connections": nets.data()}
    return Page(name, f"{headline}.", sections, data)


def _fewer(before: float, after: float) -> str:
    change = 100 * (1 - after / before)
    return f"{change:.0f} % fewer" if change >= 0 else f"{-change:.0f} % more"


def _cut_headline(plan: Plan) -> str:
    done = plan.achieved
    if not done:
        changed = sum(row["before"] != row["after"] for row in plan.layers)
        return f"A plan that was chosen by hand: it changes {changed} of {len(plan.layers)} groups."
    before, after = done["before"], done["after"]
    return (
        f"The cut net has {_fewer(before['macs'], after['macs'])} MACs "
        f"({human(before['macs'])} to {human(after['macs'])}) and {_fewer(before['params'], after['params'])} "
        f"params. Nobody measured its accuracy here: `prune-dn evaluate` does."
    )


def run_headline(metrics: Facts, samples: Facts | None = None) -> str:
    """What a run brought, in one sentence: the last net against the dense one."""
    stages = metrics["stages"]
    dense, name = stages["dense"], list(stages)[-1]
    last = stages[name]
    right = percent(last["test_accuracy"], last["n_test"])
    if name == "dense":
        return f"{right} of {last['n_test']:,} test images are right; nothing was cut."
    text = f"{_fewer(dense['macs'], last['macs'])} MACs, "
    pairs = list(
        zip(*(metrics.get("latency", {}).get(k, []) for k in ("dense", "pruned")), strict=False)
    )
    if pairs:
        one, two = max(pairs, key=lambda pair: pair[0]["median_ms"] / pair[1]["median_ms"])
        text += (
            f"{one['median_ms'] / two['median_ms']:.2f} times as fast ({two['runtime']}, batch "
            f"{two['batch_size']}: {one['median_ms']:.2f} to {two['median_ms']:.2f} ms), "
        )
    points = 100 * (last["test_accuracy"] - dense["test_accuracy"])
    text += f"test accuracy {right} against {percent(dense['test_accuracy'], dense['n_test'])}: {points:+.2f} points"
    if samples is not None:
        low, high = (-x for x in reversed(samples["drop_interval"]))
        text += f" (95 % interval {100 * low:+.1f} to {100 * high:+.1f}, the same {samples['n']:,} images)"
    else:
        text += f" (n = {last['n_test']:,})"
    return f"{text}."


def _results(metrics: Facts) -> Section:
    latency = metrics.get("latency", {})
    timed = latency.get("dense", [])
    header = ["net", "test accuracy, %", "95 % interval", "params", "MACs"]
    header += [f"ms, {row['runtime']}, batch {row['batch_size']}" for row in timed] + ["bytes"]
    rows: list[list[Any]] = []
    points = []
    for stage, figures in metrics["stages"].items():
        low, high = (100 * x for x in wilson(figures["test_accuracy"], figures["n_test"]))
        accuracy = 100 * figures["test_accuracy"]
        measured = latency.get("dense" if stage == "dense" else "pruned", [])
        rows.append(
            [
                stage,
                accuracy,
                f"{low:.1f} to {high:.1f}",
                figures["params"],
                figures["macs"],
                *(row["median_ms"] for row in measured),
                figures["file_bytes"],
            ]
        )
        points.append((stage, figures, measured, accuracy, low, high))
    tables = [Table("nets", header, rows, "Nets of this run, in the order in which they were made")]
    charts = []
    if len(points) > 1:
        on_macs = [Point(p[0], p[1]["macs"] / 1e6, *p[3:]) for p in points]
        charts.append(scatter("Accuracy against MACs", on_macs, "million MACs"))
        for i, row in enumerate(timed):
            timed_points = [Point(p[0], p[2][i]["median_ms"], *p[3:]) for p in points]
            where = f"{row['runtime']}, batch {row['batch_size']}"
            charts.append(scatter(f"Accuracy against time ({where})", timed_points, "milliseconds"))
    if timed:
        keys = ("runtime", "batch_size", "median_ms", "p10_ms", "p90_ms", "n", "machine")
        header = ["net", "runtime", "batch", "median, ms", "10 %", "90 %", "n", "machine"]
        each = [
            [net, *(row[key] for key in keys)] for net, found in latency.items() for row in found
        ]
        tables.append(Table("latency", header, each, "Latency, the nets timed in turns"))
    n = metrics["stages"]["dense"]["n_test"]
    text = [
        f"Accuracy on {n:,} test images, which no choice has seen; 95 % intervals by Wilson. One "
        "multiply-add is one MAC. Each cut net is timed as it is at the end of the run."
    ]
    if metrics.get("rounds"):
        told = asked(metrics["rounds"][-1])
        text.append(f"{told[0].upper()}{told[1:]}.")
    text += [f"Notice ({x['name']}): {x['text']}" for x in metrics.get("notices", [])]
    return Section("results", "What it brought", text, charts=charts, tables=tables)


def _search(found: Facts) -> Section:
    """The path of a search for the largest cut that keeps the accuracy."""
    rows = []
    points = []
    for trial in found["trials"]:
        low, high = (100 * x for x in trial["interval"])
        rows.append(
            [
                trial["pruning_ratio"],
                100 * trial["value"],
                100 * trial["drop"],
                f"{low:.2f} to {high:.2f}",
                trial["macs"],
                trial["latency_ms"],
                "yes" if trial["holds"] else "no",
            ]
        )
        bounds = [100 * x for x in wilson(trial["value"], found["images"])]
        name = f"ratio {trial['pruning_ratio']:.3f}"
        points.append(Point(name, trial["macs"] / 1e6, 100 * trial["value"], *bounds))
    header = [
        "ratio",
        "validation accuracy, %",
        "points lost",
        "95 % interval",
        "MACs",
        "ms",
        "holds",
    ]
    text = [
        f"The largest cut that loses at most {found['max_drop']:g} points on {found['images']:,} "
        "validation images, by bisection."
    ]
    charts = [scatter("The path of the search", points, "million MACs")] if points else []
    table = Table("search", header, rows, "Trials, in the order in which they were made")
    return Section("search", "As far as the accuracy allows", text, charts=charts, tables=[table])


def _training(history: Facts) -> Section:
    charts = []
    for key, title in (("loss", "Training loss"), ("val_accuracy", "Validation accuracy")):
        series: dict[str, list[tuple[float, float]]] = {}
        marks: list[float] = []
        for name, rows in history.items():
            points = [
                (float(i), row[key])
                for i, row in enumerate(rows, start=1)
                if row.get(key) is not None
            ]
            if points:
                series[name] = points
            marks += [i - 0.5 for i, row in enumerate(rows, start=1) if row.get("resumed")]
        if series:
            charts.append(
                lines(
                    title,
                    series,
                    "epoch",
                    title.lower(),
                    {"went on here": marks} if marks else None,
                )
            )
    keys = ("epoch", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate", "seconds")
    rows = [
        [name, *(row.get(key) for key in keys)] for name, found in history.items() for row in found
    ]
    table = Table("training", ["fit", *keys], rows, "Each epoch", folded=True)
    return Section("training", "Training", charts=charts, tables=[table])


def _samples(found: Facts) -> Section:
    classes = found["classes"]
    told = {
        "lost": "only the dense net is right",
        "won": "only the pruned net is right",
        "changed, both wrong": "changed, both wrong",
        "same": "",
    }
    samples = [
        Sample(
            x["image"],
            str(classes[x["label"]]),
            str(classes[x["dense"]]),
            str(classes[x["pruned"]]),
            told[x["kind"]],
        )
        for x in found["samples"]
    ]
    text = [
        f"Of {found['n']:,} test images {found['changed']:,} have another prediction than before: "
        f"{found['lost']:,} were right and are wrong now, {found['won']:,} the other way round. Those that "
        "changed come first."
    ]
    return Section("samples", "Test images, dense beside pruned", text, samples=samples)


def _provenance(metrics: Facts, environment: Facts, recipe: str) -> Section:
    data = metrics["data"]
    rows: list[list[Any]] = [
        ["data", f"{data['name']}, {len(data['classes'])} classes, {data['image_size']} pixels"],
        [
            "pixels",
            f"mean {_words(data.get('mean'))}, std {_words(data.get('std'))} of values in [0, 1]",
        ],
        ["machine", environment["machine"]],
        ["seed", str(environment["seed"])],
        ["processes", str(environment["processes"])],
        ["command", environment["command"]],
        *([f"version of {k}", v] for k, v in environment["versions"].items()),
        *([f"seconds of {k}", p["seconds"]] for k, p in metrics["phases"].items()),
    ]
    table = Table("environment", ["what", "value"], rows)
    return Section(
        "environment",
        "Where and with what",
        tables=[table],
        code={"The recipe, every default written out": recipe},
    )


def _words(value: Any) -> str:
    return " + ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
