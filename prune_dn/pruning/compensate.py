"""Refit the weights that stay, so that each reader's output is again what the dense net's was."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune_dn.batches import read_batches
from prune_dn.defaults import usual_defaults
from prune_dn.errors import PruningError
from prune_dn.graph import Graph
from prune_dn.losses import LossFunction
from prune_dn.models import DenseNet
from prune_dn.models.dense_net import DenseLayer, ReadStream, Transition
from prune_dn.models.mfm import MaxFeatureMap
from prune_dn.pruning.calibration import PixelSampler
from prune_dn.pruning.config import COMPENSATIONS, check_choice
from prune_dn.pruning.cuts import cuts
from prune_dn.pruning.judge import Judge, split_images
from prune_dn.pruning.kept import Kept, indices_of
from prune_dn.pruning.least_squares import Moments, solve
from prune_dn.pruning.parts import Mask
from prune_dn.pruning.patches import at_positions, patches_of
from prune_dn.pruning.plan import Plan, planned
from prune_dn.pruning.refit import refit_
from prune_dn.pruning.subject import Subject
from prune_dn.pruning.units import Units
from prune_dn.sound import check_sound

AnyNet = TypeVar("AnyNet", bound=nn.Module)
Maps = list[Tensor]  # one tensor per calibration batch
Streams = list[list[Tensor]]  # per calibration batch, the sources that make the stream


@usual_defaults()
@torch.inference_mode(False)
def compensate_plan(
    small: AnyNet,
    dense: nn.Module,
    plan: Plan,
    calibration: Iterable[object],
    method: str = "least_squares",
    *,
    loss: str | LossFunction | None = None,
    seed: int = 0,
) -> AnyNet:
    """A copy of `small` (`dense` after `plan`) whose readers give nearly what the dense net's give.

    From front to back, each conv and the classifier: its inputs come from the pruned net as it is
    by then, its targets from the dense net. `least_squares` refits the weights (after ThiNet,
    arXiv:1707.06342, and channel pruning, arXiv:1707.06168) with a ridge towards the present
    weights. Fitted on half the images, each ridge of RIDGES is judged on the other half, and so are
    the present weights: they stay where no ridge does better. `mean` leaves all weights. Both
    move what is left of the mean difference into the norms that read the output, or the
    classifier's bias; an MFM layer's mean is not moved (a maximum stands between, as it does where
    what is read competes), so `mean` does nothing there. A filter whose sibling went is refitted
    to what the whole unit gave.

    Gives `small` itself, with a warning, when the result is further than `small` from `dense`:
    every tenth image is kept from the refit for this; of fewer than 128 images all are used for
    both. How far is the loss's distance of the outputs, summed in float64 (`loss` as in
    `find_loss`; None: half the squared differences). A difference that rounding alone can make
    does not count.

    The streams of one block, of both nets and all images, are in memory at a time. Raises
    PruningError for an unknown method, unusable images, or a dense net whose answers to them are
    not finite, and DataError for a loss that does not fit.

    >>> from prune_dn.models import densenet
    >>> from prune_dn.pruning import apply_plan, make_plan
    >>> net, images = densenet([2, 2], 8, stem="cifar", num_classes=10), torch.randn(64, 3, 8, 8)
    >>> plan = make_plan(net, 0.3, unit="macs", criterion="l2")
    >>> small = compensate_plan(apply_plan(net, plan), net, plan, [images])
    """
    check_compensation(method, True)
    if method == "none":
        return small
    given, table, keep = planned(dense, plan)
    return compensate(given, table, keep, small, calibration, method, loss=loss, seed=seed)


@torch.inference_mode(False)
def compensate(
    given: Subject,
    table: Units,
    keep: Mask,
    small: AnyNet,
    calibration: Iterable[object],
    method: str,
    *,
    loss: str | LossFunction | None,
    seed: int,
) -> AnyNet:
    """`compensate_plan` for a net that was cut to what `keep` leaves of the units of `given`."""
    refit = method == "least_squares"

    def fit_(net: nn.Module, teacher: nn.Module, images: Sequence[Tensor]) -> None:
        if isinstance(net, DenseNet) and isinstance(teacher, DenseNet):
            _Walk(net, teacher, indices_of(table, keep), images, refit, seed).run()
            return
        kept = {n: c.outputs for n, c in cuts(table, keep).items() if c.outputs is not None}
        shifts = shiftable(given.graph)
        refit_(net, teacher, kept, shifts, images, weights=refit, seed=seed)

    return closer(small, given.model, calibration, method, loss, fit_)


def shiftable(graph: Graph) -> set[str]:
    """The layers of which each output goes through a batch norm, which can move its mean."""
    normed = {int(c) for f in graph.followers if f.is_norm for c in graph.classes(f.channels)}
    return {
        p.layer for p in graph.producers if normed.issuperset(graph.classes(p.channels).tolist())
    }


def closer(
    small: AnyNet,
    dense: nn.Module,
    calibration: Iterable[object],
    method: str,
    loss: str | LossFunction | None,
    fit_: Callable[[nn.Module, nn.Module, Sequence[Tensor]], None],
) -> AnyNet:
    """A copy of `small` after `fit_(copy, dense, images)`, or `small` itself, with a warning.

    See `compensate_plan`: judged on images that `fit_` did not see.
    """
    for model in (small, dense):
        check_sound(model)
    images = read_batches(calibration).images
    fitted, judged = split_images(images)
    was_training = {name: module.training for name, module in small.named_modules()}
    net, cut = (copy.deepcopy(small).eval() for _ in range(2))
    teacher = copy.deepcopy(dense).eval()
    with torch.no_grad():
        judge = Judge(teacher, judged, loss)
        fit_(net, teacher, fitted)
        before, after = judge(cut), judge(net)
    if not after <= before + judge.rounding:
        unseen = "" if judged is images else " that the refit did not see"
        warnings.warn(
            f"compensate={method!r} did not help, so the net is left as it was cut: on the "
            f"{sum(map(len, judged))} calibration images{unseen} its {judge.loss.name} distance "
            f"from the dense net is {before:.4g}, compensated {after:.4g}; give more or better "
            "images, or compensate='none'",
            stacklevel=3,
        )
        return small
    for name, module in net.named_modules():
        module.training = was_training[name]
    return net


def check_compensation(method: str, has_images: bool) -> None:
    """Raise PruningError for an unknown method, or one that needs images and has none."""
    check_choice("compensate", method, COMPENSATIONS)
    if method != "none" and not has_images:
        raise PruningError(
            f"compensate={method!r} needs calibration images: give calibration=batches of images"
        )


class _Walk:
    """A front-to-back pass over both nets; `run` changes the weights of `small`."""

    def __init__(
        self,
        small: DenseNet,
        dense: DenseNet,
        keep_indices: Kept,
        images: Sequence[Tensor],
        refit: bool,
        seed: int,
    ) -> None:
        self.small, self.dense, self.refit = small, dense, refit
        self.keep_indices, self.images = keep_indices, images
        self.sampler = PixelSampler(sum(map(len, images)), seed)

    def run(self) -> None:
        nets = (self.small, self.dense)
        weight = self.dense.classifier.weight
        images = [x.to(weight.device, weight.dtype) for x in self.images]
        small, dense = ([[_stem(net, x)] for x in images] for net in nets)
        shift = weight.new_zeros(small[0][0].shape[1])
        for b in range(1, len(self.dense.config.blocks) + 1):
            shift = self._block(f"features.denseblock{b}", small, dense, shift)
            if b < len(self.dense.config.blocks):
                name = f"features.transition{b}"
                new, old = (net.get_submodule(name) for net in nets)
                assert isinstance(new, Transition) and isinstance(old, Transition)
                inputs = _inputs(small, new.read, new.norm, shift)
                targets = _inputs(dense, old.read, old.norm)
                shift = self._reader(f"{name}.conv", inputs, targets, new.mfm, old.mfm)
                small, dense = (
                    [[F.avg_pool2d(_made(part.conv, part.mfm, x), 2)] for x in maps]
                    for part, maps in ((new, inputs), (old, targets))
                )
        pooled = []
        for net, stream, moved in ((self.small, small, shift), (self.dense, dense, None)):
            norm = net.get_submodule("features.norm5")
            assert isinstance(norm, nn.BatchNorm2d)
            pooled.append([x.mean((2, 3)) for x in _inputs(stream, net.read, norm, moved)])
        left = self._reader("classifier", pooled[0], pooled[1])
        self.small.classifier.bias.add_(left)

    def _block(self, name: str, small: Streams, dense: Streams, shift: Tensor) -> Tensor:
        """Refit the layers of a block and add their maps to both streams.

        `shift` is by how much the mean of each channel of the small stream is too low.
        """
        layers = dict(self.small.get_submodule(name).named_children())
        for leaf, old in self.dense.get_submodule(name).named_children():
            assert isinstance(old, DenseLayer)
            new = layers.get(leaf)
            if new is None:
                for sources in dense:
                    sources.append(old(sources))
                continue
            assert isinstance(new, DenseLayer)
            inputs = _inputs(small, new.read, new.norm1, shift)
            targets = _inputs(dense, old.read, old.norm1)
            last = "conv1"
            if new.norm2 is not None and old.norm2 is not None:
                last = "conv2"
                left = self._reader(f"{name}.{leaf}.conv1", inputs, targets)
                _raise_mean(new.norm2, left)
                inputs = [F.relu(new.norm2(new.conv1(x))) for x in inputs]
                targets = [F.relu(old.norm2(old.conv1(x))) for x in targets]
            left = self._reader(f"{name}.{leaf}.{last}", inputs, targets, new.mfm, old.mfm)
            shift = torch.cat([shift, left])
            for layer, maps, streams in ((new, inputs, small), (old, targets, dense)):
                for sources, x in zip(streams, maps, strict=True):
                    sources.append(_made(layer.get_submodule(last), layer.mfm, x))
        return shift

    def _reader(
        self,
        name: str,
        inputs: Maps,
        targets: Maps,
        mfm: MaxFeatureMap | None = None,
        dense_mfm: MaxFeatureMap | None = None,
    ) -> Tensor:
        """Refit one conv or the classifier; a filter that stands alone follows its whole unit.

        Returns by how much the mean of each map that it makes is too low still; 0 behind MFM.
        """
        new, old = self.small.get_submodule(name), self.dense.get_submodule(name)
        assert isinstance(new, nn.Conv2d | nn.Linear) and isinstance(old, nn.Conv2d | nn.Linear)
        kept = self.keep_indices.get(name)
        alone = _alone(kept, mfm, dense_mfm)
        halves = [Moments(new.weight, self.refit), Moments(new.weight, self.refit)]
        for i, (x, y) in enumerate(zip(inputs, targets, strict=True)):
            whole = old(y)
            positions = self.sampler(new, whole)
            target = whole if kept is None else whole[:, list(kept)]
            if alone is not None and dense_mfm is not None:
                filters, units = alone
                target[:, filters] = dense_mfm(whole)[:, units]
            missing = at_positions(new, target - new(x), positions)
            halves[i % 2].add(patches_of(new, x, positions), missing)
        both = halves[0] + halves[1]
        left = both.output
        if self.refit:
            change = solve(halves, both, centred=mfm is None)
            new.weight.add_(change.T.reshape(new.weight.shape))
            left = left - both.input @ change
        if mfm is not None:
            left = torch.zeros_like(mfm(left[None])[0])
        return left.to(new.weight.dtype)


def _stem(net: DenseNet, x: Tensor) -> Tensor:
    for name, module in net.features.named_children():
        if name.startswith("denseblock"):
            break
        x = module(x)
    return x


def _inputs(
    streams: Streams, read: ReadStream, norm: nn.BatchNorm2d, shift: Tensor | None = None
) -> Maps:
    """What a reader's conv sees; first its norm's mean follows the stream's `shift`."""
    if shift is not None:
        _raise_mean(norm, _seen(shift, read))
    return [F.relu(norm(read(torch.cat(sources, 1)))) for sources in streams]


def _seen(shift: Tensor, read: ReadStream) -> Tensor:
    """`shift` where the norm sees it; 0 where two channels compete: a maximum stands between."""
    if read.input_indices is None:
        return shift
    seen = shift[read.input_indices]
    if read.rival_indices is not None:
        seen = seen * (read.rival_indices == read.input_indices)
    return seen


def _alone(
    kept: tuple[int, ...] | None, mfm: MaxFeatureMap | None, dense_mfm: MaxFeatureMap | None
) -> tuple[list[int], list[int]] | None:
    """Filters that lost their sibling by this cut, in the new order, and their units in the old."""
    if kept is None or dense_mfm is None or dense_mfm.kind != "2/1":
        return None
    units = mfm.units if mfm is not None else len(kept)
    single = range(units) if mfm is None else mfm.alone
    paired = [unit for unit in range(dense_mfm.units) if unit not in dense_mfm.alone]
    owner = [*range(dense_mfm.units), *paired]
    return list(single), [owner[kept[filter_]] for filter_ in single]


def _raise_mean(norm: nn.BatchNorm2d, shift: Tensor) -> None:
    """Make the norm give what it would if the means of its inputs were higher by `shift`."""
    assert norm.running_mean is not None
    norm.running_mean.sub_(shift)


def _made(conv: nn.Module, mfm: nn.Module | None, x: Tensor) -> Tensor:
    out: Tensor = conv(x)
    return out if mfm is None else mfm(out)
