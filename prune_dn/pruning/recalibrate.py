"""Refresh the running statistics of batch norms on training images."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from prune_dn.base.defaults import usual_defaults
from prune_dn.base.sound import find_unsound
from prune_dn.data.batches import each_batch, run_on, working_copy
from prune_dn.errors import PruningError
from prune_dn.models.examples import for_net
from prune_dn.pruning.slices import fresh


@usual_defaults()
@torch.no_grad()
def recalibrate_batch_norm_(
    model: nn.Module, batches: Iterable[object], *, max_batches: int | None = None
) -> int:
    """Replace all running means and variances by their averages over `batches`; in place.

    `batches` yields inputs, or (inputs, ...) tuples (see `each_batch`); labels are not used. Give training images, augmented as in training: black borders of shifted images alone
    move the statistics, and without them a net loses accuracy that was not even cut. Nothing but
    the statistics moves; dropout is off. A copy of the model computes them, in float32 or better. A
    cut changes what every later norm sees, so this is due after surgery (arXiv:2007.02491,
    EagleEye). Returns the number of batches used.

    Raises PruningError when there are no batch norms or no batches, for batches that the model cannot
    take, and for weights or statistics that are not finite; after any error the statistics are what
    they were.

    >>> from prune_dn.models import densenet40
    >>> recalibrate_batch_norm_(densenet40(), [torch.randn(4, 3, 32, 32)])
    1
    """
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    if not names:
        raise PruningError("this model has no batch norm with running statistics to recalibrate")
    if (problem := find_unsound(model.named_parameters())) is not None:
        raise PruningError(f"{problem}: the statistics would follow it; load a sound model")
    net = working_copy(model)
    norms = {name: net.get_submodule(name) for name in names}
    for norm in norms.values():
        assert isinstance(norm, _BatchNorm)
        norm.train().reset_running_stats()
        norm.momentum = None
    used = 0
    for inputs, _ in itertools.islice(each_batch(batches, "recalibration"), max_batches):
        run_on(net, fresh(for_net(inputs, net)), "recalibration")
        used += 1
    if not used:
        raise PruningError("recalibrate_batch_norm_ got no batches; the statistics are unchanged")
    pairs = [
        (f"{name}.{key}", old := model.get_buffer(f"{name}.{key}"), new.to(old))
        for name, norm in norms.items()
        for key, new in norm.named_buffers()
        if key.startswith("running_")
    ]
    if (problem := find_unsound((name, new) for name, _, new in pairs)) is not None:
        raise PruningError(
            f"{problem} after recalibration, so the statistics are left as they were: what the model "
            "computes overflows; check that the images are normalised as in training"
        )
    for _, old, new in pairs:
        old.copy_(new)
    return used
