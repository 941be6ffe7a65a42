"""Score, plan, cut."""

from prune_dn.pruning.compensate import compensate_plan
from prune_dn.pruning.config import PruneConfig
from prune_dn.pruning.criteria import CRITERIA, register_criterion
from prune_dn.pruning.latency_model import LatencyModel, fit_latency_model
from prune_dn.pruning.plan import Plan, make_plan
from prune_dn.pruning.recalibrate import recalibrate_batch_norm_
from prune_dn.pruning.settle import settling_plan
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
