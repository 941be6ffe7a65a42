"""Exported files give the model's answers at any batch size, or do not exist."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from light_cnn_oracle import slow
from oracle import randomise_
from other_nets import NETS

from prune_dn.deploy.onnx_files import export_onnx
from prune_dn.deploy.preparing import ExportReport
from prune_dn.deploy.torch_files import export_torch
from prune_dn.errors import ConfigError, ExportError
from prune_dn.graph import call, tensors
from prune_dn.models import (
    LIGHT_CNNS,
    DenseNet,
    DenseNetConfig,
    LayerConfig,
    LightCNN,
    MFMConfig,
    TransitionConfig,
    densenet,
)
from prune_dn.models.examples import in_batch
from prune_dn.pruning import prune

UNEVEN = DenseNetConfig(
    num_init_features=4,
    blocks=(
        (LayerConfig("denselayer2", 4, 6, (0, 3), "3/2"), LayerConfig("denselayer3", 3)),
        (
            LayerConfig("denselayer1", 2, mfm="2/1"),
            LayerConfig("denselayer2", 3, 4, (0, 1, 3), "2/1", (4, 1, 3), (1,)),
        ),
    ),
    transitions=(TransitionConfig(3, (1, 4, 8), "2/1", (2, 4, 10), (0, 2)),),
    num_classes=5,
    in_channels=1,
    stem="cifar",
    classifier_indices=(0, 2, 4),
    classifier_rivals=(7, 2, 6),
)


def uneven(seed: int = 0) -> DenseNet:
    return randomise_(DenseNet(UNEVEN), seed)


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def run(path: Path, x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(session(path).run(["logits"], {"input": x.numpy()})[0])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[DenseNet, Path, ExportReport, str]:
    """A net in an odd state, its ONNX file, the report, and the state as text before."""
    net = uneven().double().train()
    net.memory_efficient = True
    net.features.transition1.eval()
    net.features.conv0.weight.requires_grad_(False)
    before = state_of(net)
    path = tmp_path_factory.mktemp("onnx") / "new" / "net.onnx"
    return net, path, export_onnx(net, path, image_size=(8, 12)), before


def state_of(net: DenseNet) -> str:
    modes = {name: module.training for name, module in net.named_modules()}
    tensors = {name: (t.dtype, t.sum().item()) for name, t in net.state_dict().items()}
    grads = {name: p.requires_grad for name, p in net.named_parameters()}
    return repr((net.memory_efficient, modes, tensors, grads))


def test_onnx_gives_the_same_logits_at_any_batch(
    exported: tuple[DenseNet, Path, ExportReport, str],
) -> None:
    net, path, report, before = exported
    assert state_of(net) == before
    plain = uneven().eval()
    for batch in (1, 2, 5):
        x = torch.randn(batch, 1, 8, 12)
        with torch.no_grad():
            torch.testing.assert_close(run(path, x), plain(x), rtol=0, atol=1e-5)
    assert report.path == path and report.batches == (1, 7)
    assert report.size_bytes == path.stat().st_size
    assert 0 <= report.max_abs_error < 1e-5


def test_onnx_file_is_one_clean_file(exported: tuple[DenseNet, Path, ExportReport, str]) -> None:
    _, path, _, _ = exported
    assert os.listdir(path.parent) == ["net.onnx"]
    onnx.checker.check_model(str(path), full_check=True)
    (given,), (made,) = session(path).get_inputs(), session(path).get_outputs()
    assert (given.name, given.shape, given.type) == ("input", ["batch", 1, 8, 12], "tensor(float)")
    assert (made.name, made.shape) == ("logits", ["batch", 5])
    text = path.read_bytes()
    assert b"dense_net.py" not in text and str(Path.cwd()).encode() not in text


def test_onnx_folds_the_norms_that_follow_a_conv(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    net = randomise_(densenet([2, 1], 4, num_classes=3), 1)
    capfd.readouterr()
    export_onnx(net, tmp_path / "net.onnx", image_size=33)
    assert capfd.readouterr() == ("", "")  # nothing is printed
    ops = Counter(node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node)
    readers = 3 + 1 + 1  # norm1 of each layer, the transition, the last norm
    assert ops["BatchNormalization"] == readers
    assert ops["Conv"] == 1 + 2 * 3 + 1
    with torch.no_grad():
        x = torch.randn(3, 3, 33, 33)
        torch.testing.assert_close(run(tmp_path / "net.onnx", x), net.eval()(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("opset", [18, np.int64(20)])
def test_onnx_opset(tmp_path: Path, opset: int) -> None:
    net = densenet([1], 4, stem="cifar", num_classes=2)
    export_onnx(net, tmp_path / "net.onnx", image_size=8, opset=opset)
    written = onnx.load(tmp_path / "net.onnx").opset_import
    assert [(entry.domain, entry.version) for entry in written] == [("", opset)]


@pytest.mark.parametrize("opset", [0, -1, 7, 13, 17, 999, "18", 18.0, True])
def test_an_opset_that_cannot_be_written(tmp_path: Path, opset: object) -> None:
    newest = onnx.defs.onnx_opset_version()
    match = rf"opset is {opset!r}; PyTorch's exporter can write the integers from 18 to {newest}"
    with pytest.raises(ExportError, match=match):
        export_onnx(uneven(), tmp_path / "net.onnx", image_size=8, opset=opset)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("entry", [("", 18), ("pkg.other", 1)])
def test_a_file_of_another_opset_is_not_left(
    exported: tuple[DenseNet, Path, ExportReport, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    entry: tuple[str, int],
) -> None:
    """The exporter goes on where it could not convert: what it wrote is compared with the request."""
    proto = onnx.load(exported[1])
    if entry[0]:
        proto.opset_import[0].version = 19
        proto.opset_import.append(onnx.helper.make_opsetid(*entry))
    else:
        proto.opset_import[0].version = entry[1]
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: SimpleNamespace(model_proto=proto))
    with pytest.raises(ExportError, match=r"opset 19 was asked for, but PyTorch exported \{'': 1"):
        export_onnx(uneven(), tmp_path / "net.onnx", image_size=(8, 12), opset=19)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", [0, "8", 8.0, True, (8,), (8, 8, 8), None])
def test_sizes_that_are_none(tmp_path: Path, size: object) -> None:
    for export, name in ((export_onnx, "net.onnx"), (export_torch, "net.pt2")):
        with pytest.raises(ConfigError, match=r"image_size is .*; give pixels, or"):
            export(uneven(), tmp_path / name, image_size=size)  # type: ignore[operator]


def test_another_answer_is_no_file(
    exported: tuple[DenseNet, Path, ExportReport, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, path, _, _ = exported
    program = SimpleNamespace(model_proto=onnx.load(path))
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: program)
    (tmp_path / "net.onnx").write_bytes(b"before")
    export_onnx(uneven(), tmp_path / "same.onnx", image_size=(8, 12))  # the same weights
    with pytest.raises(ExportError) as error:
        export_onnx(uneven(seed=1), tmp_path / "net.onnx", image_size=(8, 12))
    text = str(error.value)
    assert "the ONNX file differs from the model at batch 1: largest error" in text
    numbers = text.partition("largest error ")[2].split()
    assert float(numbers[0]) > 1e-4 * float(numbers[5].rstrip(";"))
    assert "allowed is 0.0001 of that" in text
    assert (tmp_path / "net.onnx").read_bytes() == b"before"
    assert sorted(os.listdir(tmp_path)) == ["net.onnx", "same.onnx"]
    # one weight that is wrong by a little
    changed = onnx.load(path)
    weight = max(changed.graph.initializer, key=lambda t: len(t.raw_data))
    values = np.frombuffer(weight.raw_data, dtype=np.float32) * 1.01
    weight.raw_data = values.astype(np.float32).tobytes()
    program.model_proto = changed
    with pytest.raises(ExportError, match="differs from the model"):
        export_onnx(uneven(), tmp_path / "new.onnx", image_size=(8, 12))
    export_onnx(uneven(), tmp_path / "new.onnx", image_size=(8, 12), tolerance=0.1)
    # a file that is none
    program.model_proto = onnx.ModelProto()
    with pytest.raises(ExportError, match="onnxruntime cannot read the exported file"):
        export_onnx(uneven(), tmp_path / "none.onnx", image_size=(8, 12))
    assert not (tmp_path / "none.onnx").exists()


def test_torch_export(tmp_path: Path) -> None:
    net = uneven().train()
    net.memory_efficient = True
    before = state_of(net)
    report = export_torch(net, tmp_path / "net.pt2", image_size=8)
    assert state_of(net) == before
    assert os.listdir(tmp_path) == ["net.pt2"]
    assert (
        report.max_abs_error < 1e-5 and report.size_bytes == (tmp_path / "net.pt2").stat().st_size
    )
    again = torch.export.load(tmp_path / "net.pt2").module()
    net.eval()
    for batch in (1, 5):
        x = torch.randn(batch, 1, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(again(x), net(x), rtol=0, atol=1e-5)
    assert b"dense_net.py" not in (tmp_path / "net.pt2").read_bytes()
    calls = {str(node.target) for node in torch.export.load(tmp_path / "net.pt2").graph.nodes}
    assert not any("checkpoint" in call for call in calls)  # no recomputation in it


def test_errors_before_any_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.onnx"
    with pytest.raises(ExportError, match="cannot run on images of 1x1 pixels: "):
        export_onnx(uneven(), path, image_size=1)
    with pytest.raises(ExportError, match="in_channels is 3, but the model takes 1"):
        export_onnx(uneven(), path, image_size=8, in_channels=3)
    broken = uneven()
    broken.classifier.bias.data[0] = float("nan")
    with pytest.raises(ExportError, match="the model's own logits are not finite"):
        export_onnx(broken, path, image_size=8)
    with pytest.raises(ConfigError, match="this ReLU is no CNN: it has no convolution"):
        export_onnx(torch.nn.ReLU(), path, image_size=8)
    with pytest.raises(ExportError, match=r"net.onnx must end in .pt2"):
        export_torch(uneven(), path, image_size=8)

    def fail(*_: object, **__: object) -> None:
        raise ValueError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(ExportError, match="could not export the model to ONNX: no such operator"):
        export_onnx(uneven(), path, image_size=8)
    with pytest.raises(ExportError, match=r"torch.export could not export .* no such operator"):
        export_torch(uneven(), tmp_path / "net.pt2", image_size=8)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", LIGHT_CNNS)
def test_a_pruned_light_cnn_as_onnx_and_torch_export(tmp_path: Path, name: str) -> None:
    """One layer has lost single filters, so that the index of its rivals is in the files too."""
    whole = LIGHT_CNNS[name](5, image_size=20 if name != "light_cnn_29_v2" else 32, embedding=8)
    layers = list(prune(whole, 0.8).config.layers)
    layers[0] = MFMConfig(layers[0].units, (0, 2))
    net = LightCNN(dataclasses.replace(whole.config, layers=tuple(layers)))
    net = randomise_(net, 0).train()
    size = net.config.image_size
    assert export_onnx(net, tmp_path / "a.onnx", image_size=size).batches == (1, 7)
    export_torch(net, tmp_path / "a.pt2", image_size=size)
    assert net.training
    x = torch.randn(3, 1, size, size)
    expected = slow(net, x)
    atol = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(run(tmp_path / "a.onnx", x), expected, rtol=0, atol=atol)
    found = torch.export.load(tmp_path / "a.pt2").module()(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    with pytest.raises(ExportError, match=f"takes images of {size}x{size} pixels, not 8x8"):
        export_onnx(net, tmp_path / "b.onnx", image_size=8)
    assert not (tmp_path / "b.onnx").exists()


@pytest.mark.parametrize("name", sorted(NETS))
def test_any_net_as_onnx_and_torch_export(tmp_path: Path, name: str) -> None:
    """At another batch than was exported, by the names of inputs and answers, the net's own answers."""
    build, example, _ = NETS[name]
    net, inputs = randomise_(build(), 0).train(), example()
    assert export_onnx(net, tmp_path / "a.onnx", example_inputs=inputs).max_abs_error < 1e-3
    assert net.training
    x = in_batch(inputs, 3)
    with torch.no_grad():
        wanted = call(net.eval(), x)
    written = session(tmp_path / "a.onnx")
    given = [entry.name for entry in written.get_inputs()]
    made = [entry.name for entry in written.get_outputs()]
    assert given == (["image", "signal"] if name == "two inputs" else ["input"])
    multiple = {"two inputs": ["logits", "value"], "u-net": ["0", "1"]}
    assert made == multiple.get(name, ["logits"])
    feed = dict(zip(given, (x.numpy() for x in tensors(x)), strict=True))
    found = [torch.from_numpy(y) for y in written.run(None, feed)]
    for mine, theirs in zip(found, tensors(wanted), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())
    if name in ("two inputs", "volume"):
        export_torch(net, tmp_path / "a.pt2", example_inputs=inputs)
        again = call(torch.export.load(tmp_path / "a.pt2").module(), x)
        assert type(again) is type(wanted)
        for mine, theirs in zip(tensors(again), tensors(wanted), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


def test_inputs_by_name_and_constants(tmp_path: Path) -> None:
    class Scaled(torch.nn.Conv2d):
        def forward(self, image, *, flag=True, mask=None, scale=1.0):  # type: ignore[no-untyped-def]
            y = super().forward(image) * scale
            return {"maps": [y, y + 1], "flag": "yes"} if flag else y

    net, x = Scaled(3, 4, 1), torch.randn(2, 3, 4, 4)
    export_onnx(net, tmp_path / "a.onnx", example_inputs={"image": x, "scale": 2.0, "mask": None})
    written = session(tmp_path / "a.onnx")
    assert [entry.name for entry in written.get_outputs()] == ["maps_0", "maps_1"]
    found = written.run(["maps_1"], {"image": x[:1].numpy()})[0]
    wanted = net(x[:1], scale=2.0)["maps"][1]
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=1e-5)


def test_what_is_said_of_other_nets(tmp_path: Path) -> None:
    path, (build, example, _) = tmp_path / "a.onnx", NETS["two inputs"]
    with pytest.raises(
        ExportError, match="give image_size in pixels, or example_inputs, for a TwoIn"
    ):
        export_onnx(build(), path)
    with pytest.raises(
        ExportError, match=r"cannot run on images of 8x8 pixels: .*missing 1 required"
    ):
        export_onnx(build(), path, image_size=8)
    with pytest.raises(ExportError, match=r"cannot run on example_inputs of shape \(1, 3, 8, 8\)"):
        export_onnx(build(), path, example_inputs=torch.zeros(1, 3, 8, 8))
    with pytest.raises(ExportError, match="have no effect beside example_inputs"):
        export_onnx(build(), path, example_inputs=example(), image_size=8)

    class Text(torch.nn.Conv2d):
        def forward(self, x: torch.Tensor) -> str:  # type: ignore[override]
            return "text"

    with pytest.raises(ExportError, match="without a tensor: nothing can be compared"):
        export_onnx(Text(3, 4, 1), path, image_size=8)
    assert os.listdir(tmp_path) == []


FULL_DISK = """
import resource, sys
from prune_dn.errors import WriteError
from prune_dn.deploy.onnx_files import export_onnx
from prune_dn.deploy.torch_files import export_torch
from prune_dn.models import densenet
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
net = densenet([1], 4, stem="cifar", num_classes=3)
for write, name in ((export_torch, "a.pt2"), (export_onnx, "a.onnx")):
    try:
        write(net, f"{sys.argv[1]}/{name}", image_size=8)
    except WriteError as error:
        print(error)
"""


def test_a_full_disk_is_an_error_like_others(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == [
        "File too large; nothing was changed"
    ] * 2
    assert list(tmp_path.iterdir()) == []
