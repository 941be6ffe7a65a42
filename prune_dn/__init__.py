"""prune_dn: channel pruning for DenseNets.

The names below are loaded when they are first used, so that the command line starts at once.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prune_dn.checkpoint import load, read_info, save, save_state_dict
    from prune_dn.export import export_onnx, export_torch
    from prune_dn.latency import compare_latency, measure_latency
    from prune_dn.models.config import DenseNetConfig
    from prune_dn.models.convert import convert
    from prune_dn.models.densenet import DenseNet
    from prune_dn.profiling import count, count_per_layer
    from prune_dn.pruning.importance import register_criterion
    from prune_dn.pruning.plan import Plan, make_plan
    from prune_dn.pruning.recalibrate import recalibrate_batch_norm_
    from prune_dn.pruning.settle import settling_plan
    from prune_dn.pruning.surgery import apply_plan, prune

__all__ = [
    "DenseNet",
    "DenseNetConfig",
    "Plan",
    "apply_plan",
    "compare_latency",
    "convert",
    "count",
    "count_per_layer",
    "export_onnx",
    "export_torch",
    "fit_latency_model",
    "load",
    "make_plan",
    "measure_latency",
    "prune",
    "read_info",
    "recalibrate_batch_norm_",
    "register_criterion",
    "save",
    "save_state_dict",
    "settling_plan",
]

_HOMES = {
    "checkpoint": ("load", "read_info", "save", "save_state_dict"),
    "export": ("export_onnx", "export_torch"),
    "latency": ("compare_latency", "measure_latency"),
    "models": ("DenseNet", "DenseNetConfig"),
    "models.convert": ("convert",),
    "profiling": ("count", "count_per_layer"),
    "pruning": (
        "Plan",
        "apply_plan",
        "fit_latency_model",
        "make_plan",
        "prune",
        "recalibrate_batch_norm_",
        "register_criterion",
        "settling_plan",
    ),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("prune_dn")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"prune_dn.{home}"), name)
    raise AttributeError(f"module 'prune_dn' has no attribute {name!r}")
