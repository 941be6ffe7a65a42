"""Learning from a teacher (Hinton et al., arXiv:1503.02531)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from prune_dn.errors import TrainingError


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) at temperature T, mean over the batch.

    Both logits are (N, classes); the result is a scalar. Raises TrainingError for logits of two
    shapes, and for one class, of which a softmax is always 1.
    """
    if logits.shape != teacher_logits.shape:
        raise TrainingError(
            f"the teacher answers {teacher_logits.shape[-1]} classes, the model {logits.shape[-1]}; "
            "distil from a net for the same classes"
        )
    if logits.ndim < 2 or logits.shape[1] < 2:
        raise TrainingError("there is nothing to distil from one output: its softmax is always 1")
    student = F.log_softmax(logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    loss = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return loss * temperature**2
