"""Edges of nets that are no DenseNets of ours: norms that select their inputs."""

from __future__ import annotations

import io

import pytest
import torch
from oracle import randomise_
from torch import nn

from prune_dn import apply_plan, export_onnx, load, make_plan, prune, save
from prune_dn.graph.selecting import SelectingBatchNorm2d, select_inputs_
from prune_dn.pruning.cuts import cuts
from prune_dn.pruning.plan import planned


class Layer(nn.Module):
    """A layer of somebody's DenseNet: new maps first."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, growth, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.conv(self.norm(x).relu()), x], 1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.Sequential(*(Layer(8 + 6 * i, 6) for i in range(4)))
        self.last, self.head = nn.BatchNorm2d(32), nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.layers(self.stem(x))).relu().mean((2, 3)))


X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def net(seed: int = 0) -> Net:
    return randomise_(Net(), seed).eval()


def masked(model: nn.Module, plan) -> nn.Module:
    """The dense net that reads zeros where the plan cuts: independent of the surgery."""
    given, units, keep = planned(model, plan)
    for name, cut in cuts(units, keep).items():
        layer = given.model.get_submodule(name)
        if cut.inputs is not None and isinstance(layer, nn.Conv2d | nn.Linear):
            mask = torch.zeros(layer.weight.shape[1])
            mask[cut.inputs] = 1
            with torch.no_grad():
                layer.weight.mul_(mask.view(1, -1, *[1] * (layer.weight.ndim - 2)))
    return given.model


@pytest.mark.parametrize("units", [["edge"], ["stream", "edge"], ["stream", "bottleneck"]])
def test_masked_equals_pruned_over_two_rounds(units) -> None:
    model = net().double()
    for ratio in (0.3, 0.3):
        plan = make_plan(model, ratio, unit="macs", units=units, input_size=12)
        small = apply_plan(model, plan)
        x = X.double()
        torch.testing.assert_close(small(x), masked(model, plan)(x), rtol=1e-9, atol=1e-9)
        assert type(small) is Net and list(dict(small.named_modules())) == list(
            dict(model.named_modules())
        )
        model = small
    selecting = [m for m in model.modules() if isinstance(m, SelectingBatchNorm2d)]
    assert bool(selecting) == ("edge" in units)


def test_a_selection_is_saved_loaded_pickled_and_exported(tmp_path) -> None:
    small = prune(net(), 0.4, unit="macs", units=["edge"], input_size=12)
    save(small, tmp_path / "small.safetensors", example_inputs=X)
    again = load(tmp_path / "small.safetensors", model=Net())
    torch.testing.assert_close(again(X), small(X), rtol=0, atol=0)
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(X), small(X), rtol=0, atol=0)
    export_onnx(small, tmp_path / "small.onnx", example_inputs=X)  # checked against the net


def test_edges_are_refitted() -> None:
    model, g = net(), torch.Generator().manual_seed(1)
    images = [torch.randn(64, 3, 12, 12, generator=g) for _ in range(3)]
    cut, fitted = (
        prune(model, 0.4, unit="macs", units=["edge"], criterion="l2", calibration=calibration,
              **choice)
        for calibration, choice in ((None, {"input_size": 12}), (images, {"loss": "mse"}))
    )  # fmt: skip
    new = torch.randn(64, 3, 12, 12, generator=g)
    far, near = ((x(new) - model(new)).square().mean() for x in (cut, fitted))
    assert near < 0.5 * far


def test_a_norm_without_tensors_selects() -> None:
    norm = nn.BatchNorm2d(2, affine=False, track_running_stats=False)
    select_inputs_(norm, torch.tensor([1, 0]))
    torch.testing.assert_close(
        norm(X), nn.functional.batch_norm(X[:, [1, 0]], None, None, training=True)
    )


def test_a_norm_selects_and_takes_all_again() -> None:
    norm = randomise_(nn.BatchNorm2d(3), 1).eval()
    x = torch.randn(2, 5, 4, 4)
    expected = norm(x[:, [4, 0, 2]])
    keys = set(norm.state_dict())
    select_inputs_(norm, torch.tensor([4, 0, 2]))
    assert isinstance(norm, nn.BatchNorm2d)
    assert set(norm.state_dict()) == keys | {"selected_inputs"}
    torch.testing.assert_close(norm(x), expected)
    select_inputs_(norm, None)
    assert type(norm) is nn.BatchNorm2d and set(norm.state_dict()) == keys
