"""Compensation against direct least squares, and against doing nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import randomise_

from prune_dn.errors import PruningError
from prune_dn.models import densenet
from prune_dn.pruning import (
    Plan,
    apply_plan,
    compensate,
    compensate_plan,
    make_plan,
    prune,
    settling_plan,
)

KINDS = {
    "basic": {"bn_size": None},
    "bottleneck": {"bn_size": 2},
    "mfm": {"bn_size": 2, "mfm": {"denseblock1.*": "3/2", "transition1": "2/1"}},
    "competing": {"bn_size": 2, "mfm_skipped": {"*": "2/1"}},
    "imagenet": {"bn_size": 2, "stem": "imagenet"},
}


def case(kind: str, ratio: float = 0.4):
    torch.manual_seed(0)
    net = densenet([3, 2], 6, **{"stem": "cifar", "num_classes": 5, **KINDS[kind]})
    net = randomise_(net, 2).eval()
    side = 32 if kind == "imagenet" else 8
    batches = [torch.randn(32, 3, side, side) for _ in range(4)]
    net.train()(torch.cat(batches))  # running statistics of these images
    net.eval()
    plan = make_plan(
        net,
        ratio,
        unit="macs",
        input_size=side,
        criterion="reconstruction",
        units=("stream", "bottleneck", "edge"),
        calibration=batches,
    )
    return net, plan, batches


def error(net, dense, batches) -> float:
    with torch.no_grad():
        return sum(float(F.mse_loss(net(x), dense(x))) for x in batches)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_each_step_comes_closer_to_the_dense_net(kind) -> None:
    net, plan, batches = case(kind)
    cut = apply_plan(net, plan)
    before = {k: v.clone() for k, v in cut.state_dict().items()}
    mean = compensate_plan(cut, net, plan, batches, "mean")
    refitted = compensate_plan(cut, net, plan, batches)
    fresh = [torch.randn_like(x) for x in batches]
    for images in (batches, fresh):
        errors = [error(n, net, images) for n in (refitted, mean, cut)]
        assert errors[0] < 0.6 * errors[2]
        assert errors[1] < errors[2] or kind == "mfm"
    assert all(torch.equal(v, before[k]) for k, v in cut.state_dict().items())
    assert refitted.config == cut.config


@pytest.mark.parametrize("units", [("sibling",), ("sibling", "stream", "edge")])
def test_who_stands_alone_follows_its_whole_unit(units) -> None:
    """All filters of layer 1 stand alone: each is the least-squares fit of the pair's maximum."""
    net, _, batches = case("bottleneck")
    net = densenet([3, 2], 6, bn_size=2, stem="cifar", num_classes=5, mfm={"denseblock1.*": "2/1"})
    randomise_(net, 2).eval()
    plan = settling_plan(net, batches)
    if units != ("sibling",):
        plan = make_plan(net, 0.2, unit="macs", units=units, criterion="l2", input_size=8)
    cut = apply_plan(net, plan)
    refitted = compensate_plan(cut, net, plan, batches)
    fresh = [torch.randn_like(x) for x in batches]
    for images in (batches, fresh):
        assert error(refitted, net, images) < 0.7 * error(cut, net, images)
    if units == ("sibling",):
        name = "features.denseblock1.denselayer1"
        inputs, units_of = [], []
        net.get_submodule(f"{name}.conv2").register_forward_pre_hook(
            lambda _, args: inputs.append(args[0])
        )
        net.get_submodule(f"{name}.mfm").register_forward_hook(
            lambda _, __, out: units_of.append(out)
        )
        with torch.no_grad():
            for x in batches:
                net(x)
        rows = F.unfold(torch.cat(inputs), 3, padding=1).transpose(1, 2).flatten(0, 1).double()
        target = torch.cat(units_of).permute(0, 2, 3, 1).flatten(0, 2).double()
        design = torch.cat([rows, torch.ones(len(rows), 1)], 1)
        best = design @ torch.linalg.lstsq(design, target).solution
        weight = refitted.get_submodule(f"{name}.conv2").weight.detach().flatten(1).double()
        found = rows @ weight.T
        found = found + (target - found).mean(0)  # the norms behind take the mean
        assert float(F.mse_loss(found, target)) < 1.02 * float(F.mse_loss(best, target))


def test_the_classifier_is_the_least_squares_solution() -> None:
    """With only the classifier's inputs cut, the result is lstsq with a constant column."""
    torch.manual_seed(1)
    net = randomise_(densenet([2], 6, bn_size=None, stem="cifar", num_classes=5), 1).eval()
    plan = make_plan(net, 0.2, criterion="l2", units=("edge",), protect=("features.denseblock1",))
    # A filter that only the classifier read went too; nothing else did.
    assert "features.norm5" in plan.keep_indices
    assert not any(name.endswith("norm1") for name in plan.keep_indices)
    batches = [torch.randn(200, 3, 8, 8) for _ in range(2)]
    small = compensate_plan(apply_plan(net, plan), net, plan, batches)
    seen: list[torch.Tensor] = []
    net.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        targets = torch.cat([net(x) for x in batches]).double()
        got = torch.cat([small(x) for x in batches]).double()
    inputs = torch.cat(seen).double()[:, list(plan.keep_indices["features.norm5"])]
    design = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
    best = design @ torch.linalg.lstsq(design, targets).solution
    assert float(F.mse_loss(got, targets)) == pytest.approx(
        float(F.mse_loss(best, targets)), rel=0.02
    )


def test_mean_makes_the_means_of_bottlenecks_right() -> None:
    net, _, batches = case("bottleneck")
    plan = make_plan(net, 0.3, criterion="l2", scope="local", units=("edge",))
    cut = apply_plan(net, plan)
    fixed = compensate_plan(cut, net, plan, batches, "mean")
    name = "features.denseblock1.denselayer1.norm2"  # the first that a cut reaches
    assert "features.denseblock1.denselayer1.norm1" in plan.keep_indices
    means = []
    for model in (net, cut, fixed):
        out: list[torch.Tensor] = []
        model.get_submodule(name).register_forward_hook(lambda m, a, o, out=out: out.append(o))
        with torch.no_grad():
            for x in batches:
                model(x)
        means.append(torch.cat(out).mean((0, 2, 3)))
    # Half the pixels are seen, so not to the last digit.
    assert (means[0] - means[2]).abs().max() < 0.02 * (means[0] - means[1]).abs().max()


def test_a_mean_is_not_moved_through_a_maximum() -> None:
    """Of 15 channels that layer 3 reads, 7 pairs and one of layer 1's, which stands alone."""
    net = densenet([3], 6, num_init_features=3, bn_size=2, stem="cifar", num_classes=5,
                   mfm_skipped={"*3": "2/1"})  # fmt: skip
    randomise_(net, 2).eval()
    first = "features.denseblock1.denselayer1"
    plan = make_plan(net, 0.05, criterion="l2", units=["bottleneck"], scope="local")
    assert f"{first}.conv1" in plan.keep_indices
    cut = apply_plan(net, plan)
    fixed = compensate_plan(cut, net, plan, [torch.randn(32, 3, 8, 8) for _ in range(2)], "mean")
    before, after = (n.features.denseblock1.denselayer3.norm1.running_mean for n in (cut, fixed))
    moved = (before != after).tolist()
    assert moved == [False] * 7 + [True]


def test_training_flags_dtype_and_repeatability() -> None:
    net, plan, batches = case("basic")
    cut = apply_plan(net.double().train(), plan)
    a, b = (compensate_plan(cut, net, plan, [x.double() for x in batches]) for _ in range(2))
    assert all(m.training for m in a.modules())
    assert {p.dtype for p in a.parameters()} == {torch.float64}
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_prune_takes_it_all_in_one_call() -> None:
    net, plan, batches = case("bottleneck")
    small = prune(
        net,
        0.4,
        unit="macs",
        criterion="reconstruction",
        units=("stream", "bottleneck", "edge"),
        compensate="least_squares",
        calibration=iter(batches),
        input_size=8,
    )
    assert small.config == plan.config_after
    plain = prune(net, 0.4, compensate="mean", calibration=iter(batches))
    assert plain.config == prune(net, 0.4).config


def test_a_layer_that_went_whole() -> None:
    net, plan, batches = case("bottleneck", 0.93)
    names = {f"{b}.{x.name}" for b, block in enumerate(plan.config_after.blocks) for x in block}
    assert len(names) < 5
    compensate_plan(apply_plan(net, plan), net, plan, batches)


@pytest.mark.parametrize("divergences", [(0.1, 0.2), (0.1, float("nan")), (0.2, 0.1)])
def test_a_refit_that_harms_is_told(monkeypatch: pytest.MonkeyPatch, divergences) -> None:
    net, _, batches = case("bottleneck")
    nothing = Plan(net.config, net.config, {}, {}, {}, {})
    left = iter(divergences)
    monkeypatch.setattr(compensate, "_distance", lambda *_: next(left))
    if divergences == (0.2, 0.1):
        compensate_plan(net, net, nothing, batches)  # a warning would be an error
    else:
        with pytest.warns(UserWarning, match="compensate='least_squares' did not help"):
            compensate_plan(net, net, nothing, batches)


def test_errors() -> None:
    net = densenet([1], 4, stem="cifar", num_classes=3)
    with pytest.raises(PruningError, match="compensate 'lsq' is unknown; choose from none, mean"):
        prune(net, 0.5, compensate="lsq", calibration=[torch.randn(2, 3, 8, 8)])
    with pytest.raises(PruningError, match="compensate='mean' needs calibration images"):
        prune(net, 0.5, compensate="mean")
