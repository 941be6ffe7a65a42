"""What calibration images tell: statistics of each reader's inputs, streamed over batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from prune_dn.data.batches import Batches, joined, rows_of, run_on, working_copy
from prune_dn.errors import DataError, PruningError
from prune_dn.graph import tensors
from prune_dn.models.examples import batch_size, for_net
from prune_dn.models.losses import find_loss
from prune_dn.pruning.patches import output_positions, patch_width
from prune_dn.pruning.slices import bytes_to_follow, fresh, in_slices
from prune_dn.pruning.statistics import Seen, Slopes, Sums

AnyStatistic = TypeVar("AnyStatistic")


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
    need: type[AnyStatistic],
    *,
    owners: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> dict[str, AnyStatistic]:
    """Run `model` over the batches and give the statistics (see `statistics`) of each reader: a conv or linear
    layer; for `Wins` a `MaxFeatureMap` or a `ReadStream`.

    Where others read the same tensor, only what this reader does with it counts. The model is not
    touched: a copy runs, in eval mode, in float32 or better. Memory does not grow with the number or size of
    batches: a large one runs in slices (`slices.MEMORY`), which change the result only by rounding; `Gram` keeps
    one matrix per reader. `owners` says of which unit each channel that a reader
    reads is, (C,): behind a flattened map a unit has one a pixel. Its statistics are then of units:
    of all that the reader reads of one, before an absolute value or a square is taken.

    Raises PruningError when the model cannot take the images, its outputs are not finite, or labels
    do not fit the loss (`batches.loss`, or the one that labels imply).
    """
    net = working_copy(model)
    modules = {name: net.get_submodule(name) for name in readers}
    sampler = PixelSampler(len(batches), seed)
    wanted: Any = need
    at: Slopes = wanted.slopes
    backward = at is not None
    seen: list[tuple[str, Tensor, Tensor]] = []  # reader, input, output
    sums: dict[str, Sums] = {name: defaultdict(float) for name in modules}

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
                slopes = _slopes(joined(answers or [outputs]), batches, i, at, sampler.generator)
            gradients = _followed(outputs, [s[rows] for s in slopes], seen, i, at)
            for number, ((name, x, output), gradient) in enumerate(
                zip(seen, gradients, strict=True)
            ):
                where = None
                if at == "outputs":
                    if number == len(drawn):
                        drawn.append(sampler(modules[name], output, batch_size(inputs)))
                    where = drawn[number]
                owner = None if owners is None else owners.get(name)
                positions = None if where is None else where[rows]
                one = Seen(modules[name], x.detach(), gradient, owner, positions)
                wanted.add_(sums[name], one)
            seen.clear()
    return {
        name: need(**{key: value / len(batches) for key, value in found.items()})
        for name, found in sums.items()
        if found
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
    at: Slopes,
) -> Sequence[Tensor | None]:
    """The gradient of the loss at each input or output that was seen."""
    if at is None:
        return [None] * len(seen)
    pairs = [(x, s) for x, s in zip(tensors(outputs), slopes, strict=True) if x.requires_grad]
    if not pairs:
        raise _no_gradient(i)
    heads, slopes = zip(*pairs, strict=True)
    watched = [x if at == "inputs" else out for _, x, out in seen]
    return torch.autograd.grad(heads, watched, slopes, materialize_grads=True)


def _slopes(
    outputs: Any, batches: Batches, i: int, at: Slopes, generator: torch.Generator
) -> Sequence[Tensor]:
    """The gradient of the loss of batch `i` at each of the outputs."""
    heads = tree_map(lambda x: x.detach().requires_grad_() if tensors(x) else x, outputs)
    error = _error(heads, batches, i, at, generator)
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


def _error(
    outputs: Any, batches: Batches, i: int, at: Slopes, generator: torch.Generator
) -> Tensor:
    """The loss of batch `i`: by its labels for slopes at inputs, by what is drawn for those at outputs."""
    device = tensors(outputs)[0].device if tensors(outputs) else torch.device("cpu")
    labels = None if batches.labels is None else batches.labels[i]
    if labels is not None:
        labels = tree_map(lambda x: x.to(device, copy=True), labels)
    given = labels if at == "inputs" or batches.loss is None else None
    try:
        loss = find_loss(batches.loss, outputs, given)
        if at == "outputs" and loss.draw is not None:
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
