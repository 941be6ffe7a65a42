"""Score, plan, cut.

The names below are loaded when they are first used, so that `config` loads no torch.
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from prune_dn.pruning.compensate import compensate_plan
    from prune_dn.pruning.config import PruneConfig
    from prune_dn.pruning.criteria import CRITERIA, register_criterion
    from prune_dn.pruning.latency_model import LatencyModel, fit_latency_model
    from prune_dn.pruning.plan import Plan
    from prune_dn.pruning.planning import make_plan, settling_plan
    from prune_dn.pruning.recalibrate import recalibrate_batch_norm_
    from prune_dn.pruning.surgery import apply_plan, prune

__all__ = [
    "CRITERIA",
    "LatencyModel",
    "Plan",
    "PruneConfig",
    "apply_plan",
    "compensate_plan",
    "fit_latency_model",
    "make_plan",
    "prune",
    "recalibrate_batch_norm_",
    "register_criterion",
    "settling_plan",
]

_HOMES = {
    "compensate": ("compensate_plan",),
    "config": ("PruneConfig",),
    "criteria": ("CRITERIA", "register_criterion"),
    "latency_model": ("LatencyModel", "fit_latency_model"),
    "plan": ("Plan",),
    "planning": ("make_plan", "settling_plan"),
    "recalibrate": ("recalibrate_batch_norm_",),
    "surgery": ("apply_plan", "prune"),
}


def __getattr__(name: str) -> typing.Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
