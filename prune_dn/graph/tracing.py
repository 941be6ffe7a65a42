"""From a model and an example of its inputs to the graph of its channels, by `torch.export`."""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map

from prune_dn.errors import PruningError
from prune_dn.graph.builder import Builder
from prune_dn.graph.flow import Flow, constant
from prune_dn.graph.inference import arguments, call, to_inference_
from prune_dn.graph.movements import view
from prune_dn.graph.operations import elementwise, reduction, spatial
from prune_dn.graph.rules import RULES, Call, Weight, unknown
from prune_dn.graph.sizes import Sizes
from prune_dn.graph.types import OUTPUT, Graph

_UNKNOWN = -1  # a size that depends on the data
_KEEPING = (elementwise, view, spatial, reduction)  # rules of what may stand behind a norm
_NORMS = {"aten.batch_norm", "aten.instance_norm"}


def trace(model: nn.Module, example_inputs: Any) -> Graph:
    """Follow the channels of `model` through one forward; `model` stays as it is.

    `example_inputs` are a tensor, a tuple of positional arguments, or a dict of keyword arguments, as
    the model is called. Where weights or channels are not used in eval mode (auxiliary heads) the
    branches for training are followed too; what neither reaches is in `Graph.unreached`.

    Raises PruningError where the model cannot be copied, does not run, or `torch.export` cannot follow it.

    >>> from torch import nn
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    >>> graph = trace(net, torch.zeros(2, 3, 8, 8))
    >>> [(reader.layer, len(reader.channels)) for reader in graph.readers]
    [('0', 3), ('3', 8)]
    >>> graph.why_fixed("0"), graph.why_fixed("3")
    (None, 'an output of the net')
    """
    try:
        net = copy.deepcopy(model)
    except Exception as error:  # whatever a foreign module raises
        raise PruningError(
            f"this {type(model).__name__} cannot be copied, and is not to be changed: {_reason(error)}"
        ) from error
    net = to_inference_(net.cpu().float(), branches=False)
    example_inputs = tree_map(
        lambda x: x.cpu().float() if isinstance(x, Tensor) and x.is_floating_point() else x,
        example_inputs,
    )
    build = Builder()
    build.sizes = _check_runs(net, example_inputs)
    names = _first_names(net)
    _interpret(_export(net, example_inputs), build, names)
    build.counts_ops = False
    why: str | None = None
    if len(build.unread()) or _unreached(net, build):
        try:
            program = _export(to_inference_(net, branches=True), example_inputs)
        except PruningError as error:
            why = str(error)  # what only training reaches stays unreached
        else:
            build.sizes = _sizes(net, example_inputs) or Sizes()
            _interpret(program, build, names)
    build.fix(build.unread(), "no layer reads it")
    held = Counter(id(p) for m in net.modules() for p in m._parameters.values() if p is not None)
    for name, module in net.named_modules():
        if any(p is not None and held[id(p)] > 1 for p in module._parameters.values()):
            build.share(name, f"{name} shares its weight with another layer")
    return build.graph(net, _unreached(net, build), why)


def _export(net: nn.Module, example_inputs: Any) -> ExportedProgram:
    args, kwargs = arguments(example_inputs)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(net, args, kwargs, strict=False)
    except Exception as error:
        raise PruningError(
            f"torch.export cannot follow this {type(net).__name__} on {_shapes(example_inputs)}: "
            f"{_reason(error)}; see torch.export's documentation for what a forward may contain"
        ) from error


def _sizes(net: nn.Module, example_inputs: Any) -> Sizes | None:
    """The sizes that its code holds; None where it does not run so."""
    with torch.no_grad(), suppress(Exception), Sizes() as sizes:
        call(net, example_inputs)
        return sizes
    return None


def _first_names(net: nn.Module) -> dict[str, str]:
    """The name under which `named_modules` lists the owner of each parameter and buffer."""
    first = {id(module): name for name, module in net.named_modules()}
    return {
        f"{name}.{key}".lstrip("."): f"{first[id(module)]}.{key}".lstrip(".")
        for name, module in net.named_modules(remove_duplicate=False)
        for key in (*module._parameters, *module._buffers)
    }


def _check_runs(net: nn.Module, example_inputs: Any) -> Sizes:
    """The sizes that its code holds. Raises PruningError where the net does not run."""
    if (sizes := _sizes(net, example_inputs)) is not None:
        return sizes
    try:
        with torch.no_grad():
            call(net, example_inputs)
    except Exception as error:  # whatever a foreign forward raises
        raise PruningError(
            f"this {type(net).__name__} does not run on {_shapes(example_inputs)} "
            f"({_reason(error)}); give example_inputs that it takes: a tensor, a tuple of its "
            "arguments, or a dict of them by name"
        ) from error
    return Sizes()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


def _shapes(inputs: Any) -> str:
    found = [str(tuple(x.shape)) for x in tree_leaves(inputs) if isinstance(x, Tensor)]
    return f"inputs of shape {', '.join(found)}"


def _unreached(net: nn.Module, build: Builder) -> list[str]:
    """The modules that hold weights of which none was used; whole ones rather than their layers."""
    weights = dict(net.named_parameters(remove_duplicate=False))
    used = {id(weights[name]) for name in build.used if name in weights}
    reached: dict[str, bool] = {}
    for name, module in net.named_modules():
        if own := [id(p) for p in module.parameters(recurse=False)]:
            reached[name] = not used.isdisjoint(own)
    found: list[str] = []
    for name, _ in net.named_modules():
        inside = [seen for owner, seen in reached.items() if f"{owner}.".startswith(f"{name}.")]
        if (
            name
            and inside
            and not any(inside)
            and not name.startswith(tuple(f"{n}." for n in found))
        ):
            found.append(name)
    return found


def _interpret(program: ExportedProgram, build: Builder, names: Mapping[str, str]) -> None:
    """Carry ids through all operations; what the net returns is fixed."""
    values: dict[str, Any] = {}
    tensors = {**program.state_dict, **program.constants}
    for spec in program.graph_signature.input_specs:
        tensor = tensors.get(str(spec.target))
        if isinstance(tensor, Tensor) and spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            name = names.get(str(spec.target), str(spec.target))
            values[spec.arg.name] = Weight(
                name, tuple(tensor.shape), tensor, spec.kind == InputKind.PARAMETER
            )
    returned = _run(program.graph_module, values, build)
    given = {spec.arg.name for spec in program.graph_signature.output_specs if spec.target is None}
    for name, value in returned.items():
        if isinstance(value, Flow) and (name in given or not given):
            build.fix(value.ids, OUTPUT)


def _run(module: torch.fx.GraphModule, values: dict[str, Any], build: Builder) -> dict[str, Any]:
    """The values of a graph's outputs, by the names of their nodes; `values` are its inputs."""
    returned: dict[str, Any] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            if node.name not in values:
                values[node.name] = _fresh(node)
        elif node.op == "get_attr":
            values[node.name] = getattr(module, str(node.target), None)
            if isinstance(values[node.name], Tensor):
                values[node.name] = constant(values[node.name].shape)
        elif node.op == "output":
            returned = {n.name: values[n.name] for n in node.all_input_nodes}
        else:
            values[node.name] = _call(node, values, build)
    return returned


def _fresh(node: Node) -> Any:
    value = node.meta.get("val")
    return constant(value.shape) if isinstance(value, Tensor) else value


def _call(node: Node, values: Mapping[str, Any], build: Builder) -> Any:
    target: Any = node.target
    args: Any = torch.fx.node.map_arg(node.args, lambda n: values[n.name])
    if getattr(target, "__name__", "") == "getitem":
        return args[0][args[1]]
    result = node.meta.get("val")
    found = [result] if isinstance(result, Tensor) else tree_leaves(result)
    shapes = tuple(
        tuple(size if isinstance(size, int) else _UNKNOWN for size in x.shape)
        for x in found
        if isinstance(x, Tensor)
    )
    if isinstance(target, torch._ops.HigherOrderOperator):
        inner: Any = next((x for x in args if isinstance(x, torch.fx.GraphModule)), None)
        operands = [x for x in args if isinstance(x, Flow | Weight)]
        holders = (
            [] if inner is None else [n.name for n in inner.graph.nodes if n.op == "placeholder"]
        )
        if inner is not None and len(operands) == len(holders):
            return list(_run(inner, dict(zip(holders, operands, strict=True)), build).values())
    if not shapes:
        return result  # a number
    name, filled = str(target), list(args)
    if isinstance(target, torch._ops.OpOverload):
        name = f"{target.namespace}.{target._schema.name.split('::')[-1]}"
        given = torch.fx.node.map_arg(node.kwargs, lambda n: values[n.name])
        rest = target._schema.arguments[len(filled) :]
        filled += [given.get(argument.name, argument.default_value) for argument in rest]
    call = Call(
        name, tuple(filled), shapes, build, _norm_in_front(node, values), _origin(node, values)
    )
    rule = RULES.get(name)
    read = [x.shape for x in tree_leaves(filled) if isinstance(x, Flow)]
    if any(_UNKNOWN in shape for shape in (*shapes, *read)):
        rule = None  # its sizes depend on the data
    out = unknown(call) if rule is None else rule(call)
    if isinstance(result, Tensor) and isinstance(out, list):
        return out[0]
    return out


def _norm_in_front(node: Node, values: Mapping[str, Any]) -> str | None:
    """The norm whose activated output this node alone reads."""
    before = node.args[0] if node.args else None
    while isinstance(before, Node) and len(before.users) == 1 and before.op == "call_function":
        schema = getattr(before.target, "_schema", None)
        name = "aten." + schema.name.split("::")[-1] if schema is not None else ""
        if name in _NORMS:
            weights = [values[a.name] for a in before.args[1:5] if isinstance(a, Node)]
            return weights[0].layer if weights and isinstance(weights[0], Weight) else None
        if RULES.get(name) not in _KEEPING or len(before.all_input_nodes) != 1:
            return None
        before = before.args[0]
    return None


def _origin(node: Node, values: Mapping[str, Any]) -> Weight | None:
    """The largest parameter, or else buffer, from which the second operand, a weight, is computed."""
    second = node.args[1] if len(node.args) > 1 else None
    if not isinstance(second, Node) or isinstance(values[second.name], Weight):
        return None
    found: list[Weight] = []
    waiting, seen = [second], {second}
    while waiting:
        for before in waiting.pop().all_input_nodes:
            value = values.get(before.name)
            if isinstance(value, Weight):
                found.append(value)
            elif before not in seen:
                seen.add(before)
                waiting.append(before)
    return max(found, key=lambda w: (w.is_parameter, math.prod(w.shape)), default=None)
