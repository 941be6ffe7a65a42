"""Ridge regression of what a layer lacks on what it reads, from sums that are streamed over images."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)


class Moments:
    """Sums in float64 over patches p (rows, inputs) and what the reader lacks, y (rows, outputs).

    The `products` of p with itself and with y are left out unless asked for.
    """

    def __init__(self, weight: Tensor, products: bool) -> None:
        outputs, inputs = weight.flatten(1).shape
        self.rows, self.products = 0, products
        width = inputs if products else 0
        self.gram, self.cross, self.sum_inputs, self.sum_outputs = (
            torch.zeros(shape, dtype=torch.float64, device=weight.device)
            for shape in ((width, width), (width, outputs), (inputs,), (outputs,))
        )

    @property
    def input(self) -> Tensor:
        return self.sum_inputs / self.rows

    @property
    def output(self) -> Tensor:
        return self.sum_outputs / self.rows

    def add(self, p: Tensor, y: Tensor) -> None:
        exact = torch.promote_types(p.dtype, torch.float32)  # the products of half precisions
        p, y = p.to(exact), y.to(exact)
        self.rows += len(p)
        if self.products:
            self.gram += p.T @ p
            self.cross += p.T @ y
        self.sum_inputs += p.sum(0, dtype=torch.float64)
        self.sum_outputs += y.sum(0, dtype=torch.float64)

    def __add__(self, other: Moments) -> Moments:
        both = copy.copy(self)
        for key in ("rows", "gram", "cross", "sum_inputs", "sum_outputs"):
            setattr(both, key, getattr(self, key) + getattr(other, key))
        return both

    def normal(self, centred: bool) -> tuple[Tensor, Tensor]:
        """The normal equations' two sides, per row, with or without a free constant."""
        gram, cross = self.gram / self.rows, self.cross / self.rows
        if centred:
            gram = gram.addr_(self.input, self.input, alpha=-1)
            cross = cross.addr_(self.input, self.output, alpha=-1)
        return gram, cross


def solve(halves: list[Moments], both: Moments, *, centred: bool) -> Tensor:
    """The change of the weights (inputs, outputs) whose ridge does best on the half it was not
    fitted on: none where each does worse than no change.
    """
    ridge: float | None = RIDGES[1]
    if halves[1].rows:
        fitted, (gram, cross) = (half.normal(centred) for half in halves)
        errors: dict[float | None, float] = {None: 0.0}
        for candidate in RIDGES:
            found = _ridge(*fitted, candidate)
            errors[candidate] = float(((gram @ found - 2 * cross) * found).sum())
        ridge = min(errors, key=errors.__getitem__)
    if ridge is None:
        return torch.zeros_like(both.cross)
    return _ridge(*both.normal(centred), ridge)


def _ridge(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """argmin over the change w of the squared error plus ridge * mean diagonal * |w|²."""
    regular = gram.clone()
    strength = ridge * gram.diagonal().mean()
    regular.diagonal().add_(strength.clamp_min(torch.finfo(gram.dtype).tiny))
    factor, failed = torch.linalg.cholesky_ex(regular)
    if failed:  # more rounding than ridge
        return torch.zeros_like(cross) if ridge >= 1 else _ridge(gram, cross, 10 * ridge)
    return torch.cholesky_solve(cross, factor)
