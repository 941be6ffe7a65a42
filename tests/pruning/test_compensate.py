"""Compensation against direct least squares, and against doing nothing."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from oracle import randomise_

from prune_dn.errors import DataError, PruningError
from prune_dn.models import densenet
from prune_dn.pruning import (
    Plan,
    apply_plan,
    compensate_plan,
    judge,
    least_squares,
    make_plan,
    prune,
    refit,
    settling_plan,
)
from prune_dn.pruning.judge import split_images
from prune_dn.pruning.least_squares import Moments, solve

KINDS = {
    "basic": {"bn_size": None},
    "bottleneck": {"bn_size": 2},
    "mfm": {"bn_size": 2, "mfm": {"denseblock1.*": "3/2", "transition1": "2/1"}},
    "competing": {"bn_size": 2, "mfm_skipped": {"*": "2/1"}},
    "imagenet": {"bn_size": 2, "stem": "imagenet"},
}


def case(kind: str, ratio: float = 0.4, outputs: int = 5):
    torch.manual_seed(0)
    net = densenet([3, 2], 6, **{"stem": "cifar", "num_classes": outputs, **KINDS[kind]})
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
        loss="softmax" if outputs > 1 else "mse",
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
    net = densenet([3, 2], 6, bn_size=2, stem="cifar", num_classes=5, mfm={"denseblock1.*": "2/1"})
    randomise_(net, 2).eval()
    batches = [torch.randn(32, 3, 8, 8) for _ in range(2)]  # so few that no pixel is drawn
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


def test_the_classifier_is_the_least_squares_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    """With only the classifier's inputs cut, and hardly a ridge, it is lstsq with a constant column."""
    monkeypatch.setattr(
        least_squares, "RIDGES", (1e-9, 1e-8)
    )  # of two as good, rounding would choose
    torch.manual_seed(1)
    net = randomise_(densenet([2], 6, bn_size=None, stem="cifar", num_classes=5), 1).eval()
    plan = make_plan(net, 0.2, criterion="l2", units=("edge",), protect=("features.denseblock1",))
    # A filter that only the classifier read went too; nothing else did.
    assert "features.norm5" in plan.keep_indices
    for name, kept in plan.keep_indices.items():
        if name.endswith("norm1"):  # in another order, and whole
            assert sorted(kept) == list(range(len(kept)))
            assert len(kept) == net.get_submodule(name).num_features
    batches = [torch.randn(60, 3, 8, 8) for _ in range(2)]  # so few that all are fitted
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
        float(F.mse_loss(best, targets)), rel=1e-3
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


def test_the_mean_behind_a_maximum_is_that_of_the_dense_net() -> None:
    """Of 15 channels that layer 3 reads, 7 pairs and one of layer 1's, which stands alone."""
    net = densenet([3], 6, num_init_features=3, bn_size=2, stem="cifar", num_classes=5,
                   mfm_skipped={"*3": "2/1"})  # fmt: skip
    randomise_(net, 2).eval()
    first = "features.denseblock1.denselayer1"
    plan = make_plan(net, 0.05, criterion="l2", units=["bottleneck"], scope="local")
    assert f"{first}.conv1" in plan.keep_indices
    cut = apply_plan(net, plan)
    images = [torch.randn(32, 3, 8, 8) for _ in range(2)]
    fixed = compensate_plan(cut, net, plan, images, "mean")
    seen = {}
    for name, model in (("dense", net), ("fixed", fixed)):
        norm = model.features.denseblock1.denselayer3.norm1
        hook = norm.register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: out.mean((0, 2, 3))})
        )
        model(torch.cat(images))
        hook.remove()
    torch.testing.assert_close(seen["fixed"], seen["dense"], rtol=1e-4, atol=1e-4)


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
        loss="softmax",
        units=("stream", "bottleneck", "edge"),
        compensate="least_squares",
        calibration=iter(batches),
        input_size=8,
    )
    assert small.config == plan.config_after
    plain = prune(net, 0.4, criterion="bn_scale", compensate="mean", calibration=iter(batches))
    assert plain.config == prune(net, 0.4).config


def test_a_layer_that_went_whole() -> None:
    net, plan, batches = case("bottleneck", 0.93)
    names = {f"{b}.{x.name}" for b, block in enumerate(plan.config_after.blocks) for x in block}
    assert len(names) < 5
    compensate_plan(apply_plan(net, plan), net, plan, batches)


def misled(batches):
    """Nine images of ten are of another kind, and those the refit goes by."""
    images = torch.cat(batches) + 10
    images[9::10] -= 10
    return list(images.split(32))


@pytest.mark.parametrize("loss", [None, "softmax", "sigmoid"])
@pytest.mark.parametrize("outputs", [1, 5])
@pytest.mark.parametrize("method", ["mean", "least_squares"])
def test_a_refit_that_harms_is_dropped(method, outputs, loss) -> None:
    """Judged on images that it did not see; of one output too, of which a softmax says nothing."""
    net, plan, batches = case("basic", 0.2, outputs)
    net, batches = net.double(), misled([x.double() for x in batches])
    cut = apply_plan(net, plan)
    if (outputs, loss) == (1, "softmax"):
        with pytest.raises(DataError, match="'softmax' of one output is always 0"):
            compensate_plan(cut, net, plan, batches, method, loss=loss)
        return
    with pytest.warns(UserWarning, match="did not help") as told:
        assert compensate_plan(cut, net, plan, batches, method, loss=loss) is cut
    (text,) = (str(warning.message) for warning in told)
    unseen = torch.cat(batches)[9::10]
    with torch.no_grad():
        found, target = (n(unseen) for n in (cut, net))
    away = {
        None: lambda: (found - target).square().sum() / 2,
        "softmax": lambda: F.kl_div(found.log_softmax(1), target.softmax(1), reduction="sum"),
        "sigmoid": lambda: (
            F.binary_cross_entropy_with_logits(found, target.sigmoid(), reduction="sum")
            - F.binary_cross_entropy_with_logits(target, target.sigmoid(), reduction="sum")
        ),
    }[loss]()
    expected = (
        rf"compensate='{method}' did not help, so the net is left as it was cut: on the 12 calibration "
        rf"images that the refit did not see its {loss or 'mse'} distance from the dense net is "
        r"([\d.e+-]+), compensated ([\d.e+-]+); give more or better images, or compensate='none'"
    )
    before, after = map(float, re.fullmatch(expected, text).groups())
    assert before == pytest.approx(float(away) / len(unseen), rel=1e-3)
    assert after > before


def test_few_images_are_fitted_and_judged_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 127 all, of 128 a tenth is held out; whether they come in one batch or many is equal."""
    images = torch.arange(127.0)[:, None]
    for batches in ([images], list(images.split(1)), list(images.split(50))):
        fitted, judged = split_images(batches)
        assert torch.equal(torch.cat(list(judged)), images)
        assert torch.equal(torch.cat(list(fitted)), images)
    images = torch.arange(128.0)[:, None]
    for batches in ([images], list(images.split(1)), list(images.split(50))):
        fitted, judged = split_images(batches)
        assert torch.equal(torch.cat(list(judged)), images[9::10])
        both = torch.cat([*fitted, *judged])
        assert torch.equal(both.sort(0).values, images)
    net, plan, batches = case("basic")
    cut, left = apply_plan(net, plan), iter([0.1, 0.2])
    monkeypatch.setattr(judge.Judge, "__call__", lambda *_: next(left))
    with pytest.warns(
        UserWarning, match=r"on the 64 calibration images its mse distance .* is 0\.1,"
    ):
        assert compensate_plan(cut, net, plan, batches[:2]) is cut


def test_batches_are_no_more_than_a_way_to_give_images() -> None:
    net, plan, batches = case("bottleneck")
    net, images = net.double(), torch.cat(batches).double()
    cut = apply_plan(net, plan)
    one, many = (
        compensate_plan(cut, net, plan, given)
        for given in ([images[:64]], list(images[:64].split(30)))  # so few that no pixel is drawn
    )
    for name, value in one.state_dict().items():
        torch.testing.assert_close(many.state_dict()[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("count", [1, 8, 16, 128])
def test_rounding_is_neither_harm_nor_help(kind, count) -> None:
    """Where the cut changes nothing there is nothing to refit, nor anything to warn of."""
    net, _, batches = case(kind)
    nothing = Plan(net.config, net.config, {}, {}, {}, {})
    images = torch.cat(batches)[:count]
    for loss in (None, "softmax"):
        same = compensate_plan(net, net, nothing, [images], loss=loss)
        with torch.no_grad():
            torch.testing.assert_close(same(images), net(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 1e-9), (torch.bfloat16, 2e-3), (torch.float64, 1e-26)]
)
def test_the_floor_is_about_what_rounding_does(dtype, most) -> None:
    """Above what the same net in float64 differs by; `most` is its share of the outputs' squares."""
    for kind in KINDS:
        net, _, batches = case(kind)
        net, images = net.to(dtype), [x.to(dtype) for x in batches]
        with torch.no_grad():
            found = judge.Judge(net, images, None)
            exact = torch.cat([net.double()(x.double()) for x in images])
        rounded = torch.cat([t for (t,) in found.targets])
        off = float((rounded - exact).square().sum()) / 2 / 128
        assert off < found.rounding or off == 0
        assert found.rounding < most * float(exact.square().sum()) / 2 / 128


def test_answers_that_are_no_numbers() -> None:
    """A dense net that gives NaN is refused; a refit that does is dropped."""
    net, plan, batches = case("basic")
    cut = apply_plan(net, plan)
    broken = copy.deepcopy(net)
    broken.classifier.weight.data.fill_(3e38)  # a sum overflows
    with pytest.raises(
        PruningError, match="the dense net gives NaN or infinity on the calibration"
    ):
        compensate_plan(cut, broken, plan, batches)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refit, "solve", lambda halves, both, **_: both.cross * float("nan"))
        with pytest.warns(
            UserWarning, match=r"distance from the dense net is \S+, compensated nan;"
        ):
            assert compensate_plan(cut, net, plan, batches) is cut


def test_a_reader_keeps_its_weights_where_no_ridge_does_better() -> None:
    """Noise on the half that is fitted, none on the other: only the present weights are right."""
    generator = torch.Generator().manual_seed(0)
    weight, halves = torch.zeros(2, 6), []
    for noise in (1.0, 0.0):
        halves.append(Moments(weight, True))
        x = torch.randn(12, 6, generator=generator)
        halves[-1].add(x, noise * torch.randn(12, 2, generator=generator))
    assert not solve(halves, halves[0] + halves[1], centred=True).any()
    assert solve(halves[:1] * 2, halves[0] + halves[0], centred=True).any()


def test_errors() -> None:
    net = densenet([1], 4, stem="cifar", num_classes=3)
    with pytest.raises(PruningError, match="compensate 'lsq' is unknown; choose from none, mean"):
        prune(net, 0.5, compensate="lsq", calibration=[torch.randn(2, 3, 8, 8)])
    with pytest.raises(PruningError, match="compensate='mean' needs calibration images"):
        prune(net, 0.5, compensate="mean")
