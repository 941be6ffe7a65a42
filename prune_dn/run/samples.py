"""Test images with what the dense and the pruned net say of them; those that changed come first."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from prune_dn.base.intervals import paired_drop
from prune_dn.data.batches import each_batch
from prune_dn.data.datasets import DataSpec, ImageSet, make_loader
from prune_dn.models.answers import eval_mode

MOST = 24
FORMAT = "prune_dn.samples/1"


@torch.no_grad()
def collect(dense: nn.Module, pruned: nn.Module, images: ImageSet) -> dict[str, Any]:
    """How often the nets agree on the images, and some of these with both predictions.

    `lost` are images that only the dense net has right, `won` those that only the pruned one has;
    `drop_interval` is the 95 % interval of the accuracy that was lost.
    """
    first, second = (_predictions(net, images) for net in (dense, pruned))
    labels = images.labels
    right, still = first == labels, second == labels
    kinds = (
        ("lost", right & ~still),
        ("won", ~right & still),
        ("changed, both wrong", (first != second) & ~right & ~still),
        ("same", first == second),
    )
    shown: list[dict[str, Any]] = []
    for kind, where in kinds:
        for index in where.nonzero().flatten()[: MOST - len(shown)].tolist():
            pixels, label = images[index]
            shown.append(
                {
                    "index": index,
                    "kind": kind,
                    "label": int(label),
                    "dense": int(first[index]),
                    "pruned": int(second[index]),
                    "image": _data_uri(pixels, images.spec),
                }
            )
    return {
        "format": FORMAT,
        "n": len(images),
        "lost": int((right & ~still).sum()),
        "won": int((~right & still).sum()),
        "changed": int((first != second).sum()),
        "drop_interval": paired_drop(right.int().tolist(), still.int().tolist()),
        "classes": list(images.spec.classes),
        "samples": shown,
    }


def _predictions(model: nn.Module, images: ImageSet) -> Tensor:
    like = next(model.parameters())
    with eval_mode(model):
        found = [
            model(batch.to(like)).argmax(1).cpu()
            for batch, _ in each_batch(make_loader(images, 64))
        ]
    return torch.cat(found)


def _data_uri(pixels: Tensor, spec: DataSpec) -> str:
    """A normalised image (C, H, W) as a PNG of at most 96 pixels in a data URI."""
    std, mean = (torch.tensor(x).view(-1, 1, 1) for x in (spec.std, spec.mean))
    values = ((pixels * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    grey = len(values) not in (3, 4)
    array = values[0].numpy() if grey else values[:3].permute(1, 2, 0).numpy()
    image = Image.fromarray(array)
    image.thumbnail((96, 96))
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
