"""Small nets of other people's kinds; built again in fresh processes, so in a module of their own."""

from __future__ import annotations

import timm
import torch
import torchvision
from torch import Tensor, nn


class Volume(nn.Module):
    """Blocks of dense layers on volumes, norms in front of convs, a head behind a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 8, 3, padding=1, bias=False)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm3d(n),
                nn.ReLU(),
                nn.Conv3d(n, 12, 1, bias=False),
                nn.BatchNorm3d(12),
                nn.ReLU(),
                nn.Conv3d(12, 4, 3, padding=1, bias=False),
            )
            for n in (8, 12, 16)
        )
        self.norm = nn.InstanceNorm3d(20, affine=True)
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.head(self.norm(x).relu().mean((2, 3, 4)))


class TwoInputs(nn.Module):
    """An image and a signal; a dict comes out, with a number beside the tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.PReLU(10))
        self.signal = nn.Sequential(nn.Conv1d(2, 6, 5), nn.BatchNorm1d(6), nn.PReLU())
        self.scale = nn.Parameter(torch.rand(10, 1, 1) + 0.5)
        self.mixed = nn.Linear(16, 12)
        self.classes, self.value = nn.Linear(12, 4), nn.Linear(12, 1)

    def forward(self, image: Tensor, signal: Tensor) -> dict[str, object]:
        maps = (self.image(image) * self.scale).mean((2, 3))
        x = self.mixed(torch.cat([maps, self.signal(signal).mean(2)], 1)).relu()
        return {"logits": self.classes(x), "value": self.value(x), "kind": "two"}


class UNet(nn.Module):
    """Transposed, grouped and depthwise convs, a skip connection, group norm, a tuple of two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(8, 8), nn.ReLU())
        self.deep = nn.Sequential(
            nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=4),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, groups=16),
            nn.PReLU(32),
        )
        self.up = nn.ConvTranspose2d(32, 8, 2, stride=2)
        self.spread = nn.ConvTranspose2d(8, 8, 3, padding=1, groups=8)
        self.out = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.down(x)
        maps = self.out(torch.cat([first, self.spread(self.up(self.deep(first)))], 1))
        return maps, maps.sigmoid()


class Remembers(nn.Module):
    """A forward that goes by a width that is no tensor's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)
        self.width = 8

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu().mean((2, 3)) / self.width)


def own_head() -> nn.Module:
    net = torchvision.models.DenseNet(4, (2, 2), 8, num_classes=5)
    width = net.classifier.in_features
    net.classifier = nn.Sequential(nn.Dropout(0.1), nn.Linear(width, 6), nn.Sigmoid())
    return net


def two_inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 12, 12), torch.randn(2, 2, 24)


class Layer(nn.Module):
    """A dense layer that concatenates what it makes and what it read, the new maps first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, 8, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(self.norm(x).relu()), x], 1)


class Blur(nn.Module):
    """Depthwise, with a buffer for each channel, which no file holds, and their number, as in timm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("filt", torch.ones(channels, 1, 3, 3) / 9, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.filt, stride=2, groups=self.channels)


def blurred() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.GroupNorm(6, 24), nn.ReLU(), Blur(24), nn.Conv2d(24, 16, 3),
        nn.BatchNorm2d(16), nn.ReLU(), Blur(16), nn.Conv2d(16, 2, 1),
    )  # fmt: skip


# Each net, an example of its inputs, and whether it is built again by its name alone.
NETS = {
    "resnet18": (torchvision.models.resnet18, lambda: torch.randn(2, 3, 64, 64), True),
    "mobilenet_v2": (
        lambda: torchvision.models.mobilenet_v2(num_classes=7),
        lambda: torch.randn(2, 3, 64, 64),
        True,
    ),
    "timm": (
        lambda: timm.create_model("mobilenetv3_small_050", num_classes=4, in_chans=1),
        lambda: torch.randn(2, 1, 64, 64),
        True,
    ),
    "own head": (own_head, lambda: torch.randn(2, 3, 64, 64), False),
    "volume": (Volume, lambda: torch.randn(2, 1, 8, 8, 8), False),
    "two inputs": (TwoInputs, two_inputs, False),
    "blurred": (blurred, lambda: torch.randn(2, 3, 24, 24), False),
    "u-net": (UNet, lambda: torch.randn(2, 3, 16, 16), False),
}
