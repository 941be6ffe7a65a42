"""Patches times the kernel matrix is the layer's output, for every kind of layer that has one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prune_dn.pruning.patches import (
    at_positions,
    kernel_matrix,
    output_positions,
    patches_of,
    set_kernel_matrix_,
    taps_of,
)

LAYERS = [
    (nn.Conv2d(4, 6, 3, padding=1), (4, 7, 5)),
    (nn.Conv2d(4, 6, (3, 1), stride=(2, 1), dilation=(1, 2), padding=(0, 2), groups=2), (4, 9, 5)),
    (nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), (4, 7, 5)),
    (nn.Conv2d(4, 6, 5, padding=2, padding_mode="circular", bias=False), (4, 7, 5)),
    (nn.Conv1d(4, 6, 3, stride=2), (4, 9)),
    (nn.Conv3d(2, 3, (1, 2, 3), padding=(0, 1, 1)), (2, 3, 4, 5)),
    (nn.ConvTranspose2d(4, 6, 2, stride=2), (4, 3, 5)),
    (nn.ConvTranspose2d(4, 6, 3, 2, padding=1, output_padding=1, groups=2), (4, 3, 5)),
    (nn.ConvTranspose1d(4, 6, 4, stride=3, dilation=2), (4, 5)),
    (nn.ConvTranspose3d(2, 3, 2, stride=2), (2, 2, 3, 2)),
    (nn.Linear(4, 6), (4,)),
    (nn.Linear(4, 6, bias=False), (5, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda x: str(x)[:50])
@pytest.mark.parametrize("some", [False, True])
def test_patches_times_the_matrix_is_the_output(layer, shape, some) -> None:
    layer = layer.double()
    x = torch.randn(3, *shape, dtype=torch.float64)
    y = layer(x)
    count = output_positions(layer, y)
    positions = torch.randint(count, (3, 4)) if some else None
    rows = patches_of(layer, x, positions)
    matrix = kernel_matrix(layer)
    groups = len(matrix)
    parts = rows.unflatten(1, (groups, -1)).transpose(0, 1) @ matrix
    found = parts.transpose(0, 1).flatten(1)
    if layer.bias is not None:
        found = found + layer.bias
    torch.testing.assert_close(found, at_positions(layer, y, positions))
    assert matrix.shape[1] % taps_of(layer) == 0


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda x: str(x)[:50])
def test_the_matrix_is_written_back(layer, shape) -> None:
    before = layer.weight.detach().clone()
    matrix = kernel_matrix(layer).clone()
    nn.init.zeros_(layer.weight)
    set_kernel_matrix_(layer, matrix)
    assert torch.equal(layer.weight, before)
