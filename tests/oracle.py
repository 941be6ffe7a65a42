"""The contract's other side: the dense net with masks on each reader's post-activation input.

Where siblings compete, one that went is minus infinity in the maximum, if the other stays.
"""

from __future__ import annotations

import copy
import itertools

import torch
from torch import nn

from prune_dn.models import DenseNet, MaxFeatureMap
from prune_dn.models.dense_net import ReadStream
from prune_dn.pruning import Plan


def masked(net: DenseNet, plan: Plan) -> nn.Module:
    """A copy of `net` whose readers get zero for every input that the plan takes from them, and whose
    maxima do not see the siblings that it takes.

    Written against the plan's `keep_indices` only. A layer that goes whole makes stream channels
    that nobody in the plan reads any more, so their masks are in the readers.
    """
    out = copy.deepcopy(net)
    for name, module in out.named_modules():
        parent, _, leaf = name.rpartition(".")
        if leaf in ("mfm", "read") and name in plan.keep_indices:
            module.register_forward_hook(_without(module, set(plan.keep_indices[name])))
        norm = {
            "conv1": f"{parent}.norm1",
            "conv": f"{parent}.norm",
            "classifier": "features.norm5",
        }.get(leaf)
        if leaf == "conv2":
            # keep_indices of conv1 are its filters, which conv2 reads
            norm = f"{parent}.conv1"
        kept = plan.keep_indices.get(norm or "")
        if kept is None or not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        mask = torch.zeros(module.weight.shape[1], dtype=module.weight.dtype)
        mask[list(kept)] = 1
        shape = (1, -1, 1, 1) if isinstance(module, nn.Conv2d) else (1, -1)
        module.register_forward_pre_hook(_multiplier(mask.reshape(shape)))
    return out


def _without(module: nn.Module, kept: set[int]):
    """The maximum of each pair, without the sibling that went."""
    if isinstance(module, ReadStream):
        leads, rivals = module.input_indices.tolist(), module.rival_indices.tolist()
    else:
        assert isinstance(module, MaxFeatureMap) and module.kind == "2/1"
        leads, seconds = list(range(module.units)), itertools.count(module.units)
        rivals = [unit if unit in module.alone else next(seconds) for unit in leads]
    # Siblings are counted as in the plan: the first of each pair, then the seconds that there are.
    number = itertools.count(len(leads))
    second = [next(number) if a != b else None for a, b in zip(leads, rivals, strict=True)]

    def hook(_, inputs, __):
        out = []
        for pair, (a, b) in enumerate(zip(leads, rivals, strict=True)):
            left, right = inputs[0][:, a], inputs[0][:, b]
            if second[pair] in kept and pair not in kept:
                left = torch.full_like(left, -torch.inf)
            if pair in kept and second[pair] is not None and second[pair] not in kept:
                right = torch.full_like(right, -torch.inf)
            out.append(torch.maximum(left, right))
        return torch.stack(out, 1)

    return hook


def _multiplier(mask: torch.Tensor):
    return lambda _, inputs: (inputs[0] * mask,)


def randomise_(net: nn.Module, seed: int) -> nn.Module:
    """Random weights, scales, shifts and statistics, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.1)
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator))
                module.running_mean.copy_(torch.randn(module.bias.shape, generator=generator))
                module.running_var.copy_(torch.rand(module.bias.shape, generator=generator) + 0.5)
            elif isinstance(module, nn.Conv2d | nn.Linear):
                spread = module.weight[0].numel() ** -0.5
                noise = torch.randn(module.weight.shape, generator=generator)
                module.weight.copy_(noise * spread)
    return net
