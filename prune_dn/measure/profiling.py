"""Parameters, MACs and channels: of a net of ours by its graph, of any other net by running it once."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from prune_dn.base.defaults import usual_defaults
from prune_dn.errors import ConfigError
from prune_dn.graph.inference import call
from prune_dn.models.as_built import as_built
from prune_dn.models.examples import (
    CONVS,
    TRANSPOSED,
    batch_size,
    example_image,
    for_net,
    inference_copy,
)
from prune_dn.models.families import NetConfig, config_of, empty_net, known_family
from prune_dn.models.sizes import ImageSize


@dataclass(frozen=True)
class Cost:
    """What a network costs. One multiply-add of a convolution or linear layer is one MAC.

    `channels` counts the channels of all norms, as Network Slimming does (arXiv:1708.06519): each
    reader's inputs and each bottleneck. Cutting a share r everywhere removes a share r of them. In a
    net without batch norms it counts the filters of all convs, which such norms would follow.
    """

    params: int
    macs: int
    channels: int


@dataclass(frozen=True)
class LayerCost:
    """The cost of one module, by its name in the state dict."""

    name: str
    params: int
    macs: int
    channels: int


def count(
    model: nn.Module | NetConfig,
    image_size: ImageSize | None = None,
    *,
    example_inputs: Any = None,
) -> Cost:
    """Parameters, MACs for one example, and norm channels; `model` stays as it is.

    `image_size` is in pixels, one number or (height, width); None = 32 (cifar), 224 (imagenet),
    or what a Light CNN takes. A net that is not ours needs it, or `example_inputs`: a tensor, a tuple of the
    forward's arguments, or a dict of them by name, with any number of examples. A copy runs once. Counted are
    the weights of modules; what a forward multiplies without one (attention's products) is not.

    >>> from prune_dn.models import densenet121
    >>> count(densenet121().config)
    Cost(params=7978856, macs=2834161664, channels=41824)
    >>> from torchvision.models import resnet18
    >>> count(resnet18(), 224)
    Cost(params=11689512, macs=1814073344, channels=4800)
    >>> count(nn.Sequential(nn.Conv1d(2, 4, 3)), example_inputs=torch.zeros(8, 2, 12))
    Cost(params=28, macs=240, channels=4)
    """
    return total(count_per_layer(model, image_size, example_inputs=example_inputs))


def count_per_layer(
    model: nn.Module | NetConfig,
    image_size: ImageSize | None = None,
    *,
    example_inputs: Any = None,
) -> list[LayerCost]:
    """The cost of each module with parameters, in the order of the net's modules."""
    if image_size is not None and example_inputs is not None:
        raise ConfigError("image_size has no effect beside example_inputs; leave one of them out")
    config: Any = model
    if isinstance(model, nn.Module):
        if config_of(model) is None:
            uses = weight_uses(model, image_size, example_inputs=example_inputs)
            return list(module_rows(model, uses))
        config = as_built(model, share=True).config
    if example_inputs is not None:
        image_size = tuple(example_inputs.shape[-2:])
    uses = config.graph(known_family(config).side(config, image_size)).uses()
    return list(module_rows(empty_net(config), uses))


@usual_defaults()
def weight_uses(
    model: nn.Module, image_size: ImageSize | None, *, example_inputs: Any = None
) -> Mapping[str, int]:
    """Counts of how often each conv and linear layer applies its weight to one example: its output positions.

    Of a transposed conv, its input positions. Raises ConfigError when the net cannot run.
    """
    net = inference_copy(model)
    uses: Counter[str] = Counter()

    def watch(name: str, layer: nn.Module) -> None:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(layer, TRANSPOSED):
                uses[name] += args[0].numel() // layer.in_channels
            elif isinstance(layer, CONVS):
                uses[name] += output.numel() // layer.out_channels
            elif isinstance(layer, nn.Linear):
                uses[name] += output.numel() // layer.out_features

        layer.register_forward_hook(hook)

    for name, layer in net.named_modules():
        if isinstance(layer, CONVS + TRANSPOSED + (nn.Linear,)):
            watch(name, layer)
    given = example_inputs is not None
    inputs = for_net(example_inputs, net) if given else example_image(net, image_size)
    examples = batch_size(inputs)
    try:
        with torch.no_grad():
            call(net, inputs)
    except Exception as error:
        shapes = [str(tuple(x.shape)) for x in tree_leaves(inputs) if isinstance(x, Tensor)]
        what = f"inputs of shape {', '.join(shapes)}" if given else f"an image of shape {shapes[0]}"
        raise ConfigError(
            f"this {type(model).__name__} does not run on {what} "
            f"({type(error).__name__}: {error}); {_remedy(model, error, given)}"
        ) from error
    return {name: times // examples for name, times in uses.items()}


def _remedy(model: nn.Module, error: Exception, given: bool) -> str:
    """What to do where a net does not run."""
    if given:
        return (
            "give example_inputs that it takes: a tensor, a tuple of its arguments, or a dict of them by "
            "name"
        )
    try:
        needed = [
            parameter.name
            for parameter in inspect.signature(model.forward).parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        ]
    except (TypeError, ValueError):  # a forward without a signature
        needed = []
    if len(needed) > 1 or isinstance(error, TypeError | KeyError | IndexError | AttributeError):
        many = len(needed) > 1
        takes = f"takes {', '.join(needed)}, not only" if many else "needs more than"
        return f"its forward {takes} one image tensor (N, C, H, W): give example_inputs"
    return "give the size that it takes, or example_inputs"


def module_rows(model: nn.Module, uses: Mapping[str, int]) -> Iterator[LayerCost]:
    """The cost of each module's own parameters, shared ones once; `uses` as of `weight_uses`."""
    seen: set[nn.Parameter] = set()
    counted: tuple[type[nn.Module], ...] = CONVS + TRANSPOSED
    width = "out_channels"
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        counted, width = (_BatchNorm,), "num_features"
    for name, module in model.named_modules():
        own = set(module.parameters(recurse=False))
        params = sum(p.numel() for p in own - seen)
        weight = getattr(module, "weight", None)
        macs = weight.numel() * uses[name] if name in uses and weight is not None else 0
        channels = int(getattr(module, width)) if isinstance(module, counted) else 0
        seen |= own
        if own or macs or channels:
            yield LayerCost(name, params, macs, channels)


def total(rows: list[LayerCost]) -> Cost:
    """The sum of the rows."""
    return Cost(
        sum(row.params for row in rows),
        sum(row.macs for row in rows),
        sum(row.channels for row in rows),
    )
