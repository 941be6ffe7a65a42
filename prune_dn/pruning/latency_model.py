"""How long a net takes, as a sum over its parts, fitted on the machine at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from prune_dn.base.defaults import usual_defaults
from prune_dn.base.runtimes import Precision, Runtime
from prune_dn.errors import PruningError
from prune_dn.measure.latency import compare_latency
from prune_dn.models.families import NetConfig, built, config_of, known_family
from prune_dn.models.probe import make
from prune_dn.models.sizes import ImageSize
from prune_dn.pruning.arrange import arranged
from prune_dn.pruning.budget import Budget
from prune_dn.pruning.config import TIMED, Timing
from prune_dn.pruning.cuts import cut_net
from prune_dn.pruning.kept import indices_of
from prune_dn.pruning.parts import Mask
from prune_dn.pruning.rates import Costing, Rates
from prune_dn.pruning.subject import NetShape, Subject, subject
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
    `spread` the share of their median time by which the slowest and the fastest tenth of runs differ. Of a
    net without a config `inputs` describe what it was followed and timed on, and `image_size` is None.
    """

    rates: Rates
    constant: float
    error: float
    runtime: Runtime
    batch_size: int
    image_size: ImageSize | None
    machine: str
    spread: float = 0.0
    inputs: Any = None
    precision: Precision = "fp32"

    def predict(self, net: NetConfig | nn.Module) -> float:
        """Milliseconds of one batch of a net, or of one of this config."""
        config = net if not isinstance(net, nn.Module) else config_of(net)
        if config is None:
            units = Units(subject(cast(nn.Module, net), None, make(self.inputs)).graph)
        else:
            units = Units(config.graph(self.image_size))
        everything = np.ones(units.size, dtype=bool)
        return self.constant + Costing(units).total(everything, self.rates)

    def measure(self, *nets: NetConfig | nn.Module, repeats: int = 30) -> list[float]:
        """Milliseconds of one batch, median, of these nets, or nets of these configs, timed in turns."""
        different = list(dict.fromkeys(nets))
        where = self.inputs if self.image_size is None else self.image_size
        times, _, _ = _measure(different, self, where, repeats)
        return [times[different.index(net)] for net in nets]


@usual_defaults()
def fit_latency_model(
    model: nn.Module,
    *,
    runtime: Runtime = TIMED.runtime,
    batch_size: int = TIMED.batch_size,
    precision: Precision = TIMED.precision,
    image_size: ImageSize | None = None,
    example_inputs: Any = None,
    nets: int = 16,
    repeats: int = 30,
    seed: int = 0,
) -> LatencyModel:
    """Time `nets` random cuts of a net, in turns, and fit the rates that explain the times.

    A net that is not ours needs `image_size` or `example_inputs`, as `make_plan` takes them. The cuts are of all kinds of units and depend on `seed`; the fit is least squares of relative
    errors with rates that are not negative. `rates.step` is that of 1, 8 and 16 with the least
    error. In onnxruntime and OpenVINO most of the time goes into exporting (and quantising) the nets; threads are
    PyTorch's present number. Rates of `int8` are those of nets with their nodes that quantise: what these cost
    goes by the same elements as the norms before them.

    >>> from prune_dn.models import densenet
    >>> net = densenet([2, 2], 8, stem="cifar", num_classes=10)
    >>> timing = fit_latency_model(net, runtime="eager", nets=8, repeats=3)
    >>> timing.predict(net.config) > 0
    True
    """
    given = subject(model, image_size, example_inputs)
    config, units = given.config, Units(given.graph)
    inputs: Any = None
    size: ImageSize | None = None
    if isinstance(config, NetShape):
        inputs = config.inputs
    else:
        size = known_family(config).side(config, image_size)
    generator = np.random.default_rng(seed)
    keeps = [np.ones(units.size, dtype=bool)]
    keeps += [_random_cut(units, generator) for _ in range(nets - 1)]
    cut = [_left(given, units, keep) for keep in keeps]
    timing = Timing(runtime, batch_size, precision)
    times, where, spread = _measure(cut, timing, size or inputs, repeats)
    taken = np.array(times)
    tables = {step: _table(units, keeps, step) for step in STEPS}
    errors = {step: _error(table, taken) for step, table in tables.items()}
    step = min(STEPS, key=lambda step: errors[step])
    found = _least_squares(tables[step], taken)
    rates = Rates(**dict(zip(FEATURES, found[1:].tolist(), strict=True)), step=step)
    error = errors[step]
    return LatencyModel(
        rates, float(found[0]), error, runtime, batch_size, size, where, spread, inputs, precision
    )


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
    given: Subject,
    units: Units,
    chosen: Callable[[Budget], Mask],
    budget: Budget,
    model: LatencyModel,
    baseline: NetConfig | nn.Module,
) -> tuple[Mask, dict[str, float]]:
    """The `keep` whose measured time meets `budget.target`, and the times in ms.

    `chosen` gives the units that stay for a budget. What the model predicts wrongly is measured and asked for again, up to four times; the result is
    the cut with the longest time of those that meet the request, or else the shortest. Modules wider
    than a block of the runtime's channels are cut to whole blocks, unless these cannot meet it.
    """
    share = budget.target / model.predict(baseline)
    wanted = budget.target
    budget = _in_blocks(chosen, budget, model)
    now = given.model if isinstance(given.config, NetShape) else given.config
    found: list[tuple[float, Mask, dict[str, float]]] = []
    for _ in range(TRIES):
        asked = replace(budget, target=wanted - model.constant)
        try:
            keep = chosen(asked)
        except PruningError:
            if not found:
                raise
            break
        small = _left(given, units, keep)
        dense, before, after = model.measure(baseline, now, small)
        over = after / (share * dense)
        found.append((over, keep, {"baseline": dense, "before": before, "after": after}))
        if 1 - TOLERANCE <= over <= 1:
            break
        wanted *= (1 - TOLERANCE / 2) / over
    _, keep, times = min(found, key=lambda attempt: (attempt[0] > 1, abs(1 - attempt[0])))
    return keep, times


def _left(given: Subject, units: Units, keep: Mask) -> NetConfig | nn.Module:
    """What a closed `keep` leaves: a config, of a net without one the net itself."""
    units = arranged(units, keep)
    if isinstance(given.config, NetShape):
        return cut_net(given, units, keep)
    return given.config.after(indices_of(units, keep))


def _in_blocks(chosen: Callable[[Budget], Mask], budget: Budget, model: LatencyModel) -> Budget:
    """`budget` with the widths that cost no more than narrower ones, if that can meet it."""
    in_blocks = replace(budget, block=model.rates.step)
    try:
        chosen(replace(in_blocks, target=budget.target - model.constant))
    except PruningError:
        return budget
    return in_blocks


def _measure(
    nets: Sequence[NetConfig | nn.Module],
    timing: Timing | LatencyModel,
    where: Any,
    repeats: int,
) -> tuple[list[float], str, float]:
    """Medians of nets, or nets of configs with random weights, which take the time of any others; machine; spread.

    `where` is a size of images, or what describes other inputs.
    """
    with torch.random.fork_rng(devices=[]):
        timed = {
            str(i): net if isinstance(net, nn.Module) else built(net).eval()
            for i, net in enumerate(nets)
        }
    is_size = isinstance(where, int | tuple)
    found = compare_latency(
        timed,
        batch_size=timing.batch_size,
        image_size=where if is_size else None,
        example_inputs=None if is_size else make(where),
        runtime=timing.runtime,
        precision=timing.precision,
        repeats=repeats,
    )
    times = [found[str(i)].median_ms for i in range(len(nets))]
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
            drawn = generator.random(group.size // group.blocks)
            mine = drawn < shares[kinds[group.kind], stage]
            mine[0] = True
            keep[group.units] = np.tile(mine, group.blocks)
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
