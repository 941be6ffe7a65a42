"""A settled net: of each pair the one that wins, and no competition any more."""

from __future__ import annotations

import pytest
import torch
from oracle import masked, randomise_

from prune_dn.data.batches import read_batches
from prune_dn.errors import PruningError
from prune_dn.models import DenseNet, MaxFeatureMap, densenet
from prune_dn.pruning import PruneConfig, apply_plan, make_plan, prune, settling_plan
from prune_dn.pruning.calibration import collect
from prune_dn.pruning.statistics import Wins


def net_with(**options: object) -> DenseNet:
    made = densenet([3, 2], 8, bn_size=2, stem="cifar", num_classes=4, **options)
    return randomise_(made, 5).eval()


IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(3))
BOTH = {
    "mfm": {"denseblock1.*": "2/1", "transition1": "2/1"},
    "mfm_skipped": {"denseblock2.*": "2/1", "transition1": "2/1", "classifier": "2/1"},
}


def test_the_winner_of_each_pair_is_what_is_left() -> None:
    net = net_with(mfm=BOTH["mfm"])
    plan = settling_plan(net, IMAGES.split(4))
    small = apply_plan(net, plan)
    assert not any(isinstance(module, MaxFeatureMap) for module in small.modules())
    assert [x.out_channels for b in small.config.blocks for x in b] == [4, 4, 4, 8, 8]
    name = "features.denseblock1.denselayer2"
    found = collect(net, [f"{name}.mfm"], read_batches([IMAGES]), Wins)[f"{name}.mfm"]
    margins = found.margins.reshape(2, 4)
    winners = [int(unit) + 4 * int(margins[1, unit] > margins[0, unit]) for unit in range(4)]
    conv = net.get_submodule(f"{name}.conv2")
    assert torch.equal(small.get_submodule(f"{name}.conv2").weight, conv.weight[winners])
    assert plan.keep_indices[f"{name}.conv2"] == tuple(winners)


def test_a_clear_winner_changes_nothing() -> None:
    """Where one sibling always wins, the settled net gives the same answers."""
    net = net_with(mfm={"transition1": "2/1"}).double()
    conv = net.features.transition1.conv
    with torch.no_grad():
        conv.weight.abs_()  # of inputs of at least 0
        conv.weight[: len(conv.weight) // 2] *= -1
    x = IMAGES.double()
    small = apply_plan(net, settling_plan(net, [x]))
    assert small.features.transition1.mfm is None
    torch.testing.assert_close(small(x), net(x))


def test_a_request_to_settle_is_the_same_everywhere() -> None:
    net, images = net_with(mfm=BOTH["mfm"]), IMAGES.split(4)
    plan = settling_plan(net, images)
    asked = PruneConfig(None, settle=True, criterion="mfm_win_rate", compensate="none")
    assert make_plan(net, asked, calibration=images) == plan
    small, weights = apply_plan(net, plan), prune(net, asked, calibration=images).state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in small.state_dict().items())
    for wrong, beside in (({"unit": "macs"}, "unit"), ({"pruning_ratio": 0.5}, "pruning_ratio")):
        with pytest.raises(PruningError, match=f"settle cuts .* nothing else; remove {beside}"):
            PruneConfig(**{"pruning_ratio": None, "settle": True, **wrong})
    with pytest.raises(PruningError, match="pruning_ratio is None; it must be a number"):
        make_plan(net, None)


@pytest.mark.parametrize("criterion", ["mfm_win_rate", "l1", "random"])
def test_all_three_places_settle(criterion) -> None:
    net = net_with(**BOTH).double()
    images = [IMAGES] if criterion == "mfm_win_rate" else None
    plan = settling_plan(net, images, criterion=criterion)
    small = apply_plan(net, plan)
    parts = [*(x for b in small.config.blocks for x in b), *small.config.transitions]
    assert all(part.mfm is None and part.rival_indices is None for part in parts)
    assert small.config.classifier_rivals is None
    x = IMAGES.double()
    torch.testing.assert_close(small(x), masked(net, plan)(x), rtol=1e-9, atol=1e-9)


def test_some_have_settled_before() -> None:
    net = net_with(**BOTH)
    once = apply_plan(net, settling_plan(net, [IMAGES]))
    with pytest.raises(PruningError, match="nothing to settle: this net has no MFM"):
        settling_plan(once, [IMAGES])


def test_errors() -> None:
    with pytest.raises(
        PruningError, match=r"transition1.mfm is an MFM 3/2, where no sibling can go"
    ):
        settling_plan(net_with(mfm={"transition1": "3/2"}), [IMAGES])
    with pytest.raises(PruningError, match="needs calibration images"):
        settling_plan(net_with(**BOTH))
    with pytest.raises(PruningError, match="calibration has no effect"):
        settling_plan(net_with(**BOTH), [IMAGES], criterion="l1")
    with pytest.raises(PruningError, match="criterion 'l3' is unknown"):
        settling_plan(net_with(**BOTH), [IMAGES], criterion="l3")
