"""Train, fine-tune, evaluate."""

from prune_dn.training.config import Distillation, FitConfig, Sparsity
from prune_dn.training.evaluation import EvalResult, evaluate
from prune_dn.training.fitting import FitResult, fit
from prune_dn.training.state import state_path

__all__ = [
    "Distillation",
    "EvalResult",
    "FitConfig",
    "FitResult",
    "Sparsity",
    "evaluate",
    "fit",
    "state_path",
]
