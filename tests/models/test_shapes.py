"""A dense layer that gets the tensors of a narrower one is that narrower layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prune_dn.errors import ConversionError
from prune_dn.models.shapes import fit_, own_tensors

LAYERS = {
    "conv1d": (lambda i, o: nn.Conv1d(i, o, 3), 8, 12, 3, 5),
    "conv2d": (lambda i, o: nn.Conv2d(i, o, (3, 1), bias=False), 8, 12, 3, 5),
    "conv3d": (lambda i, o: nn.Conv3d(i, o, 2), 8, 12, 3, 5),
    "grouped": (lambda i, o: nn.Conv2d(i, o, 1, groups=4), 8, 12, 4, 8),
    "depthwise": (lambda i, o: nn.Conv2d(i, i, 3, groups=i), 8, 8, 3, 3),
    "depthwise, two each": (lambda i, o: nn.Conv2d(i, 2 * i, 3, groups=i), 8, 16, 3, 6),
    "depthwise, one left": (lambda i, o: nn.Conv2d(i, i, 3, groups=i), 8, 8, 1, 1),
    "transposed": (lambda i, o: nn.ConvTranspose2d(i, o, 2, stride=2), 8, 12, 3, 5),
    "transposed, grouped": (lambda i, o: nn.ConvTranspose1d(i, o, 2, groups=2), 8, 12, 4, 6),
    "transposed, depthwise": (lambda i, o: nn.ConvTranspose2d(i, i, 2, groups=i), 8, 8, 3, 3),
    "linear": (nn.Linear, 8, 12, 3, 5),
    "batch norm": (lambda i, o: nn.BatchNorm2d(i), 8, 8, 3, 3),
    "batch norm without affine": (lambda i, o: nn.BatchNorm1d(i, affine=False), 8, 8, 3, 3),
    "instance norm": (lambda i, o: nn.InstanceNorm2d(i, affine=True), 8, 8, 3, 3),
    "sync norm": (lambda i, o: nn.SyncBatchNorm(i), 8, 8, 3, 3),
    "group norm": (lambda i, o: nn.GroupNorm(i // 2, i), 8, 8, 6, 6),
    "layer norm": (lambda i, o: nn.LayerNorm(i), 8, 8, 3, 3),
    "prelu": (lambda i, o: nn.PReLU(i), 8, 8, 3, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer(name: str) -> None:
    make, inputs, outputs, fewer_inputs, fewer_outputs = LAYERS[name]
    dense, small = make(inputs, outputs), make(fewer_inputs, fewer_outputs)
    tensors = own_tensors(small)
    for parameter in dense.parameters():
        parameter.requires_grad_(False)
    fit_(dense, tensors)
    assert repr(dense) == repr(small)
    plain = {k: v for k, v in vars(small).items() if k[0] != "_" and k != "training"}
    assert {k: vars(dense)[k] for k in plain} == plain
    assert all(own_tensors(dense)[k].data_ptr() == t.data_ptr() for k, t in tensors.items())
    assert not any(p.requires_grad for p in dense.parameters())


@pytest.mark.parametrize(
    ("dense", "small", "text"),
    [
        (
            nn.Conv2d(8, 8, 3),
            nn.Conv2d(4, 4, 1),
            "weight has shape 4x4x1x1 in the file and 8x8x3x3",
        ),
        (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 8, 3), "has shape 8x4x3x3 in the file and 4x4x3x3"),
        (nn.Conv2d(4, 4, 3), nn.Conv1d(4, 4, 3), "has shape 4x4x3 in the file and 4x4x3x3"),
        (
            nn.Conv2d(8, 8, 1, groups=4),
            nn.Conv2d(2, 6, 1),
            "weight of shape 6x2x1x1 has no 4 groups",
        ),
        (nn.LSTM(8, 8), nn.LSTM(4, 4), "is a LSTM, which cannot be made narrower here"),
        (nn.Embedding(8, 8), nn.Embedding(8, 4), "is a Embedding, which cannot be made narrower"),
        (nn.GroupNorm(4, 8), nn.GroupNorm(1, 5), "has 5 channels in 4 groups"),
    ],
)
def test_what_cannot_be(dense: nn.Module, small: nn.Module, text: str) -> None:
    with pytest.raises(ConversionError, match=text):
        fit_(dense, own_tensors(small))


def test_a_layer_whose_tensors_disagree() -> None:
    dense = nn.Sequential(nn.BatchNorm2d(4))
    tensors = own_tensors(nn.Sequential(nn.BatchNorm2d(4)))
    tensors["0.bias"] = torch.zeros(3)
    with pytest.raises(ConversionError, match="0 has 4 outputs, and vectors of 4, 3, 4, 4 numbers"):
        fit_(dense, tensors)
