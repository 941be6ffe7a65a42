"""The training loop: it learns, goes on exactly where it was stopped, and refuses what cannot work."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import in_two_processes
from own_nets import residual
from PIL import Image
from torch import Tensor, nn

import prune_dn
from prune_dn.data.datasets import Datasets, load_datasets, make_loader
from prune_dn.errors import DataError, TrainingError
from prune_dn.models import DenseNet, densenet
from prune_dn.training import Distillation, FitConfig, FitResult, evaluate, fit, fitting, state_path
from prune_dn.training.distillation import distillation_loss


def net(seed: int = 1, **how: Any) -> DenseNet:
    torch.manual_seed(seed)
    given = {"stem": "cifar", "bn_size": None, "in_channels": 1, "num_classes": 10, **how}
    return densenet([2, 2], 4, **given)


@pytest.fixture(scope="module")
def data() -> Datasets:
    return load_datasets("digits", image_size=8, limit=60)


def go(model: nn.Module, data: Datasets, *, seed: int = 0, **how: Any) -> FitResult:
    """`fit` with what it takes; other keys are settings."""
    own = {k: how.pop(k) for k in ("output_dir", "teacher", "resume", "name") if k in how}
    config = FitConfig(**{"epochs": 1, "batch_size": 16, "learning_rate": 0.05, **how})
    return fit(model, data, config, seed=seed, progress=False, **own)


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# It learns.


def test_it_learns_digits() -> None:
    data = load_datasets("digits", image_size=8, limit=600)
    model = net()
    result = go(model, data, epochs=6, batch_size=32, learning_rate=0.2)
    losses = [row["loss"] for row in result.history]
    assert losses[-1] < losses[0] * 0.6 and result.history[-1]["accuracy"] > 0.6
    assert result.val_accuracy == result.history[-1]["val_accuracy"]
    assert result.val_accuracy == evaluate(model, data.val).accuracy
    assert evaluate(model, data.test).accuracy > 0.6, "chance is 0.1"
    assert [(r["epoch"], r["step"]) for r in result.history] == [(i, 16 * i) for i in range(1, 7)]
    assert result.seconds > 0 and result.notices == []


def test_same_seed_same_net_and_other_seed_another(data: Datasets) -> None:
    nets = [net() for _ in range(3)]
    torch.manual_seed(77)
    for model, seed in zip(nets, (0, 0, 1), strict=True):
        go(model, data, seed=seed)
    assert same(nets[0], nets[1]) and not same(nets[0], nets[2])


def test_one_step_against_plain_pytorch(data: Datasets) -> None:
    """Label smoothing, clipping, weight decay, one batch of all images: by hand."""
    plain = load_datasets("digits", image_size=8, limit=60, augment=False)
    model, twin = net(), net()
    how: dict[str, Any] = {"label_smoothing": 0.2, "clip_norm": 0.1, "weight_decay": 0.01}
    result = go(model, plain, batch_size=50, momentum=0, nesterov=False, channels_last=False, **how)
    images, labels = plain.train.__getitems__(range(50))
    logits = twin.train()(images)
    loss = F.cross_entropy(logits, labels, label_smoothing=0.2)
    loss.backward()
    assert nn.utils.clip_grad_norm_(twin.parameters(), 0.1) > 0.1
    for ours, before in zip(model.parameters(), twin.parameters(), strict=True):
        decay = 0.01 if before.ndim > 1 else 0.0
        assert before.grad is not None
        want = before.detach() - 0.05 * (before.grad + decay * before.detach())
        assert torch.allclose(ours, want, atol=1e-6)
    assert result.history[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert result.history[0]["learning_rate"] == 0.05
    right = int((logits.argmax(1) == labels).sum())
    assert result.history[0]["accuracy"] == pytest.approx(right / 50)


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_distillation_step(weight: float) -> None:
    """(1 - weight) * CE + weight * T^2 * KL against the teacher in eval mode."""
    plain = load_datasets("digits", image_size=8, limit=60, augment=False)
    model, teacher = net(), net(seed=9, drop_rate=0.5)
    kept = copy.deepcopy(teacher)
    distil = Distillation(temperature=3.0, weight=weight)
    result = go(model, plain, batch_size=50, teacher=teacher, distillation=distil)
    images, labels = plain.train.__getitems__(range(50))
    with torch.no_grad():
        logits, answers = net().train()(images), kept.eval()(images)
        loss = (1 - weight) * F.cross_entropy(logits, labels)
        loss += weight * distillation_loss(logits, answers, 3.0)
    assert result.history[0]["loss"] == pytest.approx(float(loss), abs=1e-5)
    assert same(teacher, kept) and teacher.training
    assert all(p.grad is None for p in teacher.parameters())


def test_ema_is_the_moving_average(data: Datasets, tmp_path: Path) -> None:
    """Of the weights after each step, as an independent loop over the same run computes it."""
    averages: dict[str, Tensor] = {}
    model, raw = net(), net()
    step = torch.optim.SGD.step

    def spy(self: Any, *args: Any, **kwargs: Any) -> None:
        step(self, *args, **kwargs)
        for name, value in raw.named_parameters():
            old = averages.get(name, value.detach())
            averages[name] = (0.8 * old + 0.2 * value.detach()).clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", spy)
        go(raw, data, epochs=2)
    result = go(model, data, epochs=2, ema_decay=0.8, output_dir=tmp_path)
    for name, value in model.named_parameters():
        assert torch.allclose(value, averages[name], atol=1e-6), name
    assert not same(model, raw)
    assert result.val_accuracy == evaluate(model, data.val).accuracy
    again = net(seed=3)
    go(again, data, epochs=2, ema_decay=0.8, output_dir=tmp_path)
    assert same(again, model), "a finished run gives its average again"


def test_steps_and_rates(data: Datasets) -> None:
    """50 images in batches of 8 are 6 a pass; two are one step; the last, partial batch is left."""
    sizes: list[int] = []
    model = net()
    model.register_forward_pre_hook(
        lambda m, args: sizes.append(len(args[0])) if m.training else None
    )
    result = go(model, data, epochs=3, batch_size=8, gradient_accumulation=2, max_steps=7)
    assert sizes == [8] * 14
    assert [row["step"] for row in result.history] == [3, 6, 7]
    want = [0.05 * (1 + math.cos(math.pi * s / 7)) / 2 for s in (2, 5, 6)]
    assert [row["learning_rate"] for row in result.history] == pytest.approx(want)


@pytest.mark.parametrize(("batch", "sizes"), [(49, [49]), (7, [7] * 7), (64, [50])])
def test_no_batch_of_one(data: Datasets, batch: int, sizes: list[int]) -> None:
    seen: list[int] = []
    model = net()
    model.register_forward_pre_hook(
        lambda m, args: seen.append(len(args[0])) if m.training else None
    )
    go(model, data, batch_size=batch)
    assert seen == sizes


def test_resolutions_grow(data: Datasets) -> None:
    seen: list[tuple[bool, int]] = []
    model = net()
    model.register_forward_pre_hook(lambda m, args: seen.append((m.training, args[0].shape[-1])))
    go(model, data, epochs=2, batch_size=25, resolutions=((0.0, 4), (0.5, 6), (0.75, 8)))
    assert [s for training, s in seen if training] == [4, 4, 6, 8]
    assert {s for training, s in seen if not training} == {8}


def test_surgery_then_fit_trains_every_new_parameter(data: Datasets) -> None:
    model = net()
    go(model, data)
    small = prune_dn.prune(model, 0.4, input_size=8)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    before = {name: value.detach().clone() for name, value in small.named_parameters()}
    dense = copy.deepcopy(model)
    go(small, data, epochs=2, ema_decay=0.5)
    for name, value in small.named_parameters():
        assert not torch.equal(value, before[name]), name
    assert same(model, dense)


def test_frozen_parameters_stay(data: Datasets) -> None:
    model = net()
    model.features.requires_grad_(False)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    go(model, data, weight_decay=0.1)
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) == (not name.startswith("classifier")), name


# It leaves the model as it found it, but for the weights.


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_on_the_model(data: Datasets, precision: str, fails: bool) -> None:
    model = net()
    model.features.denseblock2.eval()
    flags = {name: m.training for name, m in model.named_modules()}
    keys = set(model.__dict__)
    how: dict[str, Any] = {"precision": precision, "memory_efficient": True, "ema_decay": 0.9}
    if fails:
        model.features.conv0.weight.data.fill_(float("nan"))
        with pytest.raises(TrainingError, match="the loss is nan in epoch 1, step 1: lower"):
            go(model, data, **how)
    else:
        go(model, data, **how)
    assert set(model.__dict__) == keys and "forward" not in model.__dict__
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert {name: m.training for name, m in model.named_modules()} == flags
    assert model.memory_efficient is False
    for p in model.parameters():
        assert p.is_contiguous() and p.grad is None and p.dtype == torch.float32
        stride = torch.empty(p.shape).stride()
        assert p.ndim < 4 or p.stride() == stride, "contiguous also where a side is 1"
    copy.deepcopy(model)


def test_precisions_one_after_another(data: Datasets) -> None:
    """bf16 first must not leak into a later run with full precision, nor the reverse."""
    dtypes: list[torch.dtype] = []
    trained = []
    for precision in ("no", "bf16", "no", "bf16"):
        model = net()
        handle = model.classifier.register_forward_hook(lambda m, a, out: dtypes.append(out.dtype))
        go(model, data, precision=precision, batch_size=50)
        handle.remove()
        trained.append(model)
    full, low = [torch.float32] * 2, [torch.bfloat16] * 2
    assert dtypes == full + low + full + low
    assert same(trained[0], trained[2]) and same(trained[1], trained[3])
    assert not same(trained[0], trained[1])


def test_memory_efficient_trains_the_same(data: Datasets) -> None:
    plain, checkpointed = net(bn_size=2), net(bn_size=2)
    go(plain, data, memory_efficient=False)
    go(checkpointed, data, memory_efficient=True)
    a, b = plain.state_dict(), checkpointed.state_dict()
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)


# It goes on where it was stopped.


class Stopped(Exception):
    pass


def stop_after(epoch: int, patch: pytest.MonkeyPatch) -> None:
    train = fitting.Run.train_epoch

    def spy(self: Any, shown: Any) -> Any:
        if self.epoch == epoch:
            raise Stopped
        return train(self, shown)

    patch.setattr(fitting.Run, "train_epoch", spy)


FULL: dict[str, Any] = {
    "epochs": 3,
    "ema_decay": 0.7,
    "warmup_epochs": 1.0,
    "gradient_accumulation": 2,
    "batch_size": 8,
    "clip_norm": 5.0,
    "sparsity": {"kind": "l1", "strength": 1e-3},
}


@pytest.mark.parametrize(
    "how", [FULL, {"epochs": 3, "optimizer": "adamw", "precision": "bf16"}], ids=["sgd", "adamw"]
)
def test_resumed_equals_uninterrupted(
    data: Datasets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    """Bit for bit: dropout, augmentation, order, momentum, EMA and schedule go on."""
    how = FitConfig.model_validate_json(json.dumps(how)).model_dump()
    whole, stopped, resumed = (net(drop_rate=0.3) for _ in range(3))
    want = go(whole, data, output_dir=tmp_path / "whole", **how)
    for epoch in (1, 2):
        with monkeypatch.context() as patch:
            stop_after(epoch, patch)
            with pytest.raises(Stopped):
                go(stopped, data, output_dir=tmp_path / "parts", **how)
        torch.manual_seed(epoch)
        stopped = net(seed=epoch + 5, drop_rate=0.3)  # a new process knows nothing
    found = go(resumed, data, output_dir=tmp_path / "parts", **how)
    assert same(whole, resumed)
    untimed = [
        [
            {k: v for k, v in row.items() if "second" not in k and k != "resumed"}
            for row in result.history
        ]
        for result in (want, found)
    ]
    assert untimed[0] == untimed[1] and len(untimed[0]) == 3
    marks = [["resumed" in row for row in result.history] for result in (want, found)]
    assert marks == [[False] * 3, [False, True, True]]
    log = (tmp_path / "parts" / "train.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in log] == [1, 2, 3]


SCRIPT = """
import gc, os, sys, warnings
from pathlib import Path
warnings.simplefilter("error")
import torch
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
from prune_dn.data.datasets import load_datasets
from prune_dn.models import densenet
from prune_dn.training import FitConfig, evaluate, fit
{before}
torch.manual_seed(1)
model = densenet([2, 2], 4, stem="cifar", bn_size=None, in_channels=1, num_classes=10, drop_rate=0.3)
data = load_datasets("digits", image_size=8, limit=60)
config = FitConfig(epochs=2, batch_size=8, learning_rate=0.05)
result = fit(model, data, config, output_dir=sys.argv[1], progress=False)
{after}
"""
KILL = """
from prune_dn.training import fitting
update = fitting.Run._update
def killed(self):
    if self.step == 9:  # in the second of two epochs of six steps
        os.kill(os.getpid(), 9)
    return update(self)
fitting.Run._update = killed
"""


KILL_BEFORE_LOG = """
replace, written = os.replace, []
def killed(source, target):
    written.append(Path(target).name)
    if written.count("train.jsonl") == 1:  # the state of the first epoch is there
        os.kill(os.getpid(), 9)
    replace(source, target)
os.replace = killed
"""


@pytest.mark.parametrize("kill", [KILL, KILL_BEFORE_LOG], ids=["in an epoch", "before the log"])
def test_killed_then_resumed(data: Datasets, tmp_path: Path, kill: str) -> None:
    script = SCRIPT.format(before=kill, after="")
    died = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "killed")], capture_output=True, text=True
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    left = {p.name for p in (tmp_path / "killed").glob("[!.]*")}
    assert left == {"train.state.pt", *(["train.jsonl"] if kill == KILL else [])}
    whole, resumed = net(drop_rate=0.3), net(seed=8, drop_rate=0.3)
    go(whole, data, epochs=2, batch_size=8)
    go(resumed, data, epochs=2, batch_size=8, output_dir=tmp_path / "killed")
    assert same(whole, resumed)
    log = (tmp_path / "killed" / "train.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in log] == [1, 2]


@pytest.mark.parametrize("when", ["between", "torn"])
def test_the_log_follows_the_state(
    data: Datasets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """A kill after the last state and before its row of the log, or a row that is cut short."""
    whole = go(net(), data, epochs=2, output_dir=tmp_path / "whole")
    log = tmp_path / "train.jsonl"
    replace, written = os.replace, []

    def killed(source: str, target: Path) -> None:
        written.append(Path(target).name)
        if when == "between" and written.count("train.jsonl") == 2:
            raise Stopped
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        if when == "between":
            with pytest.raises(Stopped):
                go(net(), data, epochs=2, output_dir=tmp_path)
            assert written == ["train.state.pt", "train.jsonl"] * 2
            assert len(log.read_text().splitlines()) == 1
        else:
            go(net(), data, epochs=2, output_dir=tmp_path)
            log.write_text(log.read_text()[:-30])
    found = go(net(), data, epochs=2, output_dir=tmp_path)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert rows == found.history
    assert [row["val_loss"] for row in rows] == [row["val_loss"] for row in whole.history]


KILL_LOADER = """
import multiprocessing, time
step = fitting.Run._update
def kill_one(self):
    os.kill(multiprocessing.active_children()[0].pid, 9)
    time.sleep(60)  # the signal that tells of it comes now
    return step(self)
fitting.Run._update = kill_one
"""


def test_a_killed_loader_worker(tmp_path: Path) -> None:
    before = KILL.replace("self.step == 9", "False") + KILL_LOADER
    script = SCRIPT.format(before=before, after="").replace(
        "batch_size=8", "batch_size=8, num_workers=2"
    )
    died = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True
    )
    assert died.returncode == 1
    says = r"^prune_dn\.errors\.DataError: a process that loads images ended \(DataLoader worker.*"
    assert re.search(says + "set num_workers lower", died.stderr, re.MULTILINE), died.stderr


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError(), RuntimeError()])
def test_a_worker_that_is_lost_while_it_sends(data: Datasets, error: Exception) -> None:
    """torch sees the broken connection before it hears of the death."""

    def _try_get_data() -> None:
        raise error

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        yield next(iter(make_loader(data.test, 8)))
        _try_get_data()

    if isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError):
            evaluate(net(), loader())  # type: ignore[arg-type]
    else:
        with pytest.raises(DataError, match="a process that loads images ended"):
            evaluate(net(), loader())  # type: ignore[arg-type]

    def own() -> Iterator[tuple[Tensor, Tensor]]:
        raise type(error)
        yield

    with pytest.raises(type(error)):
        evaluate(net(), own())  # type: ignore[arg-type]


def test_what_a_loader_worker_cannot_read(tmp_path: Path) -> None:
    """The same words as without workers, no traceback of another process."""
    for split, count in (("train", 4), ("test", 1)):
        for name in ("a", "b"):
            for i in range(count):
                file = tmp_path / split / name / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((8, 8), 16 * i + len(split), np.uint8)).save(file)
    numbers: dict[str, Any] = {"memory_budget_mb": 0, "mean": (0.5,), "std": (0.5,)}
    found = load_datasets("image_folder", root=tmp_path, **numbers)
    for file in (tmp_path / "train").rglob("*.png"):
        file.write_bytes(file.read_bytes()[:50])
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"^cannot decode the image .*\d\.png .*remove it$"):
            go(net(num_classes=2), found, batch_size=2, num_workers=workers)


def test_resume_false_begins_again(data: Datasets, tmp_path: Path) -> None:
    first, second, third = net(), net(), net()
    go(first, data, output_dir=tmp_path)
    go(second, data, output_dir=tmp_path, resume=False, learning_rate=0.01)
    assert not same(first, second)
    go(third, data, output_dir=tmp_path, name="other")
    assert same(first, third) and state_path(tmp_path, "other").is_file()


def test_state_of_another_run_is_refused(data: Datasets, tmp_path: Path) -> None:
    go(net(), data, output_dir=tmp_path)
    model = net(seed=2)
    before = copy.deepcopy(model)
    for how, text in (
        ({"learning_rate": 0.06}, "learning_rate: 0.05 -> 0.06"),
        ({"epochs": 2}, "epochs: 1 -> 2"),
        ({"seed": 4}, "seed: 0 -> 4"),
        ({"sparsity": {"strength": 0.1}}, "sparsity: None -> "),
    ):
        with pytest.raises(TrainingError, match=f"other settings .*{text}.*delete the file"):
            go(model, data, output_dir=tmp_path, **how)
    with pytest.raises(TrainingError, match=r"other settings .*model: "):
        go(net(bn_size=2), data, output_dir=tmp_path)
    go(residual(8), data, output_dir=tmp_path, name="own")
    with pytest.raises(
        TrainingError, match=r"other settings .*model: 'Residual \w+' -> 'Residual \w+'"
    ):
        go(residual(6), data, output_dir=tmp_path, name="own")
    other = load_datasets("digits", image_size=8, limit=80)
    with pytest.raises(TrainingError, match=r"other settings .*images: 50 -> "):
        go(model, other, output_dir=tmp_path)
    assert same(model, before)
    go(model, data, output_dir=tmp_path, num_workers=1)  # makes no difference to the result


def test_truncated_state_is_refused(data: Datasets, tmp_path: Path) -> None:
    go(net(), data, output_dir=tmp_path)
    path = state_path(tmp_path, "train")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TrainingError, match=r"cannot read the training state .*train\.state\.pt"):
        go(net(), data, output_dir=tmp_path)


# It refuses what cannot work.


@pytest.mark.parametrize(
    ("wrap", "text"),
    [
        (nn.DataParallel, r"wrapped in DataParallel; pass model\.module"),
        (torch.compile, r"wrapped in OptimizedModule; pass model\._orig_mod"),
    ],
)
def test_wrapped_models(data: Datasets, wrap: Callable[..., nn.Module], text: str) -> None:
    with pytest.raises(TrainingError, match=text):
        go(wrap(net()), data)


def test_ddp_wrapped_model(data: Datasets) -> None:
    """Without processes: only the type is looked at."""
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    with pytest.raises(TrainingError, match=r"wrapped in DistributedDataParallel; pass model\.mod"):
        go(wrapped, data)


def test_what_cannot_work(data: Datasets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = net().requires_grad_(False)
    with pytest.raises(TrainingError, match="every parameter is frozen: this step would train"):
        go(frozen, data)
    for classes in (7, 100):
        with pytest.raises(DataError, match=f"answers {classes} classes, the data has 10"):
            go(net(num_classes=classes), data)
    distil = Distillation()
    with pytest.raises(TrainingError, match="distillation needs a teacher; pass teacher="):
        go(net(), data, distillation=distil)
    with pytest.raises(TrainingError, match="teacher answers 7 classes, the model 10; distil from"):
        go(net(), data, distillation=distil, teacher=net(num_classes=7))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrainingError, match="fp16 needs a GPU; use bf16"):
        go(net(), data, precision="fp16")
    with pytest.raises(TrainingError, match="tensorboard: true needs an output_dir"):
        go(net(), data, tensorboard=True)
    monkeypatch.setattr(fitting.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrainingError, match=r"pip install prune_dn\[tensorboard\]"):
        go(net(), data, tensorboard=True, output_dir=tmp_path)


def test_exploding_run_says_so(data: Datasets) -> None:
    model = net()
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) in epoch \d+, step \d+: lower"):
        go(model, data, epochs=20, learning_rate=1e30, schedule="constant")


# What it shows and writes.


def test_log_and_lines(data: Datasets, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = FitConfig(epochs=2, batch_size=16, learning_rate=0.05)
    result = fit(net(), data, config, output_dir=tmp_path, name="tune")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[1].startswith("tune 2/2  loss ")
    assert f"val {result.val_accuracy:.1%}" in lines[1] and "images/s" in lines[1]
    rows = [json.loads(line) for line in (tmp_path / "tune.jsonl").read_text().splitlines()]
    assert rows == result.history
    go(net(), data)
    assert capsys.readouterr().err == ""


def test_tensorboard(data: Datasets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    result = go(net(), data, epochs=2, tensorboard=True, output_dir="out", name="tune")
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "nothing beside output_dir"
    events = EventAccumulator(str(tmp_path / "out" / "tune"))
    events.Reload()
    found = events.Scalars("val_loss")
    assert [e.step for e in found] == [1, 2]
    assert [e.value for e in found] == pytest.approx([r["val_loss"] for r in result.history])


# Several processes.

SAVE = """
from accelerate import PartialState
rank = PartialState().process_index
found = evaluate(model, data.test, batch_size=50)
again = fit(model, data, config, output_dir=sys.argv[1], progress=False)
assert len(again.history) == 2 and evaluate(model, data.test, batch_size=50) == found
torch.save({"model": model.state_dict(), "found": (found.accuracy, found.loss, found.n),
            "history": result.history[-1]["val_loss"]}, f"{sys.argv[1]}/rank{rank}.pt")
torch.distributed.destroy_process_group()
gc.collect()
threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
assert not any("gloo" in name for name in threads), threads  # one that ends late aborts the process
"""


def test_two_processes(data: Datasets, tmp_path: Path) -> None:
    """Both end with the same net, buffers too, and evaluate as one process does; TensorBoard's files
    do not end the group of processes, nor does going on when nothing is left to train."""
    script = tmp_path / "train.py"
    script.write_text(
        SCRIPT.format(before="", after=SAVE)
        .replace('simplefilter("error")', "resetwarnings()")
        .replace("learning_rate=0.05", "learning_rate=0.05, tensorboard=True")
    )
    in_two_processes(script, str(tmp_path))
    ranks = [torch.load(tmp_path / f"rank{i}.pt", weights_only=True) for i in range(2)]
    for key, value in ranks[0]["model"].items():
        assert torch.equal(value, ranks[1]["model"][key]), key
    assert ranks[0]["found"] == ranks[1]["found"] and ranks[0]["history"] == ranks[1]["history"]
    alone = net(drop_rate=0.3)
    assert not same(alone, alone.__class__(alone.config))
    start = copy.deepcopy(alone.state_dict())
    alone.load_state_dict(ranks[0]["model"])
    assert any(not torch.equal(start[k], v) for k, v in alone.state_dict().items())
    found = evaluate(alone, data.test, batch_size=50)
    assert (found.accuracy, found.n) == (ranks[0]["found"][0], 360)
    assert found.loss == pytest.approx(ranks[0]["found"][1], abs=1e-6)
    assert evaluate(alone, data.val).loss == pytest.approx(ranks[0]["history"], abs=1e-6)
    rows = (tmp_path / "train.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [3, 6], "50 images, 2 x 8 a step"
