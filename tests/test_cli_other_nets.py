"""Commands on files of nets that are not ours: by the constructor in the file, or by --model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
from commands import bad, document
from oracle import randomise_
from other_nets import NETS
from test_cli import Run, run  # noqa: F401  (a fixture)
from torch import nn

from prune_dn.checkpoint import load, read_info, save
from prune_dn.profiling import count

# ruff: noqa: F811

MODEL = "timm/test_resnet"
DATA = ["--data", "digits", "--image-size", 32]


def small() -> nn.Module:
    torch.manual_seed(0)
    return randomise_(timm.create_model("test_resnet", num_classes=10, in_chans=1), 0).eval()


@pytest.fixture
def named(run: Run) -> Path:  # `run` is in a folder of its own
    save(small(), "named.safetensors", info={"data": {"name": "digits", "image_size": 32}})
    return Path("named.safetensors")


def script(net: nn.Module, path: str) -> None:
    """As torchvision's training script writes a checkpoint."""
    told = argparse.Namespace(lr=0.1, model="resnet")
    torch.save({"model": net.state_dict(), "epoch": 1, "args": told}, path)


def test_profile_and_show(run: Run, named: Path) -> None:
    found = document(run("profile", named, "--batch-size", 1, "--repeats", 1, "--verify", "--json"))
    assert found["macs"] == count(small(), 32).macs == found["verify"]["thop_layers"]
    assert found["verify"]["layers_difference_percent"] == 0 < found["verify"]["difference_percent"]
    assert (found["image_size"], found["image_size_from"]) == (32, "from the checkpoint")
    code, out, _ = run("profile", named, "--batch-size", 1, "--repeats", 1, "--verify")
    assert code == 0 and "convs and linear layers: " in out and "(+0.00 %)" in out
    shown = document(run("show", named, "--json"))
    assert shown["class"] == "timm.models.resnet.ResNet" and shown["in_channels"] == 1
    assert shown["params"] == found["params"]


def test_the_size_that_a_net_of_timm_was_made_for_is_a_guess_that_is_said(run: Run) -> None:
    save(small(), "a.safetensors")
    found = document(run("show", "a.safetensors", "--json"))
    assert found["image_size"] == 160
    assert found["image_size_from"] == "guessed: usual for a ResNet"


def test_evaluate_export_and_finetune(run: Run, named: Path) -> None:
    found = document(run("evaluate", named, "--json"))
    assert found["n"] == 360 and found["macs"] == count(small(), 32).macs
    assert document(run("export", named, "-o", "a.onnx", "--json"))["image_size"] == 32
    x = torch.randn(3, 1, 32, 32)
    found = onnxruntime.InferenceSession("a.onnx").run(["logits"], {"input": x.numpy()})[0]
    with torch.no_grad():
        wanted = small()(x)
    atol = 1e-4 * wanted.abs().max().item()
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=atol)
    options = ["--epochs", 1, "--limit", 40, "--learning-rate", 0.01, "--json"]
    document(run("finetune", named, "-o", "tuned.safetensors", *options))
    assert type(load("tuned.safetensors")) is type(small())
    assert list(read_info("tuned.safetensors")["history"]) == ["finetune"]


def test_weights_of_a_script_by_the_name_of_their_net(run: Run) -> None:
    three = timm.create_model("test_resnet", num_classes=10).eval()
    script(three, "net.pth")
    found = document(run("profile", "net.pth", "--model", MODEL, "--image-size", 32, "--json"))
    assert found["params"] == count(three, 32).params
    document(
        run("export", "net.pth", "--model", MODEL, "--image-size", 32, "-o", "a.pt2", "--json")
    )
    bad(run("profile", "net.pth"), r"of another net say which: .* --model torchvision/NAME")
    bad(
        run("profile", "net.pth", "--model", "os/system"),
        "'os/system' is no known net; write torch",
    )
    bad(
        run("profile", "net.pth", "--model", "timm/resnet50"),
        "conv3.weight is missing; found conv1|downsample.*is missing; found conv1",
    )
    bad(
        run("evaluate", "net.pth", "--model", MODEL, *DATA),
        "net.pth has 3 input channels, the data",
    )
    save(small(), "own.safetensors")
    bad(run("show", "own.safetensors", "--model", "torchvision/resnet18"), "does not fit: ")


def test_a_net_that_was_saved_with_other_inputs_than_images(run: Run) -> None:
    build, example, _ = NETS["volume"]
    save(build(), "a.safetensors", example_inputs=example())
    bad(run("profile", "a.safetensors"), r"holds a other_nets.Volume, .*load\(path, model=...\)")
    wide = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    save(wide, "wide.safetensors", example_inputs=torch.zeros(2, 1, 32, 64))
    found: Any = document(run("profile", "wide.safetensors", "--repeats", 1, "--json"))
    assert found["input_shapes"] == [[2, 1, 32, 64]] and found["image_size"] is None
    assert found["macs"] == count(wide, (32, 64)).macs
    bad(run("evaluate", "wide.safetensors", "--data", "digits"), "other inputs than square images")
