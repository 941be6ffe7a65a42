"""Commands on files of nets that are not ours: by the constructor in the file, or by --model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
import torchvision
from commands import Run, bad, document, run  # noqa: F401  (a fixture)
from oracle import randomise_
from other_nets import NETS
from PIL import Image
from torch import nn

from prune_dn.checkpoints.checkpoint import load, read_info, save
from prune_dn.measure.profiling import count
from prune_dn.models import DenseNet

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


def folder_of_images(path: Path) -> None:
    """Three classes of coloured squares, in folders train and test."""
    generator = torch.Generator().manual_seed(0)
    for part, count_ in (("train", 12), ("test", 4)):
        for label in range(3):
            (path / part / str(label)).mkdir(parents=True)
            for number in range(count_):
                pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
                pixels[..., label] //= 4
                Image.fromarray(pixels.numpy()).save(path / part / str(label) / f"{number}.png")


CALIBRATED = ["--criterion", "reconstruction", "--compensate", "least_squares", "--data", "images"]


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("torchvision/resnet18", []),
        (MODEL, [*CALIBRATED, "--normalize", "imagenet"]),
    ],
)
def test_from_a_training_scripts_checkpoint_to_a_pruned_onnx_file(
    run: Run, model: str, options: list[str]
) -> None:
    """One command line."""
    torch.manual_seed(0)
    library, _, name = model.partition("/")
    make = timm.create_model if library == "timm" else torchvision.models.get_model
    net = randomise_(make(name, num_classes=3), 0).eval()
    script(net, "net.pth")
    folder_of_images(Path("images"))
    command = ["prune", "net.pth", "--model", model, "--ratio", 0.5, "--unit", "macs", *options]
    command += ["--image-size", 32, "-o", "small.safetensors", "--export", "small.onnx", "--json"]
    found = document(run(*command))
    assert found["exported"] == "small.onnx" and found["achieved"] >= 0.5
    assert found["macs_before"] == count(net, 32).macs
    small = load("small.safetensors")
    assert type(small) is type(net) and count(small, 32).macs == found["macs_after"]
    assert read_info("small.safetensors")["pruned_from"] == "net.pth"
    x = torch.randn(2, 3, 32, 32)
    onnx = onnxruntime.InferenceSession("small.onnx").run(["logits"], {"input": x.numpy()})[0]
    with torch.no_grad():
        wanted = small(x)
    atol = 1e-4 * wanted.abs().max().item()
    torch.testing.assert_close(torch.from_numpy(onnx), wanted, rtol=0, atol=atol)
    scored = document(run("evaluate", "small.safetensors", "--data", "images", "--json"))
    assert scored["n"] == 12 and scored["images"]["image_size"] == 32


def test_a_densenet_of_a_script_becomes_ours_and_has_a_plan(run: Run) -> None:
    net = randomise_(torchvision.models.densenet121(num_classes=3), 0)
    script(net, "net.pth")
    command = ["prune", "net.pth", "--model", "torchvision/densenet121", "--ratio", 0.3]
    options = ["--image-size", 64, "-o", "a.safetensors", "--plan-out", "plan.json", "--json"]
    document(run(*command, *options))
    assert isinstance(load("a.safetensors"), DenseNet) and Path("plan.json").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            ["--export", "a.tflite"],
            "a.tflite: the ending says the format; use .onnx, .xml, .pt2, .pt, .pth",
        ),
        (["--export", "o.safetensors"], "the ending says the format|is --output itself"),
        (["--model", "timm/resnet18"], "does not fit: "),
        (["--data", "nowhere"], "no images are read"),
        (["--units", "edge"], "units"),
    ],
)
def test_what_prune_refuses(run: Run, named: Path, options: list[Any], text: str) -> None:
    bad(run("prune", named, "--ratio", 0.3, "-o", "o.safetensors", *options), text)
    assert not Path("o.safetensors").exists()


def test_a_net_that_is_named_is_pruned_from_its_own_file(run: Run, named: Path) -> None:
    command = ["prune", named, "--ratio", 0.3, "--unit", "params", "-o", "o.safetensors"]
    found = document(run(*command, "--recalibrate", 2, "--json"))
    assert found["params_after"] < 0.7 * found["params_before"]
    assert document(run("profile", "o.safetensors", "--json"))["params"] == found["params_after"]
