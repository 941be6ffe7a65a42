"""Our pruning beside Torch-Pruning's: the same MACs and images, true figures, true refusals."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prune_dn
from prune_dn.errors import PruningError
from prune_dn.run.rivals import OURS, PrunerRow, best_of, compare_pruners, macs_of, torch_pruned
from prune_dn.training import evaluate


class Net(nn.Module):
    """A classifier with a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.back = nn.Conv2d(12, 8, 3, padding=1)
        self.answer = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = torch.relu(x + self.back(self.inner(x)))
        out: Tensor = self.answer(x.mean((2, 3)))
        return out


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    found = Net().eval()
    for module in found.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.1, 1.0)
    return found


@pytest.fixture
def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(32, 1, 8, 8, generator=generator), torch.arange(32) % 2) for _ in range(4)]


def test_macs_are_those_of_the_formula(net: Net) -> None:
    formula = 64 * 9 * (1 * 8 + 8 * 12 + 12 * 8) + 8 * 2
    assert macs_of(net, torch.zeros(3, 1, 8, 8)) == formula
    assert prune_dn.count(net, example_inputs=torch.zeros(3, 1, 8, 8)).macs == formula


@pytest.mark.parametrize("criterion", ["bn_scale", "fpgm", "l1", "l2", "lamp", "taylor"])
@pytest.mark.parametrize("scope", ["global", "local"])
def test_torch_pruning_meets_the_share_of_macs(
    net: Net, data: Any, criterion: str, scope: str
) -> None:
    example = torch.zeros(1, 1, 8, 8)
    before = {name: p.clone() for name, p in net.state_dict().items()}
    small = torch_pruned(
        net, 0.4, example, criterion, scope, prune_dn.data.batches.read_batches(data)
    )
    left = macs_of(small, example) / macs_of(net, example)
    assert left <= 0.6
    assert left > 0.4  # no more than needed: a channel of 8 is an eighth
    assert small(example).shape == (1, 2)
    assert all(torch.equal(before[name], p) for name, p in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_rows_have_true_figures(net: Net, data: Any) -> None:
    rows = list(
        compare_pruners(
            net,
            [0.3, 0.5],
            calibration=data,
            evaluate=lambda found: evaluate(found, data),
            criteria=["l1", "taylor"],
            scopes=["local"],
        )
    )
    assert [(row.method, row.ratio) for row in rows] == [
        ("dense", 0.0),
        *(
            (m, r)
            for r in (0.3, 0.5)
            for m in (OURS, "torch-pruning/l1/local", "torch-pruning/taylor/local")
        ),
    ]
    dense = rows[0]
    assert dense.one_shot == evaluate(net, data).accuracy
    assert (dense.macs_cut, dense.n) == (0.0, 128)
    assert dense.params == sum(p.numel() for p in net.parameters())
    assert [row.error for row in rows] == [None] * 7
    for row in rows[1:]:
        assert row.ratio <= row.macs_cut < row.ratio + 0.25
    ours = prune_dn.prune(net, 0.5, unit="macs", calibration=data)
    found = next(row for row in rows if (row.method, row.ratio) == (OURS, 0.5))
    assert found.one_shot == evaluate(ours, data).accuracy
    prune_dn.recalibrate_batch_norm_(ours, data)
    assert found.recalibrated == evaluate(ours, data).accuracy


def test_the_best_is_the_most_accurate_of_either_kind() -> None:
    rows = [
        PrunerRow("torch-pruning/a/local", 0.5, one_shot=0.2, recalibrated=0.6),
        PrunerRow("torch-pruning/b/local", 0.5, one_shot=0.7, recalibrated=None),
        PrunerRow("torch-pruning/c/local", 0.5, error="no"),
        PrunerRow("torch-pruning/d/local", 0.3, one_shot=0.9),
        PrunerRow(OURS, 0.5, one_shot=0.8),
    ]
    assert best_of(rows, "torch-pruning/", 0.5) == rows[1]
    assert best_of(rows, "ours/", 0.5) == rows[4]
    assert best_of(rows[2:3], "torch-pruning/", 0.5) is None


def test_what_one_side_cannot_do_is_a_row_with_its_error(data: Any) -> None:
    bare = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
    images = [(images, labels) for images, labels in data]
    rows = list(
        compare_pruners(
            bare,
            [0.5, 0.99],
            calibration=images,
            evaluate=lambda found: evaluate(found, images),
            criteria=["l1", "bn_scale"],
            scopes=["local"],
        )
    )
    assert rows[0].recalibrated is None
    assert all(row.error is None for row in rows[:3])
    too_far = [row for row in rows if row.ratio == 0.99]
    assert all(row.error and row.accuracy is None for row in too_far)
    assert "cannot remove 99% of the MACs of this Sequential" in str(too_far[1].error)


def test_wrong_requests_are_refused_before_anything_runs(
    net: Net, data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(_: nn.Module) -> Any:
        raise AssertionError("evaluated")

    given: dict[str, Any] = {"calibration": data, "evaluate": never}
    with pytest.raises(PruningError, match=r"criteria has 'bn'; choose from bn_scale, fpgm"):
        compare_pruners(net, [0.5], **given, criteria=["bn"])
    with pytest.raises(PruningError, match="scopes has 'all'; choose from global, local"):
        compare_pruners(net, [0.5], **given, scopes=["all"])
    with pytest.raises(PruningError, match=r"pruning_ratio is 1\.5"):
        compare_pruners(net, [0.5, 1.5], **given)
    with pytest.raises(PruningError, match="criterion 'taylor' needs labels"):
        torch_pruned(net, 0.5, data[0][0][:1], "taylor")
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(PruningError, match=r"pip install 'prune_dn\[compare\]'"):
        compare_pruners(net, [0.5], **given)
