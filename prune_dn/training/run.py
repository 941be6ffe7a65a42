"""One training run: its state, its steps, and how it goes on after a stop."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from prune_dn.base.processes import process_state
from prune_dn.data.datasets import Datasets, ImageSet, loading, make_loader
from prune_dn.errors import TrainingError
from prune_dn.models.answers import eval_mode
from prune_dn.models.families import config_of, shares_memory
from prune_dn.models.losses import find_loss
from prune_dn.training.config import WITHOUT_EFFECT, FitConfig
from prune_dn.training.distillation import distillation_loss
from prune_dn.training.evaluation import check_classes, evaluate
from prune_dn.training.optim import build_optimizer, learning_rate
from prune_dn.training.progress import Display
from prune_dn.training.regularizers import (
    add_l1_gradient_,
    describe_scales,
    norm_scales,
    shrink_,
    sparsity_notice,
)


class Run:
    """The state of one training run; inside `with`, the model is prepared for training."""

    def __init__(
        self,
        model: nn.Module,
        datasets: Datasets,
        config: FitConfig,
        seed: int,
        teacher: nn.Module | None,
        name: str,
    ) -> None:
        _check_model(model)
        self.model, self.datasets, self.config, self.name = model, datasets, config, name
        self.accelerator = _accelerator(config)
        self.seed = seed
        self.loader, per_step = self._loader(datasets.train, seed)
        self.steps_per_epoch = math.ceil(len(self.loader) / config.gradient_accumulation)
        self.steps = config.epochs * self.steps_per_epoch
        if config.max_steps is not None:
            self.steps = min(self.steps, config.max_steps)
        self.flags = {module: module.training for module in model.modules()}
        self.memory_efficient = getattr(model, "memory_efficient", None)
        self.optimizer: Any = build_optimizer(model, config)
        if config.sparsity is not None and not norm_scales(model):
            raise TrainingError("sparsity pulls on the scales of batch norms; none here can train")
        self.teacher = None
        if config.distillation is not None:
            if teacher is None:
                raise TrainingError("distillation needs a teacher; pass teacher=the dense net")
            self.teacher = teacher.to(self.accelerator.device)
        self.ema: AveragedModel | None = None
        self.epoch = self.step = 0
        self.history: list[dict[str, Any]] = []
        self.fingerprint = {
            **config.model_dump(mode="json", exclude=set(WITHOUT_EFFECT)),
            "seed": seed,
            "batch": per_step,
            "data": datasets.spec.to_dict(),
            "images": len(datasets.train),
            "contents": _digest(datasets.contents),
            "model": _described(model),
        }

    def __enter__(self) -> None:
        config, device = self.config, self.accelerator.device
        if shares_memory(self.model):
            efficient = config.memory_efficient
            self.model.memory_efficient = True if efficient is None else efficient  # type: ignore[assignment]
        self.model.to(device)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model.to(memory_format=layout)
        if config.ema_decay is not None and self.ema is None:
            self.ema = self._new_ema()
        if self.ema is not None:
            self.ema.to(memory_format=layout)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.scales = norm_scales(self.model)

    def __exit__(self, *error: object) -> None:
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        for key in ("forward", "_original_forward", "_is_accelerate_prepared"):
            self.model.__dict__.pop(key, None)
        if self.ema is not None and error[0] is None:
            self.model.load_state_dict(self.ema.module.state_dict())
        self.model.to(memory_format=torch.contiguous_format)
        self.model.zero_grad(set_to_none=True)
        for module, flag in self.flags.items():
            module.training = flag
        if shares_memory(self.model):
            self.model.memory_efficient = self.memory_efficient  # type: ignore[assignment]

    @loading()
    def train_epoch(self, shown: Display) -> dict[str, Any]:
        """One pass over the training images, then a look at the validation images."""
        config, accelerator = self.config, self.accelerator
        self.loader.set_epoch(self.epoch)  # Accelerate hands it on to the images
        torch.manual_seed(self._epoch_seed())
        self.wrapped.train()
        start = time.perf_counter()
        sums = torch.zeros(3, dtype=torch.float64)
        rate = 0.0
        for images, labels in self.loader:
            with accelerator.accumulate(self.wrapped):
                loss, logits = self._loss(images, labels)
                if not torch.isfinite(loss):
                    raise TrainingError(
                        f"the loss is {float(loss.detach())} in epoch {self.epoch + 1}, step {self.step + 1}: "
                        "lower learning_rate, add warmup_epochs or clip_norm, or use another precision"
                    )
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    rate = self._update()
            right = (logits.argmax(dim=1) == labels).sum()
            count = len(labels)
            sums += torch.tensor([float(loss.detach()) * count, float(right), count]).double()
            if accelerator.sync_gradients:
                speed = float(sums[2]) * accelerator.num_processes / (time.perf_counter() - start)
                shown.step(float(sums[0] / sums[2]), float(sums[1] / sums[2]), speed)
                if self.step >= self.steps:
                    break
        self.epoch += 1
        self._share_buffers()
        sums = accelerator.reduce(sums.to(accelerator.device), "sum").cpu()
        seconds = time.perf_counter() - start
        tested = self.model if self.ema is None else self.ema.module
        val = evaluate(tested, self.datasets.val, precision=config.precision)
        row: dict[str, Any] = {
            "epoch": self.epoch,
            "step": self.step,
            "loss": float(sums[0] / sums[2]),
            "accuracy": float(sums[1] / sums[2]),
            "val_loss": val.loss,
            "val_accuracy": val.accuracy,
            "learning_rate": rate,
            "images_per_second": float(sums[2]) / seconds,
            "seconds": seconds,
        }
        if config.sparsity is not None:
            row["gamma"] = describe_scales(self.model)
        return row

    def notices(self) -> list[str]:
        """What the user should know about the result."""
        if self.config.sparsity is None or not self.history:
            return []
        notice = sparsity_notice(self.history[-1]["gamma"], self.config.sparsity)
        return [] if notice is None else [notice]

    def state(self) -> dict[str, Any]:
        """Tensors and plain values that `restore` takes."""
        scaler = self.accelerator.scaler
        return {
            "fingerprint": json.dumps(self.fingerprint),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "history": json.dumps(self.history),
        }

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from `state`."""
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self.model.to(self.accelerator.device)
        self.optimizer.load_state_dict(state["optimizer"])
        if state["ema"] is not None:
            self.ema = self._new_ema()
            self.ema.load_state_dict(state["ema"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.history = json.loads(state["history"])

    def _loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        images = _at_resolution(images, config, self.step / max(self.steps, 1))
        if config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        logits = self.wrapped(images).float()
        check_classes(logits, self.datasets.train)
        find_loss("softmax", logits, labels)
        loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        if config.distillation is not None and self.teacher is not None:
            with torch.no_grad(), eval_mode(self.teacher), self.accelerator.autocast():
                answers = self.teacher(images).float()
            learned = distillation_loss(logits, answers, config.distillation.temperature)
            weight = config.distillation.weight
            loss = (1 - weight) * loss + weight * learned
        return loss, logits

    def _update(self) -> float:
        """One optimizer step; returns its learning rate."""
        config, accelerator = self.config, self.accelerator
        rate = learning_rate(config, self.step, self.steps, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if config.clip_norm is not None:
            accelerator.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        elif config.sparsity is not None:
            accelerator.unscale_gradients(self.optimizer)
        if config.sparsity is not None and config.sparsity.kind == "l1":
            add_l1_gradient_(self.scales, config.sparsity.strength)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if config.sparsity is not None and config.sparsity.kind == "proximal":
            shrink_(self.scales, rate * config.sparsity.strength)
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self.step += 1
        return rate

    def _epoch_seed(self) -> int:
        """Dropout's; each epoch and process has its own, so that a stopped run can go on exactly."""
        processes, index = self.accelerator.num_processes, self.accelerator.process_index
        return ((self.seed * 1_000_003 + self.epoch) * processes + index) % 2**63

    def _share_buffers(self) -> None:
        """Several processes end with the first one's running statistics, as DDP trains with them."""
        if self.accelerator.num_processes > 1:
            ema = [] if self.ema is None else [*self.ema.module.buffers()]
            for buffer in [*self.model.buffers(), *ema]:
                buffer.copy_(broadcast(buffer))

    def _new_ema(self) -> AveragedModel:
        decay = self.config.ema_decay
        assert decay is not None
        average = get_ema_multi_avg_fn(decay)
        return AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)

    def _loader(self, data: ImageSet, seed: int) -> tuple[Any, int]:
        processes = self.accelerator.num_processes
        size = min(self.config.batch_size, len(data) // processes)
        if size < 2:
            raise TrainingError(
                f"{len(data)} training images are too few for {processes} process(es): batch norm "
                "needs at least two a batch; give more images"
            )
        workers = self.config.num_workers
        loader = make_loader(
            data, size, shuffle=True, seed=seed, num_workers=workers, drop_last=True
        )
        return self.accelerator.prepare(loader), size * processes


def _described(model: nn.Module) -> str:
    """The config of a net of ours; of any other the class, and a digest of its tensors' shapes."""
    if (config := config_of(model)) is not None:
        return str(config.to_json())
    shapes = {name: str(tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    return f"{type(model).__name__} {_digest(shapes)}"


def _digest(contents: Mapping[str, str]) -> str:
    text = json.dumps(dict(contents), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _check_model(model: nn.Module) -> None:
    wrapper = type(model).__name__
    if wrapper in ("DistributedDataParallel", "DataParallel", "OptimizedModule"):
        inner = "model._orig_mod" if wrapper == "OptimizedModule" else "model.module"
        raise TrainingError(f"the model is wrapped in {wrapper}; pass {inner}, fit wraps it itself")


def _accelerator(config: FitConfig) -> Accelerator:
    """A new Accelerator; one process may fit several times, with different precisions."""
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise TrainingError("precision fp16 needs a GPU; use bf16, which CPUs can do too")
    process_state()
    AcceleratorState._reset_state()
    GradientState._reset_state()
    return Accelerator(
        mixed_precision=config.precision,
        gradient_accumulation_steps=config.gradient_accumulation,
        log_with="tensorboard" if config.tensorboard else None,
        project_dir="." if config.tensorboard else None,
    )


def _at_resolution(images: Tensor, config: FitConfig, progress: float) -> Tensor:
    sizes = [size for start, size in config.resolutions if start <= progress]
    if not sizes or images.shape[-1] == sizes[-1]:
        return images
    return F.interpolate(
        images, (sizes[-1], sizes[-1]), mode="bilinear", antialias=True, align_corners=False
    )
