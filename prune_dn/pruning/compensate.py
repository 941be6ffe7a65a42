"""Refit the weights that stay, so that each reader's output is again what the dense net's was."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from prune_dn.base.defaults import usual_defaults
from prune_dn.base.sound import check_sound
from prune_dn.data.batches import read_batches
from prune_dn.errors import PruningError
from prune_dn.graph import Graph
from prune_dn.models.examples import batch_size
from prune_dn.models.losses import LossFunction
from prune_dn.pruning.config import COMPENSATIONS, check_choice
from prune_dn.pruning.cuts import cuts
from prune_dn.pruning.judge import Judge, split_images
from prune_dn.pruning.parts import Mask
from prune_dn.pruning.plan import Plan, planned
from prune_dn.pruning.refit import refit_
from prune_dn.pruning.subject import Subject
from prune_dn.pruning.units import Units

AnyNet = TypeVar("AnyNet", bound=nn.Module)


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

    From front to back, each convolution and linear layer of any net: its inputs come from the pruned net as
    it is by then, its targets from the dense net. `least_squares` refits the weights (after ThiNet,
    arXiv:1707.06342, and channel pruning, arXiv:1707.06168) with a ridge towards the present
    weights. Fitted on half the images, each ridge of RIDGES is judged on the other half, and so are
    the present weights: they stay where no ridge does better. `mean` leaves all weights. Both
    move what is left of the mean difference into the norms that see the output, or the layer's own bias.
    A filter whose sibling went is refitted to what the whole unit gave, and a layer that makes an operand of a
    sum to what the sum lacks. A layer that runs several times in one forward stays as it is.

    Gives `small` itself, with a warning, when the result is further than `small` from `dense`:
    every tenth image is kept from the refit for this; of fewer than 128 images all are used for
    both. How far is the loss's distance of the outputs, summed in float64 (`loss` as in
    `find_loss`; None: half the squared differences). A difference that rounding alone can make
    does not count.

    The feature maps of the pruned net that are still needed, of all images, are in memory at a time. Raises
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
    kept = kept_of(table, keep)
    return compensate(given, kept, small, calibration, method, loss=loss, seed=seed)


@dataclass(frozen=True)
class Kept:
    """What is left of a net's layers, by name: outputs in their new order (absent = all), and of layers under
    MFM 2/1 for each filter that stays what it competed with, if that went; else itself."""

    outputs: Mapping[str, Tensor]
    rivals: Mapping[str, Tensor]

    def then(self, after: Kept) -> Kept:
        """What is left of the first net when `after` is left of what these left."""
        outputs = {**self.outputs, **after.outputs}
        for name in self.outputs.keys() & after.outputs.keys():
            outputs[name] = self.outputs[name][after.outputs[name]]
        rivals = {}
        for name in {**self.rivals, **after.rivals}:
            before = self.outputs.get(name)
            width = len(self.rivals[name]) if name in self.rivals else len(after.rivals[name])
            left = after.outputs.get(name, torch.arange(width))
            against = after.rivals.get(name, left)  # in numbers of what was left before
            mine = self.rivals.get(name, before)
            alone = left if mine is None else mine[left]
            other = against if before is None else before[against]
            rivals[name] = torch.where(against == left, alone, other)
        return Kept(outputs, rivals)


KEPT_ALL = Kept({}, {})


def kept_of(table: Units, keep: Mask) -> Kept:
    """What a closed `keep` leaves of each layer."""
    outputs = {n: c.outputs for n, c in cuts(table, keep).items() if c.outputs is not None}
    rivals = {}
    for pairs in table.pairs:
        if pairs.maker is not None:
            firsts, seconds = pairs.left(keep)
            alone, own = firsts == seconds, pairs.owner[firsts]
            other = np.where(firsts == own, pairs.second[own], own)
            partner = np.where(alone, other, firsts)
            rivals[pairs.maker] = torch.from_numpy(np.append(partner, seconds[~alone]))
    return Kept(outputs, rivals)


@torch.inference_mode(False)
def compensate(
    given: Subject,
    kept: Kept,
    small: AnyNet,
    calibration: Iterable[object],
    method: str,
    *,
    loss: str | LossFunction | None,
    seed: int,
) -> AnyNet:
    """`compensate_plan` for a net of which `kept` is left."""
    refit = method == "least_squares"

    def fit_(net: nn.Module, teacher: nn.Module, batches: Sequence[Any]) -> None:
        refit_(
            net,
            teacher,
            kept.outputs,
            shiftable(given.graph),
            batches,
            rivals=kept.rivals,
            weights=refit,
            seed=seed,
        )

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
    fit_: Callable[[nn.Module, nn.Module, Sequence[Any]], None],
) -> AnyNet:
    """A copy of `small` after `fit_(copy, dense, batches)`, or `small` itself, with a warning.

    See `compensate_plan`: judged on images that `fit_` did not see.
    """
    for model in (small, dense):
        check_sound(model)
    batches = read_batches(calibration).inputs
    fitted, judged = split_images(batches)
    was_training = {name: module.training for name, module in small.named_modules()}
    net, cut = (copy.deepcopy(small).eval() for _ in range(2))
    teacher = copy.deepcopy(dense).eval()
    with torch.no_grad():
        judge = Judge(teacher, judged, loss)
        fit_(net, teacher, fitted)
        before, after = judge(cut), judge(net)
    if not after <= before + judge.rounding:
        unseen = "" if judged is batches else " that the refit did not see"
        warnings.warn(
            f"compensate={method!r} did not help, so the net is left as it was cut: on the "
            f"{sum(map(batch_size, judged))} calibration images{unseen} its {judge.loss.name} distance "
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
