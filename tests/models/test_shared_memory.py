"""Memory-efficient training against the plain net: the same numbers, less memory."""

from __future__ import annotations

import copy
import dataclasses
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from commands import in_two_processes
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import saved_bytes
from oracle import randomise_
from strategies import pruned_configs
from torch import Tensor, nn

from prune_dn.errors import ConfigError, TrainingError
from prune_dn.models import (
    DenseNet,
    DenseNetConfig,
    LayerConfig,
    TransitionConfig,
    dense_net,
    densenet,
    fused,
    shared_memory,
)
from prune_dn.models.dense_net import ReadStream

UNEVEN = DenseNetConfig(
    num_init_features=4,
    blocks=(
        (
            LayerConfig("denselayer1", 3),
            LayerConfig("denselayer2", 2, bottleneck=5, input_indices=(0, 2, 6)),
            LayerConfig("denselayer4", 4, bottleneck=6, mfm="3/2"),
        ),
        (
            LayerConfig("denselayer1", 2, input_indices=(1, 2), mfm="2/1"),
            LayerConfig("denselayer2", 3, 4, (0, 1, 3), "2/1", (4, 1, 3), (1,)),
        ),
    ),
    transitions=(TransitionConfig(3, input_indices=(0, 1, 5, 9), mfm="2/1"),),
    num_classes=3,
    stem="cifar",
    classifier_indices=(0, 2, 3),
    classifier_rivals=(6, 2, 7),
)


def no_change(net: DenseNet) -> None:
    pass


def cumulative(net: DenseNet) -> None:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None


def other_eps(net: DenseNet) -> None:
    net.features.denseblock1.denselayer2.norm1.eps = 0.1


def freeze_norms(net: DenseNet) -> None:
    for block in (net.features.denseblock1, net.features.denseblock2):
        block.denselayer1.norm1.eval()
        block.denselayer1.norm1.requires_grad_(False)


def freeze_bottleneck(net: DenseNet) -> None:
    net.features.denseblock1.denselayer2.norm2.eval()
    net.features.transition1.norm.eval()


def freeze_start(net: DenseNet) -> None:
    net.features.conv0.requires_grad_(False)


def evaluate(net: DenseNet) -> None:
    net.eval()


NETS: dict[str, tuple[DenseNetConfig, Callable[[DenseNet], None]]] = {
    "uneven": (UNEVEN, no_change),
    "dropout": (dataclasses.replace(UNEVEN, drop_rate=0.3), no_change),
    "basic": (densenet([2, 2], 4, bn_size=None, stem="cifar", num_classes=3).config, no_change),
    "bottleneck": (densenet([2, 2], 4, num_classes=3).config, no_change),
    "momentum=None": (UNEVEN, cumulative),
    "other eps": (UNEVEN, other_eps),
    "frozen norm": (UNEVEN, freeze_norms),
    "frozen bottleneck": (UNEVEN, freeze_bottleneck),
    "frozen stem": (UNEVEN, freeze_start),
    "eval mode": (UNEVEN, evaluate),
}


def images(config: DenseNetConfig, batch: int = 4, seed: int = 1) -> Tensor:
    """Odd sides, so that pooling leaves a row and a column out."""
    side = 36 if config.stem == "imagenet" else 7
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, config.in_channels, side, side, generator=generator).double()


def twins(config: DenseNetConfig, level: int, seed: int = 5) -> tuple[DenseNet, DenseNet]:
    plain = randomise_(DenseNet(config).double(), seed).train()
    lean = copy.deepcopy(plain)
    lean.memory_efficient = level
    return plain, lean


def assert_same(plain: nn.Module, lean: nn.Module, rtol: float, atol: float) -> None:
    for (key, a), b in zip(plain.named_parameters(), lean.parameters(), strict=True):
        if a.grad is None:
            assert b.grad is None and not a.requires_grad, key
        else:
            torch.testing.assert_close(b.grad, a.grad, rtol=rtol, atol=atol, msg=key)
    for (key, a), b in zip(plain.named_buffers(), lean.buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=rtol, atol=atol, msg=key)


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("name", list(NETS))
def test_the_same_training(name: str, level: int) -> None:
    config, change = NETS[name]
    nets = plain, lean = twins(config, level)
    for net in nets:
        change(net)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in nets]
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for part in range(2):  # two batches per step
            losses = []
            for net in nets:
                torch.manual_seed(10 * step + part)  # dropout
                losses.append(F.cross_entropy(net(images(config, 4, step + part)),
                                              torch.tensor([0, 1, 2, 0])))  # fmt: skip
                losses[-1].backward()
            torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-14)
        assert_same(plain, lean, 1e-10, 1e-12)
        for optimizer in optimizers:
            optimizer.step()


def test_rivals_that_are_equal_share_the_gradient() -> None:
    config = DenseNetConfig(
        4,
        ((),),
        (),
        num_classes=3,
        stem="cifar",
        classifier_indices=(0, 1),
        classifier_rivals=(2, 3),
    )
    plain, lean = twins(config, 1)
    for net in (plain, lean):
        with torch.no_grad():
            net.features.conv0.weight[2] = net.features.conv0.weight[0]
        net(images(config)).square().sum().backward()
    assert plain.features.conv0.weight.grad[[0, 2]].abs().amax((1, 2, 3)).all()
    assert_same(plain, lean, 1e-10, 1e-12)


@pytest.mark.parametrize("most", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ranges_train_as_positions_do(monkeypatch, dtype: torch.dtype, most: int) -> None:
    """Many ranges are gathered, few are copied, and one is a view."""
    monkeypatch.setattr(dense_net, "MOST_RANGES", most)
    layers = tuple(
        LayerConfig(f"denselayer{n}", 4, None, read)
        for n, read in enumerate([(2, 3, 4), (0, 1, 6, 7), (0, 2, 4, 5, 9, 13), None], start=1)
    )
    config = DenseNetConfig(6, (layers,), (), 3, stem="cifar", classifier_indices=(1, 2, 3, 8, 20))
    plain, lean = (net.to(dtype) for net in twins(config, 1))
    kept = [
        m.ranges
        for m in lean.modules()
        if isinstance(m, ReadStream) and m.input_indices is not None
    ]
    assert [r is not None for r in kept] == {0: [False] * 4, 1: [True, False, False, False],
                                             3: [True, True, False, True]}[most]  # fmt: skip
    for net in (plain, lean):
        net(images(config).to(dtype)).square().sum().backward()
    close = (1e-10, 1e-12) if dtype == torch.float64 else (1e-3, 1e-4)
    assert_same(plain, lean, *close)


@settings(max_examples=15)
@given(pruned_configs(), st.integers(0, 99), st.integers(1, 2), st.integers(2, 5))
def test_any_net(config: DenseNetConfig, seed: int, level: int, batch: int) -> None:
    plain, lean = twins(config, level, seed)
    x = images(config, batch, seed)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for net, given_images in zip((plain, lean), inputs, strict=True):
        torch.manual_seed(seed)
        net(given_images).square().sum().backward()
    assert_same(plain, lean, 1e-8, 1e-10)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("level", [1, 2])
def test_gradcheck(level: int) -> None:
    layers = (LayerConfig("denselayer1", 1), LayerConfig("denselayer2", 1, 2, (0, 2), "2/1"))
    config = DenseNetConfig(
        2,
        (layers, ()),
        (TransitionConfig(2, (0, 1), None, (2, 3)),),
        num_classes=2,
        in_channels=1,
        stem="cifar",
    )
    net = randomise_(DenseNet(config, memory_efficient=level).double(), 3)

    def logits(*values: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(net, dict(zip(names, values[1:], strict=True)),
                                                   (values[0],))  # fmt: skip
        return found

    names = [name for name, _ in net.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in net.parameters()]
    x = images(config, 2)[..., :4, :5].clone().requires_grad_()
    assert torch.autograd.gradcheck(logits, (x, *values))


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_precision_and_autocast(
    monkeypatch: pytest.MonkeyPatch, kernels: bool, layout: torch.memory_format, dtype: torch.dtype
) -> None:
    """As close to the net in float64 as the plain net of the same precision is, or closer."""
    if not kernels:
        monkeypatch.setattr(fused, "library", lambda: None)
    elif fused.library() is None:
        pytest.skip("no C compiler when prune_dn was installed")
    monkeypatch.setattr("prune_dn.models.stream_reading.CHUNK_BYTES", 1 << 14)  # several chunks
    config = densenet([3, 3], 12, stem="cifar", num_classes=3, num_init_features=24).config
    exact, _ = twins(config, 0)
    x, y = images(config, 8), torch.arange(8) % 3
    F.cross_entropy(exact(x), y).backward()
    errors = []
    for level in (0, 1, 2):
        net = randomise_(DenseNet(config, memory_efficient=level), 5).to(memory_format=layout)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = F.cross_entropy(net(x.float().contiguous(memory_format=layout)), y)
        loss.backward()
        found = torch.cat([p.grad.flatten() for p in net.parameters()])
        wanted = torch.cat([p.grad.flatten() for p in exact.parameters()])
        errors.append(float((found - wanted).norm() / wanted.norm()))
        buffers = zip(net.named_buffers(), exact.buffers(), strict=True)
        for (key, a), b in buffers:
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance, msg=key)  # fmt: skip
    assert max(errors[1:]) < 1.5 * errors[0] + 1e-6, errors
    assert errors[0] < (1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dropout_draws_the_same_numbers(layout: torch.memory_format) -> None:
    config = densenet([3, 2], 4, stem="cifar", num_classes=3, drop_rate=0.5).config
    x = images(config, 2).float().contiguous(memory_format=layout)
    outputs = []
    for level in (0, 1):
        net = randomise_(DenseNet(config, memory_efficient=level), 5).to(memory_format=layout)
        torch.manual_seed(3)
        outputs.append(net(x))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_one_image_in_eval_mode_and_in_training() -> None:
    x = images(UNEVEN, 1)[..., :2, :2]
    for net in twins(UNEVEN, 1):
        with pytest.raises(ValueError, match=r"values? per channel"):
            net(x)
    plain, lean = twins(UNEVEN, 1)
    for net in (plain.eval(), lean.eval()):
        net(x).sum().backward()
    assert_same(plain, lean, 1e-10, 1e-12)


def test_statistics_move_once_whatever_follows() -> None:
    net = DenseNet(UNEVEN, memory_efficient=2).double()
    tracked = net.features.denseblock1.denselayer2.norm1
    with torch.no_grad():
        net(images(UNEVEN))
    assert tracked.num_batches_tracked == 1
    loss = net(images(UNEVEN)).sum()
    assert tracked.num_batches_tracked == 2
    mean = tracked.running_mean.clone()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in net.parameters()]
    loss.backward()
    for p, grad in zip(net.parameters(), first, strict=True):
        torch.testing.assert_close(p.grad, 2 * grad)
    assert tracked.num_batches_tracked == 2 and torch.equal(tracked.running_mean, mean)
    net.eval()(images(UNEVEN)).sum().backward()
    assert tracked.num_batches_tracked == 2 and torch.equal(tracked.running_mean, mean)


def test_it_keeps_less_and_grows_linearly() -> None:
    x = torch.randn(2, 3, 8, 8)

    def kept(depth: int, level: int) -> int:
        net = densenet([depth], 4, stem="cifar", num_classes=2, memory_efficient=level)
        return saved_bytes(net, lambda: net(x).sum())

    naive, one, two = (kept(16, level) for level in (0, 1, 2))
    assert two < 0.6 * one < 0.2 * naive
    # Beside the bottlenecks (16 maps a layer) what is kept at level 1 is the stream: 8 + 4 a layer.
    stem, pixels = 4 * 2 * 64 * 3, 4 * 2 * 64
    assert one == pytest.approx(pixels * (8 + 20 * 16) + stem, rel=0.05)
    assert kept(32, 1) < 2.2 * one


# -- where it turns itself off -------------------------------------------------------------------


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "_SAID", set())


def hooked(net: DenseNet) -> None:
    net.features.denseblock1.denselayer1.norm1.register_forward_hook(lambda *_: None)


def synchronised(net: DenseNet) -> None:
    nn.SyncBatchNorm.convert_sync_batchnorm(net)


def wrapped(net: DenseNet) -> None:
    class Twice(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    old = net.features.denseblock1.denselayer1.conv1
    net.features.denseblock1.denselayer1.conv1 = Twice(*old.weight.shape[1::-1], 3, padding=1,
                                                       bias=False).double()  # fmt: skip


def untracked(net: DenseNet) -> None:
    net.features.transition1.norm = nn.BatchNorm2d(4, track_running_stats=False).double()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (hooked, "hooks on features.denseblock1.denselayer1.norm1 would not run"),
        (wrapped, "features.denseblock1.denselayer1.conv1 is a Twice"),
        (untracked, "features.transition1.norm has no weights or no running statistics"),
    ],
)
def test_it_turns_itself_off_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[DenseNet], None], said: str
) -> None:
    forget(monkeypatch)
    plain, lean = twins(UNEVEN, 1)
    for net in (plain, lean):
        torch.manual_seed(0)
        change(net)
    x = images(UNEVEN)
    with pytest.warns(UserWarning, match=said):
        found = lean(x)
    assert torch.equal(found, plain(x))
    lean(x)  # said already


def test_synchronised_norms_are_left_to_the_plain_net() -> None:
    net = nn.SyncBatchNorm.convert_sync_batchnorm(DenseNet(UNEVEN, memory_efficient=True))
    assert "norm1 is a SyncBatchNorm" in str(shared_memory.why_not(net))


def test_hooks_on_all_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert shared_memory.why_not(DenseNet(UNEVEN)) == "hooks on all modules would not run"
    finally:
        handle.remove()
    assert shared_memory.why_not(DenseNet(UNEVEN)) is None


def test_torch_func_and_export_get_the_plain_net(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)
    plain, lean = twins(UNEVEN, 1)
    for net in (plain, lean):
        net.eval()
    weights = {name: p.detach() for name, p in plain.named_parameters()}

    def loss(net: DenseNet) -> Callable[[dict[str, Tensor]], Tensor]:
        return lambda w: torch.func.functional_call(net, w, (images(UNEVEN),)).sum()

    with pytest.warns(UserWarning, match=r"torch\.func"):
        found = torch.func.grad(loss(lean))(weights)
    for key, wanted in torch.func.grad(loss(plain))(weights).items():
        torch.testing.assert_close(found[key], wanted)
    with pytest.warns(UserWarning, match="export"):
        program = torch.export.export(lean, (images(UNEVEN),)).module()
    torch.testing.assert_close(program(images(UNEVEN)), plain(images(UNEVEN)))


def test_torch_compile_gets_the_plain_net(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)
    plain, lean = twins(UNEVEN, 1)
    with pytest.warns(UserWarning, match=r"torch\.compile"):
        found = torch.compile(lean, backend="eager")(images(UNEVEN))
    torch.testing.assert_close(found, plain(images(UNEVEN)))
    for loss in (found, plain(images(UNEVEN))):
        loss.sum().backward()
    torch.testing.assert_close(lean.classifier.bias.grad, plain.classifier.bias.grad)


def test_levels() -> None:
    with pytest.raises(ConfigError, match="is False, True \\(1\\) or 2"):
        DenseNet(UNEVEN, memory_efficient=3)


def test_second_derivatives_are_refused() -> None:
    net = DenseNet(UNEVEN, memory_efficient=True).double()
    x = images(UNEVEN).requires_grad_()
    with pytest.raises(TrainingError, match=r"set model\.memory_efficient = False"):
        torch.autograd.grad(net(x).sum(), x, create_graph=True)


PROCESSES = """
    import sys
    import torch
    import torch.nn.functional as F
    from torch.nn.parallel import DistributedDataParallel
    from prune_dn.models import densenet
    from prune_dn.base.processes import process_state

    def trained(level):
        torch.manual_seed(0)
        net = densenet([2, 2], 4, stem="cifar", num_classes=3, memory_efficient=level).double()
        shared = DistributedDataParallel(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for step in range(2):
            x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(rank + 2 * step))
            optimizer.zero_grad()
            F.cross_entropy(shared(x.double()), torch.tensor([0, 1, 2, 0])).backward()
            optimizer.step()
        return net.state_dict()

    state = process_state()
    rank = state.process_index
    torch.save({level: trained(level) for level in (0, 1)}, f"{sys.argv[1]}/rank{rank}.pt")
    state.destroy_process_group()
"""


def test_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(PROCESSES))
    in_two_processes(script, str(tmp_path))
    ranks = [torch.load(tmp_path / f"rank{i}.pt", weights_only=True) for i in range(2)]
    for key, plain in ranks[0][0].items():
        torch.testing.assert_close(ranks[0][1][key], plain, rtol=1e-9, atol=1e-11, msg=key)
        if "running" not in key:
            torch.testing.assert_close(ranks[1][1][key], ranks[0][1][key], rtol=0, atol=0, msg=key)
