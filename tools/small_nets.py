"""Small nets of other authors' forms for 32 x 32 images, and the command that trains one.

    python tools/small_nets.py vgg11 data/cifar10 -o vgg11.safetensors

They stand for what people own: none is a class of prune_dn, and `compare_pruners.py --net NAME`
compares pruners on them. One process, one thread, one seed; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from prune_dn.data.datasets import load_datasets
from prune_dn.measure.latency import machine
from prune_dn.run.data_options import NORMALISATIONS
from prune_dn.training import FitConfig, evaluate, fit


class BasicBlock(nn.Module):
    """Two 3x3 convs and a skip connection (arXiv:1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.down: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.down = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(inner)) + self.down(x))


class ResNet20(nn.Module):
    """The ResNet-20 of arXiv:1512.03385 with a conv in its two wider shortcuts."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks, width = [], 16
        for outputs, stride in ((16, 1), (32, 2), (64, 2)):
            for step in range(3):
                blocks.append(BasicBlock(width, outputs, stride if step == 0 else 1))
                width = outputs
        self.layers = nn.Sequential(*blocks)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.layers(F.relu(self.bn1(self.conv1(x)))).mean((2, 3)))
        return out


class VGG11(nn.Module):
    """VGG-11 with batch norm, 3/8 as wide (arXiv:1409.1556), and one linear layer."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for width in (24, "pool", 48, "pool", 96, 96, "pool", 192, 192, "pool", 192, 192, "pool"):
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.features(x).flatten(1))
        return out


class InvertedResidual(nn.Module):
    """Expand, depthwise, project (arXiv:1801.04381)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.adds = stride == 1 and inputs == outputs
        self.expand = nn.Sequential(
            nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(),
        )
        self.project = nn.Sequential(
            nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + out if self.adds else out


class MobileNet(nn.Module):
    """A MobileNet-V2 of ten blocks for small images."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()
        )
        blocks, width = [], 16
        for outputs, count, stride in ((16, 1, 1), (24, 2, 2), (32, 3, 1), (64, 3, 2), (96, 1, 1)):
            for step in range(count):
                blocks.append(InvertedResidual(width, outputs, stride if step == 0 else 1, 4))
                width = outputs
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Sequential(
            nn.Conv2d(width, 256, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU6()
        )
        self.fc = nn.Linear(256, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.last(self.blocks(self.stem(x))).mean((2, 3)))
        return out


class GrowingUnit(nn.Module):
    """A dense layer as others write it: it concatenates itself, its new maps first."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm_in, self.squeeze = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1)
        self.norm_mid = nn.BatchNorm2d(4 * growth)
        self.grow = nn.Conv2d(4 * growth, growth, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.squeeze(F.relu(self.norm_in(x)))
        return torch.cat([self.grow(F.relu(self.norm_mid(inner))), x], 1)


class OtherDenseNet(nn.Module):
    """A DenseNet-BC of other names and another order of maps: three stages of six units, growth 12."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        width, growth = 24, 12
        self.entry = nn.Conv2d(3, width, 3, 2, padding=1)
        stages: list[nn.Module] = []
        for stage in range(3):
            if stage:
                half = nn.Conv2d(width, width // 2, 1)
                stages += [nn.BatchNorm2d(width), nn.ReLU(), half, nn.AvgPool2d(2)]
                width //= 2
            for _ in range(6):
                stages.append(GrowingUnit(width, growth))
                width += growth
        self.trunk = nn.Sequential(*stages, nn.BatchNorm2d(width), nn.ReLU())
        self.answer = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.answer(F.adaptive_avg_pool2d(self.trunk(self.entry(x)), 1).flatten(1))
        return out


NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": ResNet20,
    "vgg11": VGG11,
    "mobilenet": MobileNet,
    "other_densenet": OtherDenseNet,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("net", choices=NETS)
    parser.add_argument("data", type=Path, help="a folder with train/CLASS and test/CLASS")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--precision", choices=["no", "bf16"], default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(given.seed)
    net = NETS[given.net]()
    mean, std = NORMALISATIONS["cifar10"]
    data = load_datasets(
        "image_folder", root=given.data, image_size=32, mean=mean, std=std, augment="crop_flip"
    )
    config = FitConfig(
        epochs=given.epochs,
        batch_size=128,
        learning_rate=given.learning_rate,
        weight_decay=5e-4,
        schedule="one_cycle",
        precision=given.precision,
    )
    result = fit(net, data, config, seed=given.seed, progress=False)
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, given.output)
    found = evaluate(net, data.test)
    print(
        json.dumps(
            {
                "net": given.net,
                "accuracy": found.accuracy,
                "n": found.n,
                "params": sum(p.numel() for p in net.parameters()),
                "seconds": round(result.seconds),
                "epochs": given.epochs,
                "seed": given.seed,
                "machine": machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
