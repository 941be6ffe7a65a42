"""prune_dn: channel pruning for DenseNets and other convolutional nets.

The names below, and the modules, are loaded when they are first used, so that the command line starts
at once.
"""

import pkgutil
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prune_dn.checkpoints.checkpoint import load, read_info, read_plan, save, save_state_dict
    from prune_dn.data.datasets import load_datasets
    from prune_dn.deploy.deployed import Deployed
    from prune_dn.deploy.onnx_files import export_onnx
    from prune_dn.deploy.openvino_files import export_openvino
    from prune_dn.deploy.torch_files import export_torch
    from prune_dn.graph import trace
    from prune_dn.measure.latency import compare_latency, measure_latency
    from prune_dn.measure.profiling import count, count_per_layer
    from prune_dn.measure.quantize import quantize
    from prune_dn.models import DenseNet, DenseNetConfig
    from prune_dn.models.convert import convert
    from prune_dn.pruning import (
        Plan,
        PruneConfig,
        apply_plan,
        compensate_plan,
        fit_latency_model,
        make_plan,
        prune,
        recalibrate_batch_norm_,
        register_criterion,
        settling_plan,
    )
    from prune_dn.run.rivals import compare_pruners
    from prune_dn.run.within import prune_within
    from prune_dn.training import evaluate, fit

    __version__: str

__all__ = [
    "DenseNet",
    "DenseNetConfig",
    "Deployed",
    "Plan",
    "PruneConfig",
    "apply_plan",
    "compare_latency",
    "compare_pruners",
    "compensate_plan",
    "convert",
    "count",
    "count_per_layer",
    "evaluate",
    "export_onnx",
    "export_openvino",
    "export_torch",
    "fit",
    "fit_latency_model",
    "load",
    "load_datasets",
    "make_plan",
    "measure_latency",
    "prune",
    "prune_within",
    "quantize",
    "read_info",
    "read_plan",
    "recalibrate_batch_norm_",
    "register_criterion",
    "save",
    "save_state_dict",
    "settling_plan",
    "trace",
]

_HOMES = {
    "checkpoints.checkpoint": ("load", "read_info", "read_plan", "save", "save_state_dict"),
    "data.datasets": ("load_datasets",),
    "deploy.deployed": ("Deployed",),
    "deploy.onnx_files": ("export_onnx",),
    "deploy.openvino_files": ("export_openvino",),
    "deploy.torch_files": ("export_torch",),
    "graph": ("trace",),
    "measure.latency": ("compare_latency", "measure_latency"),
    "measure.profiling": ("count", "count_per_layer"),
    "measure.quantize": ("quantize",),
    "models": ("DenseNet", "DenseNetConfig"),
    "models.convert": ("convert",),
    "pruning": (
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
    ),
    "run.rivals": ("compare_pruners",),
    "run.within": ("prune_within",),
    "training": ("evaluate", "fit"),
}


_MODULES = {module.name for module in pkgutil.iter_modules(__path__)} - {"__main__"}


if not TYPE_CHECKING:  # type checkers know the names above, and reject all others

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            return metadata.version("prune_dn")
        if name in _MODULES:
            return import_module(f"prune_dn.{name}")
        for home, names in _HOMES.items():
            if name in names:
                return getattr(import_module(f"prune_dn.{home}"), name)
        raise AttributeError(f"module 'prune_dn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES, "__version__"})
