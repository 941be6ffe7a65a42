"""What calibration images tell: statistics of each reader's inputs, streamed over batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune_dn.errors import PruningError
from prune_dn.models import DenseNet
from prune_dn.profiling import in_channels
from prune_dn.pruning.competition import competition

Need = Literal["activations", "gradients", "gram", "wins"]
NEEDS: tuple[Need, ...] = ("activations", "gradients", "gram", "wins")


@dataclass(frozen=True)
class Batches:
    """Calibration batches, on the CPU or wherever they came from: images, and labels or None."""

    images: tuple[Tensor, ...]
    labels: tuple[Tensor, ...] | None

    def __len__(self) -> int:
        return sum(len(images) for images in self.images)


@dataclass
class Statistics:
    """Of one reader's post-activation inputs (C channels), averaged over calibration images.

    `activation` is the mean of |a|, (C,). With a the input, g the loss's gradient there and s their
    product summed over the pixels of an image, `taylor` is the mean of |s| and `fisher` half the
    mean of s squared, (C,). `gram` is the mean over sampled pixels of p p^T for the patch p that
    one output pixel reads, (C * kernel², C * kernel²), channel-major; `sensitivity` is the mean over
    images of the summed squared gradient of -log p(y) at each output, y drawn from the model's own
    prediction (the diagonal of its Fisher information), (outputs,).

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


def read_batches(calibration: Iterable[object], *, needs_labels: bool = False) -> Batches:
    """The batches of `calibration`: image tensors (N, C, H, W), or (images, labels, ...) tuples.

    Raises PruningError for no batches, batches of another shape, values that are not finite, and
    labels that are missing where `needs_labels`.
    """
    images, labels = [], []
    if isinstance(calibration, Tensor):
        raise PruningError(
            "calibration is one tensor; give an iterable of batches, such as [images] or a loader"
        )
    for i, batch in enumerate(calibration):
        parts = batch if isinstance(batch, tuple | list) else (batch,)
        found = parts[0] if parts else None
        if not isinstance(found, Tensor) or found.ndim != 4 or not found.is_floating_point():
            raise PruningError(
                f"calibration batch {i} is {_describe(found)}; each batch must be images "
                "(N, C, H, W) in floating point, or (images, labels)"
            )
        if not torch.isfinite(found).all():
            raise PruningError(f"calibration batch {i} holds NaN or infinity")
        images.append(found)
        if len(parts) > 1 and isinstance(parts[1], Tensor) and parts[1].shape == found.shape[:1]:
            labels.append(parts[1])
    if not images or not sum(len(batch) for batch in images):
        raise PruningError("calibration has no images; a generator can be read only once")
    if needs_labels and len(labels) < len(images):
        raise PruningError(
            "this criterion needs labels: give calibration batches of (images, labels)"
        )
    return Batches(tuple(images), tuple(labels) if len(labels) == len(images) else None)


def patches(inputs: Tensor, kernel: int, positions: Tensor | None) -> Tensor:
    """What output pixels read: (N, C, H, W) -> (N * positions, C * kernel²), channel-major.

    A conv with "same" zero padding is assumed. `positions` (N, Q) are flat output pixels, None =
    all. A linear layer's input (N, C) is returned as it is.
    """
    if inputs.ndim == 2:
        return inputs
    n, c, h, w = inputs.shape
    if kernel > 1:
        inputs = F.pad(inputs, [kernel // 2] * 4)
    if positions is None:
        positions = torch.arange(h * w, device=inputs.device).expand(n, -1)
    row, column = positions // w, positions % w
    image = torch.arange(n, device=inputs.device)[:, None]
    last = inputs.permute(0, 2, 3, 1)
    taps = [
        last[image, row + dy, column + dx].reshape(-1, c)
        for dy in range(kernel)
        for dx in range(kernel)
    ]
    return taps[0] if kernel == 1 else torch.stack(taps, -1).flatten(1)


class PixelSampler:
    """Draws output pixels so that about `rows` patches come from `images` images; seeded."""

    def __init__(self, images: int, seed: int) -> None:
        self.images = images
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, inputs: Tensor, width: int) -> Tensor | None:
        """Positions (N, Q) for a reader whose patches have `width` numbers; None = every pixel."""
        if inputs.ndim == 2:
            return None
        pixels = inputs.shape[2] * inputs.shape[3]
        wanted = -(-max(2 * width, 4096) // self.images)
        if wanted >= pixels:
            return None
        drawn = torch.randint(pixels, (len(inputs), wanted), generator=self.generator)
        return drawn.to(inputs.device)


def collect(
    model: nn.Module,
    readers: Iterable[str],
    batches: Batches,
    need: Need,
    *,
    seed: int = 0,
) -> Mapping[str, Statistics]:
    """Run `model` over the batches and give the statistics of each reader (a conv or linear layer; for
    `wins` a `MaxFeatureMap` or a `ReadStream`).

    Where others read the same tensor, only what this reader does with it counts. The model is not
    touched: a copy runs, in eval mode. Memory does not grow with the number of
    batches; `gram` keeps one matrix per reader. Raises PruningError when the model cannot take the
    images, or a label is no class.
    """
    net = copy.deepcopy(model).eval().requires_grad_(False)
    if isinstance(net, DenseNet):
        net.memory_efficient = False
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
        images = images.detach().to(like)
        backward = need in ("gradients", "gram")
        with torch.set_grad_enabled(backward):
            logits = _forward(net, images.requires_grad_(backward))
        if need == "wins":
            for name, x, _ in seen:
                for key, value in competition(modules[name], x).items():
                    _add(sums[name], key, value)
            seen.clear()
            continue
        if need == "activations":
            for name, x, _ in seen:
                x = _channels_second(x, modules[name])
                dims = [d for d in range(x.ndim) if d != 1]
                _add(sums[name], "activation", x.abs().sum(dims) / x.shape[2:].numel())
            seen.clear()
            continue
        _check_logits(logits)
        if need == "gradients":
            assert batches.labels is not None
            labels = _checked(batches.labels[i].to(like.device), logits.shape[1])
            watched = [x for _, x, _ in seen]
        else:
            drawn = torch.multinomial(
                logits.detach().float().softmax(1).cpu(), 1, generator=sampler.generator
            )
            labels, watched = drawn[:, 0].to(like.device), [out for _, _, out in seen]
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        gradients = torch.autograd.grad(loss, watched, materialize_grads=True)
        for (name, x, _), gradient in zip(seen, gradients, strict=True):
            x = _channels_second(x.detach(), modules[name])
            gradient = _channels_second(gradient, modules[name])
            over = tuple(range(2, gradient.ndim))
            if need == "gradients":
                s = (x * gradient).sum(over) if over else x * gradient
                _add(sums[name], "taylor", s.abs().sum(0))
                _add(sums[name], "fisher", s.square().sum(0) / 2)
            else:
                _add(sums[name], "sensitivity", gradient.square().sum((0, *over)))
                kernel = int(getattr(modules[name], "kernel_size", (1,))[0])
                width = x.shape[1] * kernel**2
                rows = patches(x, kernel, sampler(x, width)).float()
                gram = sums[name].setdefault("gram", rows.new_zeros(width, width))
                gram.addmm_(rows.T, rows, alpha=len(images) / len(rows))
        seen.clear()
    return {
        name: Statistics(**{key: value / len(batches) for key, value in found.items()})
        for name, found in sums.items()
    }


def _add(sums: dict[str, Any], key: str, value: Tensor) -> None:
    sums[key] = sums[key].add_(value) if key in sums else value


def _channels_second(x: Tensor, layer: nn.Module) -> Tensor:
    """(N, C, ...): a linear layer has its channels last."""
    return x.movedim(-1, 1) if isinstance(layer, nn.Linear) else x


def _forward(net: nn.Module, images: Tensor) -> Tensor:
    if images.shape[1] != (channels := in_channels(net)):
        raise PruningError(
            f"calibration images have {images.shape[1]} channels; the model takes {channels}"
        )
    try:
        logits: Tensor = net(images)
    except RuntimeError as error:
        raise PruningError(
            f"the model cannot run on calibration images of shape {tuple(images.shape)}: {error}"
        ) from error
    return logits


def _check_logits(logits: object) -> None:
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise PruningError(
            f"the model gives {_describe(logits)}; a criterion that follows the loss needs logits "
            "(N, classes)"
        )


def _checked(labels: Tensor, classes: int) -> Tensor:
    if labels.is_floating_point() or not bool(((labels >= 0) & (labels < classes)).all()):
        raise PruningError(f"calibration labels must be integers from 0 to {classes - 1}")
    return labels


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    return f"a {type(value).__name__}"
