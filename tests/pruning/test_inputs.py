"""Calibration batches of several inputs, of inputs by name, and in slices, against the same net with one input."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from oracle import randomise_
from torch import Tensor, nn

from prune_dn import make_plan, prune, recalibrate_batch_norm_
from prune_dn.data.batches import read_batches
from prune_dn.errors import PruningError
from prune_dn.pruning import apply_plan, compensate_plan, slices
from prune_dn.pruning.calibration import collect
from prune_dn.pruning.statistics import Activations, Gradients, Gram
from prune_dn.training import evaluate


class Towers(nn.Module):
    """Two images, one net each, compared; `flip` and the dict that it may answer are the caller's choice."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (
            nn.Sequential(
                nn.Conv2d(c, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3)
            )
            for c in (3, 1)
        )
        self.head = nn.Linear(12, 3)

    def forward(self, colour: Tensor, grey: Tensor, flip: bool = False) -> Tensor:
        """(N, 3, H, W) and (N, 1, H, W) -> (N, 3)."""
        grey = grey.flip(3) if flip else grey
        both = (self.left(colour).relu().mean((2, 3)), self.right(grey).relu().mean((2, 3)))
        return self.head(torch.cat(both, 1))


class AsOne(nn.Module):
    """The same, with both images in one tensor."""

    def __init__(self, towers: Towers) -> None:
        super().__init__()
        self.towers = towers

    def forward(self, x: Tensor) -> Tensor:
        """(N, 4, H, W) -> (N, 3)."""
        return self.towers(x[:, :3], x[:, 3:])


class Several(nn.Module):
    """Answers of a net in a dict."""

    def __init__(self, towers: Towers) -> None:
        super().__init__()
        self.towers, self.other = towers, nn.Linear(12, 1)

    def forward(self, colour: Tensor, grey: Tensor) -> dict[str, Any]:
        """Scores, and a number beside them."""
        net = self.towers
        both = (net.left(colour).relu().mean((2, 3)), net.right(grey).relu().mean((2, 3)))
        found = torch.cat(both, 1)
        return {"scores": net.head(found), "more": (self.other(found),)}


def towers() -> Towers:
    return randomise_(Towers(), 1).eval()


def data(n: int = 96, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, 10, 10, generator=generator)
    return x[:, :3], x[:, 3:], torch.randint(3, (n,), generator=generator)


ASKED: dict[str, Any] = {"unit": "macs", "loss": "softmax"}


@pytest.mark.parametrize("form", ["tuple", "list", "dict", "alone", "dict alone"])
def test_several_inputs_score_and_refit_as_one_input_does(form: str) -> None:
    colour, grey, labels = data()
    batch = {
        "tuple": ((colour, grey), labels),
        "list": [[colour, grey], labels],
        "dict": ({"grey": grey, "colour": colour}, labels),
        "alone": ((colour, grey),),
        "dict alone": {"grey": grey, "colour": colour, "flip": False},
    }[form]
    net, x = towers(), torch.cat((colour, grey), 1)
    one = AsOne(net)
    plan = make_plan(net, 0.4, calibration=[batch], **ASKED)
    same = make_plan(one, 0.4, calibration=[(x, labels)], **ASKED)
    assert {f"towers.{n}": kept for n, kept in plan.keep_indices.items()} == same.keep_indices
    assert len(plan.keep_indices) >= 2
    small = compensate_plan(apply_plan(net, plan), net, plan, [batch], loss="softmax")
    right = compensate_plan(apply_plan(one, same), one, same, [x], loss="softmax")
    test = data(16, seed=2)[:2]
    torch.testing.assert_close(small(*test), right(torch.cat(test, 1)), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(small(*test), apply_plan(net, plan)(*test), rtol=1e-3, atol=1e-4)


def test_gradients_follow_labels_of_several_inputs() -> None:
    colour, grey, labels = data(8)
    net = towers()
    found = make_plan(net, 0.4, criterion="taylor", calibration=[((colour, grey), labels)], **ASKED)
    x = torch.cat((colour, grey), 1)
    right = make_plan(AsOne(net), 0.4, criterion="taylor", calibration=[(x, labels)], **ASKED)
    assert {f"towers.{n}": kept for n, kept in found.keep_indices.items()} == right.keep_indices


def test_evaluated_and_recalibrated_on_several_inputs() -> None:
    colour, grey, labels = data(32)
    net, x = towers(), torch.cat((colour, grey), 1)
    loaders = ([((colour, grey), labels)], [({"colour": colour, "grey": grey}, labels)])
    found = [evaluate(net, loader) for loader in loaders]
    assert found[0] == found[1] == evaluate(AsOne(net), [(x, labels)])
    one = AsOne(copy.deepcopy(net))
    recalibrate_batch_norm_(net, [((colour, grey), labels)])
    recalibrate_batch_norm_(one, [x])
    assert torch.equal(net.left[1].running_var, one.towers.left[1].running_var)


def test_what_could_be_labels_or_an_input_is_refused_with_what_to_write() -> None:
    colour, grey, labels = data(8)
    example = (colour[:1], grey[:1])
    for batch, said in (
        (
            (colour, grey),
            r"'grey'; a tuple or list is read as \(inputs, labels\); write several inputs",
        ),
        (colour, r"'grey'; a tuple or list is read"),
        (
            {"colour": colour, "grey": grey, "label": labels},
            r"'label'; a dict is read as the forward's",
        ),
    ):
        with pytest.raises(PruningError, match=said):
            make_plan(towers(), 0.4, calibration=[batch], example_inputs=example, **ASKED)
    for batch, said in (
        ({}, "batch 0 is a dict; each batch must be"),
        (
            ((colour, grey[:3]), labels),
            r"inputs of 3 and 8 rows: each tensor must have a row for each",
        ),
        (((colour, grey * torch.nan), labels), "batch 0 holds NaN"),
        ((("a", "b"), labels), "batch 0 is a tuple; each batch must be"),
    ):
        with pytest.raises(PruningError, match=said):
            read_batches([batch])


@pytest.mark.parametrize("criterion", ["reconstruction", "taylor"])
def test_mse_of_several_outputs_is_the_sum_over_all(criterion: str) -> None:
    class Joined(nn.Module):
        """The same numbers in one tensor."""

        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, colour: Tensor, grey: Tensor) -> Tensor:
            """(N, 3 + 1)."""
            found = self.net(colour, grey)
            return torch.cat((found["scores"], *found["more"]), 1)

    net = randomise_(Several(towers()), 2).eval()
    colour, grey, _ = data(24)
    wanted = torch.randn(24, 4, generator=torch.Generator().manual_seed(3))
    labels = {"scores": wanted[:, :3], "more": (wanted[:, 3:],)}
    asked = {"unit": "macs", "criterion": criterion, "loss": "mse", "compensate": "none"}
    if criterion == "taylor":
        found = make_plan(net, 0.4, calibration=[((colour, grey), labels)], **asked)
        right = make_plan(Joined(net), 0.4, calibration=[((colour, grey), wanted)], **asked)
        assert {f"net.{n}": k for n, k in found.keep_indices.items()} == right.keep_indices
        wrong = {**labels, "more": ()}
        with pytest.raises(PruningError, match="loss 'mse': the model gives 2 tensors, the labels"):
            make_plan(net, 0.4, calibration=[((colour, grey), wrong)], **asked)
    else:
        small = prune(net, 0.4, calibration=[((colour, grey), None)], **asked)
        assert small(colour, grey)["scores"].shape == (24, 3)
    result = evaluate(net, [((colour, grey), labels)], loss="mse")
    answers = Joined(net)(colour, grey).detach()
    assert result.loss == pytest.approx(float((answers - wanted).square().mean()), rel=1e-5)


@pytest.mark.parametrize("need", [Activations, Gradients, Gram])
def test_slices_make_no_difference_to_scores(need: type, monkeypatch: pytest.MonkeyPatch) -> None:
    net = towers().double()
    colour, grey, labels = data(21)
    # the mean over the batch of this loss is not the mean of what slices give
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 9.0], dtype=torch.float64))
    loss = "softmax" if need is Gram else weighted
    batches = read_batches([((colour, grey), labels)], loss=loss)
    readers = ["left.3", "right.3", "head"]
    whole = collect(net, readers, batches, need)
    calls = 0

    def count(*args: Any) -> None:
        nonlocal calls
        calls += 1

    monkeypatch.setattr(slices, "MEMORY", 100_000)
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: count() if isinstance(module, Towers) else None
    )
    parts = collect(net, readers, batches, need)
    hook.remove()
    assert calls > 6  # two looks at one example, and several slices
    for name in readers:
        for key, value in vars(whole[name]).items():
            if value is not None:
                np.testing.assert_allclose(getattr(parts[name], key), value, rtol=1e-5, atol=1e-12)


class Summed(nn.Module):
    """A residual sum: the refit also fits what it lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.branch = nn.Sequential(
            nn.Conv2d(6, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3, padding=1),
            nn.BatchNorm2d(6),
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 3)."""
        x = self.stem(x).relu()
        return self.head((x + self.branch(x)).relu().mean((2, 3)))


def test_slices_make_no_difference_to_a_refit(monkeypatch: pytest.MonkeyPatch) -> None:
    net = randomise_(Summed(), 3).double().eval()
    images = torch.randn(90, 3, 12, 12, generator=torch.Generator().manual_seed(4)).double()
    plan = make_plan(net, 0.4, unit="macs", criterion="l2", input_size=12)
    asked = (apply_plan(net, plan), net, plan, [images[:37], images[37:]])
    whole = compensate_plan(*asked).state_dict()
    assert 4096 // len(images) < 12 * 12  # so that positions are drawn
    monkeypatch.setattr(slices, "MEMORY", 50_000)
    parts = compensate_plan(*asked).state_dict()
    assert not torch.equal(whole["branch.2.weight"], asked[0].branch[2].weight)
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-7, atol=1e-9)
