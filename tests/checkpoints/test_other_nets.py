"""Any net comes back from its file in a fresh process, with the same answers, or is refused."""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from damaged import fails, rewritten
from oracle import randomise_
from other_nets import NETS, Remembers, TwoInputs, UNet, Volume, own_head
from torch import nn

from prune_dn.checkpoints.checkpoint import load, read_example, read_info, read_plan, save
from prune_dn.errors import CheckpointError
from prune_dn.graph import call, tensors
from prune_dn.models import densenet
from prune_dn.pruning import make_plan, prune

FRESH = """
import sys, torch, other_nets
from prune_dn.checkpoints.checkpoint import load, read_example
from prune_dn.graph import call, tensors
folder = sys.argv[1]
for name, (build, _, named) in other_nets.NETS.items():
    path = f"{folder}/{name}.safetensors"
    net = load(path, model=None if named else build())
    example = torch.load(f"{folder}/{name}.pt", weights_only=True)
    with torch.no_grad():
        found = tensors(call(net, example))
    torch.save((found, repr(net)), f"{folder}/{name}.out")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[nn.Module, object, Path]]:
    """Each net pruned and saved, its example, and the file; what a fresh process made of it lies beside."""
    folder, found = tmp_path_factory.mktemp("nets"), {}
    torch.manual_seed(0)
    for name, (build, example, _) in NETS.items():
        dense, inputs = randomise_(build(), 0), example()
        small = prune(dense, 0.4, unit="params", criterion="l2", example_inputs=inputs)
        assert sum(p.numel() for p in small.parameters()) < 0.7 * sum(
            p.numel() for p in dense.parameters()
        )
        path = folder / f"{name}.safetensors"
        save(small, path, info={"note": name}, example_inputs=inputs)
        torch.save(inputs, folder / f"{name}.pt")
        found[name] = small.eval(), inputs, path
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    subprocess.run([sys.executable, "-c", FRESH, str(folder)], check=True, env=environment)
    return found


@pytest.mark.parametrize("name", NETS)
def test_a_pruned_net_in_a_fresh_process(saved, name: str) -> None:
    small, inputs, path = saved[name]
    with torch.no_grad():
        wanted = tensors(call(small, inputs))
    found, text = torch.load(path.with_suffix(".out"), weights_only=True)
    assert text == repr(small)  # the widths that layers remember, too
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine, theirs)  # bit by bit
    assert read_info(path) == {"note": name}
    shapes = [x.shape for x in tensors(inputs)]
    assert [x.shape for x in tensors(read_example(path))] == shapes


def test_a_given_net_stays_as_it_is_and_its_copy_has_the_file_s_dtype(saved) -> None:
    small, _, path = saved["volume"]
    dense = Volume().train()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    again = load(path, model=dense)
    assert dense.training and not any(module.training for module in again.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    assert again.state_dict().keys() == small.state_dict().keys()
    save(small.to(torch.bfloat16), path.with_name("half"))
    assert load(path.with_name("half"), model=dense).head.weight.dtype == torch.bfloat16
    small.float()


def test_a_net_that_no_registry_builds_is_given(saved) -> None:
    fails(
        saved["u-net"][2], r"does not fit: it holds a other_nets.UNet, .*: load\(path, model=...\)"
    )


def test_another_net_is_refused_with_the_first_tensor_and_both_shapes(
    saved, tmp_path: Path
) -> None:
    path = saved["u-net"][2]

    def refused(model: nn.Module, text: str) -> None:
        with pytest.raises(CheckpointError, match=f"u-net.safetensors does not fit: {text}"):
            load(path, model=model)

    refused(Volume(), "stem.weight, of shape 8x1x3x3x3 in the model, is not in the file")
    more = UNet()
    more.extra = nn.Conv2d(2, 2, 1)
    refused(more, "extra.weight, of shape 2x2x1x1 in the model, is not in the file")
    less = UNet()
    less.out.bias = None
    refused(less, "out.bias, of shape 2 in the file, is not in the model")
    narrow = UNet()
    narrow.down[0] = nn.Conv2d(3, 2, 3, padding=1)
    refused(narrow, r"down.0.weight has shape \dx3x3x3 in the file and 2x3x3x3 in the model")
    other = UNet()
    other.out = nn.Conv2d(16, 2, 3)
    refused(other, r"out.weight has shape 2x\d+x1x1 in the file and 2x16x3x3 in the model")


@pytest.mark.parametrize("change", ["slope", "stride", "eps"])
def test_other_answers_are_refused(saved, change: str) -> None:
    """The same tensors in modules of other options."""
    model = UNet()
    if change == "slope":
        model.down[2] = nn.LeakyReLU(0.1)
    elif change == "stride":
        model.deep[0].stride = (1, 1)
    else:
        model.deep[1].eps = 1e-2
    with pytest.raises(
        CheckpointError, match=r"UNet is not the net that was saved: .*; give a dense"
    ):
        load(saved["u-net"][2], model=model)


def test_a_width_that_a_module_remembers(tmp_path: Path) -> None:
    """Tensors do not tell it: the answers do."""
    net = Remembers()
    net.first, net.last, net.width = nn.Conv2d(3, 5, 3), nn.Linear(5, 2), 5
    save(net, tmp_path / "net")
    with pytest.raises(CheckpointError, match="its answers are others"):
        load(tmp_path / "net", model=Remembers())


def test_without_an_example_the_class_is_asked_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net = TwoInputs()
    save(net, tmp_path / "net")
    assert read_example(tmp_path / "net") is None
    load(tmp_path / "net", model=TwoInputs())
    assert "answers of this other_nets.TwoInputs were not compared: no example" in caplog.text

    class Other(TwoInputs):
        pass

    with pytest.raises(
        CheckpointError, match=r"the file holds a other_nets\.TwoInputs; give a dense"
    ):
        load(tmp_path / "net", model=Other())
    with pytest.raises(CheckpointError, match=r"does not run on its example_inputs.*\(TypeError: "):
        save(net, tmp_path / "net", example_inputs=torch.zeros(1, 3, 8, 8))
    with pytest.raises(CheckpointError, match="example_inputs hold a Linear; give tensors"):
        save(net, tmp_path / "net", example_inputs=(nn.Linear(1, 1),))


def test_random_answers_are_not_held_against_a_net(tmp_path: Path) -> None:
    class Noisy(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + torch.rand(())

    save(Noisy(3, 4, 1), tmp_path / "net")
    assert read_example(tmp_path / "net") is None
    load(tmp_path / "net", model=Noisy(3, 4, 1))


def test_tensors_that_are_shared_are_saved_once(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
        net[3].weight = net[1].weight
        return net

    net = tied()
    save(net, tmp_path / "net")
    again = load(tmp_path / "net", model=tied())
    assert again[3].weight is again[1].weight and torch.equal(again[1].weight, net[1].weight)
    loose = tied()
    loose[3].weight = nn.Parameter(torch.zeros(4, 4, 1, 1))
    with pytest.raises(
        CheckpointError, match=r"3\.weight, of shape 4x4x1x1 in the model, is not in"
    ):
        load(tmp_path / "net", model=loose)
    save(loose, tmp_path / "net")
    with pytest.raises(
        CheckpointError, match=r"3\.weight, of shape 4x4x1x1 in the file, is not in"
    ):
        load(tmp_path / "net", model=tied())


# -- by name -------------------------------------------------------------------------------------


def test_a_name_is_found_or_given_and_checked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "net"
    net = timm.create_model("resnet10t", features_only=True).eval()
    save(net, path, name="timm/resnet10t", options={"features_only": True})
    x = torch.randn(1, 3, 64, 64)
    assert all(map(torch.equal, load(path)(x), net(x)))
    wide = torchvision.models.resnet18(num_classes=1200).eval()
    save(wide, path)
    assert torch.equal(load(path)(x), wide(x))
    # another head, stride or activation: no constructor makes it, whatever its class
    changed = torchvision.models.resnet18()
    changed.relu = nn.SiLU()
    save(changed, path)
    assert "rebuilds this torchvision.models.resnet.ResNet (torchvision/res" in caplog.text
    fails(path, "it holds a torchvision.models.resnet.ResNet, which is given")
    with pytest.raises(
        CheckpointError, match=r"torchvision/resnet18 does not rebuild this .*: relu is"
    ):
        save(changed, path, name="torchvision/resnet18")
    hooked = torchvision.models.resnet18().eval()
    hooked.fc.register_forward_hook(lambda _, x, y: 2 * y)
    with pytest.raises(CheckpointError, match="its answers are others"):
        save(hooked, path, name="torchvision/resnet18")
    with pytest.raises(CheckpointError, match="options are those of the constructor `name`"):
        save(changed, path, options={"num_classes": 1000})


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("os/system", {}, "'os/system' is no known net; write torchvision/NAME or timm/NAME"),
        ("resnet18", {}, "'resnet18' is no known net"),
        ("timm/../../x", {}, r"timm lists no net '../../x'"),
        ("timm/hf_hub:someone/net", {}, "timm lists no net 'hf_hub:someone/net'"),
        ("timm/local-dir:/tmp", {}, "timm lists no net"),
        ("torchvision/_utils", {}, "torchvision lists no net '_utils'"),
        ("torchvision/resnet18", {"weights": "DEFAULT"}, "'weights' is no option of torchvision/resn"),
        ("torchvision/resnet18", {"norm_layer": "os.system"}, "'norm_layer' is no option"),
        ("timm/resnet18", {"checkpoint_path": "/etc/passwd"}, "'checkpoint_path' is no option"),
        ("timm/resnet18", {"pretrained": True}, "'pretrained' is no option"),
        ("timm/resnet18", {"num_classes": "__import__('os')"}, "num_classes of timm/resnet18 is .__im"),
        ("timm/resnet18", {"num_classes": 10**12}, "num_classes of timm/resnet18 is 1000000000000"),
        ("timm/resnet18", {"num_classes": -1}, "num_classes of timm/resnet18 is -1"),
        ("timm/resnet18", {"num_classes": True}, "num_classes of timm/resnet18 is True"),
        ("timm/resnet18", {"act_layer": "os.system"}, "timm/resnet18 cannot be built with"),
    ],
)  # fmt: skip
def test_what_a_file_may_not_ask_for(saved, tmp_path: Path, name: str, options, text: str) -> None:
    path = tmp_path / "net"
    path.write_bytes(saved["resnet18"][2].read_bytes())
    told = json.dumps({"name": name, "options": options})
    rewritten(path, lambda header: header["__metadata__"].update(constructor=told))
    fails(path, f"does not fit: {text}")
    with pytest.raises(CheckpointError, match=text):
        save(saved["resnet18"][0], path, name=name, options=options)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("constructor", "[1]", "is damaged: its constructor is none"),
        ("constructor", '{"name": 1, "options": {}}', "is damaged: its constructor is none"),
        ("probe", "{}", "is damaged: its probe is none"),
        (
            "probe",
            '{"inputs": {"tensor": [99999, 99999], "dtype": "float32"}, "given": true, "dtype": "float64", "answers": []}',
            "is damaged: it describes an input of shape",
        ),
        (
            "probe",
            '{"inputs": {"tensor": [1], "dtype": "float32"}, "given": true, "dtype": "float64", "answers": []}',
            "does not fit: .* is not the net that was saved: it does not run",
        ),
        ("class", None, "is damaged: it does not say what net it holds"),
    ],
)
def test_damaged_metadata(saved, tmp_path: Path, key: str, value: str | None, text: str) -> None:
    path = tmp_path / "net"
    path.write_bytes(saved["resnet18"][2].read_bytes())
    told = {} if value is None else {key: value}
    rewritten(path, lambda h: (h["__metadata__"].pop(key), h["__metadata__"].update(told)))
    fails(path, text)


# -- what cannot be saved ------------------------------------------------------------------------


def test_what_is_not_saved(tmp_path: Path) -> None:
    def refused(net: nn.Module, text: str, **arguments: object) -> None:
        with pytest.raises(CheckpointError, match=text):
            save(net, tmp_path / "net", **arguments)  # type: ignore[arg-type]

    conv = nn.Conv2d(3, 4, 3)
    refused(nn.DataParallel(conv), r"the model is wrapped in DataParallel; .*: pass model.module")
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    refused(normed, "weight is computed by a parametrization; bake it in first")
    refused(nn.LazyConv2d(4, 3), "weight has no shape yet: run the net once")
    refused(nn.Conv2d(3, 4, 3, device="meta"), "weight is on the meta device")
    broken = nn.Conv2d(3, 4, 3)
    broken.weight.data[0] = float("nan")
    refused(broken, "weight holds 27 NaN or infinite values among 108")

    class Extra(nn.Conv2d):
        def get_extra_state(self) -> str:
            return "more"

    refused(Extra(3, 4, 3), r"it keeps state that is no tensor \(get_extra_state\)")
    ours = densenet([1], 4, stem="cifar", num_classes=2)
    refused(ours, "name has no effect: a DenseNet is saved with its config", name="timm/resnet18")
    assert os.listdir(tmp_path) == []


def test_buffers_that_hold_nan_and_buffers_that_are_not_kept(tmp_path: Path) -> None:
    """As the thresholds of torchxrayvision, in which NaN stands for none."""

    def build() -> nn.Module:
        net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
        net.register_buffer("thresholds", torch.tensor([0.5, float("nan")]))
        net.register_buffer("table", torch.ones(2), persistent=False)
        return net

    net = build()
    net.thresholds[0] = 0.25
    save(net, tmp_path / "net")
    again = load(tmp_path / "net", model=build())
    assert torch.equal(again.thresholds, net.thresholds) or again.thresholds[0] == 0.25
    assert torch.equal(again.table, torch.ones(2))


def test_a_plan_is_kept_with_the_net(tmp_path: Path) -> None:
    net = randomise_(densenet([2, 1], 4, stem="cifar", num_classes=3), 0)
    plan = make_plan(net, 0.3, criterion="l2", input_size=8)
    save(net, tmp_path / "net", plan=plan)
    assert read_plan(tmp_path / "net") == plan
    save(net, tmp_path / "net")
    assert read_plan(tmp_path / "net") is None
    save(net, tmp_path / "net", plan=plan)
    rewritten(tmp_path / "net", lambda header: header["__metadata__"].update(plan="{}"))
    with pytest.raises(CheckpointError, match="its plan cannot be read: not a plan of prune_dn"):
        read_plan(tmp_path / "net")


# -- checkpoints of training scripts -------------------------------------------------------------


@pytest.mark.parametrize("given", ["torchvision/resnet18", "net"])
def test_a_checkpoint_of_a_training_script(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, given: str
) -> None:
    """As torchvision's references/classification writes it."""
    net = randomise_(torchvision.models.resnet18(num_classes=6), 0).eval()
    script = {
        "model": OrderedDict((f"module.{k}", v) for k, v in net.state_dict().items()),
        "optimizer": {
            "state": {0: {"momentum_buffer": torch.zeros(2)}},
            "param_groups": [{"lr": 1}],
        },
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1, model="resnet18"),
        "model_ema": {f"module.{k}": v + 1 for k, v in net.state_dict().items()},
    }
    torch.save(script, tmp_path / "net.pth")
    model = torchvision.models.resnet18(num_classes=6) if given == "net" else given
    again = load(tmp_path / "net.pth", model=model)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), net(x)) and again.fc.out_features == 6
    assert (
        "took the mapping 'model', not the mapping 'model_ema' (ema: the averaged ones)"
        in caplog.text
    )
    assert "the modules of this ResNet" in caplog.text
    averaged = load(tmp_path / "net.pth", model=model, ema=True)
    assert torch.equal(averaged.fc.bias, net.fc.bias + 1)
    with pytest.raises(CheckpointError, match=r"features\.\S+ is missing; found module"):
        load(tmp_path / "net.pth", model="torchvision/mobilenet_v2")
    with pytest.raises(CheckpointError, match=r"layer1\.0\.downsample\.0\.weight is missing"):
        load(tmp_path / "net.pth", model="torchvision/resnet50")


def test_widths_of_another_net_must_run(tmp_path: Path) -> None:
    """The tensors of a ResNeXt have the names of a ResNet's, and fewer inputs in grouped convs."""
    net = torchvision.models.resnext50_32x4d(num_classes=3).eval()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    with pytest.raises(
        CheckpointError, match="its widths are not those of this ResNet, which does"
    ):
        load(tmp_path / "net.pth", model="torchvision/wide_resnet50_2")
    small = prune(torchvision.models.resnet18(), 0.5, criterion="l2", input_size=64).eval()
    torch.save(small.state_dict(), tmp_path / "net.pth")
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(load(tmp_path / "net.pth", model="torchvision/resnet18")(x), small(x))


def test_old_keys_of_torchvisions_densenets(tmp_path: Path) -> None:
    """Its published files have norm.1 where the classes have norm1."""
    net = randomise_(torchvision.models.densenet121(num_classes=3), 0).eval()
    old = {
        k.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): v
        for k, v in net.state_dict().items()
    }
    old = {k: v for k, v in old.items() if not k.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "net.pth")
    again = load(tmp_path / "net.pth", model="torchvision/densenet121")
    x = torch.randn(1, 3, 64, 64)
    assert type(again) is type(net) and torch.equal(again(x), net(x))
    assert type(load(tmp_path / "net.pth")) is not type(net)  # ours, where no name is given


def test_a_net_of_another_dtype_of_tensors(tmp_path: Path) -> None:
    path, net = tmp_path / "net", own_head()
    save(net, path, info={"a": 1})
    with pytest.raises(CheckpointError, match="holds no averaged"):
        load(path, model=own_head(), ema=True)
    save(densenet([1], 4, stem="cifar", num_classes=2), path)
    with pytest.raises(CheckpointError, match="holds a net of ours, whole: leave model out"):
        load(path, model=own_head())
    assert logging.getLogger("prune_dn.checkpoints.checkpoint").name
