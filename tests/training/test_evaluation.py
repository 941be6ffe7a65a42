"""Accuracy and loss against a slow count; flags restored; classes checked."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from prune_dn.data import Datasets, load_datasets, make_loader
from prune_dn.errors import DataError
from prune_dn.models import DenseNet, densenet
from prune_dn.models.answers import eval_mode
from prune_dn.training import evaluate


@pytest.fixture(scope="module")
def data() -> Datasets:
    return load_datasets("digits", image_size=8, limit=60)


def net(**how: int) -> DenseNet:
    return densenet(
        [2, 2], 4, **{"stem": "cifar", "bn_size": None, "in_channels": 1, "num_classes": 10, **how}
    )


def test_against_one_image_at_a_time(data: Datasets) -> None:
    model = net(drop_rate=0.5)
    right, loss = 0, 0.0
    model.eval()
    with torch.no_grad():
        for i in range(len(data.test)):
            image, label = data.test[i]
            logits = model(image[None])[0].double().tolist()
            right += logits.index(max(logits)) == int(label)
            loss += math.log(sum(math.exp(v) for v in logits)) - logits[int(label)]
    model.train()
    for found in (
        evaluate(model, data.test),
        evaluate(model, data.test, batch_size=7),
        evaluate(model, make_loader(data.test, 100)),
    ):
        assert found.n == 360 and found.accuracy == right / 360
        assert found.loss == pytest.approx(loss / 360, abs=1e-5)
    low = evaluate(model, data.test, precision="bf16")
    assert low.loss == pytest.approx(loss / 360, abs=0.05) and low.loss != found.loss


def test_nothing_of_the_model_changes(data: Datasets) -> None:
    model = net()
    model.features.denseblock1.eval()
    flags = {name: module.training for name, module in model.named_modules()}
    assert len(set(flags.values())) == 2
    state = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, data.val)
    assert {name: module.training for name, module in model.named_modules()} == flags
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert all(p.grad is None for p in model.parameters())
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    with pytest.raises(ZeroDivisionError), eval_mode(model):
        raise ZeroDivisionError
    assert {name: module.training for name, module in model.named_modules()} == flags


def test_wrong_number_of_classes(data: Datasets) -> None:
    for classes in (7, 100):
        model = net(num_classes=classes)
        with pytest.raises(DataError, match=rf"model answers {classes} classes, the data has 10; "):
            evaluate(model, data.test)
        assert model.training
    with pytest.raises(DataError, match="answers 7 classes, the data has 10"):
        evaluate(net(num_classes=7), make_loader(data.test, 360))
    assert evaluate(net(num_classes=100), make_loader(data.test, 360)).n == 360


def test_no_images() -> None:
    empty: list[tuple[Tensor, Tensor]] = []
    with pytest.raises(DataError, match="no images to evaluate on"):
        evaluate(nn.Linear(1, 1), torch.utils.data.DataLoader(empty))
