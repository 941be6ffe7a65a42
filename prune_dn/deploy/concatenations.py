"""Selections from concatenations, in an exported program, as concatenations of what is selected."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from prune_dn.graph.pieces import Piece, pieces_of

_ATEN = torch.ops.aten
Add = Callable[..., Node]


class _Selection(NamedTuple):
    """Positions that a node takes of another one's output along an axis; `at` holds them, if a node does."""

    of: Node
    dim: int
    positions: list[int]
    at: Node | None


def take_from_sources_(program: ExportedProgram) -> None:
    """Let each selection from a concatenation take from its operands, so that the rest need not be copied.

    A range or constant positions, rising, of what `cat` joins along the same axis become a `cat` of the
    operands' parts: whole ones, ranges, or gathered positions (see `pieces_of`). What nobody uses then is
    taken out. What the program answers is left as it is.
    """
    graph, tensors = program.graph, _constants(program)
    waiting = list(graph.nodes)
    while waiting:
        node = waiting.pop(0)
        found = _selection(node, tensors)
        if found is not None and found.of.target is _ATEN.cat.default:
            waiting = _split(graph, node, found) + waiting
    for node in list(graph.nodes):
        _flatten(node)
    graph.eliminate_dead_code()
    graph.lint()
    program.graph_module.recompile()


def _constants(program: ExportedProgram) -> Mapping[str, Tensor]:
    """Buffers and constants by the names of their nodes."""
    held = {**program.state_dict, **program.constants}
    return {
        spec.arg.name: held[str(spec.target)]
        for spec in program.graph_signature.input_specs
        if isinstance(held.get(str(spec.target)), Tensor)
    }


def _selection(node: Node, tensors: Mapping[str, Tensor]) -> _Selection | None:
    arguments: tuple[Any, ...] = node.args
    if node.target is _ATEN.index_select.default:
        source, dim, index = arguments
        given = tensors.get(index.name) if isinstance(index, Node) else None
        if given is not None and bool((given.diff() > 0).all()):
            return _made(source, dim, given.tolist(), index)
    if node.target is _ATEN.narrow.default:
        source, dim, start, length = arguments
        return _made(source, dim, range(start, start + length), None)
    if node.target is _ATEN.slice.Tensor:
        source, dim, start, stop, step = _range(node)
        width = _width(source, dim)
        known = all(isinstance(x, int | None) for x in (start, stop))
        if width is not None and step == 1 and known:
            return _made(source, dim, range(width)[start:stop], None)
    return None


def _made(source: Any, dim: int, positions: Sequence[int], index: Any) -> _Selection | None:
    while isinstance(source, Node) and source.target is _ATEN.slice.Tensor and _is_whole(source):
        source = source.args[0]
    if _width(source, dim) is None or not all(isinstance(p, int) for p in positions):
        return None
    return _Selection(source, dim % source.meta["val"].ndim, list(positions), index)


def _is_whole(node: Node) -> bool:
    """Whether a slice takes everything: `x[:, 2:5]` is one of these and then another one."""
    _, _, start, stop, step = _range(node)
    return start in (None, 0) and stop in (None, sys.maxsize) and bool(step == 1)


def _range(node: Node) -> tuple[Any, ...]:
    """Input, axis, start, stop and step of a slice."""
    given: tuple[Any, ...] = node.args
    return given + (0, None, None, 1)[len(given) - 1 :]


def _width(node: Any, dim: Any) -> int | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    size = value.shape[dim] if isinstance(value, Tensor) else None
    return size if isinstance(size, int) else None


def _split(graph: Graph, node: Node, found: _Selection) -> list[Node]:
    """Put the pieces in the place of a selection from a `cat`; the new nodes."""
    sources, dim = _joined(found.of)
    widths = [_width(source, dim) for source in sources]
    if dim != found.dim or not found.positions or None in widths:
        return []
    pieces = pieces_of(found.positions, widths)  # type: ignore[arg-type]
    made: list[Node] = []

    def add(target: Any, *args: Any) -> Node:
        new = graph.call_function(target, args)
        values = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
        new.meta["val"] = target(*values)
        made.append(new)
        return new

    with graph.inserting_before(node):
        parts = list(_parts(add, sources, pieces, found))
        new = parts[0] if len(parts) == 1 else add(_ATEN.cat.default, parts, dim)
    node.replace_all_uses_with(new, lambda user: user.op != "output")
    return made


def _parts(
    add: Add, sources: list[Node], pieces: tuple[Piece, ...], found: _Selection
) -> Iterator[Node]:
    at = 0
    for piece in pieces:
        source, dim = sources[piece.source], found.dim
        if piece.indices:
            assert found.at is not None
            index = add(_ATEN.narrow.default, found.at, 0, at, len(piece.indices))
            before = found.positions[at] - piece.indices[0]
            index = add(_ATEN.sub.Scalar, index, before) if before else index
            yield add(_ATEN.index_select.default, source, dim, index)
            at += len(piece.indices)
            continue
        at += piece.stop - piece.start
        if (piece.start, piece.stop) == (0, _width(source, dim)):
            yield source
        else:
            yield add(_ATEN.narrow.default, source, dim, piece.start, piece.stop - piece.start)


def _joined(cat: Node) -> tuple[list[Node], int]:
    """The operands of a `cat`, and its axis counted from the front."""
    sources: Any = cat.args[0]
    dim: Any = cat.args[1] if len(cat.args) > 1 else 0
    return list(sources), dim % cat.meta["val"].ndim


def _flatten(node: Node) -> None:
    """Let a `cat` take the operands of each `cat` along the same axis that only it uses."""
    if node.target is not _ATEN.cat.default:
        return
    sources, dim = _joined(node)
    parts: list[Node] = []
    for source in sources:
        inner = source.target is _ATEN.cat.default and len(source.users) == 1
        parts += _joined(source)[0] if inner and _joined(source)[1] == dim else [source]
    node.args = (parts, dim)
