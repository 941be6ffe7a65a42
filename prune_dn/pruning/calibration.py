"""What calibration images tell: statistics of each reader's inputs, streamed over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prune_dn.data.batches import Batches, run_on, working_copy
from prune_dn.errors import DataError, PruningError
from prune_dn.graph import tensors
from prune_dn.models.losses import find_loss
from prune_dn.pruning.competition import competition
from prune_dn.pruning.patches import output_positions, patch_width, patches_of

Need = Literal["activations", "gradients", "gram", "wins"]
NEEDS: tuple[Need, ...] = ("activations", "gradients", "gram", "wins")


@dataclass
class Statistics:
    """Of one reader's post-activation inputs (C channels), averaged over calibration images.

    `activation` is the mean of |a|, (C,). With a the input, g the loss's gradient there and s their
    product summed over the pixels of an image, `taylor` is the mean of |s| and `fisher` half the
    mean of s squared, (C,). `gram` is the mean over sampled pixels of p p^T for the patch p that
    one output pixel reads, (C * kernel², C * kernel²), channel-major; `sensitivity` is the mean over
    images of the summed squared gradient of -log p(y) at each output, y drawn from the model's own
    prediction (the diagonal of its Fisher information), (outputs,); of a loss that is a callable,
    its gradient at the labels that are given.

    Of an MFM or a competing reader, (siblings,): `wins` is the share of pixels where the sibling
    survives (equals share what they win), `margins` by how much it exceeds the least of its unit,
    on average: what the sum of the survivors loses when it goes.
    """

    activation: Tensor | None = None
    taylor: Tensor | None = None
    fisher: Tensor | None = None
    gram: Tensor | None = None
    sensitivity: Tensor | None = None
    wins: Tensor | None = None
    margins: Tensor | None = None


class PixelSampler:
    """Draws output pixels so that about `rows` patches come from `images` images; seeded."""

    def __init__(self, images: int, seed: int) -> None:
        self.images = images
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, layer: nn.Module, output: Tensor) -> Tensor | None:
        """Flat output positions (N, Q) of a layer, about twice as many as a patch has numbers.

        At least 4,096 in all; None = every position.
        """
        pixels, width = output_positions(layer, output), patch_width(layer)
        wanted = -(-max(2 * width, 4096) // self.images)
        if wanted >= pixels:
            return None
        drawn = torch.randint(pixels, (len(output), wanted), generator=self.generator)
        return drawn.to(output.device)


@torch.inference_mode(False)
@torch.enable_grad()
def collect(
    model: nn.Module,
    readers: Iterable[str],
    batches: Batches,
    need: Need,
    *,
    owners: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Mapping[str, Statistics]:
    """Run `model` over the batches and give the statistics of each reader (a conv or linear layer; for
    `wins` a `MaxFeatureMap` or a `ReadStream`).

    Where others read the same tensor, only what this reader does with it counts. The model is not
    touched: a copy runs, in eval mode, in float32 or better. Memory does not grow with the number of
    batches; `gram` keeps one matrix per reader. `owners` says of which unit each channel that a reader
    reads is, (C,): behind a flattened map a unit has one a pixel. Its statistics are then of units:
    of all that the reader reads of one, before an absolute value or a square is taken.

    Raises PruningError when the model cannot take the images, its outputs are not finite, or labels
    do not fit the loss (`batches.loss`, or the one that labels imply).
    """
    net = working_copy(model)
    like = next(net.parameters())
    modules = {name: net.get_submodule(name) for name in readers}
    sampler = PixelSampler(len(batches), seed)
    seen: list[tuple[str, Tensor, Tensor]] = []  # reader, input, output
    sums: dict[str, dict[str, Any]] = {name: {} for name in modules}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen.append((name, args[0], output))

        return hook

    def own(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        return args[0].view_as(args[0])  # a node of its own: gradients of other readers stay out

    for name, module in modules.items():
        module.register_forward_pre_hook(own)
        module.register_forward_hook(watch(name))
    for i, images in enumerate(batches.images):
        images = images.detach().to(like, copy=True)
        backward = need in ("gradients", "gram")
        with torch.set_grad_enabled(backward):
            outputs = run_on(net, images.requires_grad_(backward))
        _check_finite(outputs, i)
        watched = [x if need == "gradients" else out for _, x, out in seen]
        gradients: Sequence[Tensor | None] = [None] * len(seen)
        if backward:
            error = _error(outputs, batches, i, need, sampler.generator, like.device)
            if not (error.requires_grad and error.isfinite()):
                raise PruningError(
                    f"calibration batch {i}: the loss is {error.item():g}, "
                    f"{'and' if error.requires_grad else 'without a gradient, so'} nothing follows "
                    "from it; look at the loss, and at the labels"
                )
            gradients = torch.autograd.grad(error, watched, materialize_grads=True)
        for (name, x, output), gradient in zip(seen, gradients, strict=True):
            module, x = modules[name], x.detach()
            if need == "wins":
                found = competition(module, x)
            elif need == "gram":
                assert gradient is not None
                gradient = _channels_second(gradient, module)
                found = {"sensitivity": gradient.square().sum([0, *range(2, gradient.ndim)])}
                _add_gram_(sums[name], x, output, module, sampler)
            else:
                owner = None if owners is None else owners.get(name)
                found = _of_units(x, gradient, module, owner)
            for key, value in found.items():
                value = value.double()
                sums[name][key] = sums[name][key].add_(value) if key in sums[name] else value
        seen.clear()
    return {
        name: Statistics(**{key: value / len(batches) for key, value in found.items()})
        for name, found in sums.items()
    }


def _of_units(
    x: Tensor, gradient: Tensor | None, module: nn.Module, owner: Tensor | None
) -> dict[str, Tensor]:
    """Sums over images of what `activation`, or with the gradient `taylor` and `fisher`, are means of.

    Over pixels first, then over the channels that are of one unit.
    """
    x = _channels_second(x, module)
    owner = torch.arange(x.shape[1]) if owner is None else owner
    owner = owner.to(x.device)
    shares = owner.bincount()

    def total(values: Tensor) -> Tensor:
        values = values.sum([*range(2, values.ndim)]) if values.ndim > 2 else values
        return values.new_zeros(len(values), len(shares)).index_add_(1, owner, values)

    if gradient is None:
        return {"activation": total(x.abs()).sum(0) / (shares.clamp_min(1) * x[0, 0].numel())}
    slopes = total(x * _channels_second(gradient, module))
    return {"taylor": slopes.abs().sum(0), "fisher": slopes.square().sum(0) / 2}


def _add_gram_(
    sums: dict[str, Any], x: Tensor, output: Tensor, module: nn.Module, sampler: PixelSampler
) -> None:
    """Add the patches' Gram matrix; it is large, so in float32. Of a grouped conv, one for each group."""
    groups = int(getattr(module, "groups", 1))
    rows = patches_of(module, x, sampler(module, output)).float()
    share = len(x) / len(rows)
    if groups == 1:
        gram = sums.setdefault("gram", rows.new_zeros(rows.shape[1], rows.shape[1]))
        gram.addmm_(rows.T, rows, alpha=share)
        return
    parts = rows.unflatten(1, (groups, -1)).transpose(0, 1)
    width = parts.shape[2]
    gram = sums.setdefault("gram", rows.new_zeros(groups, width, width))
    gram.baddbmm_(parts.transpose(1, 2), parts, alpha=share)


def _channels_second(x: Tensor, layer: nn.Module) -> Tensor:
    """(N, C, ...): a linear layer has its channels last."""
    return x.movedim(-1, 1) if isinstance(layer, nn.Linear) else x


def _error(
    outputs: Any,
    batches: Batches,
    i: int,
    need: Need,
    generator: torch.Generator,
    device: torch.device,
) -> Tensor:
    """The loss of batch `i`: by its labels for `gradients`, by what is drawn for `gram`."""
    labels = None if batches.labels is None else batches.labels[i].to(device, copy=True)
    given = labels if need == "gradients" or batches.loss is None else None
    try:
        loss = find_loss(batches.loss, outputs, given)
        if need == "gram" and loss.draw is not None:
            return loss.error(outputs, loss.draw(outputs, generator))
        if labels is None:
            raise DataError(f"loss {loss.name!r} draws no labels: give (images, labels)")
        return loss.error(outputs, labels)
    except DataError as error:
        raise PruningError(f"calibration batch {i}: {error}") from error


def _check_finite(outputs: Any, batch: int) -> None:
    """Raise PruningError where the weights are sound and what they give is not."""
    if not all(bool(x.isfinite().all()) for x in tensors(outputs)):
        raise PruningError(
            f"calibration batch {batch}: the model's outputs are not finite, though its weights are: "
            "what it computes overflows; check that the images are normalised as in training"
        )
