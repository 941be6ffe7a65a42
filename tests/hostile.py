"""A process that reads files which may be hostile, each in a child of its own with little time and memory.

`python tests/hostile.py FOLDER` answers one line of JSON on stdout for each line `[reader, path]` on stdin: how
reading ended, and what was said. `Sandbox` asks it. FOLDER holds the good files of `make_files`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

SECONDS, BYTES = 2, 2 << 30
RECIPE = """\
model: {name: densenet, block_config: [2, 2], growth_rate: 4, bn_size: 2, stem: cifar}
data: {name: digits, image_size: 8, limit: 64}
train: {epochs: 1, batch_size: 16, learning_rate: 5e-2}
prune:
  pruning_ratio: 0.4
  units: [stream, bottleneck]
  protect: ['features.conv0']
"""

_STAGE = {"test_accuracy": 0.5, "test_loss": 1.5, "n_test": 360, "val_accuracy": 0.5, "n_val": 64}
_STAGE |= {"params": 1000, "macs": 50_000, "file_bytes": 8_000}
_ROW = {"median_ms": 1.5, "p10_ms": 1.0, "p90_ms": 2.0, "n": 30, "batch_size": 1}
_EPOCH = {"epoch": 1, "loss": 2.0, "accuracy": 0.3, "val_loss": 2.0, "val_accuracy": 0.3}
METRICS = {  # what a run with one cut leaves
    "format": "prune_dn.metrics/1",
    "phases": {"train": {"seconds": 1.5}, "prune-1": {"seconds": 0.5}, "report": {"seconds": 2.0}},
    "stages": {"dense": _STAGE, "pruned": {**_STAGE, "params": 500}},
    "history": {"train": [{**_EPOCH, "learning_rate": 0.1}]},
    "latency": {n: [{**_ROW, "runtime": "eager", "machine": "a CPU"}] for n in ("dense", "pruned")},
    "rounds": [{"unit": "macs", "requested": 0.5, "achieved": 0.52}],
    "notices": [{"name": "train", "text": "it stopped early"}],
}


class Sandbox:
    """The process, and the folder with the good files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.good: dict[str, str] = {}  # what the good files hold, by their names
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def read(self, reader: str, data: bytes, ending: str = "") -> tuple[str, str]:
        """How it ended ("refused", "died", a digest of what was read), and what was said."""
        assert self.process.stdin is not None and self.process.stdout is not None
        path = self.folder / f"given{ending}"
        path.write_bytes(data)
        self.process.stdin.write(json.dumps([reader, str(path)]) + "\n")
        self.process.stdin.flush()
        outcome, said = json.loads(self.process.stdout.readline())
        return outcome, said

    def close(self) -> None:
        self.process.communicate()


def net() -> nn.Module:
    from oracle import randomise_

    from prune_dn.models import densenet

    return randomise_(densenet([2, 1], 4, stem="cifar", num_classes=3, bn_size=2), 0).eval()


def other_net() -> nn.Module:
    import timm
    from oracle import randomise_

    return randomise_(timm.create_model("test_resnet", num_classes=3), 0).eval()


def make_files(folder: Path) -> None:
    """Good files of every kind that is read."""
    import dataclasses

    from prune_dn.checkpoints.checkpoint import save, save_state_dict
    from prune_dn.measure.profiling import count
    from prune_dn.models import DenseNet, light_cnn_9
    from prune_dn.pruning import make_plan, prune
    from prune_dn.pruning.ratios import FORMAT
    from prune_dn.pruning.sensitivity import sensitivity

    model = net()
    assert isinstance(model, DenseNet)
    info = {
        "data": {"name": "digits", "image_size": 8, "mean": [0.5], "std": [0.2]},
        "augment": "shift",
    }
    save(model, folder / "net.safetensors", info=info)
    light = light_cnn_9(3, image_size=16, widths=(4, 4, 6, 6, 6), embedding=8)
    save(light, folder / "light.safetensors")
    other = prune(other_net(), 0.9, unit="params", criterion="l2", input_size=64)
    save(other, folder / "other.safetensors")
    save_state_dict(model, folder / "net.pt")
    script = {"model": model.state_dict(), "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save(script, folder / "script.pt")
    torch.save(model.state_dict(), folder / "legacy.pt", _use_new_zipfile_serialization=False)
    make_plan(model, 0.3, criterion="l2", input_size=8).save(folder / "plan.json")
    rows = sensitivity(model, lambda net: 0.5, ratios=[0.5], criterion="l2", input_size=8)
    facts = {
        "format": FORMAT,
        "params": count(model).params,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    (folder / "sensitivity.json").write_text(json.dumps(facts))
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "metrics.json").write_text(json.dumps(METRICS))


# -- in the process ------------------------------------------------------------------------------


def digest(model: nn.Module) -> str:
    """Of everything that a net is."""
    config = getattr(model, "config", None)
    found = hashlib.sha256((repr(model) if config is None else config.to_json()).encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + str(tensor.dtype).encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def read_checkpoint(path: Path) -> str:
    from prune_dn.checkpoints.checkpoint import load
    from prune_dn.checkpoints.opened import read_known_info

    read_known_info(path)
    return digest(load(path))


def read_plan(path: Path) -> str:
    from prune_dn.pruning import Plan, apply_plan

    plan = Plan.load(path)
    assert Plan.from_json(plan.to_json()) == plan and plan.layers
    return digest(apply_plan(net(), plan))


def read_recipe(path: Path) -> str:
    from prune_dn.run.recipe import to_yaml
    from prune_dn.run.recipe_file import load_recipe, parse_recipe

    recipe = load_recipe(path)
    assert parse_recipe(to_yaml(recipe), name=path.stem) == recipe
    return "a recipe"


def read_sensitivity(path: Path) -> str:
    from prune_dn.pruning import make_plan

    make_plan(net(), 0.1, criterion="l2", ratios=path, input_size=8)
    return "ratios"


def read_run(path: Path) -> str:
    """As a run that goes on: its figures are read, and reported."""
    from prune_dn.run.metrics import read_metrics
    from prune_dn.run.report import below_table, render, stage_table

    metrics = read_metrics(path)
    metrics |= {"name": "run", "data": {"name": "digits", "classes": ["0"], "image_size": 8}}
    if "train" in metrics["phases"]:
        assert stage_table(metrics) and below_table(metrics)
        render(
            metrics, {"versions": {}, "machine": "", "seed": 0, "command": "", "processes": 1}, []
        )
    return "figures"


READERS: dict[str, Callable[[Path], str]] = {
    "checkpoint": read_checkpoint,
    "plan": read_plan,
    "recipe": read_recipe,
    "sensitivity": read_sensitivity,
    "metrics": read_run,
}


def answer(reader: str, path: str) -> tuple[str, str]:
    """Read in a child with limits."""
    ends = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(ends[0])
            report(ends[1], limited(reader, Path(path)))
        finally:
            os._exit(0)
    os.close(ends[1])
    with os.fdopen(ends[0]) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if not said:
        return "died", f"wait status {status}, signal {os.WTERMSIG(status)}"
    outcome, text = json.loads(said)
    return outcome, text


def report(pipe: int, found: tuple[str, str]) -> None:
    with os.fdopen(pipe, "w") as file:
        json.dump(found, file)


def limited(reader: str, path: Path) -> tuple[str, str]:
    from prune_dn.errors import PruneDNError

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    try:
        return READERS[reader](path), ""
    except PruneDNError as error:
        return "refused", f"{type(error).__name__}: {error}"
    except BaseException:
        return "died", traceback.format_exc()


def main() -> None:
    torch.set_num_threads(1)
    answers = sys.stdout
    sys.stdout = sys.stderr
    for reader, name in (
        ("checkpoint", "net.safetensors"),
        ("checkpoint", "other.safetensors"),
        ("plan", "plan.json"),
        ("recipe", "recipe.yaml"),
        ("sensitivity", "sensitivity.json"),
        ("metrics", "metrics.json"),
    ):  # imports and first calls cost the children nothing
        READERS[reader](Path(sys.argv[1]) / name)
    for line in sys.stdin:
        print(json.dumps(answer(*json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
