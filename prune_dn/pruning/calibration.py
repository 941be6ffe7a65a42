"""What calibration images tell: statistics of each reader's inputs, streamed over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from prune_dn.data.batches import Batches, joined, rows_of, run_on, working_copy
from prune_dn.errors import DataError, PruningError
from prune_dn.graph import tensors
from prune_dn.models.examples import batch_size, for_net
from prune_dn.models.losses import find_loss
from prune_dn.pruning.competition import competition
from prune_dn.pruning.patches import output_positions, patch_width, patches_of
from prune_dn.pruning.slices import bytes_to_follow, fresh, in_slices

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

    def __call__(self, layer: nn.Module, output: Tensor, rows: int | None = None) -> Tensor | None:
        """Flat output positions (N, Q) of a layer, about twice as many as a patch has numbers.

        At least 4,096 in all; None = every position. N = `rows`, by default those of `output`.
        """
        pixels, width = output_positions(layer, output), patch_width(layer)
        wanted = -(-max(2 * width, 4096) // self.images)
        if wanted >= pixels:
            return None
        rows = len(output) if rows is None else rows
        drawn = torch.randint(pixels, (rows, wanted), generator=self.generator)
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
    touched: a copy runs, in eval mode, in float32 or better. Memory does not grow with the number or size of
    batches: a large one runs in slices (`slices.MEMORY`), which change the result only by rounding; `gram` keeps
    one matrix per reader. `owners` says of which unit each channel that a reader
    reads is, (C,): behind a flattened map a unit has one a pixel. Its statistics are then of units:
    of all that the reader reads of one, before an absolute value or a square is taken.

    Raises PruningError when the model cannot take the images, its outputs are not finite, or labels
    do not fit the loss (`batches.loss`, or the one that labels imply).
    """
    net = working_copy(model)
    modules = {name: net.get_submodule(name) for name in readers}
    sampler = PixelSampler(len(batches), seed)
    backward = need in ("gradients", "gram")
    seen: list[tuple[str, Tensor, Tensor]] = []  # reader, input, output
    sums: dict[str, dict[str, Any]] = {name: {} for name in modules}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if torch.is_grad_enabled() or not backward:  # else only answers are wanted
                seen.append((name, args[0], output))

        return hook

    def own(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        x = args[0]
        if torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()
        return x.view_as(x)  # a node of its own: gradients of other readers stay out

    for name, module in modules.items():
        module.register_forward_pre_hook(own)
        module.register_forward_hook(watch(name))
    size: dict[Any, int] = {}  # bytes of an example, by the shapes of its tensors
    for i, given in enumerate(batches.inputs):
        inputs = for_net(given, net)
        shapes = tuple(x.shape[1:] for x in tree_leaves(inputs) if isinstance(x, Tensor))
        if shapes not in size:
            size[shapes] = _bytes(net, inputs, modules, backward)
            seen.clear()
        parts, answers = in_slices(inputs, size[shapes]), []
        if backward and len(parts) > 1:  # the loss is that of the batch
            with torch.no_grad():
                answers = [run_on(net, fresh(part)) for part in parts]
        slopes: Sequence[Tensor] = ()
        drawn: list[Tensor | None] = []  # positions of the whole batch, for each that is seen
        start = 0
        for part in parts:
            rows = slice(start, start := start + batch_size(part))
            with torch.set_grad_enabled(backward):
                outputs = run_on(net, fresh(part))
            _check_finite(outputs, i)
            if backward and not slopes:
                slopes = _slopes(joined(answers or [outputs]), batches, i, need, sampler.generator)
            gradients = _followed(outputs, [s[rows] for s in slopes], seen, i, need)
            for number, ((name, x, output), gradient) in enumerate(
                zip(seen, gradients, strict=True)
            ):
                module, x = modules[name], x.detach()
                if need == "wins":
                    found = competition(module, x)
                elif need == "gram":
                    assert gradient is not None
                    gradient = _channels_second(gradient, module)
                    found = {"sensitivity": gradient.square().sum([0, *range(2, gradient.ndim)])}
                    if number == len(drawn):
                        drawn.append(sampler(module, output, batch_size(inputs)))
                    where = drawn[number]
                    _add_gram_(sums[name], x, module, None if where is None else where[rows])
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


def _bytes(net: nn.Module, inputs: Any, modules: Mapping[str, nn.Module], backward: bool) -> int:
    """What one example takes (`bytes_to_follow`); 0 where outputs have no row for each."""
    one = rows_of(inputs, slice(0, 1))
    with torch.no_grad():
        outputs = run_on(net, fresh(one))
    if not all(x.ndim and len(x) == 1 for x in tree_leaves(outputs) if isinstance(x, Tensor)):
        return 0
    return bytes_to_follow(net, fresh(one), modules, backward)


def _followed(
    outputs: Any,
    slopes: Sequence[Tensor],
    seen: Sequence[tuple[str, Tensor, Tensor]],
    i: int,
    need: Need,
) -> Sequence[Tensor | None]:
    """The gradient of the loss at each input, or for `gram` output, that was seen."""
    if need not in ("gradients", "gram"):
        return [None] * len(seen)
    pairs = [(x, s) for x, s in zip(tensors(outputs), slopes, strict=True) if x.requires_grad]
    if not pairs:
        raise _no_gradient(i)
    heads, slopes = zip(*pairs, strict=True)
    watched = [x if need == "gradients" else out for _, x, out in seen]
    return torch.autograd.grad(heads, watched, slopes, materialize_grads=True)


def _slopes(
    outputs: Any, batches: Batches, i: int, need: Need, generator: torch.Generator
) -> Sequence[Tensor]:
    """The gradient of the loss of batch `i` at each of the outputs."""
    heads = tree_map(lambda x: x.detach().requires_grad_() if tensors(x) else x, outputs)
    error = _error(heads, batches, i, need, generator)
    if not error.requires_grad:
        raise _no_gradient(i)
    if not error.isfinite():
        raise PruningError(
            f"calibration batch {i}: the loss is {error.item():g}, and nothing follows from it; look at "
            "the loss, and at the labels"
        )
    return torch.autograd.grad(error, tensors(heads), materialize_grads=True)


def _no_gradient(i: int) -> PruningError:
    return PruningError(
        f"calibration batch {i}: the loss is without a gradient, so nothing follows from it; look at the "
        "loss, and at the labels"
    )


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
    sums: dict[str, Any], x: Tensor, module: nn.Module, positions: Tensor | None
) -> None:
    """Add the patches' Gram matrix; it is large, so in float32. Of a grouped conv, one for each group."""
    groups = int(getattr(module, "groups", 1))
    rows = patches_of(module, x, positions).float()
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
    outputs: Any, batches: Batches, i: int, need: Need, generator: torch.Generator
) -> Tensor:
    """The loss of batch `i`: by its labels for `gradients`, by what is drawn for `gram`."""
    device = tensors(outputs)[0].device if tensors(outputs) else torch.device("cpu")
    labels = None if batches.labels is None else batches.labels[i]
    if labels is not None:
        labels = tree_map(lambda x: x.to(device, copy=True), labels)
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
