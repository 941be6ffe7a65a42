"""What a reader loses when inputs go one after another and the rest is refitted each time.

The optimal brain surgeon (Hassibi and Stork, 1993) in blocks: an input channel is a block of
kernel² taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-3


def elimination_losses(gram: Tensor, weight: Tensor, block: int) -> Tensor:
    """The loss of each channel at its turn, cheapest first: (channels,), never falling.

    `gram` (C * block, C * block) is E[p p^T] of the inputs and `weight` (C * block, outputs) reads
    them. When channel c goes, and the channels that are left are refitted, the squared error of
    all outputs rises by tr(w_c^T (H_cc)^-1 w_c), where H is the inverse of `gram` conditioned on
    what went before. The cheapest channel goes, H and the weights are updated, and so on: two
    channels that say the same are not both cheap. A ridge of RIDGE times the mean of the diagonal
    keeps the inverse sound.

    In effect a block Cholesky factorisation of the inverse in the order found, O((C * block)³): each
    step brings one panel up to date, and after every eighth of the channels all that is left.

    >>> twin = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> elimination_losses(twin, torch.tensor([[1.0], [2.0], [1.5]]), 1).round().tolist()
    [0.0, 9.0, 2.0]
    """
    channels = gram.shape[0] // block
    regular = gram.clone()
    diagonal = regular.diagonal()
    diagonal += (RIDGE * diagonal.mean()).clamp_min(torch.finfo(gram.dtype).tiny)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(regular))
    weights = weight.to(gram.dtype).reshape(channels, block, -1)
    left = torch.arange(channels, device=gram.device)
    losses, highest = gram.new_zeros(channels), 0.0
    while len(left):
        gone, lost, panels, weights = _eliminate(inverse, weights, max(1, len(left) // 8))
        for c, loss in zip(gone, lost, strict=True):
            highest = max(highest, loss)
            losses[left[c]] = highest
        stays = torch.ones(len(left), dtype=torch.bool, device=gram.device)
        stays[gone] = False
        left, weights = left[stays], weights[stays]
        rows = stays.repeat_interleave(block)
        inverse = inverse[rows][:, rows].addmm_(panels[rows], panels[rows].T, alpha=-1)
    return losses


def _eliminate(
    inverse: Tensor, weights: Tensor, count: int
) -> tuple[list[int], list[float], Tensor, Tensor]:
    """Take `count` channels out: which, at what loss each, the update's factor, and the weights."""
    channels, block, _ = weights.shape
    starts = range(0, channels * block, block)
    diagonals = torch.stack([inverse[c : c + block, c : c + block] for c in starts])
    panels = inverse.new_zeros(channels * block, count * block)
    unit = torch.eye(block, dtype=inverse.dtype, device=inverse.device)
    gone: list[int] = []
    lost: list[float] = []
    for step in range(count):
        factors, failed = torch.linalg.cholesky_ex(diagonals)
        whitened = torch.linalg.solve_triangular(factors, weights, upper=False)
        loss = whitened.square().sum((1, 2))
        # Rounding has eaten the remainder of a channel that says what others say: it goes for free.
        loss.masked_fill_((failed != 0) | ~loss.isfinite(), 0.0)
        loss[gone] = torch.inf
        c = int(loss.argmin())
        gone.append(c)
        lost.append(float(loss[c]))
        if not failed[c]:
            rows, here = slice(c * block, (c + 1) * block), slice(step * block, (step + 1) * block)
            column = inverse[:, rows] - panels[:, : here.start] @ panels[rows, : here.start].T
            panel = torch.linalg.solve_triangular(factors[c], column.T, upper=False).T
            panels[:, here] = panel
            by_channel = panel.reshape(channels, block, block)
            weights = weights - by_channel @ whitened[c]
            diagonals = diagonals - by_channel @ by_channel.transpose(1, 2)
        diagonals[gone] = unit
    return gone, lost, panels, weights
