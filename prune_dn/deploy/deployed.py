"""A deployed file as a net: evaluated and timed like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prune_dn.base.runtimes import Precision
from prune_dn.deploy.formats import StrPath, open_deployed
from prune_dn.deploy.running import Running, answers
from prune_dn.errors import ExportError


class Deployed(nn.Module):
    """A net whose forward runs a deployed file (.onnx, .xml, .pt2) in its runtime, on the CPU.

    It takes and gives tensors: one, or a tuple of what the file answers. It has no weights to train.
    """

    def __init__(self, path: StrPath, precision: Precision = "fp32", threads: int | None = None):
        super().__init__()
        self.path = Path(path)
        self.running: Running = open_deployed(path, precision, threads)
        self.eval()

    @staticmethod
    def of(running: Running) -> Deployed:
        """A net that runs what is open already."""
        net = Deployed.__new__(Deployed)
        nn.Module.__init__(net)
        net.path, net.running = Path(running.label), running
        return net.eval()

    def forward(self, *inputs: Tensor) -> Any:
        """Raises ExportError where the file does not run on these."""
        device = inputs[0].device
        try:
            found = answers(self.running, inputs, self.running.inputs)
        except ExportError as error:
            raise ExportError(f"{self.path}: {error}") from error
        made = tuple(x.to(device) for x in found)
        return made[0] if len(made) == 1 else made

    @property
    def in_channels(self) -> int:
        """Channels of the images that the file takes. Raises ExportError for other inputs."""
        return self._image_shape()[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that the file takes. Raises ExportError for other inputs."""
        return self._image_shape()[2:4]  # type: ignore[return-value]

    def _image_shape(self) -> tuple[int, ...]:
        shapes = self.running.shapes
        if len(shapes) != 1 or len(shapes[0]) != 4 or None in shapes[0][1:]:
            known = ", ".join(map(str, shapes)) or "none"
            raise ExportError(
                f"{self.path} does not take images of one size (N, C, H, W); its inputs are of shape {known}"
            )
        return tuple(n or 0 for n in shapes[0])

    def extra_repr(self) -> str:
        return f"{self.path}, {self.running.label}"


def example(net: Deployed, batch: int) -> Tensor:
    """Random images that the file takes."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, net.in_channels, *net.image_size, generator=generator)
