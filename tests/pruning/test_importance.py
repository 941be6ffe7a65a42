"""Criteria against plain formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import randomise_

from prune_dn.data.batches import read_batches
from prune_dn.errors import PruningError
from prune_dn.models import DenseNet, densenet
from prune_dn.pruning import make_plan
from prune_dn.pruning.criteria import CRITERIA, Criterion, register_criterion
from prune_dn.pruning.importance import importance
from prune_dn.pruning.parts import STAYS
from prune_dn.pruning.units import Units, layers

FORMULAS = {
    "bn_scale": lambda norm, conv, c: abs(norm.weight[c].item()),
    "l1": lambda norm, conv, c: conv.weight[:, c].abs().sum().item(),
    "l2": lambda norm, conv, c: conv.weight[:, c].flatten().norm().item(),
    "fpgm": lambda norm, conv, c: sum(
        (conv.weight[:, c] - conv.weight[:, other]).flatten().norm().item()
        for other in range(conv.weight.shape[1])
    ),
    "lamp": lambda norm, conv, c: _lamp(conv.weight.transpose(0, 1).flatten(1), c),
}


def _lamp(rows, c):
    squares = rows.square().sum(1)
    return (squares[c] / squares[squares >= squares[c]].sum()).item()


@pytest.mark.parametrize("criterion", sorted(FORMULAS))
def test_a_stream_channel_counts_for_every_reader(criterion) -> None:
    net = randomise_(densenet([2, 1], 4, bn_size=2, stem="cifar", num_classes=3), 5)
    units = Units(net.config.graph())
    scores = importance(net, units, criterion)
    block, f = net.features.denseblock1, FORMULAS[criterion]
    by_name = {(g.kind, g.name): scores[g.units] for g in units.groups}

    for c in range(8):  # the stem: read by both layers and the transition
        expected = (
            f(block.denselayer1.norm1, block.denselayer1.conv1, c)
            + f(block.denselayer2.norm1, block.denselayer2.conv1, c)
            + f(net.features.transition1.norm, net.features.transition1.conv, c)
        )
        assert by_name["stream", "features.conv0"][c] == pytest.approx(expected, rel=1e-5)
    layer = block.denselayer2
    for c in range(8):
        narrow = by_name["bottleneck", "features.denseblock1.denselayer2.conv1"][c]
        assert narrow == pytest.approx(f(layer.norm2, layer.conv2, c), rel=1e-5)
    for c in range(4):  # layer 2 is read by the transition alone, at position 12 + c
        made = by_name["stream", "features.denseblock1.denselayer2.conv2"][c]
        edge = by_name["edge", "features.transition1.norm"][12 + c]
        assert made == pytest.approx(edge)
    last = by_name["edge", "features.norm5"]
    assert last[2] == pytest.approx(f(net.features.norm5, net.classifier, 2), rel=1e-5)


def test_an_mfm_unit_counts_for_all_that_it_makes() -> None:
    net = densenet([1], 6, bn_size=None, stem="cifar", num_classes=3, mfm={"*": "3/2"})
    with torch.no_grad():
        net.features.norm5.weight.copy_(torch.arange(16.0))
    units = Units(net.config.graph())
    scores = importance(net, units, "bn_scale")
    group = next(g for g in units.groups if g.name.endswith("denselayer1.conv1"))
    # 6 filters, 2 units; unit u makes channels 12 + u (maximum) and 14 + u (median)
    np.testing.assert_allclose(scores[group.units], [12 + 14, 13 + 15])


def test_registering() -> None:
    @register_criterion("constant")
    def constant(reading):
        return torch.ones(reading.weight.shape[1])

    try:
        with pytest.raises(PruningError, match="'constant' is registered already"):
            register_criterion("constant")(constant)
        net = densenet([1], 4, stem="cifar", num_classes=3)
        assert set(importance(net, Units(net.config.graph()), "constant")) == {1.0, 2.0}
        CRITERIA["constant"] = Criterion(lambda reading: torch.ones(3), None)
        with pytest.raises(PruningError, match="gave shape"):
            importance(net, Units(net.config.graph()), "constant")
    finally:
        del CRITERIA["constant"]


def small_net() -> DenseNet:
    return randomise_(
        densenet([2, 1], 4, bn_size=2, stem="cifar", num_classes=3, mfm={"transition1": "2/1"}), 5
    ).eval()


def batches(seed: int = 0, sizes: tuple[int, ...] = (3, 2)):
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 3, 8, 8, generator=g), torch.randint(3, (n,), generator=g)) for n in sizes
    ]


@pytest.mark.parametrize("criterion", ["activation", "taylor", "fisher"])
def test_data_criteria_against_one_image_at_a_time(criterion) -> None:
    net = small_net()
    data = batches()
    units = Units(net.config.graph())
    scores = importance(net, units, criterion, calibration=read_batches(data))
    for name, _, inputs in layers(units):
        if (inputs == STAYS).all():  # it reads images
            continue
        found = []
        pairs = [pair for xs, ys in data for pair in zip(xs.split(1), ys.split(1), strict=True)]
        for x, y in pairs:
            seen = []
            hook = net.get_submodule(name).register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0])
            )
            loss = torch.nn.functional.cross_entropy(net(x), y)
            hook.remove()
            (gradient,) = torch.autograd.grad(loss, seen)
            product = (seen[0] * gradient).reshape(seen[0].shape[1], -1).sum(1)
            mean = seen[0].detach().reshape(seen[0].shape[1], -1).mean(1)
            found.append(
                {"activation": mean, "taylor": product.abs(), "fisher": product.square() / 2}[
                    criterion
                ]
            )
        expected = torch.stack(found).mean(0).detach()
        np.testing.assert_allclose(scores[inputs], expected, rtol=2e-4, atol=1e-7)


def test_scoring_leaves_the_model_alone() -> None:
    net = small_net().train()
    net.memory_efficient = True
    before = {k: v.clone() for k, v in net.state_dict().items()}
    importance(
        net, Units(net.config.graph()), "reconstruction", calibration=read_batches(batches())
    )
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert all(m.training and not m._forward_hooks for m in net.modules())
    assert net.memory_efficient


def test_batches_make_no_difference_and_the_seed_makes_it_repeatable() -> None:
    net = small_net()
    units, x = Units(net.config.graph()), batches(sizes=(6,))[0][0]
    one = importance(net, units, "activation", calibration=read_batches([x]))
    many = importance(net, units, "activation", calibration=read_batches(x.split(2)))
    np.testing.assert_allclose(one, many, rtol=1e-4, atol=1e-7)
    a, b = (
        importance(
            net, units, "reconstruction", calibration=read_batches([x], loss="softmax"), seed=1
        )
        for _ in range(2)
    )
    np.testing.assert_array_equal(a, b)


def test_what_a_criterion_needs() -> None:
    net = small_net()
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(PruningError, match=r"'taylor' needs calibration images.*labels"):
        make_plan(net, 0.5, criterion="taylor")
    with pytest.raises(PruningError, match="needs labels: give calibration batches of"):
        make_plan(net, 0.5, criterion="taylor", calibration=[x])
    with pytest.raises(PruningError, match="calibration has no effect: criterion 'l2'"):
        make_plan(net, 0.5, criterion="l2", calibration=[x])
    for wrong, text in (
        ([], "no images"),
        (x, "one tensor"),
        ([x[0]], r"batch 0 is a tensor \(3, 8, 8\)"),
        (["a"], "batch 0 is a str"),
        ([x, x * float("nan")], "batch 1 holds NaN"),
        ([x[:, :1]], "have 1 channels; the model takes 3"),
        ([x[:, :, :1, :1]], "cannot run on calibration images of shape"),
    ):
        with pytest.raises(PruningError, match=text):
            make_plan(net, 0.5, criterion="reconstruction", calibration=wrong)
    with pytest.raises(PruningError, match="labels must be integers from 0 to 2"):
        make_plan(net, 0.5, criterion="fisher", calibration=[(x, torch.tensor([0, 3]))])
    with pytest.raises(
        PruningError, match="need 'images' is no statistic: give a dataclass with `slopes`"
    ):
        register_criterion("x", need="images")
