"""The figures of a run that never was, for pages."""

from __future__ import annotations

from typing import Any

import torch

from prune_dn.data.datasets import load_datasets
from prune_dn.models import densenet
from prune_dn.run import samples


def stage(accuracy: float, macs: int) -> dict[str, Any]:
    return {
        "test_accuracy": accuracy,
        "n_test": 360,
        "params": macs // 20,
        "macs": macs,
        "file_bytes": macs // 5,
    }


def timed(median: float) -> dict[str, Any]:
    spread = {"median_ms": median, "p10_ms": median - 0.1, "p90_ms": median + 0.1}
    return {**spread, "n": 30, "batch_size": 1, "runtime": "onnxruntime", "machine": "a CPU"}


def epochs(*losses: float, resumed: int = 0) -> list[dict[str, Any]]:
    rows = [
        {"epoch": i, "loss": x, "val_accuracy": 1 / (1 + x), "accuracy": 0.5, "learning_rate": 0.1}
        for i, x in enumerate(losses, start=1)
    ]
    if resumed:
        rows[resumed - 1]["resumed"] = True
    return rows


def trial(ratio: float, value: float) -> dict[str, Any]:
    lost = round(0.98 - value, 6)
    return {
        "pruning_ratio": ratio,
        "value": value,
        "drop": lost,
        "interval": [lost - 0.007, lost + 0.007],
        "macs": round(40_000_000 * (1 - ratio)),
        "latency_ms": None,
        "holds": lost < 0.01,
    }


def figures() -> tuple[dict[str, Any], dict[str, Any]]:
    """metrics and environment of a run that never was."""
    metrics = {
        "name": "mine & <others>",
        "data": {"name": "digits", "classes": list("0123456789"), "image_size": 32},
        "stages": {
            "dense": stage(353 / 360, 40_000_000),
            "pruned": stage(0.10, 20_000_000),
            "compensated": stage(0.975, 20_000_000),
            "fine-tuned": stage(355 / 360, 19_999_980),
        },
        "latency": {"dense": [timed(4.0)], "pruned": [timed(1.25)]},
        "rounds": [{"unit": "macs", "requested": 0.5, "achieved": 0.5}],
        "notices": [{"name": "data", "text": "2 images <b>are</b> twice there"}],
        "search": {"max_drop": 1.0, "images": 143, "trials": [trial(0.5, 0.975), trial(0.7, 0.9)]},
        "history": {"train": epochs(2.0, 1.0, 0.5, resumed=2), "finetune": epochs(0.4)},
        "phases": {"train": {"seconds": 12.0}},
    }
    environment = {
        "versions": {"python": "3.11"},
        "machine": "a CPU",
        "seed": 7,
        "processes": 1,
        "command": "prune-dn run mine.yaml",
    }
    return metrics, environment


def found_samples() -> dict[str, Any]:
    data = load_datasets("digits", image_size=8, limit=64)
    torch.manual_seed(0)
    nets = [
        densenet(
            [1], growth_rate=4, num_init_features=4, num_classes=10, in_channels=1, stem="cifar"
        )
        for _ in "ab"
    ]
    return samples.collect(*nets, data.test)
