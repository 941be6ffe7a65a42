"""Losses: three uses of one meaning, and a guess only where it cannot be wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from prune_dn.errors import DataError
from prune_dn.models.losses import LOSSES, find_loss


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_distance_is_zero_for_equal_outputs_and_positive_elsewhere(name: str) -> None:
    a, b = torch.randn(5, 4), torch.randn(5, 4)
    assert float(LOSSES[name].distance(a, a)) == 0
    assert float(LOSSES[name].distance(a, b)) > 0
    assert LOSSES[name].distance(a.half(), b.half()).dtype == torch.float64


def test_distances_are_the_divergences_of_torch_distributions() -> None:
    a, b = torch.randn(5, 4).double(), torch.randn(5, 4).double()
    from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence

    oracle = {
        "softmax": kl_divergence(Categorical(logits=b), Categorical(logits=a)),
        "sigmoid": kl_divergence(Bernoulli(logits=b), Bernoulli(logits=a)),
        "mse": kl_divergence(Normal(b, 1.0), Normal(a, 1.0)),
    }
    for name, expected in oracle.items():
        torch.testing.assert_close(LOSSES[name].distance(a, b), expected.sum())


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_labels_that_are_drawn_give_the_fisher_information_of_the_outputs(name: str) -> None:
    outputs = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64).repeat(40_000, 1)
    outputs.requires_grad_()
    loss = LOSSES[name]
    assert loss.draw is not None
    drawn = loss.draw(outputs, torch.Generator().manual_seed(0))
    assert loss.check(drawn, outputs) is None
    (gradient,) = torch.autograd.grad(loss.error(outputs, drawn), outputs)
    p = outputs[0].detach().softmax(0) if name == "softmax" else outputs[0].detach().sigmoid()
    expected = torch.ones(3).double() if name == "mse" else p * (1 - p)
    # 40,000 draws: the standard error is below 1 %.
    torch.testing.assert_close(gradient.square().mean(0), expected, rtol=0.05, atol=0)


def test_predictions_per_pixel() -> None:
    outputs, classes = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    expected = sum(
        F.cross_entropy(outputs[..., i, j], classes[:, i, j], reduction="sum")
        for i in range(4)
        for j in range(5)
    )
    torch.testing.assert_close(LOSSES["softmax"].error(outputs, classes), expected)
    drawn = LOSSES["softmax"].draw(outputs, torch.Generator())  # type: ignore[misc]
    assert drawn.shape == classes.shape
    assert find_loss(None, outputs, classes).name == "softmax"


@pytest.mark.parametrize(
    ("outputs", "labels", "name"),
    [
        (torch.zeros(4, 3), torch.tensor([0, 2, 1, 1]), "softmax"),
        (torch.zeros(2, 3, 2), torch.tensor([[0, 2], [1, 1]]), "softmax"),
        (torch.zeros(3, 2), torch.tensor([True, False, True]), "softmax"),
    ],
)
def test_a_guess_where_it_cannot_be_wrong(outputs, labels, name) -> None:
    assert find_loss(None, outputs, labels).name == name


@pytest.mark.parametrize(
    ("outputs", "labels"),
    [
        (torch.zeros(4, 3), None),
        (torch.zeros(2, 3), torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])),
        (torch.zeros(2, 3), torch.tensor([[1, 1, 0], [0, 0, 0]])),
        (torch.zeros(3, 1), torch.tensor([3.5, -1.0, 0.2])),
        (torch.zeros(4), torch.tensor([0, 1, 1, 0])),
        (torch.zeros(4, 1), torch.tensor([0, 1, 1, 0])),
        (torch.zeros(4, 1), torch.tensor([0.0, 1.0, 1.0, 0.0])),
        (torch.zeros(2, 3), torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])),
        (torch.zeros(3, 3), torch.tensor([0.0, 1.0, 2.0])),
    ],
)
def test_no_guess_where_it_could_be(outputs, labels) -> None:
    with pytest.raises(DataError, match=r"cannot be told from .*give loss='softmax'"):
        find_loss(None, outputs, labels)


@pytest.mark.parametrize(
    ("loss", "outputs", "labels", "message"),
    [
        ("softmax", torch.zeros(4, 1), None, "softmax' of one output is always 0"),
        ("softmax", torch.zeros(2, 2), torch.eye(2), "one class for each prediction"),
        ("softmax", torch.zeros(2, 2), torch.tensor([0, 2]), "integers from 0 to 1, not 2"),
        ("sigmoid", torch.zeros(3, 3), torch.tensor([0, 1, 1]), r"labels have shape \(3,\)"),
        ("sigmoid", torch.zeros(2, 1), torch.tensor([0, 2]), "between 0 and 1"),
        ("mse", torch.zeros(2, 1), torch.tensor([0.0, float("nan")]), "not finite"),
        (
            "sigmoid",
            torch.zeros(14, 14),
            torch.zeros(14, dtype=torch.long),
            r"the outputs \(14, 14\)",
        ),
        (
            "mse",
            torch.zeros(3),
            torch.zeros(3, 2),
            r"labels have shape \(3, 2\), the outputs \(3,\)",
        ),
        ("softmax", torch.zeros(2, 3), torch.tensor([0.0, 1.0]), "0 to 2, not torch.float32"),
        ("softmax", torch.zeros(4), None, "softmax' of one output is always 0"),
        (3, torch.zeros(2, 1), None, "loss 3 is unknown"),
        ("hinge", torch.zeros(2, 1), None, "choose softmax, sigmoid, mse, or a callable"),
    ],
)
def test_refusals(loss, outputs, labels, message) -> None:
    with pytest.raises(DataError, match=message):
        find_loss(loss, outputs, labels)


def test_a_callable_is_the_mean_over_the_batch() -> None:
    outputs, labels = torch.randn(6, 3), torch.rand(6, 3)
    found = find_loss(torch.nn.MSELoss(), outputs, labels)
    torch.testing.assert_close(found.error(outputs, labels), 6 * F.mse_loss(outputs, labels))
    assert found.draw is None and found.accuracy is None


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            torch.nn.BCEWithLogitsLoss,
            r"is the class BCEWithLogitsLoss; give one of it, BCEWithLogitsLoss\(\)",
        ),
        (torch.nn.MSELoss(reduction="none"), r"'MSELoss' gives a tensor \(6, 3\) of torch.float32"),
        (torch.nn.CrossEntropyLoss(), r"'CrossEntropyLoss' cannot take outputs .*labels"),
    ],
)
def test_a_callable_that_gives_no_mean(function, message) -> None:
    outputs, labels = torch.randn(6, 3), torch.rand(6, 4)
    labels = labels[:, :3] if "MSE" in message else labels
    with pytest.raises(DataError, match=message):
        find_loss(function, outputs, labels).error(outputs, labels)


def test_one_output_without_a_dimension_of_its_own() -> None:
    outputs, labels = torch.randn(6), torch.tensor([0, 1, 1, 0, 1, 0])
    for shape in ((6,), (6, 1)):
        found = find_loss("sigmoid", outputs.reshape(shape), labels)
        for same in (labels, labels[:, None].bool()):
            error = found.error(outputs.reshape(shape), same)
            expected = F.binary_cross_entropy_with_logits(outputs, labels.float(), reduction="sum")
            torch.testing.assert_close(error, expected)


def test_what_is_reported_is_torchs_mean_and_the_share_that_is_right() -> None:
    outputs = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 1.0, 4.0]])
    classes, hot = torch.tensor([0, 1]), torch.tensor([[1, 1, 0], [0, 1, 1]])
    softmax, sigmoid, mse = LOSSES["softmax"], LOSSES["sigmoid"], LOSSES["mse"]
    assert softmax.accuracy(outputs, classes) == 1 / 2
    assert sigmoid.accuracy(outputs, hot) == 4 / 6
    assert mse.accuracy is None
    pairs = [(softmax, classes, F.cross_entropy(outputs, classes))]
    pairs += [(sigmoid, hot, F.binary_cross_entropy_with_logits(outputs, hot.float()))]
    pairs += [(mse, hot, F.mse_loss(outputs, hot.float()))]
    for loss, labels, expected in pairs:
        torch.testing.assert_close(loss.mean(outputs, labels), expected)
