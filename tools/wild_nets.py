"""The nets that people own, by kind: what `tools/wild.py` prunes. Random weights, nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE = (3, 64, 64)


@dataclass(frozen=True)
class Net:
    """How a net is built and what it takes.

    `shape` is one image without the batch; `inputs` makes the arguments of a batch where they are more.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = IMAGE
    inputs: Callable[[Tensor], Any] | None = None

    def arguments(self, x: Tensor) -> Any:
        """What the net takes for a batch."""
        return x if self.inputs is None else self.inputs(x)


class Rebuilt(nn.Module):
    """A DenseNet's features, pooled, and a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        dense = small()
        self.features = dense.features
        self.fc = nn.Linear(dense.classifier.in_features, 5)

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = F.adaptive_avg_pool2d(F.relu(self.features(x)), 1)
        return self.fc(pooled.flatten(1))


class Backbone(nn.Module):
    """A whole DenseNet as `backbone`, heads of its own on its features."""

    def __init__(self, outputs: int, **heads: int) -> None:
        super().__init__()
        self.backbone, width = small(), small().classifier.in_features
        self.backbone.classifier = nn.Identity()
        self.head = nn.Linear(width, outputs)
        self.heads = nn.ModuleDict({name: nn.Linear(width, n) for name, n in heads.items()})

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        x = self.backbone(x)
        if not self.heads:
            return self.head(x)
        return {"main": self.head(x), **{name: head(x) for name, head in self.heads.items()}}


class Wrapped(nn.Module):
    """A net as `model`, as Lightning modules and TimmWrapper hold it."""

    def __init__(self, model: nn.Module, as_dict: bool = False) -> None:
        super().__init__()
        self.model, self.as_dict = model, as_dict

    def forward(self, pixel_values: Tensor) -> Any:
        logits = self.model(pixel_values)
        return {"logits": logits} if self.as_dict else logits


class Normalised(nn.Module):
    """Subtracts a mean and divides by a deviation, held as buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class DenseLayer(nn.Module):
    """Norm, activation, 3x3 conv; concatenates what it made to what it read, in front or behind."""

    def __init__(self, width: int, growth: int, front: bool) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, growth, 3, 1, 1, bias=False)
        self.front = front

    def forward(self, x: Tensor) -> Tensor:
        made = self.conv(F.relu(self.norm(x)))
        return torch.cat([made, x] if self.front else [x, made], 1)


class CifarDenseNet(nn.Module):
    """A DenseNet for small images whose blocks are Sequentials of layers that concatenate themselves."""

    def __init__(self, front: bool, plain_transition: bool = False) -> None:
        super().__init__()
        width, growth, parts = 24, 12, [nn.Conv2d(3, 24, 3, 1, 1, bias=False)]
        layers: list[nn.Module] = list(parts)
        for block in range(3):
            layers.append(
                nn.Sequential(*(DenseLayer(width + i * growth, growth, front) for i in range(6)))
            )
            width += 6 * growth
            if block < 2:
                activation = nn.Identity() if plain_transition else nn.ReLU()
                conv = nn.Conv2d(width, width // 2, 1, bias=False)
                layers += [nn.BatchNorm2d(width), activation, conv, nn.AvgPool2d(2)]
                width //= 2
        self.features = nn.Sequential(*layers)
        self.norm_final = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.norm_final(self.features(x))).mean((2, 3)))


class TwoInputs(nn.Module):
    """An image and a row of facts about it."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.facts = Backbone(16), nn.Linear(4, 16)
        self.head = nn.Linear(32, 2)

    def forward(self, image: Tensor, facts: Tensor) -> Tensor:
        return self.head(F.relu(torch.cat([self.image(image), self.facts(facts)], 1)))


class FromDict(TwoInputs):
    """The same, from one dict."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(batch["image"], batch["facts"])


def tv(name: str, **options: Any) -> Any:
    """A net of torchvision."""
    import torchvision.models

    if name.startswith(("inception", "googlenet")):
        options = {"init_weights": False, **options}
    return torchvision.models.get_model(name, weights=None, **options)


SMALL: dict[str, Any] = {"growth_rate": 16, "block_config": (3, 6, 8, 6), "num_init_features": 32}
WIDTH = 194  # what its classifier reads


def small(**options: Any) -> Any:
    """A DenseNet of torchvision's class with 23 layers: what is around it does not ask for more."""
    import torchvision.models

    return torchvision.models.DenseNet(**SMALL, **options)


def timm(name: str, **options: Any) -> Any:
    """A net of timm."""
    import timm as package

    return package.create_model(name, pretrained=False, **options)


def small_timm(**options: Any) -> Any:
    """A DenseNet of timm's class with 23 layers."""
    return timm("densenet121", growth_rate=16, block_config=(3, 6, 8, 6), **options)


def cv(name: str, **options: Any) -> Any:
    """A net of pytorchcv; its last pooling, made for 224 pixels, takes any size."""
    from pytorchcv.model_provider import get_model

    net = get_model(name, pretrained=False, **options)
    for name, _ in list(net.named_modules()):
        if name.endswith("final_pool"):
            parent, _, key = name.rpartition(".")
            setattr(net.get_submodule(parent), key, nn.AdaptiveAvgPool2d(1))
    return net


def monai(name: str, **options: Any) -> Any:
    """A net of MONAI."""
    import monai.networks.nets as nets

    return getattr(nets, name)(**options)


def smp(name: str, encoder: str = "densenet121", **options: Any) -> Any:
    """A net of segmentation-models-pytorch."""
    import segmentation_models_pytorch as package

    return getattr(package, name)(encoder, encoder_weights=None, classes=2, **options)


def without_unused_head() -> Any:
    """The U-Net on EfficientNet-B0, of which the encoder's last conv and norm are never used."""
    net = smp("Unet", "efficientnet-b0")
    net.encoder._conv_head = net.encoder._bn1 = nn.Identity()
    return net


def xray(thresholds: bool) -> Any:
    """A DenseNet of torchxrayvision."""
    from torchxrayvision.models import DenseNet

    net = DenseNet(weights=None, num_classes=18, in_channels=1, **SMALL)
    if thresholds:
        net.op_threshs = torch.linspace(0.1, 0.9, 18)
    return net


def headed(head: nn.Module) -> nn.Module:
    """torchvision's DenseNet with another head."""
    net = small()
    net.classifier = head
    return net


def compiled(name: str) -> Any:
    """A net of torchvision in torch.compile's wrapper."""
    return torch.compile(tv(name))


def stemmed(*, deleted: bool) -> nn.Module:
    """torchvision's DenseNet with a stem for small images."""
    net = small(num_classes=10)
    net.features.conv0 = nn.Conv2d(3, 32, 3, 1, 1, bias=False)
    if deleted:
        del net.features.pool0
    else:
        net.features.pool0 = nn.Identity()
    return net


def two(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x.flatten(1)[:, :4].clone()


def named(x: Tensor) -> dict[str, Tensor]:
    return dict(zip(("image", "facts"), two(x), strict=True))


def _densenets() -> Iterator[tuple[str, Net]]:
    for name in ("densenet121", "densenet161", "densenet169", "densenet201"):
        yield f"torchvision {name}", Net(partial(tv, name))
    yield "timm densenet121", Net(lambda: timm("densenet121"))
    yield "timm densenet121, 1 channel", Net(lambda: timm("densenet121", in_chans=1), (1, 64, 64))
    yield "half", Net(lambda: tv("densenet121").half())
    yield "bf16", Net(lambda: tv("densenet121").bfloat16())


def _heads() -> Iterator[tuple[str, Net]]:
    yield (
        "Sequential(Linear, Sigmoid)",
        Net(lambda: headed(nn.Sequential(nn.Linear(WIDTH, 14), nn.Sigmoid()))),
    )
    yield (
        "Dropout + Linear",
        Net(lambda: headed(nn.Sequential(nn.Dropout(0.3), nn.Linear(WIDTH, 14)))),
    )
    yield (
        "MLP",
        Net(lambda: headed(nn.Sequential(nn.Linear(WIDTH, 256), nn.ReLU(), nn.Linear(256, 5)))),
    )
    yield "Identity", Net(lambda: headed(nn.Identity()))
    yield "Linear without bias", Net(lambda: headed(nn.Linear(WIDTH, 5, bias=False)))
    yield "Linear(w, 1)", Net(lambda: headed(nn.Linear(WIDTH, 1)))
    yield "timm num_classes=0", Net(lambda: small_timm(num_classes=0))


def _inside() -> Iterator[tuple[str, Net]]:
    yield "backbone + own head", Net(lambda: Backbone(5))
    yield "several heads", Net(lambda: Backbone(5, age=1))
    yield "features + pooling + fc", Net(Rebuilt)
    yield "Sequential(Normalize, net)", Net(lambda: nn.Sequential(Normalised(), small()))
    yield "Lightning-like .model", Net(lambda: Wrapped(small()))
    yield (
        "TimmWrapper-like, dict output",
        Net(lambda: Wrapped(small_timm(), as_dict=True)),
    )
    yield "fastai-like body + head", Net(
        lambda: nn.Sequential(
            small().features,
            nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(WIDTH), nn.Dropout(0.25),
                nn.Linear(WIDTH, 512, bias=False), nn.ReLU(), nn.BatchNorm1d(512), nn.Linear(512, 5),
            ),
        )
    )  # fmt: skip


def _medical() -> Iterator[tuple[str, Net]]:
    for thresholds in (False, True):
        name = "DenseNet" + (" with op_threshs" if thresholds else "")
        yield (
            f"torchxrayvision {name}",
            Net(partial(xray, thresholds), (1, 64, 64)),
        )
    two = {"spatial_dims": 2, "in_channels": 1, "out_channels": 3}
    three = {**two, "spatial_dims": 3}
    few = {"init_features": 32, "growth_rate": 16, "block_config": (3, 6, 8, 6)}
    rows: dict[str, tuple[str, dict[str, Any]]] = {
        "DenseNet121": ("DenseNet121", two),
        "DenseNet169": ("DenseNet169", two),
        "DenseNet, dropout": ("DenseNet", {**two, **few, "dropout_prob": 0.2}),
        "DenseNet, instance norm": ("DenseNet", {**two, **few, "norm": "instance"}),
        "DenseNet, group norm": ("DenseNet", {**two, **few, "norm": ("group", {"num_groups": 2})}),
        "DenseNet, 3-D": ("DenseNet", {**three, **few}),
        "DenseNet121, 3-D": ("DenseNet121", three),
        "SEResNet50": ("SEResNet50", {"spatial_dims": 2, "in_channels": 1}),
        "UNet, 3-D": ("UNet", {**three, "channels": (8, 16, 32), "strides": (2, 2), "norm": "batch"}),
        "BasicUNet": ("BasicUNet", {**two, "features": (16, 16, 32, 64, 128, 16)}),
        "SegResNet": ("SegResNet", {**two, "init_filters": 16}),
        "SegResNet, batch norm": ("SegResNet", {**two, "init_filters": 16, "norm": "batch"}),
        "DynUNet, deep supervision": ("DynUNet", {
            **two, "kernel_size": (3, 3, 3, 3), "strides": (1, 2, 2, 2), "upsample_kernel_size": (2, 2, 2),
            "filters": (16, 24, 32, 48), "norm_name": "batch", "deep_supervision": True,
        }),
        "FlexibleUNet": ("FlexibleUNet", {"in_channels": 3, "out_channels": 2, "backbone": "resnet18"}),
    }  # fmt: skip
    for name, (kind, options) in rows.items():
        shape = (
            (1, 32, 32, 32)
            if options.get("spatial_dims") == 3
            else (options["in_channels"], 64, 64)
        )
        yield f"MONAI {name}", Net(partial(monai, kind, **options), shape)


def _segmentation() -> Iterator[tuple[str, Net]]:
    for name in ("Unet", "FPN", "UnetPlusPlus", "Linknet", "PSPNet", "MAnet"):
        yield f"{name}, densenet121", Net(partial(smp, name))
    for name, encoder in (
        ("DeepLabV3Plus", "resnet18"),
        ("Unet", "mobilenet_v2"),
        ("PAN", "resnet18"),
        ("Unet", "efficientnet-b0"),
    ):
        shape = (3, 128, 128) if name == "PAN" else IMAGE
        yield (
            f"{name}, {encoder}",
            Net(partial(smp, name, encoder), shape),
        )
    yield "Unet, efficientnet-b0, without its unused head", Net(without_unused_head)
    for name in ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"):
        module = f"torchvision {name}"
        yield module, Net(partial(tv, name, weights_backbone=None, num_classes=3))


def _cifar() -> Iterator[tuple[str, Net]]:
    pixels = (3, 32, 32)
    yield "torchvision, 3x3 conv0, pool0 Identity", Net(lambda: stemmed(deleted=False), pixels)
    yield "torchvision, 3x3 conv0, pool0 deleted", Net(lambda: stemmed(deleted=True), pixels)
    yield "new maps first, layers concatenate themselves", Net(lambda: CifarDenseNet(True), pixels)
    yield "new maps last, transition without ReLU", Net(lambda: CifarDenseNet(False, True), pixels)


def _timm() -> Iterator[tuple[str, Net]]:
    options: dict[str, dict[str, Any]] = {
        "features_only": {"features_only": True},
        **{f"pool {pool}": {"global_pool": pool} for pool in ("max", "avgmax", "catavgmax")},
        "SiLU": {"act_layer": "silu"},
        "deep stem": {"stem_type": "deep"},
        "deep tiered stem": {"stem_type": "deep_tiered"},
    }
    for name, given in options.items():
        yield f"timm DenseNet, {name}", Net(partial(small_timm, **given))
    for name in ("densenetblur121d", "densenet264d"):
        yield f"timm {name}", Net(partial(timm, name))


def _relatives() -> Iterator[tuple[str, Net]]:
    for name in (
        "peleenet",
        "sparsenet121",
        "condensenet74_c4_g4",
        "hardnet39ds",
        "vovnet27s",
        "dpn68",
        "dla34",
        "squeezenet_v1_1",
        "shufflenetv2_wd2",
        "igcv3_wd4",
        "menet228_12x1_g3",
        "preresnet18",
        "seresnet18",
        "resnext26_32x4d",
        "bagnet9",
        "xdensenet121_2",
    ):
        yield name, Net(partial(cv, name))
    yield "densenet40_k12_bc_cifar10", Net(lambda: cv("densenet40_k12_bc_cifar10"), (3, 32, 32))
    yield "resnet20_cifar10", Net(lambda: cv("resnet20_cifar10"), (3, 32, 32))


def _others() -> Iterator[tuple[str, Net]]:
    for name in (
        "resnet18", "resnet50", "resnext50_32x4d", "vgg16_bn", "vgg11", "alexnet", "mobilenet_v2",
        "mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf", "mnasnet0_5",
        "convnext_tiny", "shufflenet_v2_x0_5", "squeezenet1_1", "googlenet", "inception_v3",
    ):  # fmt: skip
        shape = (
            (3, 299, 299)
            if name == "inception_v3"
            else (3, 96, 96)
            if name in ("googlenet", "alexnet")
            else IMAGE
        )
        yield f"torchvision {name}", Net(partial(tv, name), shape)
    for name in (
        "resnet18d", "resnetv2_50", "resnetv2_50x1_bit", "resnetv2_50d_gn", "seresnet50", "ecaresnet26t", "skresnet18", "resnest14d", "res2net50_26w_4s",
        "cspresnet50", "cspdarknet53", "dla34", "dpn48b", "ghostnet_100", "repvgg_a0", "mobileone_s0", "vovnet39a",
        "ese_vovnet19b_dw", "hrnet_w18_small", "nfnet_l0", "convnextv2_atto", "rexnet_100", "mobilenetv4_conv_small", "selecsls42", "fasternet_t0", "resnetblur18", "mixnet_s", "regnetx_002", "starnet_s1", "edgenext_xx_small", "repghostnet_050", "lcnet_050", "efficientvit_b0", "resnet33ts",
    ):  # fmt: skip
        shape = (3, 128, 128) if "inception" in name or "xception" in name else IMAGE
        yield f"timm {name}", Net(partial(timm, name), shape)
    yield "torchvision r3d_18", Net(lambda: tv("r3d_18"), (3, 8, 32, 32))


def _wrappers() -> Iterator[tuple[str, Net]]:
    def average(net: nn.Module) -> nn.Module:
        from torch.optim.swa_utils import AveragedModel

        return AveragedModel(net)

    yield "SyncBatchNorm", Net(lambda: nn.SyncBatchNorm.convert_sync_batchnorm(small()))
    yield (
        "SyncBatchNorm, resnet18",
        Net(lambda: nn.SyncBatchNorm.convert_sync_batchnorm(tv("resnet18"))),
    )
    yield "DataParallel", Net(lambda: nn.DataParallel(small()))
    yield "DataParallel, resnet18", Net(lambda: nn.DataParallel(tv("resnet18")))
    yield "AveragedModel", Net(lambda: average(small()))
    yield "torch.compile", Net(lambda: compiled("densenet121"))
    yield "torch.compile, resnet18", Net(lambda: compiled("resnet18"))


def _inputs() -> Iterator[tuple[str, Net]]:
    yield "two inputs", Net(TwoInputs, inputs=two)
    yield "one dict", Net(FromDict, inputs=lambda x: (named(x),))
    yield "arguments by name", Net(TwoInputs, inputs=named)


KINDS: dict[str, dict[str, Net]] = {
    "DenseNets as they come": dict(_densenets()),
    "another head": dict(_heads()),
    "inside another module": dict(_inside()),
    "medical images": dict(_medical()),
    "segmentation": dict(_segmentation()),
    "CIFAR stems and other people's DenseNets": dict(_cifar()),
    "timm's options": dict(_timm()),
    "relatives (pytorchcv)": dict(_relatives()),
    "other CNNs": dict(_others()),
    "wrappers and SyncBatchNorm": dict(_wrappers()),
    "other inputs": dict(_inputs()),
}
