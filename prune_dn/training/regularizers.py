"""Sparse training: a pull on the scales of the norms, and what has become of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prune_dn.training.config import Sparsity

SMALL = 0.01


def norm_scales(model: nn.Module) -> list[nn.Parameter]:
    """The trainable scales (gamma) of all batch norms."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    return [n.weight for n in norms if n.affine and n.weight.requires_grad]


@torch.no_grad()
def add_l1_gradient_(scales: list[nn.Parameter], strength: float) -> None:
    """grad += strength * sign(gamma): once per step, on gradients that are already unscaled."""
    for scale in scales:
        if scale.grad is not None:
            scale.grad.add_(scale.sign(), alpha=strength)


@torch.no_grad()
def shrink_(scales: list[nn.Parameter], amount: float) -> None:
    """gamma = sign(gamma) * max(|gamma| - amount, 0): the proximal step of the L1 norm."""
    for scale in scales:
        scale.copy_(scale.sign() * (scale.abs() - amount).clamp_(min=0))


def describe_scales(model: nn.Module) -> dict[str, Any]:
    """|gamma| over all norms: quantiles, the share below 0.01, and a histogram of 20 bins."""
    found = [n.weight for n in model.modules() if isinstance(n, _BatchNorm) and n.affine]
    values = torch.cat([w.detach().float().abs().cpu() for w in found])
    quantiles = torch.quantile(values[:1_000_000], torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]))
    top = max(float(values.max()), 1e-12)
    return {
        "quantiles": dict(zip(("5", "25", "50", "75", "95"), _plain(quantiles), strict=True)),
        "share_small": float((values < SMALL).float().mean()),
        "histogram": {
            "counts": torch.histc(values, 20, 0, top).long().tolist(),
            "from": 0.0,
            "to": top,
        },
    }


def sparsity_notice(scales: dict[str, Any], sparsity: Sparsity) -> str | None:
    """What to say when the scales have not become sparse."""
    if scales["share_small"] >= 0.05:
        return None
    return (
        f"the norm scales are not sparse: {scales['share_small']:.1%} of them are below {SMALL}, "
        f"the median is {scales['quantiles']['50']:.3f}; pruning by bn_scale will cost accuracy. "
        f"Train longer, or raise sparsity.strength above {sparsity.strength:g}"
    )


def _plain(values: Tensor) -> list[float]:
    return [round(v, 6) for v in values.tolist()]
