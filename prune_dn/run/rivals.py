"""Our pruning beside Torch-Pruning's on one net: the same images, and the same share of the MACs."""

from __future__ import annotations

import copy
import functools
import itertools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from prune_dn.data.batches import Batches, read_batches, rows_of
from prune_dn.errors import PruneDNError, PruningError
from prune_dn.graph import trace
from prune_dn.graph.inference import call
from prune_dn.models.answers import eval_mode
from prune_dn.models.examples import batch_size, for_net
from prune_dn.models.losses import find_loss
from prune_dn.pruning import prune, recalibrate_batch_norm_
from prune_dn.pruning.config import check_ratio
from prune_dn.training import EvalResult

THEIR_CRITERIA = ("bn_scale", "fpgm", "l1", "l2", "lamp", "taylor")
THEIR_SCOPES = ("global", "local")
OURS = "ours/reconstruction/least_squares"

_STEPS = 9  # of bisection: the ratio is found to 1/512


@dataclass(frozen=True)
class PrunerRow:
    """What one pruner's net is and does.

    `method` is `dense`, OURS, or `torch-pruning/CRITERION/SCOPE`; `ratio` the share of MACs that was
    to go, `macs_cut` what went. `seconds` are scoring, search, surgery and refit. `one_shot` is
    the accuracy in [0, 1] of the net as pruned, `recalibrated` after its norms' statistics were
    estimated anew (None: it has no such norms), both on `n` images. With an `error` there is no net.
    """

    method: str
    ratio: float
    macs_cut: float = 0.0
    params: int = 0
    seconds: float = 0.0
    one_shot: float | None = None
    recalibrated: float | None = None
    n: int = 0
    error: str | None = None

    @property
    def accuracy(self) -> float | None:
        """The better of the two, which is what the pruner is taken at."""
        return max((x for x in (self.one_shot, self.recalibrated) if x is not None), default=None)


def compare_pruners(
    model: nn.Module,
    ratios: Sequence[float],
    *,
    calibration: Iterable[object],
    evaluate: Callable[[nn.Module], EvalResult],
    example_inputs: Any = None,
    recalibration: Iterable[object] | None = None,
    criteria: Sequence[str] = THEIR_CRITERIA,
    scopes: Sequence[str] = THEIR_SCOPES,
    seed: int = 0,
) -> Iterator[PrunerRow]:
    """Yield a row for the dense net, and for each ratio of MACs ours and each choice of Torch-Pruning.

    Ours is `prune` as it is with `calibration` images, batches of (images, labels). Each net is
    evaluated as pruned and after recalibration on the same batches (`recalibration`; None: those of
    `calibration`). Torch-Pruning (arXiv:2301.12900) gets no more than its own ratio, which is bisected
    until at least the share of MACs is gone; `taylor` needs labels. What a pruner cannot do is a
    row with its error. `example_inputs` are what the net is followed on; None: a calibration image.

    Raises PruningError where torch-pruning is not installed, and for ratios and names that are wrong.

    >>> from prune_dn.training import evaluate
    >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
    >>> data = [(torch.randn(64, 1, 8, 8), torch.arange(64) % 2)]
    >>> rows = compare_pruners(
    ...     net, [0.5], calibration=data, evaluate=lambda n: evaluate(n, data), criteria=["l1"]
    ... )
    >>> [row.method for row in rows]
    ['dense', 'ours/reconstruction/least_squares', 'torch-pruning/l1/global', 'torch-pruning/l1/local']
    """
    check_torch_pruning()
    for ratio in ratios:
        check_ratio(ratio)
    for what, given, known in (
        ("criteria", criteria, THEIR_CRITERIA),
        ("scopes", scopes, THEIR_SCOPES),
    ):
        if wrong := [name for name in given if name not in known]:
            raise PruningError(f"{what} has {wrong[0]!r}; choose from {', '.join(known)}")
    calibration = list(calibration)
    again = calibration if recalibration is None else list(recalibration)
    batches = read_batches(calibration)
    example = rows_of(batches.inputs[0], slice(0, 1)) if example_inputs is None else example_inputs

    def ours(ratio: float) -> nn.Module:
        request: dict[str, Any] = {"unit": "macs", "calibration": calibration, "seed": seed}
        return prune(model, ratio, **request, example_inputs=example_inputs)

    def theirs(ratio: float, criterion: str, scope: str) -> nn.Module:
        return torch_pruned(model, ratio, example, criterion, scope, batches)

    makers: list[tuple[str, float, Callable[[], nn.Module]]] = [
        ("dense", 0.0, functools.partial(copy.deepcopy, model))
    ]
    for ratio in ratios:
        makers.append((OURS, ratio, functools.partial(ours, ratio)))
        for criterion, scope in itertools.product(criteria, scopes):
            make = functools.partial(theirs, ratio, criterion, scope)
            makers.append((f"torch-pruning/{criterion}/{scope}", ratio, make))
    whole = macs_of(model, example)
    return (_row(*maker, evaluate, again, example, whole) for maker in makers)


def best_of(rows: Iterable[PrunerRow], prefix: str, ratio: float) -> PrunerRow | None:
    """The most accurate net of a pruner at a ratio, by its better accuracy; None where it made none."""
    found = [
        row
        for row in rows
        if row.method.startswith(prefix) and row.ratio == ratio and row.accuracy is not None
    ]
    return max(found, key=lambda row: row.accuracy or 0.0, default=None)


def _row(
    method: str,
    ratio: float,
    make: Callable[[], nn.Module],
    evaluate: Callable[[nn.Module], EvalResult],
    recalibration: list[object],
    example: Any,
    whole: float,
) -> PrunerRow:
    start = time.perf_counter()
    try:
        net = make()
    except PruneDNError as error:
        return PrunerRow(method, ratio, error=str(error))
    seconds = time.perf_counter() - start
    cut, params = 1 - macs_of(net, example) / whole, sum(p.numel() for p in net.parameters())
    first, second = evaluate(net), None
    if any(getattr(m, "running_mean", None) is not None for m in net.modules()):
        recalibrate_batch_norm_(net, recalibration)
        second = evaluate(net).accuracy
    return PrunerRow(method, ratio, cut, params, seconds, first.accuracy, second, first.n)


def torch_pruned(
    model: nn.Module,
    ratio: float,
    example_inputs: Any,
    criterion: str = "l2",
    scope: str = "global",
    batches: Batches | None = None,
    round_to: int = 1,
) -> nn.Module:
    """A copy of `model` from which Torch-Pruning's BasePruner took at least `ratio` of the MACs.

    Layers that make outputs of the net stay. Its own ratio is bisected to the largest net that is
    small enough. `taylor` reads gradients on labelled `batches`.

    Raises PruningError where Torch-Pruning cannot prune this net, with what it says, or not as far.

    >>> from torchvision.models import resnet18
    >>> small = torch_pruned(resnet18(), 0.5, torch.zeros(1, 3, 64, 64))
    >>> small.conv1.out_channels < 64
    True
    """
    check_torch_pruning()
    example = for_net(example_inputs, model)
    kept = _makers_of_outputs(model, example)
    gradients = _gradients(model, batches) if criterion == "taylor" else {}
    target = (1 - ratio) * macs_of(model, example)
    low, high, best, problem = 0.0, 1.0, None, "its largest ratio leaves more"
    for _ in range(_STEPS):
        middle = (low + high) / 2
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                net = _once(model, middle, example, criterion, scope, kept, gradients, round_to)
                left = macs_of(net, example)
        except Exception as error:  # whatever goes wrong inside it, it can prune no further
            high, problem = middle, f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if left <= target:
            high, best = middle, net
        else:
            low = middle
    if best is None:
        raise PruningError(
            f"Torch-Pruning ({criterion}, {scope}) cannot remove {ratio:.0%} of the MACs of this "
            f"{type(model).__name__}: {problem}"
        )
    return best


def macs_of(model: nn.Module, example_inputs: Any) -> float:
    """MACs of one example by torch's own counter: the same for nets of all pruners."""
    with eval_mode(model), FlopCounterMode(display=False) as counter, torch.no_grad():
        call(model, for_net(example_inputs, model))
    return counter.get_total_flops() / 2 / batch_size(example_inputs)


def check_torch_pruning() -> None:
    """Raise PruningError where it is not installed."""
    try:
        import torch_pruning  # noqa: F401
    except ImportError as error:
        raise PruningError(
            f"the comparison needs Torch-Pruning, and it cannot be imported ({error}): "
            "pip install 'prune_dn[compare]'"
        ) from error


def _once(
    model: nn.Module,
    ratio: float,
    example: Any,
    criterion: str,
    scope: str,
    kept: list[str],
    gradients: dict[str, torch.Tensor],
    round_to: int,
) -> nn.Module:
    import torch_pruning as tp

    score = {
        "bn_scale": tp.importance.BNScaleImportance,
        "fpgm": tp.importance.FPGMImportance,
        "l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
        "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "lamp": tp.importance.LAMPImportance,
        "taylor": tp.importance.GroupTaylorImportance,
    }[criterion]()
    net = copy.deepcopy(model).eval()
    for name, parameter in net.named_parameters():
        parameter.grad = gradients[name].clone() if name in gradients else None
    tp.pruner.BasePruner(
        net,
        example,
        importance=score,
        pruning_ratio=ratio,
        max_pruning_ratio=0.95,
        global_pruning=scope == "global",
        round_to=None if round_to == 1 else round_to,
        ignored_layers=[net.get_submodule(name) for name in kept],
    ).step()
    net.zero_grad()
    return net


def _makers_of_outputs(model: nn.Module, example: Any) -> list[str]:
    """The layers whose output channels the net returns."""
    graph = trace(model, example)
    makers = (producer.layer for producer in graph.producers)
    return [name for name in makers if graph.why_fixed(name) == "an output of the net"]


def _gradients(model: nn.Module, batches: Batches | None) -> dict[str, torch.Tensor]:
    """Of the summed loss on labelled images, by parameter."""
    if batches is None or batches.labels is None:
        raise PruningError("criterion 'taylor' needs labels: give batches of (images, labels)")
    net = copy.deepcopy(model).eval()
    net.zero_grad()
    device = next(net.parameters()).device
    for inputs, labels in zip(batches.inputs, batches.labels, strict=True):
        outputs, labels = call(net, for_net(inputs, net)), labels.to(device)
        first = tree_leaves(outputs)[0]
        (find_loss(batches.loss, first, labels).error(first, labels)).backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
