"""Refresh the running statistics of batch norms on training images."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from prune_dn.errors import PruningError


@torch.no_grad()
def recalibrate_batch_norm_(
    model: nn.Module, batches: Iterable[object], *, max_batches: int | None = None
) -> int:
    """Replace all running means and variances by their averages over `batches`; in place.

    `batches` yields image tensors (N, C, H, W), or (images, ...) tuples; labels are not used.
    Give training images, augmented as in training: black borders of shifted images alone move the
    statistics, and without them a net loses accuracy that was not even cut. Weights do not move; dropout is off; training flags and momenta are restored. A cut changes
    what every later norm sees, so this is due after surgery (arXiv:2007.02491, EagleEye). Returns
    the number of batches used.

    Raises PruningError when there are no batch norms or no batches; after any error the statistics
    are what they were.

    >>> from prune_dn.models import densenet40
    >>> recalibrate_batch_norm_(densenet40(), [torch.randn(4, 3, 32, 32)])
    1
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        raise PruningError("this model has no batch norm with running statistics to recalibrate")
    flags = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    kept = {norm: copy.deepcopy(norm._buffers) for norm in norms}
    device = next(model.parameters()).device
    used = 0
    try:
        model.eval()
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None
        for batch in batches:
            if max_batches is not None and used >= max_batches:
                break
            images = batch[0] if isinstance(batch, tuple | list) else batch
            assert isinstance(images, torch.Tensor)
            model(images.to(device, non_blocking=True))
            used += 1
        if not used:
            raise PruningError(
                "recalibrate_batch_norm_ got no batches; the statistics are unchanged"
            )
        for norm in norms:
            norm._buffers["num_batches_tracked"] = kept[norm]["num_batches_tracked"]
    except BaseException:
        for norm in norms:
            norm._buffers.update(kept[norm])
        raise
    finally:
        for norm in norms:
            norm.momentum = momenta[norm]
        for module, flag in flags.items():
            module.training = flag
    return used
