"""The sections of a page that tell of nets: connections, widths, costs, what stayed and why."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from prune_dn.graph.types import Graph
from prune_dn.measure.profiling import LayerCost, count_per_layer
from prune_dn.models.families import config_of
from prune_dn.page.charts import before_after
from prune_dn.page.connections import Connections, Stream, connections, streams
from prune_dn.page.document import MOST_CELLS, HeatMap, HeatMaps, Section, Table
from prune_dn.pruning import Plan
from prune_dn.pruning.siblings import contests
from prune_dn.pruning.subject import Config, NetShape, subject
from prune_dn.pruning.units import Units

WEIGHT = (
    "Weight is the share of what a layer computes that comes from a source: the squares of its weights "
    "times the variance of what it sees of each channel, which a batch norm in front of it tells "
    "(channels counted as independent)."
)


@dataclass(frozen=True)
class View:
    """A net as a page shows it: its channels, who reads whom, and what each layer costs.

    `layers` are None where only a plan is there.
    """

    graph: Graph
    connections: Connections
    layers: Sequence[LayerCost] | None

    @staticmethod
    def of(model: nn.Module, **inputs: Any) -> View:
        """A net, run on `image_size` or `example_inputs`; what `trace` raises of others than ours."""
        if (config := config_of(model)) is not None:
            graph = config.graph(inputs.get("image_size"))
        else:
            graph = subject(model, inputs.get("image_size"), inputs.get("example_inputs")).graph
        found = connections(graph, model)
        return View(graph, found, count_per_layer(model, **inputs))

    @staticmethod
    def of_config(config: Config) -> View | None:
        """What a plan tells of a net: without weights; nothing of a net that has no config."""
        if isinstance(config, NetShape):
            return None
        graph = config.graph()
        return View(graph, connections(graph), None)


def views_of(plan: Plan) -> tuple[View | None, View | None]:
    """The nets before and after, as far as a plan tells."""
    return View.of_config(plan.config_before), View.of_config(plan.config_after)


def map_section(before: View | None, after: View | None) -> Section | None:
    """The connection map: for each stream its readers and sources; None for a net without such streams."""
    first = before or after
    if first is None:
        return None
    found = streams(first.graph, first.connections)
    groups, left_out, cells = [], [], 0
    for number, stream in enumerate(found, start=1):
        group = _maps(stream, number, before, after)
        cells += sum(len(one.cells) for one in group.maps)
        if cells <= MOST_CELLS:
            groups.append(group)
        else:
            left_out.append(stream.name)
    if not groups:
        return None
    text = [
        "Each row is a layer that reads, each column a layer whose output it reads (compare figure 5 of the "
        "DenseNet paper, arXiv:1608.06993). A struck cell is a connection that is gone."
    ]
    if first.connections.weights:
        text.append(WEIGHT + " The shades of both weight maps of a block have one scale.")
    if left_out:
        text.append(f"Too large for this page: {', '.join(left_out)}.")
    return Section("map", "The connection map", text, maps=groups)


def connection_rows(before: View, after: View | None) -> Iterator[dict[str, Any]]:
    """The connections of a net as plain facts, for the data of a page."""
    for (reader, source), n in before.connections.channels.items():
        pair = (reader, source)
        row: dict[str, Any] = {"reader": reader, "source": source, "channels_before": n}
        if after is not None:
            row["channels_after"] = after.connections.channels.get(pair, 0)
        for when, view in (("before", before), ("after", after)):
            if view is not None and view.connections.weights:
                row[f"weight_{when}"] = round(view.connections.weights.get(pair, 0.0), 6)
        yield row


def chain_section(before: View, after: View | None) -> Section:
    """Of a net without a map: each layer with the layers that it reads, and the channels of both."""
    readers: dict[str, list[str]] = {}
    for reader, source in before.connections.channels:
        readers.setdefault(reader, []).append(source)
    widths = [
        {p.layer: len(p.channels) for p in view.graph.producers} if view else {}
        for view in (before, after)
    ]
    names = [producer.layer for producer in before.graph.producers]
    rows: list[list[Any]] = []
    for name in names:
        row: list[Any] = [name, ", ".join(readers.get(name, [])) or "the input", widths[0][name]]
        if after is not None:
            left = widths[1].get(name, 0)
            row += [left, left / widths[0][name]]
        rows.append(row)
    header = ["layer", "reads", "channels" if after is None else "channels before"]
    charts = []
    if after is not None:
        header += ["after", "kept"]
        made, left_over = ([float(w.get(name, 0)) for name in names] for w in widths)
        title = "Channels that each layer makes"
        charts = [before_after(title, names, made, left_over, "channels")]
    table = Table("layers", header, rows, "Layers, and what they read", frozenset({4}))
    text = ["Where a sum adds the outputs of several layers, a layer that reads it reads them all."]
    return Section("layers", "The layers", text, charts=charts, tables=[table])


def width_section(
    rows: Sequence[Mapping[str, Any]], before: View | None, after: View | None
) -> Section:
    """Widths of each group of units, and what each layer costs, before and after."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    charts = []
    for kind in kinds:
        of_kind = [row for row in rows if row["kind"] == kind]
        charts.append(
            before_after(
                f"{kind} units",
                [row["name"] for row in of_kind],
                [row["before"] for row in of_kind],
                [row["after"] for row in of_kind],
                "channels",
            )
        )
    widths = Table(
        "widths",
        ["unit group", "kind", "before", "after", "kept"],
        [[r["name"], r["kind"], r["before"], r["after"], r["after"] / r["before"]] for r in rows],
        "Widths before and after",
        frozenset({4}),
        folded=True,
    )
    tables = [widths]
    if before is not None and before.layers is not None and after is not None and after.layers:
        left = {row.name: row for row in after.layers}
        costs = []
        for row in before.layers:
            now = left.get(row.name)
            macs, params = (0, 0) if now is None else (now.macs, now.params)
            kept = macs / row.macs if row.macs else None
            costs.append([row.name, row.macs, macs, kept, row.params, params])
        header = ["layer", "MACs before", "after", "kept", "params before", "after"]
        title = "Cost of each layer"
        tables.append(Table("costs", header, costs, title, frozenset({3}), folded=True))
        heavy = [row for row in before.layers if row.macs]
        charts.append(
            before_after(
                "MACs of each layer",
                [row.name for row in heavy],
                [row.macs / 1e6 for row in heavy],
                [(left[row.name].macs if row.name in left else 0) / 1e6 for row in heavy],
                "million MACs",
            )
        )
    return Section("widths", "Widths and cost per layer", charts=charts, tables=tables)


def protected_section(plans: Sequence[Mapping[str, Any]]) -> Section:
    """What could not be cut, and why."""
    found = {unit: why for plan in plans for unit, why in plan["protected"].items()}
    if not found:
        text = ["Nothing: each group of units might be cut."]
        return Section("protected", "What was protected", text)
    table = Table("protected", ["unit group", "why it stays"], list(map(list, found.items())))
    return Section("protected", "What was protected, and why", tables=[table])


def mfm_section(before: View | None, after: View | None) -> Section | None:
    """The Max-Feature-Map competitions: how many compete and how many win; None where there are none."""
    if before is None or not before.graph.competitions:
        return None
    counts = [
        {x.name: (len(x.owner), x.winners) for x in contests(Units(view.graph))} if view else {}
        for view in (before, after)
    ]
    rows: list[list[Any]] = []
    for name, (competing, winners) in counts[0].items():
        row: list[Any] = [name, competing, winners]
        if after is not None:
            now = counts[1].get(name)
            row += ["settled or gone", None] if now is None else list(now)
        rows.append(row)
    header = ["competition", "maps that compete", "that win"]
    header += [] if after is None else ["compete after", "win after"]
    text = ["Where no maps compete any more, each winner is known: the maximum is taken away."]
    table = Table("competitions", header, rows)
    return Section("competitions", "Max-Feature-Map competitions", text, tables=[table])


def _maps(stream: Stream, number: int, before: View | None, after: View | None) -> HeatMaps:
    first = before or after
    assert first is not None
    prefix = f"{stream.name}."
    rows = {name: _label(name, prefix) for name in stream.readers}
    columns = {name: _label(name, prefix).removeprefix("layer ") for name in stream.sources}
    channels = first.connections.channels
    pairs = [(r, s) for r in stream.readers for s in stream.sources if (r, s) in channels]
    maps = []
    if before is not None and after is not None:
        cells = {}
        for pair in pairs:
            n, left = channels[pair], after.connections.channels.get(pair, 0)
            cells[pair] = (f"{left} of {n} channels", left / n)
        maps.append(HeatMap("share still read", rows, columns, cells))
    elif not first.connections.weights:
        cells = {pair: (f"{channels[pair]} channels", 1.0) for pair in pairs}
        maps.append(HeatMap("channels read", rows, columns, cells))
    weighed = {
        name: view.connections.weights
        for name, view in (("before", before), ("after", after))
        if view is not None and view.connections.weights
    }
    most = max((w.get(pair, 0.0) for w in weighed.values() for pair in pairs), default=0.0) or 1.0
    for name, weights in weighed.items():
        cells = {p: _weight(weights.get(p), most) for p in pairs}
        title = f"weight {name}" if len(weighed) > 1 else "weight"
        maps.append(HeatMap(title, rows, columns, cells))
    title = stream.name.removeprefix("features.")
    return HeatMaps(f"map-{number}", title, "reader, by source", maps)


def _weight(share: float | None, most: float) -> tuple[str, float]:
    """A weight as text and shade; only what is gone has no shade at all."""
    if share is None:
        return "gone", 0.0
    return f"{100 * share:.2f} %", max(share / most, 0.001)


def _label(name: str, prefix: str) -> str:
    short = name.removeprefix(prefix).removeprefix("features.")
    short = re.sub(r"\.conv\d*$", "", short)
    return re.sub(r"^denselayer(\d+)$", r"layer \1", short)
