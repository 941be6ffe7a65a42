"""What of a request and of training settings does not fit a net, said before anything is done."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from prune_dn.errors import ConversionError, PruningError
from prune_dn.models.examples import example_image, inference_copy
from prune_dn.models.families import family_of
from prune_dn.pruning.config import PruneConfig
from prune_dn.pruning.planning import allowed
from prune_dn.pruning.ratios import read_ratios
from prune_dn.pruning.request import check_rounding, with_defaults
from prune_dn.pruning.settle import settled_contests
from prune_dn.pruning.subject import Subject, own_subject, subject
from prune_dn.pruning.units import Units
from prune_dn.training import FitConfig
from prune_dn.training.regularizers import norm_scales


def unfit(
    model: nn.Module,
    fits: Mapping[str, FitConfig | None],
    request: PruneConfig | None,
    ratios: str | os.PathLike[str] | None,
    image_size: int | None,
) -> Iterator[str]:
    """What this net has no use for or cannot do, each with a reason and what to do instead.

    `fits` are training runs by the names of their sections. A net of ours may be on the meta device; any
    other is followed on an image of `image_size`.
    """
    for name, fit in fits.items():
        if fit is not None:
            yield from _unfit_training(model, name, fit)
    if request is None:
        return
    try:
        given = _subject(model, image_size)
        table = Units(given.graph)
        if request.settle:
            settled_contests(table)
            return
        kinds = {group.kind for group in table.groups}
        has = {*kinds, "layer"} if table.blocks else kinds
        has |= {"connection"} if table.of_kinds(("connection",)).any() else set()
        asked = [kind for kind in request.units if kind not in PruneConfig.units]
        if none := [kind for kind in asked if kind not in has]:
            yield f"prune.units: it has no {' and no '.join(none)}; leave that out"
            return
        check_rounding(table, request.units, request.round_to)
        allowed(given, table, with_defaults(request, model, False))
        if ratios is not None:
            read_ratios(ratios, table, request.units)
    except (PruningError, ConversionError) as error:
        yield f"prune: {error}"


def _unfit_training(model: nn.Module, name: str, fit: FitConfig) -> Iterator[str]:
    if fit.sparsity is not None and not norm_scales(model):
        yield f"{name}.sparsity: it has no batch norms with scales to pull on; leave it out"
    family = family_of(model)
    if fit.memory_efficient and not (family is not None and family.shares_memory):
        yield f"{name}.memory_efficient: only DenseNets have a shared buffer; leave it out"
    if fit.resolutions and family is not None and family.one_size:
        yield f"{name}.resolutions: its linear layer fits one size; leave them out"
    elif fit.resolutions and family is None:
        net, size = inference_copy(model), 0
        try:
            for _, size in fit.resolutions:
                with torch.no_grad():
                    net(example_image(net, size))
        except Exception as error:  # whatever a net raises
            said = f"at {size} pixels it fails: {str(error)[:200]}"
            yield f"{name}.resolutions: {said}; leave them out"


def _subject(model: nn.Module, image_size: int | None) -> Subject:
    if family_of(model) is None:
        return subject(model, image_size)
    return own_subject(model, image_size)
