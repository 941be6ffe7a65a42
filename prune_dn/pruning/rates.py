"""What each part of a DenseNet costs: in channels, params or MACs by formula, in time by measurement.

All four are one sum with different rates, so that one plan can be priced in any of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from prune_dn.models import DenseNetConfig
from prune_dn.profiling import ImageSize, block_pixels, stem_pixels
from prune_dn.pruning.parts import Group, Mask, Pairs, Part
from prune_dn.pruning.prices import Costs
from prune_dn.pruning.units import Units


@dataclass(frozen=True)
class Rates:
    """Cost per weight and per norm channel, and, for one image, per multiply-add and per element.

    `concatenated`: an element of the stream, for every reader (which concatenates it);
    `gathered`: an element that a reader selects; `gather`, `layer`: each one of them. The multiply-adds
    of a conv are those of widths filled up to multiples of `step`, as a runtime does that computes
    in blocks of channels (inputs below `step` are not filled up).
    """

    weight: float = 0
    norm_channel: float = 0
    mac_1x1: float = 0
    mac_kxk: float = 0
    normalised: float = 0
    concatenated: float = 0
    gathered: float = 0
    gather: float = 0
    layer: float = 0
    step: int = 1

    def conv(self, inputs: int, outputs: int, kernel: int, pixels: int) -> float:
        """A convolution without bias."""
        filled = self._filled(inputs) if inputs >= self.step else inputs
        mac = self.mac_1x1 if kernel == 1 else self.mac_kxk
        time = filled * self._filled(outputs) * pixels * mac
        return kernel * kernel * (inputs * outputs * self.weight + time)

    def filter(self, inputs: int, outputs: int, kernel: int, pixels: int) -> float:
        """What each of a convolution's filters saves that goes: no time where they fill one step."""
        whole = self.conv(inputs, outputs, kernel, pixels)
        if 1 < outputs <= self.step:
            whole = inputs * outputs * kernel * kernel * self.weight
        return whole / max(outputs, 1)

    def _filled(self, width: int) -> int:
        return -(-width // self.step) * self.step

    def norm(self, channels: int, pixels: int) -> float:
        """A batch norm (and the ReLU behind it)."""
        return channels * (self.norm_channel + pixels * self.normalised)


COUNTED = {
    "channels": Rates(norm_channel=1),
    "params": Rates(weight=1, norm_channel=2),
    "macs": Rates(mac_1x1=1, mac_kxk=1),
}


class Piece(NamedTuple):
    """A part of the net that a `keep` leaves: its widths, and that of the stream that it reads.

    `gathered` counts the channels that it selects: none where it reads the stream as it is, two for
    each norm channel where what it reads competes.
    """

    part: Part
    read: int
    bottleneck: int | None
    filters: int
    stream: int
    kernel: int
    pixels: int
    conv_pixels: int
    gathered: int


def pieces(units: Units, keep: Mask, image_size: ImageSize | None) -> Iterator[Piece]:
    """All parts, in the order in which they run; one that went whole has widths of 0."""
    config = units.config
    areas = [stem_pixels(config, image_size), *block_pixels(config, image_size)]
    stream = config.in_channels
    for part in units.parts():
        read, narrow, filters = _widths(config, part, keep)
        area = areas[part.block]
        kernel = 3 if part.is_dense_layer or config.stem == "cifar" else 7
        if part.edges is not None and not part.is_dense_layer:
            kernel = 1
        conv_area = 1 if part.stream is None else area
        seen = stream if filters else 0
        gathered = read if read < seen else 0
        if part.sides is not None and np.logical_and(*part.sides.halves(keep)).any():
            gathered = 2 * read
        yield Piece(part, read, narrow, filters, seen, kernel, area, conv_area, gathered)
        if part.stream is not None:
            made = int(keep[part.stream.units].sum()) * part.stream.survivors
            stream = stream + made if part.is_dense_layer else made


def _widths(config: DenseNetConfig, part: Part, keep: Mask) -> tuple[int, int | None, int]:
    """Channels read, bottleneck (None = none) and filters of the last conv of one part."""

    def left(group: Group) -> int:
        return int(np.count_nonzero(keep[group.units]))

    filters = config.num_classes
    if part.siblings is not None:
        filters = left(part.siblings.group)
    elif part.stream is not None:
        filters = left(part.stream) * part.stream.siblings
    if not filters:
        return 0, 0, 0
    read = config.in_channels if part.edges is None else left(part.edges)
    return read, None if part.bottleneck is None else left(part.bottleneck), filters


def total_cost(units: Units, keep: Mask, rates: Rates, image_size: ImageSize | None) -> float:
    """What the net costs that a closed `keep` leaves."""
    found = 0.0
    for piece in pieces(units, keep, image_size):
        if not piece.filters:
            continue
        area, narrow = piece.pixels, piece.bottleneck
        if piece.part.edges is not None:
            found += rates.norm(piece.read, area) + rates.concatenated * piece.stream * area
            if piece.gathered:
                found += rates.gather + rates.gathered * piece.gathered * area
        elif units.config.stem == "imagenet":
            found += rates.norm(piece.filters, area)
        if piece.part.is_dense_layer:
            found += rates.layer
        if narrow is None:
            found += rates.conv(piece.read, piece.filters, piece.kernel, piece.conv_pixels)
            if piece.part.stream is None:
                found += rates.weight * piece.filters  # the classifier's bias
        else:
            found += rates.conv(piece.read, narrow, 1, area) + rates.norm(narrow, area)
            found += rates.conv(narrow, piece.filters, 3, area)
    return found


def unit_costs(units: Units, keep: Mask, rates: Rates, image_size: ImageSize | None) -> Costs:
    """What each unit, and each part however narrow, costs by itself in the net that `keep` leaves."""
    each, reading = np.zeros(units.size), np.zeros(units.size)
    found = list(pieces(units, keep, image_size))
    upkeep, gather = np.zeros(len(found)), np.zeros(len(found))
    # How often a pixel of a block's channel is concatenated by the parts after the one at hand.
    copies = dict.fromkeys(range(len(units.streams) + 1), 0)
    for number in reversed(range(len(found))):
        piece = found[number]
        part, read, narrow, filters = piece.part, piece.read, piece.bottleneck, piece.filters
        area = piece.pixels
        if part.edges is None:
            norm = rates.norm(1, area) if units.config.stem == "imagenet" else 0.0
        else:
            norm = 0.0
            twice = 2 if piece.gathered > read else 1
            edge = rates.norm(1, area) + rates.gathered * area * twice
            if not piece.gathered:
                gather[number] = rates.gather + rates.gathered * read * area
            if narrow is None:
                # What such a layer reads is counted in its filters.
                reading[part.edges.units] = edge
                edge += rates.conv(1, filters, piece.kernel, piece.conv_pixels)
            else:
                edge += rates.conv(1, narrow, 1, area)
                reading[part.edges.units] = edge
            each[part.edges.units] = edge
            if part.sides is not None:
                # Where the other side stays, the norm channel stays.
                each[part.sides.group.units] = edge * ~_rival_stays(part.sides, keep)
        if part.bottleneck is not None:
            assert narrow is not None
            each[part.bottleneck.units] = (
                rates.filter(read, narrow, 1, area)
                + rates.norm(1, area)
                + rates.conv(1, filters, 3, area)
            )
            upkeep[number] = rates.norm(narrow, area)
        made = narrow or read, filters, piece.kernel, area  # the conv that makes channels
        own = rates.filter(*made)
        if part.is_dense_layer:
            upkeep[number] += rates.layer + rates.concatenated * piece.stream * area
            upkeep[number] += rates.conv(*made) - filters * own
        if part.stream is not None:
            later = copies[part.block if part.is_dense_layer else part.block + 1]
            siblings: int | np.ndarray = part.stream.siblings
            if part.siblings is not None:
                siblings = np.sum(part.siblings.halves(keep), axis=0)
                each[part.siblings.group.units] = own
            concatenated = rates.concatenated * part.stream.survivors * later
            each[part.stream.units] = siblings * own + norm + concatenated
        if filters:
            copies[part.block] += area
    return Costs(each, reading, upkeep, gather)


def _rival_stays(pairs: Pairs, keep: Mask) -> Mask:
    """Whether the other sibling of the pair stays, of each sibling."""
    both: Mask = np.logical_and(*pairs.halves(keep))
    return both[pairs.owner]
