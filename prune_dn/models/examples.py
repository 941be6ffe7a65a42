"""Examples of a net's inputs at any batch size, the names of inputs and outputs, and a copy to run on them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map

from prune_dn.errors import ConfigError
from prune_dn.graph.inference import arguments
from prune_dn.models.answers import computed_weights
from prune_dn.models.sizes import ImageSize, sides

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def batch_size(inputs: Any) -> int:
    """The first size of the first tensor. Raises ConfigError where there is none."""
    first = next((x for x in tree_leaves(inputs) if isinstance(x, Tensor)), None)
    if first is None or first.ndim == 0 or not len(first):
        raise ConfigError("example_inputs hold no tensor with a batch axis in front")
    return len(first)


def in_batch(inputs: Any, batch: int) -> Any:
    """Inputs with as many examples: the given ones in turn, of floating-point ones each a little weaker.

    An example is a row of each tensor that has as many rows as the first one; the others stay.

    >>> in_batch((torch.ones(2, 1), 5), 4)[0].flatten()
    tensor([1.0000, 0.8750, 0.7500, 0.6250])
    """
    rows = batch_size(inputs)

    def again(x: Any) -> Any:
        if not batched(x, rows):
            return x
        picked: Tensor = x[torch.arange(batch, device=x.device) % rows]
        if not x.is_floating_point():
            return picked
        weaker = 1 - torch.arange(batch, device=x.device, dtype=x.dtype) / (2 * batch)
        return picked * weaker.view(-1, *[1] * (x.ndim - 1))

    return tree_map(again, inputs)


def batched(x: object, rows: int) -> bool:
    """Whether it is a tensor with one row for each example."""
    return isinstance(x, Tensor) and x.ndim > 0 and len(x) == rows


def for_net(inputs: Any, net: nn.Module) -> Any:
    """Inputs on the net's device, the floating-point ones in its dtype."""
    first = next((p for p in net.parameters() if p.is_floating_point()), torch.empty(0))

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(first.device, first.dtype if x.is_floating_point() else None)

    return tree_map(moved, inputs)


def by_name(net: nn.Module, inputs: Any) -> Mapping[str, Any]:
    """Each argument of the forward by its parameter's name."""
    positional, named = arguments(inputs)
    return inspect.signature(net.forward).bind(*positional, **named).arguments


def names_in(tree: Any) -> list[str]:
    """A name for each tensor in nested containers: its keys and positions, `maps_0` for maps[0].

    >>> names_in({"logits": torch.ones(1), "maps": (torch.ones(1), torch.ones(1), "text")})
    ['logits', 'maps_0', 'maps_1']
    """
    leaves, _ = tree_flatten_with_path(tree)
    return [_plain(keystr(path)) for path, leaf in leaves if isinstance(leaf, Tensor)]


def _plain(path: str) -> str:
    kept = "".join(c if c.isalnum() else "_" for c in path)
    return "_".join(part for part in kept.split("_") if part)


def inference_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode, in float32 on the CPU. Raises ConfigError where there can be none."""
    try:
        return copy.deepcopy(model).cpu().float().eval()
    except (
        Exception
    ) as error:  # old weight norm after a forward, and whatever foreign modules raise
        why = next(computed_weights(model), error)
        raise ConfigError(f"this {type(model).__name__} cannot be copied: {why}") from error


def example_image(model: nn.Module, image_size: ImageSize | None) -> Tensor:
    """One random image (1, C, H, W) on the CPU in float32, with the first conv's channels.

    Raises ConfigError where `image_size` is None or no size, or the net has no convolution.
    """
    if image_size is None:
        raise ConfigError(
            f"the size of images is needed for a {type(model).__name__}: give it in pixels, such as "
            "224 or (height, width)"
        )
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, in_channels(model), *sides(image_size), generator=generator)


def in_channels(model: nn.Module) -> int:
    """Channels of the images that a CNN takes: those of its first convolution."""
    for module in model.modules():
        if isinstance(module, CONVS + TRANSPOSED):
            return int(module.in_channels)
    raise ConfigError(f"this {type(model).__name__} is no CNN: it has no convolution")
