"""Changes to an ONNX graph after PyTorch wrote it; its answers stay the same."""

from __future__ import annotations

from typing import Any

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def tidy_(proto: Any) -> None:
    """Take off the exporter's notes, call layers by their modules, and nest concatenations."""
    clear_metadata_(proto)
    name_layers_(proto.graph)
    nest_concatenations_(proto.graph)


def clear_metadata_(message: Any) -> None:
    """Take off the exporter's notes on each node: they hold paths of this machine."""
    for field, value in message.ListFields():
        if field.name == "metadata_props":
            message.ClearField("metadata_props")
        elif field.message_type is not None and field.name != "initializer":
            for child in value if hasattr(value, "__len__") else [value]:
                clear_metadata_(child)


def name_layers_(graph: Any) -> None:
    """Call each convolution and linear layer by its module's name, where its weight is called so."""
    taken = {node.name for node in graph.node}
    for node in graph.node:
        weight = next((name for name in node.input[1:] if name.endswith(".weight")), "")
        name = weight.removesuffix(".weight")
        if node.op_type in LAYERS and name and name not in taken:
            taken.add(name)
            node.name = name


def nest_concatenations_(graph: Any) -> None:
    """Let a concatenation that begins with the inputs of an earlier one begin with its output.

    A dense block concatenates all that came before, for each layer anew: then each map is converted from int8
    once for every reader. Nested, each map has one reader and each stream one copy.
    """
    made: dict[tuple[Any, ...], str] = {}
    for node in graph.node:
        if node.op_type != "Concat":
            continue
        axis = next(a.i for a in node.attribute if a.name == "axis")
        given = tuple(node.input)
        starts = ((axis, *given[:n]) for n in range(len(given) - 1, 1, -1))
        known = next((start for start in starts if start in made), None)
        if known is not None:
            node.input[:] = [made[known], *given[len(known) - 1 :]]
        made.setdefault((axis, *given), node.output[0])


def layers_of(graph: Any) -> tuple[list[str], list[str]]:
    """Names of all layers with weights, and of those that read no quantised input."""
    makers = {name: node for node in graph.node for name in node.output}
    constants = {entry.name for entry in graph.initializer}

    def dequantised(name: str) -> bool:
        return name in makers and makers[name].op_type == "DequantizeLinear"

    layers = [
        node
        for node in graph.node
        if node.op_type in LAYERS and (node.input[1] in constants or dequantised(node.input[1]))
    ]
    plain = [node.name for node in layers if not all(map(dequantised, node.input[:2]))]
    return [node.name for node in layers], plain
