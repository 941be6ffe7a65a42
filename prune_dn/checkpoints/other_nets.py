"""The part of a checkpoint about a net that is not ours, and the net from it.

The file holds the tensors under their names; their shapes say what was cut. A net of torchvision or timm
is rebuilt by the name of its constructor (see `models.named`), anybody else's is given. A probe (see
`probe`) shows on loading that the net still gives the answers that it gave when it was saved.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prune_dn.base.files import parse_json
from prune_dn.base.sound import check_sound
from prune_dn.errors import CheckpointError, ConversionError, PruningError
from prune_dn.graph.selecting import INDEX, can_select, select_inputs_
from prune_dn.models.answers import computed_weights, path_of
from prune_dn.models.convert import check_not_wrapped
from prune_dn.models.named import Named, Option, candidates, other_make
from prune_dn.models.probe import Probe, differs, probe
from prune_dn.models.shapes import aliases, fit_, own_tensors
from prune_dn.models.weights import COUNTER, cut, find_weights, not_plain, plain_key, shorten

logger = logging.getLogger("prune_dn.checkpoints.checkpoint")


def describe(
    model: nn.Module, example_inputs: Any, name: str | None, options: Mapping[str, Option] | None
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a net. Raises CheckpointError for what no file would give back.

    A constructor's name that is given must rebuild the net; one that is found by its class is left out
    where it does not.
    """
    kind = path_of(type(model))
    try:
        check_not_wrapped(model)
        check_sound(model)
    except (ConversionError, PruningError) as error:
        raise CheckpointError(f"cannot save this {kind}: {error}") from error
    for problem in _unsavable(model):
        raise CheckpointError(f"cannot save this {kind}: {problem}")
    if options is not None and name is None:
        raise CheckpointError("options are those of the constructor `name`: give it too")
    known = probe(model, example_inputs)
    tensors = own_tensors(model)
    if name is None:
        named = _found(model, known, tensors)
    else:
        named = _asked(name, options or {})
        if problem := _refusal(model, known, tensors, named):
            raise CheckpointError(
                f"{name} does not rebuild this {kind}: {problem}; leave name out, and give `load` a "
                "dense instance: load(path, model=...)"
            )
    told = {"class": kind}
    if named is not None:
        told["constructor"] = json.dumps({"name": named.name, "options": dict(named.options)})
    if known is not None:
        told["probe"] = known.to_json()
    return told, tensors


def rebuilt(
    metadata: Mapping[str, str], tensors: Mapping[str, Tensor], model: nn.Module | str | None
) -> nn.Module:
    """The net of a file's `metadata` and `tensors`: by its constructor, or from the dense `model`.

    Raises ConversionError where they do not fit, where there is no model, and where the answers are
    others than they were; ValueError for metadata that are damaged.
    """
    if "class" not in metadata:
        raise ValueError("it does not say what net it holds")
    kind = metadata["class"]
    known = Probe.from_json(metadata["probe"]) if "probe" in metadata else None
    if isinstance(model, nn.Module):
        net = filled(model, tensors)
        same = type(model).__name__ == kind.rpartition(".")[2]
    elif model is None and "constructor" not in metadata:
        raise ConversionError(
            f"it holds a {cut(kind)}, which is given: load(path, model=...) with a dense instance"
        )
    else:
        net = filled(_named(metadata["constructor"]) if model is None else Named(model), tensors)
        same = path_of(type(net)) == kind
    if known is not None:
        problem = differs(net, known)
    else:
        problem = None if same else f"the file holds a {cut(kind)}"
        logger.warning("the answers of this %s were not compared: no example was saved", cut(kind))
    if problem is not None:
        raise ConversionError(
            f"this {path_of(type(net))} is not the net that was saved: {problem}; give a dense "
            f"instance that was built as that {cut(kind)} was"
        )
    return net


def from_file_of_others(
    state: Any, model: nn.Module | str, *, ema: bool
) -> tuple[nn.Module, str, list[str]]:
    """A net with the weights of a script's checkpoint, what was taken of it, and what was not.

    A name, such as `torchvision/resnet18`, is built with as many classes as the weights have.
    Raises ConversionError where they do not fit.
    """
    given = Named(model) if isinstance(model, str) else None
    shell = given.build() if given is not None else model
    assert isinstance(shell, nn.Module)
    names = {plain_key(name): name for name in own_tensors(shell)}
    told = [key for key, name in names.items() if own_tensors(shell)[name].ndim >= 2]
    # The longest key is hardly the end of another one.
    weights, others = find_weights(state, ema=ema, firsts=(max(told, key=len, default=""),))
    found = weights.tensors()
    if problems := list(not_plain(found)):
        raise ConversionError(f"no net can run with these weights: {shorten(problems)}")
    tensors = {names.get(key, key): tensor for key, tensor in found.items()}
    if given is not None:
        last = [key for key, tensor in own_tensors(shell).items() if tensor.ndim >= 2][-1]
        if last in tensors and tensors[last].shape[:1] != own_tensors(shell)[last].shape[:1]:
            given = Named(given.name, {"num_classes": tensors[last].shape[0]})
            shell = given.build()
    own = own_tensors(shell)
    for other, first in aliases(shell).items():
        if other in tensors and first in tensors and torch.equal(tensors[other], tensors[first]):
            del tensors[other]
    for name in own.keys() - tensors.keys():
        if name.endswith(COUNTER):
            tensors[name] = torch.zeros((), dtype=torch.long)
    own_memory = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    net = filled(shell if given is None else given, own_memory)
    others_widths = any(own[name].shape != tensor.shape for name, tensor in tensors.items())
    if others_widths and probe(net) is None:
        raise ConversionError(
            f"its widths are not those of this {type(net).__name__}, which does not run so on images"
        )
    return net, str(weights), list(map(str, others))


def filled(dense: nn.Module | Named, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a dense net, or the net of that name, with `tensors` instead of its own."""
    net = dense.build() if isinstance(dense, Named) else copy.deepcopy(dense).cpu()
    _select_(net, tensors)
    fit_(net, tensors)
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if tensor.is_meta:
            raise ConversionError(f"{name} is neither in the file nor made by the constructor")
    try:
        check_sound(net)
    except PruningError as error:
        raise ConversionError(str(error)) from error
    return net.eval()


def _select_(net: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make the norms select whose selection is among the tensors (see `models.selecting`)."""
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        norm = dict(net.named_modules()).get(owner) if key == INDEX else None
        if norm is not None and can_select(norm):
            if tensor.ndim != 1 or tensor.dtype != torch.int64 or bool((tensor < 0).any()):
                raise ConversionError(f"{name} is no list of positions")
            select_inputs_(norm, tensor)


def _unsavable(model: nn.Module) -> Any:
    """Parts of a net that tensors under names do not hold."""
    yield from computed_weights(model)
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield f"{name or 'it'} keeps state that is no tensor (get_extra_state)"
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            yield f"{name} has no shape yet: run the net once"
        elif tensor.layout != torch.strided or tensor.is_quantized:
            yield f"{name} is a {str(tensor.layout).removeprefix('torch.')} or quantised tensor"


def _asked(name: str, options: Mapping[str, Option]) -> Named:
    try:
        return Named(name, dict(options))
    except ConversionError as error:
        raise CheckpointError(str(error)) from error


def _found(model: nn.Module, known: Probe | None, tensors: Mapping[str, Tensor]) -> Named | None:
    """The first constructor by the net's class that rebuilds it."""
    problems = []
    for named in candidates(model):
        if (problem := _refusal(model, known, tensors, named)) is None:
            return named
        problems.append(f"{named.name}: {problem}")
    if problems:
        logger.warning(
            "no constructor of its library rebuilds this %s (%s): `load` will need a dense instance, "
            "load(path, model=...)",
            *(path_of(type(model)), problems[0]),
        )
    return None


def _refusal(
    model: nn.Module, known: Probe | None, tensors: Mapping[str, Tensor], named: Named
) -> str | None:
    """Why a constructor does not give the same modules with the same options and answers; None = it does."""
    if known is None:
        return "its answers cannot be compared; give example_inputs that it takes"
    try:
        built = filled(named, {name: tensor.detach().cpu() for name, tensor in tensors.items()})
    except ConversionError as error:
        return str(error)
    return other_make(model, built) or differs(built, known)


def _named(text: str) -> Named:
    told = parse_json(text)
    if not isinstance(told, dict) or told.keys() != {"name", "options"}:
        raise ValueError("its constructor is none")
    if not isinstance(told["name"], str) or not isinstance(told["options"], dict):
        raise ValueError("its constructor is none")
    return Named(told["name"], told["options"])
