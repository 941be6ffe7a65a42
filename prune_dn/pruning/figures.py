"""What a net, a baseline and what a cut leaves have of each unit of cost."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from torch import nn

from prune_dn.errors import PruningError
from prune_dn.measure.profiling import Cost, count, module_rows, total
from prune_dn.models.families import NetConfig, config_of, known_family
from prune_dn.pruning.config import LATENCY, PruneConfig
from prune_dn.pruning.latency_model import LatencyModel
from prune_dn.pruning.parts import Mask
from prune_dn.pruning.rates import COUNTED, Costing
from prune_dn.pruning.subject import NetShape, Subject
from prune_dn.pruning.units import Units

Baseline = NetConfig | nn.Module


def checked_baseline(given: Subject, baseline: Baseline | None) -> Baseline | None:
    """The baseline, of a net of ours its config. Raises PruningError for one of another kind."""
    config, found, wanted = given.config, baseline, "the net"
    kind: type[Any] = nn.Module
    if not isinstance(config, NetShape):
        found, kind = config_of(baseline) or baseline, type(config)
        wanted = f"a {known_family(config).name} or its config"
    if found is None or isinstance(found, kind):
        return found
    raise PruningError(f"baseline is a {type(baseline).__name__}; give {wanted}")


class Measure:
    """What nets have of each unit of cost.

    `before` is what the net has, `rest` what of the asked unit is not among its units of pruning.
    """

    def __init__(
        self, given: Subject, table: Units, asked: PruneConfig, latency: LatencyModel | None
    ) -> None:
        self.given, self.asked, self.latency = given, asked, latency
        self.costing, everything = Costing(table), np.ones(table.size, dtype=bool)
        self.counted = {u: self.costing.total(everything, r) for u, r in COUNTED.items()}
        self.before = self._costs(self._count(None))
        if latency is not None:
            whole = self.costing.total(everything, latency.rates)
            self.before[LATENCY] = latency.constant + whole
        counted = self.counted.get(asked.unit)
        self.rest = 0.0 if counted is None else self.before[asked.unit] - counted

    def of(self, baseline: Baseline) -> dict[str, float]:
        """Costs of another net."""
        found = self._costs(self._count(baseline))
        if self.latency is not None:
            found[LATENCY] = self.latency.predict(baseline)
        return found

    def after(self, keep: Mask) -> dict[str, float]:
        """Costs of what a closed `keep` leaves."""
        saved = {u: self.counted[u] - self.costing.total(keep, r) for u, r in COUNTED.items()}
        return {unit: round(self.before[unit] - saved[unit]) for unit in COUNTED}

    def _count(self, baseline: Baseline | None) -> Cost:
        if baseline is None:
            return total(list(module_rows(self.given.model, self.given.graph.uses())))
        if isinstance(baseline, nn.Module):
            return count(baseline, example_inputs=self.given.inputs)
        return count(baseline, self.asked.input_size)

    @staticmethod
    def _costs(cost: Cost) -> dict[str, float]:
        return dict(dataclasses.asdict(cost))
