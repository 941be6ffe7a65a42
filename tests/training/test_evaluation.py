"""Accuracy and loss against a slow count; flags restored; classes checked."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from prune_dn.data.datasets import Datasets, load_datasets, make_loader
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
    with pytest.raises(DataError, match=r"labels must be integers from 0 to 6, not [789]"):
        evaluate(net(num_classes=7), make_loader(data.test, 360))
    assert evaluate(net(num_classes=100), make_loader(data.test, 360)).n == 360


def test_no_images() -> None:
    empty: list[tuple[Tensor, Tensor]] = []
    with pytest.raises(DataError, match="no images to evaluate on"):
        evaluate(nn.Linear(1, 1), torch.utils.data.DataLoader(empty))


def pairs(labels: Tensor, sizes: tuple[int, ...] = (5, 3), seed: int = 0):
    """A plain list of batches, of unequal sizes."""
    images = torch.randn(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return list(zip(images.split(sizes), labels.split(sizes), strict=True))


def answers(model: nn.Module, batches) -> Tensor:
    with torch.no_grad():
        return torch.cat([model.eval()(images) for images, _ in batches]).double()


@pytest.mark.parametrize("outputs", [1, 14])
def test_yes_or_no_for_each_output(outputs: int) -> None:
    labels = torch.rand(8, outputs, generator=torch.Generator().manual_seed(1)).round()
    model, batches = net(num_classes=outputs), pairs(labels)
    found, logits = evaluate(model, batches, loss="sigmoid"), answers(model, batches)
    p = 1 / (1 + (-logits).exp())
    right = sum((p[i, j] > 0.5) == bool(labels[i, j]) for i in range(8) for j in range(outputs))
    assert found.accuracy == pytest.approx(int(right) / (8 * outputs)) and found.n == 8
    entropy = -(labels * p.log() + (1 - labels) * (1 - p).log())
    assert found.loss == pytest.approx(float(entropy.mean()), rel=1e-6)
    if outputs == 1:
        assert evaluate(model, pairs(labels[:, 0].long()), loss="sigmoid") == found


def test_numbers_and_a_callable_have_no_accuracy() -> None:
    labels = torch.linspace(-2, 5, 8)[:, None]
    model, batches = net(num_classes=1), pairs(labels)
    errors = answers(model, batches) - labels
    found = evaluate(model, batches, loss="mse")
    assert found.accuracy is None
    assert found.loss == pytest.approx(float(errors.square().mean()), rel=1e-5)
    found = evaluate(model, batches, loss=nn.L1Loss())
    assert found.accuracy is None
    assert found.loss == pytest.approx(float(errors.abs().mean()), rel=1e-5)


def test_a_class_for_each_pixel() -> None:
    model = nn.Conv2d(1, 3, 1)
    labels = torch.randint(3, (8, 8, 8), generator=torch.Generator().manual_seed(0))
    found, logits = evaluate(model, pairs(labels)), answers(model, pairs(labels))
    assert found.accuracy == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert found.loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_are_cast_to_the_dtype_of_the_net(data: Datasets, dtype: torch.dtype) -> None:
    model = net().to(dtype).eval()
    found = evaluate(model, data.val)
    images = torch.stack([data.val[i][0] for i in range(len(data.val))]).to(dtype)
    labels = torch.tensor([int(data.val[i][1]) for i in range(len(data.val))])
    with torch.no_grad():
        logits = model(images).double()
    assert found.accuracy == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert found.loss == pytest.approx(
        float(nn.functional.cross_entropy(logits, labels)), rel=2 * torch.finfo(dtype).eps
    )
    if dtype == torch.float64:
        return
    low = evaluate(model, data.val, precision="bf16")
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert low == evaluate(model.float(), data.val, precision="bf16")


X = torch.zeros(10, 1, 8, 8)


@pytest.mark.parametrize(
    ("outputs", "batch", "loss", "message"),
    [
        # as many images as classes: was an accuracy of 0, by broadcasting
        (
            10,
            (X, torch.eye(10)),
            None,
            r"from labels that are a tensor \(10, 10\) of torch.float32",
        ),
        (10, (X, torch.eye(10).long()), None, "give loss='softmax' .* 'sigmoid'"),
        (10, (X, torch.eye(10)), "softmax", r"labels have shape \(10, 10\), one class for each"),
        (
            10,
            (X, torch.arange(10)),
            "sigmoid",
            r"labels have shape \(10,\), the outputs \(10, 10\)",
        ),
        (10, (X, torch.arange(10.0)), None, r"\(10,\) of torch.float32: give loss="),
        (10, (X, torch.arange(-1, 9)), None, "labels must be integers from 0 to 9, not -1"),
        (1, (X, torch.zeros(10).long()), None, "the 1 output of the model mean cannot be told"),
        (1, (X, torch.zeros(10).long()), "softmax", "of one output is always 0"),
        (3, (X, torch.arange(9)), None, r"10 images, and as their labels a tensor \(9,\)"),
        (3, (X, [0] * 10), None, "10 images, and as their labels a list"),
        (3, X, None, "data batch 0 has 10 images, and as their labels a NoneType"),
        (3, (torch.arange(10), X), None, r"data batch 0 is a tensor \(10,\) of torch.int64; each"),
        (3, (X.byte(), torch.zeros(10).long()), None, "of torch.uint8; each batch must be images"),
        (
            3,
            {"image": X},
            None,
            r"data batch 0 has 10 images, and as their labels a NoneType; each batch must be",
        ),
        (3, (X + torch.nan, torch.zeros(10).long()), None, "data batch 0 holds NaN or infinity"),
        (3, (X, torch.zeros(10).long()), "hinge", "loss 'hinge' is unknown"),
    ],
)
def test_batches_and_labels_that_do_not_fit(outputs, batch, loss, message) -> None:
    with pytest.raises(DataError, match=message):
        evaluate(net(num_classes=outputs), [batch], loss=loss)


def test_outputs_that_are_no_numbers(data: Datasets) -> None:
    model = net()
    nn.init.constant_(model.classifier.weight, torch.nan)
    with pytest.raises(DataError, match="the loss on data batch 0 is NaN: the model's outputs are"):
        evaluate(model, data.val)
