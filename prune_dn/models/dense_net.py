"""DenseNet (arXiv:1608.06993) with torchvision's keys, built from a `DenseNetConfig`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune_dn.errors import ConfigError
from prune_dn.graph.pieces import Piece, concatenated, pieces_of, ranges_of
from prune_dn.models.config import DenseNetConfig, Indices, LayerConfig, TransitionConfig
from prune_dn.models.mfm import MFM_KINDS, MaxFeatureMap
from prune_dn.models.shared_memory import pooled_features, usable
from prune_dn.models.stream_reading import MOST_RANGES


class ReadStream(nn.Module):
    """Select the stream channels that a reader reads; positions are constant index buffers.

    (N, stream, H, W) -> (N, read, H, W). With `input_indices=None` the stream passes unchanged. With
    `rival_indices` what is read competes first: the maximum of each channel and its rival.

    With the `widths` of the tensors that make up the stream it takes these, in a list, and concatenates
    what is read of each: all, one or two ranges, or single channels.

    >>> pairs = ReadStream((0, 1), (2, 1))
    >>> pairs(torch.tensor([[1.0, -5.0, 3.0]])).tolist()
    [[3.0, -5.0]]
    >>> few = ReadStream((0, 1, 4), widths=(2, 1, 2))
    >>> few([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]), torch.tensor([[4.0, 5.0]])]).tolist()
    [[1.0, 2.0, 5.0]]
    """

    input_indices: Tensor | None
    rival_indices: Tensor | None

    def __init__(
        self,
        input_indices: Indices,
        rival_indices: Indices = None,
        widths: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        # An index is no weight: nothing loads it later, so it is real even in a model on "meta".
        device = "cpu" if torch.get_default_device().type == "meta" else None
        for name, indices in (("input_indices", input_indices), ("rival_indices", rival_indices)):
            index = None if indices is None else torch.tensor(indices, device=device)
            self.register_buffer(name, index, persistent=False)
        ranges = () if input_indices is None else tuple(ranges_of(input_indices))
        self.ranges = (
            ranges if len(ranges) <= MOST_RANGES else None
        )  # for training with little memory
        self.pieces: tuple[Piece, ...] | None = None
        if input_indices is not None and rival_indices is None:
            self.pieces = pieces_of(input_indices, widths or (input_indices[-1] + 1,))
        for number, piece in enumerate(self.pieces or ()):
            index = torch.tensor(piece.indices, device=device) if piece.indices else None
            self.register_buffer(f"piece{number}_indices", index, persistent=False)

    def forward(self, stream: Tensor | list[Tensor]) -> Tensor:
        if self.pieces is not None:
            sources = [stream] if isinstance(stream, Tensor) else stream
            indices = [
                self._buffers[f"piece{number}_indices"] for number in range(len(self.pieces))
            ]
            return concatenated(sources, self.pieces, indices)
        whole = stream if isinstance(stream, Tensor) else torch.cat(stream, 1)
        if self.input_indices is None or self.rival_indices is None:
            return whole
        read = whole.index_select(1, self.input_indices)
        return torch.maximum(read, whole.index_select(1, self.rival_indices))


class DenseLayer(nn.Module):
    """norm1, ReLU, conv1 (1x1), norm2, ReLU, conv2 (3x3); or norm1, ReLU, conv1 (3x3); then MFM."""

    def __init__(
        self,
        widths: tuple[int, ...],
        layer: LayerConfig,
        *,
        drop_rate: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        """`widths`: of the block's input and the outputs of the layers before this one."""
        super().__init__()
        read = sum(widths) if layer.input_indices is None else len(layer.input_indices)
        self.read = ReadStream(layer.input_indices, layer.rival_indices, widths)
        self.norm1 = nn.BatchNorm2d(read, eps=norm_eps)
        self.norm2: nn.BatchNorm2d | None = None
        self.conv2: nn.Conv2d | None = None
        if layer.bottleneck is None:
            self.conv1 = nn.Conv2d(read, layer.filters, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(read, layer.bottleneck, 1, bias=False)
            self.norm2 = nn.BatchNorm2d(layer.bottleneck, eps=norm_eps)
            self.conv2 = nn.Conv2d(layer.bottleneck, layer.filters, 3, padding=1, bias=False)
        self.mfm = _mfm(layer)
        self.drop_rate = drop_rate

    def forward(self, sources: list[Tensor]) -> Tensor:
        """`sources`: the block's input and the outputs of the layers before this one."""
        # What competes is looked at as a whole stream, by hooks that score it too.
        stream = torch.cat(sources, 1) if self.read.pieces is None else sources
        out = self.conv1(F.relu(self.norm1(self.read(stream))))
        if self.norm2 is not None and self.conv2 is not None:
            out = self.conv2(F.relu(self.norm2(out)))
        if self.mfm is not None:
            out = self.mfm(out)
        return F.dropout(out, self.drop_rate, self.training) if self.drop_rate else out


class DenseBlock(nn.Module):
    """Dense layers, each reading the stream of everything before it. Returns the whole stream."""

    def __init__(
        self, stream: int, layers: tuple[LayerConfig, ...], *, drop_rate: float, norm_eps: float
    ) -> None:
        super().__init__()
        widths: tuple[int, ...] = (stream,)
        for layer in layers:
            module = DenseLayer(widths, layer, drop_rate=drop_rate, norm_eps=norm_eps)
            self.add_module(layer.name, module)
            widths += (layer.out_channels,)

    def forward(self, x: Tensor) -> Tensor:
        sources = [x]
        for layer in self.children():
            sources.append(layer(sources))
        return torch.cat(sources, 1)


class Transition(nn.Module):
    """norm, ReLU, 1x1 conv, (MFM), 2x2 average pooling."""

    def __init__(self, stream: int, transition: TransitionConfig, *, norm_eps: float) -> None:
        super().__init__()
        indices = transition.input_indices
        read = stream if indices is None else len(indices)
        self.read = ReadStream(indices, transition.rival_indices)
        self.norm = nn.BatchNorm2d(read, eps=norm_eps)
        self.conv = nn.Conv2d(read, transition.filters, 1, bias=False)
        self.mfm = _mfm(transition)

    def forward(self, stream: Tensor) -> Tensor:
        out = self.conv(F.relu(self.norm(self.read(stream))))
        if self.mfm is not None:
            out = self.mfm(out)
        return F.avg_pool2d(out, 2, 2)


class DenseNet(nn.Module):
    """The network that a `DenseNetConfig` describes: (N, in_channels, H, W) -> (N, num_classes).

    `memory_efficient=True` (or 1) trains with one buffer per dense block: the same numbers, memory
    linear in depth, and no slower; 2 takes still less memory and some more time (see
    `shared_memory`). It has no effect where no gradients are asked for.

    >>> import torch
    >>> from prune_dn.models import densenet40
    >>> densenet40().eval()(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, config: DenseNetConfig, *, memory_efficient: bool | int = False) -> None:
        super().__init__()
        if memory_efficient not in (0, 1, 2):
            raise ConfigError(
                f"memory_efficient is {memory_efficient!r}; it is False, True (1) or 2"
            )
        self.config = config
        self.memory_efficient = memory_efficient
        eps, width = config.norm_eps, config.num_init_features
        features = nn.Sequential()
        if config.stem == "cifar":
            features.add_module(
                "conv0", nn.Conv2d(config.in_channels, width, 3, padding=1, bias=False)
            )
        else:
            features.add_module(
                "conv0", nn.Conv2d(config.in_channels, width, 7, 2, padding=3, bias=False)
            )
            features.add_module("norm0", nn.BatchNorm2d(width, eps=eps))
            features.add_module("relu0", nn.ReLU(inplace=True))
            features.add_module("pool0", nn.MaxPool2d(3, 2, padding=1))
        for b, layers in enumerate(config.blocks, start=1):
            block = DenseBlock(width, layers, drop_rate=config.drop_rate, norm_eps=eps)
            features.add_module(f"denseblock{b}", block)
            width += sum(layer.out_channels for layer in layers)
            if b <= len(config.transitions):
                transition = config.transitions[b - 1]
                features.add_module(f"transition{b}", Transition(width, transition, norm_eps=eps))
                width = transition.out_channels
        indices = config.classifier_indices
        read = width if indices is None else len(indices)
        self.features = features
        self.read = ReadStream(indices, config.classifier_rivals)
        features.add_module("norm5", nn.BatchNorm2d(read, eps=eps))
        self.classifier = nn.Linear(read, config.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.memory_efficient and torch.is_grad_enabled() and usable(self):
            return self.classifier(pooled_features(self, x, int(self.memory_efficient)))
        for name, module in self.features.named_children():
            if name == "norm5":
                x = self.read(x)
            x = module(x)
        return self.classifier(F.adaptive_avg_pool2d(F.relu(x), 1).flatten(1))


def _mfm(part: LayerConfig | TransitionConfig) -> MaxFeatureMap | None:
    if part.mfm is None:
        return None
    units = part.out_channels // MFM_KINDS[part.mfm][1]
    return MaxFeatureMap(part.mfm, units=units, alone=part.mfm_alone)
