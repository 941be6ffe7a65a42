"""Batch norms that take some of their input's channels, so that a layer behind reads only these."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

INDEX = "selected_inputs"


class _Selecting(nn.Module):
    """A norm of C channels on an input of more: positions in `selected_inputs`, (C,)."""

    selected_inputs: Tensor

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x.index_select(1, self.selected_inputs))
        return out


class SelectingBatchNorm1d(_Selecting, nn.BatchNorm1d):
    """`BatchNorm1d` of some channels of its input."""


class SelectingBatchNorm2d(_Selecting, nn.BatchNorm2d):
    """`BatchNorm2d` of some channels of its input."""


class SelectingBatchNorm3d(_Selecting, nn.BatchNorm3d):
    """`BatchNorm3d` of some channels of its input."""


_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    SelectingBatchNorm1d: nn.BatchNorm1d,
    SelectingBatchNorm2d: nn.BatchNorm2d,
    SelectingBatchNorm3d: nn.BatchNorm3d,
}
_SELECTING = {plain: selecting for selecting, plain in _PLAIN.items()}


def can_select(norm: object) -> bool:
    """Whether inputs can be selected in front of this module: a plain batch norm, or one that does."""
    return type(norm) in _SELECTING or type(norm) in _PLAIN


def select_inputs_(norm: nn.Module, indices: Tensor | None) -> None:
    """Make a batch norm take these channels of its input, (C,); None = all, as it is.

    Its other tensors keep their names; the index is a buffer, which is saved with them.

    >>> norm = nn.BatchNorm2d(2).eval()
    >>> select_inputs_(norm, torch.tensor([0, 2]))
    >>> norm(torch.ones(1, 3, 1, 1)).shape
    torch.Size([1, 2, 1, 1])
    """
    if indices is None:
        if type(norm) in _PLAIN:
            norm.__class__ = _PLAIN[type(norm)]
            del norm._buffers[INDEX]
        return
    norm.__class__ = _SELECTING.get(type(norm), type(norm))
    like = next(itertools.chain(norm.parameters(), norm.buffers()), indices)
    norm.register_buffer(INDEX, indices.to(device=like.device, dtype=torch.long))


def selected(norm: nn.Module, x: Tensor) -> Tensor:
    """The channels of its input that a norm takes."""
    return x.index_select(1, norm.get_buffer(INDEX)) if type(norm) in _PLAIN else x
