"""How long a DenseNet or Light CNN takes, as a sum over its parts, fitted on the machine at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from prune_dn.base.defaults import usual_defaults
from prune_dn.base.runtimes import Runtime
from prune_dn.errors import PruningError
from prune_dn.measure.latency import compare_latency
from prune_dn.models.families import NetConfig, built, default_image_size
from prune_dn.models.sizes import ImageSize
from prune_dn.pruning.arrange import arranged
from prune_dn.pruning.budget import Budget, choose
from prune_dn.pruning.config import TIMED
from prune_dn.pruning.kept import indices_of
from prune_dn.pruning.parts import Mask
from prune_dn.pruning.prices import Scores
from prune_dn.pruning.rates import Costing, Rates
from prune_dn.pruning.subject import NetShape, subject
from prune_dn.pruning.units import Units

TRIES = 4
TOLERANCE = 0.03
# Above these a plan is doubtful: shares of the predicted, the asked and the median time.
BAD_FIT = (
    0.15  # several times what a fit on a quiet machine leaves, and as much as units differ in price
)
OVERSHOT = 0.1
SPREAD = 0.3  # from the fastest to the slowest tenth of the runs; 0.05 to 0.15 on a quiet machine
FEATURES = (
    "mac_1x1",
    "mac_kxk",
    "normalised",
    "concatenated",
    "gathered",
    "gather",
    "layer",
)
STEPS = (1, 8, 16)  # channels in a block of the fastest convolutions: 8 with AVX2, 16 with AVX-512


@dataclass(frozen=True)
class LatencyModel:
    """Milliseconds of a batch = `constant` + the sum that `rates` stand for; JSON-able.

    `error` is the median of |predicted - measured| / measured over nets that the fit did not see;
    `spread` the share of their median time by which the slowest and the fastest tenth of runs differ.
    """

    rates: Rates
    constant: float
    error: float
    runtime: Runtime
    batch_size: int
    image_size: ImageSize
    machine: str
    spread: float = 0.0

    def predict(self, config: NetConfig) -> float:
        """Milliseconds of one batch of a net of this shape."""
        units = Units(config.graph(self.image_size))
        everything = np.ones(units.size, dtype=bool)
        return self.constant + Costing(units).total(everything, self.rates)

    def measure(self, *configs: NetConfig, repeats: int = 30) -> list[float]:
        """Milliseconds of one batch, median, of nets of these shapes, timed in turns."""
        different = list(dict.fromkeys(configs))
        times, _, _ = _measure(different, self.runtime, self.batch_size, self.image_size, repeats)
        return [times[different.index(config)] for config in configs]


@usual_defaults()
def fit_latency_model(
    model: nn.Module,
    *,
    runtime: Runtime = TIMED[0],
    batch_size: int = TIMED[1],
    image_size: ImageSize | None = None,
    nets: int = 16,
    repeats: int = 30,
    seed: int = 0,
) -> LatencyModel:
    """Time `nets` random cuts of a DenseNet or Light CNN, in turns, and fit the rates that explain the times.

    The cuts are of all kinds of units and depend on `seed`; the fit is least squares of relative
    errors with rates that are not negative. `rates.step` is that of 1, 8 and 16 with the least
    error. For onnxruntime most of the time goes into exporting the nets; threads are PyTorch's
    present number.

    >>> from prune_dn.models import densenet
    >>> net = densenet([2, 2], 8, stem="cifar", num_classes=10)
    >>> timing = fit_latency_model(net, runtime="eager", nets=8, repeats=3)
    >>> timing.predict(net.config) > 0
    True
    """
    config = subject(model, image_size).config
    if isinstance(config, NetShape):
        raise PruningError(
            f"the latency of a {type(model).__name__} has no model: it is for DenseNets and Light CNNs; "
            "measure it with compare_latency"
        )
    size = default_image_size(config) if image_size is None else image_size
    units = Units(config.graph(size))
    generator = np.random.default_rng(seed)
    keeps = [np.ones(units.size, dtype=bool)]
    keeps += [_random_cut(units, generator) for _ in range(nets - 1)]
    configs = [config.after(indices_of(arranged(units, keep), keep)) for keep in keeps]
    times, where, spread = _measure(configs, runtime, batch_size, size, repeats)
    taken = np.array(times)
    tables = {step: _table(units, keeps, step) for step in STEPS}
    errors = {step: _error(table, taken) for step, table in tables.items()}
    step = min(STEPS, key=lambda step: errors[step])
    found = _least_squares(tables[step], taken)
    rates = Rates(**dict(zip(FEATURES, found[1:].tolist(), strict=True)), step=step)
    error = errors[step]
    return LatencyModel(rates, float(found[0]), error, runtime, batch_size, size, where, spread)


def doubts(model: LatencyModel, ratio: float, times: Mapping[str, float]) -> list[str]:
    """What speaks against a plan that was asked to remove `ratio` of the time: `times` as measured."""
    found = []
    if model.spread > SPREAD:
        found.append(
            f"the machine was busy when the latency model was fitted: the slowest and the fastest "
            f"tenth of runs differ by {model.spread:.0%} of the median; fit it on a quiet machine"
        )
    if model.error > BAD_FIT:
        found.append(
            f"the latency model fits badly: it misses the times of other nets by {model.error:.0%}, so "
            "units are priced wrongly; fit it on a quiet machine, with more nets or repeats"
        )
    achieved = 1 - times["after"] / times["baseline"]
    over = (1 - achieved) / (1 - ratio)
    if not 1 - OVERSHOT <= over <= 1 + TOLERANCE:
        found.append(
            f"asked to remove {ratio:.1%} of the time, the plan removes {achieved:.1%} as measured in "
            f"{model.runtime}: {times['after']:.3g} of {times['baseline']:.3g} ms a batch of "
            f"{model.batch_size}; no plan that was tried came closer"
        )
    return found


def meet_latency(
    units: Units,
    config: NetConfig,
    scores: Scores,
    may_go: Mask,
    budget: Budget,
    model: LatencyModel,
    baseline: NetConfig,
) -> tuple[Mask, dict[str, float]]:
    """The `keep` whose measured time meets `budget.target`, and the times in ms.

    What the model predicts wrongly is measured and asked for again, up to four times; the result is
    the cut with the longest time of those that meet the request, or else the shortest. Modules wider
    than a block of the runtime's channels are cut to whole blocks, unless these cannot meet it.
    """
    share = budget.target / model.predict(baseline)
    wanted = budget.target
    budget = _in_blocks(units, scores, may_go, budget, model)
    found: list[tuple[float, Mask, dict[str, float]]] = []
    for _ in range(TRIES):
        asked = replace(budget, target=wanted - model.constant)
        try:
            keep = choose(units, scores, may_go, asked)
        except PruningError:
            if not found:
                raise
            break
        small = config.after(indices_of(arranged(units, keep), keep))
        dense, before, after = model.measure(baseline, config, small)
        over = after / (share * dense)
        found.append((over, keep, {"baseline": dense, "before": before, "after": after}))
        if 1 - TOLERANCE <= over <= 1:
            break
        wanted *= (1 - TOLERANCE / 2) / over
    _, keep, times = min(found, key=lambda attempt: (attempt[0] > 1, abs(1 - attempt[0])))
    return keep, times


def _in_blocks(
    units: Units, scores: Scores, may_go: Mask, budget: Budget, model: LatencyModel
) -> Budget:
    """`budget` with the widths that cost no more than narrower ones, if that can meet it."""
    in_blocks = replace(budget, block=model.rates.step)
    try:
        choose(units, scores, may_go, replace(in_blocks, target=budget.target - model.constant))
    except PruningError:
        return budget
    return in_blocks


def _measure(
    configs: Sequence[NetConfig],
    runtime: Runtime,
    batch_size: int,
    image_size: ImageSize,
    repeats: int,
) -> tuple[list[float], str, float]:
    """Medians of nets with random weights, which take the time of any others; machine; spread."""
    with torch.random.fork_rng(devices=[]):
        nets = {str(i): built(config).eval() for i, config in enumerate(configs)}
    found = compare_latency(
        nets, batch_size=batch_size, image_size=image_size, runtime=runtime, repeats=repeats
    )
    times = [found[str(i)].median_ms for i in range(len(configs))]
    spread = float(np.median([(x.p90_ms - x.p10_ms) / x.median_ms for x in found.values()]))
    return times, found["0"].machine, spread


def _random_cut(units: Units, generator: np.random.Generator) -> Mask:
    """A closed `keep` that leaves a random share of each kind of unit and of layers in each block."""
    keep = np.ones(units.size, dtype=bool)
    areas = {op.layer: op.pixels for op in units.graph.ops}
    areas |= {s.edges.name: s.reader.positions for s in units.selections}
    stages = {area: n for n, area in enumerate(dict.fromkeys(areas.values()))}
    shares = generator.uniform(0.15, 1.0, size=(4, len(stages)))
    shares[generator.random(4) < 0.4] = 1.0  # some cuts leave a kind as it is
    kinds = {"stream": 0, "bottleneck": 1, "edge": 2}
    stage, whole = 0, dict(enumerate(units.blocks))
    for group in units.groups:
        stage = stages[areas[group.name]] if group.name in areas else stage
        number = units.block_of[group.start]
        block = whole.pop(number, None)
        if block is not None and generator.random() > shares[3, stage]:
            for gone in block.groups:
                keep[gone.units] = False
        if group.kind in kinds and keep[group.units].all():
            keep[group.units] = generator.random(group.size) < shares[kinds[group.kind], stage]
            keep[group.start] = True
    return units.close(keep)


def _table(units: Units, keeps: list[Mask], step: int) -> npt.NDArray[np.float64]:
    """A column per rate: what the nets cost where that rate is 1 and all others are 0."""
    rates = [Rates(**{name: 1}, step=step) for name in FEATURES]
    costing = Costing(units)
    return np.array([[1.0, *(costing.total(keep, rate) for rate in rates)] for keep in keeps])


def _error(table: np.ndarray, times: np.ndarray) -> float:
    """The median relative error of predictions for nets that the fit did not see."""
    errors = []
    for fold in range(4):
        out = np.arange(len(times)) % 4 == fold
        predicted = table[out] @ _least_squares(table[~out], times[~out])
        errors += (np.abs(predicted - times[out]) / times[out]).tolist()
    return float(np.median(errors))


def _least_squares(table: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Coefficients of at least 0 with the least squared relative error."""
    from sklearn.linear_model import LinearRegression

    scale = np.maximum(table.max(axis=0), 1e-12)
    rows = table / scale / times[:, None]
    fit = LinearRegression(positive=True, fit_intercept=False).fit(rows, np.ones(len(times)))
    found: np.ndarray = fit.coef_ / scale
    return found
