"""Calibration at the public face: what outputs mean, half precision, and modes of autograd around it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from oracle import randomise_
from torch import nn

from prune_dn import make_plan, prune
from prune_dn.data.batches import read_batches
from prune_dn.errors import PruneDNError
from prune_dn.models import DenseNet, densenet, light_cnn_9
from prune_dn.pruning import apply_plan, compensate_plan, settling_plan
from prune_dn.pruning.calibration import collect
from prune_dn.pruning.importance import importance
from prune_dn.pruning.sensitivity import sensitivity
from prune_dn.pruning.statistics import Gram
from prune_dn.pruning.units import Units


def net(classes: int = 3, seed: int = 5) -> DenseNet:
    model = densenet([2, 2], 4, bn_size=2, stem="cifar", num_classes=classes)
    return randomise_(model, seed).eval()


def plain() -> nn.Module:
    """A small CNN that is no DenseNet."""
    convs = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3)]
    return randomise_(nn.Sequential(*convs, *head), 0).eval()


def images(n: int = 8, seed: int = 0, side: int = 8) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def scores(model: DenseNet, criterion: str, data: list[object], loss=None) -> np.ndarray:
    batches = read_batches(data, loss=loss)
    return importance(model, Units(model.config.graph()), criterion, calibration=batches)


LABELS = {
    ("sigmoid", 1): torch.tensor([0, 1, 1, 0, 1, 0, 0, 1]),
    ("sigmoid", 14): torch.rand(8, 14, generator=torch.Generator().manual_seed(1)).round(),
    ("mse", 1): torch.linspace(-2, 5, 8),
    ("mse", 6): torch.linspace(-3, 3, 48).reshape(8, 6),
}
ERRORS: dict[str, Callable[..., torch.Tensor]] = {
    "sigmoid": nn.functional.binary_cross_entropy_with_logits,
    "mse": lambda out, labels, reduction: nn.functional.mse_loss(out, labels, reduction="sum") / 2,
}


@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
@pytest.mark.parametrize(("loss", "outputs"), list(LABELS))
def test_one_output_and_many_labels_against_one_image_at_a_time(loss, outputs, criterion) -> None:
    model, x, labels = net(outputs), images(), LABELS[loss, outputs]
    found = scores(model, criterion, [(x[:5], labels[:5]), (x[5:], labels[5:])], loss)
    layer = model.get_submodule("features.denseblock2.denselayer1.conv1")
    expected = torch.zeros(layer.in_channels)
    for image, label in zip(x, labels, strict=True):
        seen: list[torch.Tensor] = []
        hook = layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        out = model(image[None])
        hook.remove()
        error = ERRORS[loss](out, label.float().reshape(out.shape), reduction="sum")
        (gradient,) = torch.autograd.grad(error, seen)
        slope = (seen[0] * gradient).sum((0, 2, 3)).detach()
        expected += (slope.abs() if criterion == "taylor" else slope.square() / 2) / 8
    group = next(
        g
        for g in Units(model.config.graph()).groups
        if g.name == "features.denseblock2.denselayer1.norm1"
    )
    np.testing.assert_allclose(found[group.units], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("criterion", ["reconstruction", "taylor", "fisher"])
@pytest.mark.parametrize(("loss", "outputs"), list(LABELS))
def test_what_nobody_hears_goes_first(loss, outputs, criterion) -> None:
    """And nearly all that is heard has a score of its own, in no order of numbers."""
    model, labels = net(outputs), LABELS[loss, outputs]
    with torch.no_grad():
        model.classifier.weight[:, 6:9] = 0
    data: list[object] = [(images(), labels)]
    found = scores(model, criterion, data, loss)
    last = next(g for g in Units(model.config.graph()).groups if g.name == "features.norm5")
    assert found[last.units][6:9].max() == found[last.units].min() == 0
    stream = np.concatenate(
        [found[g.units] for g in Units(model.config.graph()).groups if g.kind == "stream"]
    )
    assert len(np.unique(stream)) > 0.8 * len(stream)
    assert not np.array_equal(np.argsort(stream), np.arange(len(stream)))
    plan = make_plan(model, 0.3, criterion=criterion, calibration=data, loss=loss)
    assert plan.requested["loss"] == loss


def test_the_sensitivity_of_outputs_is_their_fisher_information() -> None:
    """p (1 - p) for yes and no, 1 for numbers with errors of unit variance."""
    model = net(4)
    x = images(1).expand(4000, -1, -1, -1)
    p = model(x[:1])[0].detach().double().sigmoid()
    for loss, expected in (("sigmoid", p * (1 - p)), ("mse", torch.ones(4).double())):
        found = collect(model, ["classifier"], read_batches(x.split(1000), loss=loss), Gram)
        torch.testing.assert_close(
            found["classifier"].sensitivity, expected, rtol=0.1, atol=0.01
        )  # 4,000 draws


def test_a_callable_follows_the_labels() -> None:
    model, labels = net(1), LABELS["sigmoid", 1][:, None].float()
    data: list[object] = [(images()[:6], labels[:6]), (images()[6:], labels[6:])]
    named = scores(model, "taylor", data, "sigmoid")
    np.testing.assert_allclose(scores(model, "taylor", data, nn.BCEWithLogitsLoss()), named, 1e-4)
    found = scores(model, "reconstruction", data, nn.BCEWithLogitsLoss())
    assert (found > 0).mean() > 0.9
    plan = make_plan(model, 0.3, criterion="fisher", calibration=data, loss=nn.BCEWithLogitsLoss())
    assert plan.requested["loss"] == "BCEWithLogitsLoss"
    with pytest.raises(PruneDNError, match=r"needs labels: .* batch 0 has none"):
        make_plan(model, 0.3, criterion="reconstruction", calibration=[images()], loss=nn.MSELoss())


class PerPixel(nn.Module):
    """A segmentation net: a dict of maps of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return {"out": self.head(self.body(x))}


def test_predictions_per_pixel() -> None:
    """With one prediction per image, repeated: scores are those of the whole map's loss."""
    model = randomise_(PerPixel(), 3).eval()
    plain = nn.Sequential(*model.body, model.head)
    classes = torch.randint(4, (6, 8, 8), generator=torch.Generator().manual_seed(0))
    data = [(images(6), classes)]
    by_name = prune(plain, 0.5, criterion="taylor", compensate="none", calibration=data)
    guessed = prune(
        plain, 0.5, criterion="taylor", compensate="none", calibration=data, loss="softmax"
    )
    assert torch.equal(by_name[0].weight, guessed[0].weight)

    def loss(outputs, labels):
        return nn.functional.cross_entropy(outputs["out"], labels)

    small = prune(model, 0.5, criterion="taylor", compensate="none", calibration=data, loss=loss)
    assert torch.equal(small.body[0].weight, by_name[0].weight)
    seen = model.body(images(6)).detach().requires_grad_()
    error = nn.functional.cross_entropy(model.head(seen), classes, reduction="sum")
    slope = (torch.autograd.grad(error, seen)[0] * seen).sum((2, 3)).abs().mean(0)
    kept = slope.topk(len(small.body[0].weight)).indices.sort().values
    assert torch.equal(small.body[0].weight, model.body[0].weight[kept])
    with pytest.raises(
        PruneDNError, match=r"batch 0: the model gives a dict; .* Give loss='mse', a callable"
    ):
        prune(model, 0.5, criterion="taylor", compensate="none", calibration=data)


@pytest.mark.parametrize(
    ("classes", "criterion", "data", "loss", "message"),
    [
        (3, "reconstruction", [images()], None, "from no labels: give loss='softmax'"),
        (1, "reconstruction", [(images(), torch.zeros(8).long())], None, "the 1 output of the mo"),
        (
            1,
            "taylor",
            [(images(), torch.zeros(8).long())],
            None,
            "give loss='softmax' .* 'sigmoid'",
        ),
        (1, "taylor", [(images(), torch.zeros(8).long())], "softmax", "of one output is always 0"),
        (
            14,
            "taylor",
            [(images(), LABELS["sigmoid", 14])],
            None,
            r"tensor \(8, 14\) of torch.float",
        ),
        (8, "taylor", [(images(), torch.eye(8)[:, :3])], "sigmoid", r"labels have shape \(8, 3\)"),
        (8, "taylor", [(images(), torch.zeros(8).long())], "sigmoid", r"labels have shape \(8,\)"),
        (3, "taylor", [(images(), [0] * 8)], None, "needs labels: .* batch 0 has a list for 8 im"),
        (3, "taylor", [(images(), torch.zeros(7))], "mse", r"batch 0 has a tensor \(7,\)"),
        (3, "l2", None, "mse", "loss has no effect: criterion 'l2'"),
        (3, "activation", [images()], "mse", "loss has no effect: criterion 'activation'"),
        (3, "fisher", [images()], "hinge", "loss 'hinge' is unknown; choose softmax, sigmoid, mse"),
        (3, "fisher", [images()], nn.MSELoss, "is the class MSELoss; give one of it"),
    ],
)
def test_refusals(classes, criterion, data, loss, message) -> None:
    with pytest.raises(PruneDNError, match=message):
        make_plan(net(classes), 0.3, criterion=criterion, calibration=data, loss=loss)


def test_labels_are_not_looked_at_where_they_are_drawn() -> None:
    """An embedding net with class labels beside its images, regressed on."""
    data: list[object] = [(images(), torch.arange(8))]
    found = scores(net(3), "reconstruction", data, "mse")
    np.testing.assert_array_equal(found, scores(net(3), "reconstruction", [images()], "mse"))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda out, labels: out.detach().mean(), "without a gradient, so nothing follows from it"),
        (
            lambda out, labels: out.mean() * torch.nan,
            "batch 0: the loss is nan, and nothing follows",
        ),
    ],
)
def test_a_callable_that_says_nothing(loss, message) -> None:
    data = [(images(), torch.zeros(8).long())]
    with pytest.raises(PruneDNError, match=message):
        make_plan(net(), 0.3, criterion="taylor", calibration=data, loss=loss)


CRITERIA = ("activation", "taylor", "fisher", "reconstruction")
HALF = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("dtype", HALF)
def test_sums_are_in_float32_or_better(dtype: torch.dtype, criterion: str) -> None:
    """Six hundred batches of a net in half precision give what the same weights do in float32."""
    model = densenet([1], 4, bn_size=None, stem="cifar", num_classes=3)
    model = randomise_(model, 1).eval().to(dtype)
    labels = torch.arange(600) % 3
    x = images(600, side=4).to(dtype)
    many = [(a, b) for a, b in zip(x.split(1), labels.split(1), strict=True)]
    found = scores(model, criterion, many, "softmax")
    wide = densenet([1], 4, bn_size=None, stem="cifar", num_classes=3).double().eval()
    wide.load_state_dict(model.state_dict())
    expected = scores(wide, criterion, [(x.double(), labels)], "softmax")
    if criterion == "reconstruction":  # labels are drawn
        np.testing.assert_allclose(np.log(found + 1e-9), np.log(expected + 1e-9), atol=0.5)
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("criterion", CRITERIA)
def test_large_images_do_not_overflow_in_half_precision(criterion: str) -> None:
    model = randomise_(densenet([1], 4, bn_size=None, stem="cifar", num_classes=3), 1).eval()
    with torch.no_grad():
        model.features.denseblock1.denselayer1.norm1.bias += 20  # a sum of 10⁶ over an image
    data: list[object] = [(images(2, side=224), torch.tensor([0, 2]))]
    found = scores(model.half(), criterion, data, "softmax")
    expected = scores(model.float(), criterion, data, "softmax")
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("criterion", ["l1", "l2", "fpgm", "lamp", "bn_scale"])
@pytest.mark.parametrize("dtype", HALF)
def test_weights_alone_in_half_precision(dtype: torch.dtype, criterion: str) -> None:
    """Cut as the same numbers in float32 are: magnitudes whose squares overflow in float16."""
    light = light_cnn_9(3, image_size=16, widths=[4, 6, 8, 6, 6], embedding=8)
    for model in (net(), plain(), *([] if criterion == "bn_scale" else [light])):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(300)
        options = {"criterion": criterion, "input_size": 16}
        half = prune(model.to(dtype), 0.4, **options)
        wide = prune(model.float(), 0.4, **options)
        assert {p.dtype for p in half.parameters()} == {dtype}
        for a, b in zip(half.parameters(), wide.parameters(), strict=True):
            assert torch.equal(a.float(), b)


def test_what_overflows_is_not_blamed_on_the_weights() -> None:
    model = net()
    with torch.no_grad():
        model.features.norm5.weight.mul_(1e38)
    with pytest.raises(PruneDNError, match="outputs are not finite, though its weights are"):
        make_plan(model, 0.3, criterion="taylor", calibration=[(images(), torch.zeros(8).long())])
    with torch.no_grad():
        model.features.norm5.weight.fill_(1)
        model.classifier.weight.fill_(1e30)
    with pytest.raises(PruneDNError, match=r"scores of features.norm5 are not finite, though"):
        make_plan(model, 0.3, criterion="l2")


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kind", "criterion"),
    [
        *(("densenet", name) for name in CRITERIA),
        *(("plain", name) for name in ("bn_scale", "taylor")),
        *(("light", name) for name in ("fisher", "mfm_win_rate")),
    ],
)
def test_autograd_may_be_off_around_it(kind: str, criterion: str, mode: str) -> None:
    """The same cut as elsewhere; images and model made inside; and the result can be trained."""
    build = {
        "densenet": net,
        "plain": plain,
        "light": lambda: light_cnn_9(3, image_size=16, widths=[4, 6, 8, 6, 6], embedding=8).eval(),
    }[kind]
    channels = 1 if kind == "light" else 3

    def cut() -> nn.Module:
        torch.manual_seed(0)
        data = [(images(4, side=16)[:, :channels], torch.arange(4) % 3)]
        options = {} if criterion == "bn_scale" else {"calibration": data}
        return prune(build(), 0.4, criterion=criterion, input_size=16, **options)

    expected = cut()
    with MODES[mode]():
        found = cut()
        assert torch.is_inference_mode_enabled() == (mode == "inference_mode")
        assert not torch.is_grad_enabled()
    for a, b in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
    found.train()(images(4, side=16)[:, :channels]).square().mean().backward()
    torch.optim.SGD(found.parameters(), lr=0.1).step()


@pytest.mark.parametrize("mode", MODES)
def test_other_entries_with_autograd_off(mode: str) -> None:
    model, data = net(), [(images(), torch.arange(8) % 3)]
    mfm = randomise_(densenet([2], 6, stem="cifar", num_classes=3, mfm={"*": "2/1"}), 0).eval()
    with MODES[mode]():
        plan = make_plan(model, 0.3, criterion="taylor", calibration=data)
        small = compensate_plan(apply_plan(model, plan), model, plan, data)
        rows = sensitivity(
            model, lambda net: 0.0, criterion="fisher", calibration=data, ratios=[0.5]
        )
        settled = apply_plan(mfm, settling_plan(mfm, data, criterion="taylor"))
    assert rows
    for net_ in (small, settled):
        net_.train()(images()).square().mean().backward()
        torch.optim.SGD(net_.parameters(), lr=0.1).step()
