"""The whole job for nets that are not ours: by name, by a function of one's own, from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
from own_nets import Residual, residual
from torch import nn

from prune_dn.checkpoints.checkpoint import load, read_info, save
from prune_dn.errors import ConfigError, DataError, RecipeError
from prune_dn.measure.profiling import count
from prune_dn.models import DenseNet
from prune_dn.pruning import Plan, apply_plan
from prune_dn.run import pipeline
from prune_dn.run.building import load_data, start
from prune_dn.run.recipe import Recipe
from prune_dn.run.recipe_file import parse_recipe

TEXT = """\
model: {factory: "own_nets:residual", arguments: {width: 8}}
data: {name: digits, image_size: 16, limit: 96}
train: {epochs: 1, batch_size: 16, learning_rate: 0.01}
prune: {pruning_ratio: 0.5, unit: macs, calibration: 64, rounds: 2}
finetune: {epochs: 1, batch_size: 16, learning_rate: 0.01, distillation: {weight: 0.5}}
report: {batch_sizes: [2], repeats: 2}
"""
NAMED = "model={name: timm/test_resnet}"
NO_ONNX = "export.onnx=false"


def tiny(folder: Path, *overrides: str) -> Recipe:
    return parse_recipe(TEXT, overrides=[f"output_dir={json.dumps(str(folder))}", *overrides])


@pytest.mark.parametrize("model", [None, NAMED])
def test_from_the_recipe_to_the_pruned_onnx_file(tmp_path: Path, model: str | None) -> None:
    """Every phase; the file gives in ONNX Runtime what the loaded net gives, and a lost one comes again."""
    overrides = ["prune.rounds=1"] if model is None else [model, "prune.compensate=none"]
    overrides += [] if model is None else ["prune.criterion=taylor"]
    recipe, folder = tiny(tmp_path / "run", *overrides), tmp_path / "run"
    told = pipeline.dry_run(recipe)
    assert told["pruned"]["macs"] <= 0.5 * told["dense"]["macs"] and told["achieved"] >= 0.5
    result = pipeline.run(recipe, progress=False)
    shape = residual() if model is None else None
    dense, small = (load(folder / f"{n}.safetensors", model=shape) for n in ("dense", "pruned"))
    assert type(small) is type(dense) is (Residual if model is None else type(timm_net()))
    stages, more = result.metrics["stages"], {"recalibrated"} if model else {"compensated"}
    assert set(stages) == {"dense", "pruned", "fine-tuned"} | more
    for net, stage in ((dense, "dense"), (small, "fine-tuned")):
        cost = count(net, 16)
        assert (stages[stage]["params"], stages[stage]["macs"]) == (cost.params, cost.macs)
    assert stages["fine-tuned"]["macs"] <= 0.5 * stages["dense"]["macs"]
    first, last = ("plan-1", "plan-2") if model else ("plan", "plan")
    plan = Plan.load(folder / f"{first}.json")
    cut = apply_plan(dense, plan)
    assert plan.requested["criterion"] == ("taylor" if model else "reconstruction")
    assert count(cut, 16).macs <= (0.75 if model else 0.5) * count(dense, 16).macs
    report = (folder / "report.md").read_text()
    for row in Plan.load(folder / f"{last}.json").layers:
        if row["before"] != row["after"]:
            assert f"| {row['name']} | {row['kind']} | {row['before']} | {row['after']} |" in report
    x = torch.randn(3, 1, 16, 16)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    found = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
    with torch.no_grad():
        torch.testing.assert_close(found, small(x), rtol=1e-4, atol=1e-4)
    assert read_info(folder / "pruned.safetensors")["data"]["name"] == "digits"
    weights = small.state_dict()
    (folder / "pruned.safetensors").unlink()  # as if stopped before the end
    again = pipeline.run(recipe, progress=False).model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())


def timm_net() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=10, in_chans=1)


def test_from_checkpoints(tmp_path: Path) -> None:
    """Of a net of one's own, of a library's net, and a training script's weights, each only cut."""
    torch.manual_seed(0)
    own, named = residual(6).eval(), timm_net().eval()
    save(own, tmp_path / "own.safetensors", example_inputs=torch.randn(1, 1, 16, 16))
    save(named, tmp_path / "named.safetensors", example_inputs=torch.randn(1, 1, 32, 32))
    torch.save({"state_dict": named.state_dict()}, tmp_path / "script.pth")
    for number, (file, beside, net) in enumerate(
        (
            ("own.safetensors", ', factory: "own_nets:residual", arguments: {width: 8}', own),
            ("named.safetensors", "", named),
            ("script.pth", ", name: timm/test_resnet", named),
        )
    ):
        recipe = tiny(
            *(tmp_path / f"run{number}", "train=null", "finetune=null", "prune.rounds=1", NO_ONNX),
            f"model={{checkpoint: {json.dumps(str(tmp_path / file))}{beside}}}",
            "data={name: digits, image_size: 32, limit: 96}",
        )
        result = pipeline.run(recipe, progress=False)
        assert type(result.model) is type(net)
        assert result.metrics["stages"]["dense"]["macs"] == count(net, 32).macs
        assert count(result.model, 32).macs <= 0.5 * count(net, 32).macs


def test_a_plain_densenet_of_a_library_becomes_ours(tmp_path: Path) -> None:
    overrides = [
        "model={name: timm/densenet121}",
        "data.image_size=32",
        "prune.units=[stream, layer]",
        "prune.unit=latency",
        "train.memory_efficient=2",
    ]
    recipe = tiny(tmp_path / "run", *overrides)
    net = start(recipe, load_data(recipe.data, seed=0))
    assert isinstance(net, DenseNet)
    assert (net.config.in_channels, net.config.num_classes) == (1, 10)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (
            ["prune.units=[stream, sibling]"],
            RecipeError,
            "prune.units: it has no sibling; leave that",
        ),
        (["prune={settle: true}"], RecipeError, "prune: nothing to settle: this net has no MFM"),
        (["prune.criterion=mfm_win_rate"], RecipeError, "prune: .*judges only what competes"),
        (
            ["prune.protect=[nobody]"],
            RecipeError,
            "prune: protect pattern 'nobody' matches no module",
        ),
        (
            ["prune.round_to=64"],
            RecipeError,
            r"prune: round_to=64 is larger .*the net is own_nets:res",
        ),
        (
            ["train.memory_efficient=true"],
            RecipeError,
            "train.memory_efficient: only DenseNets have",
        ),
        (
            ["model={factory: 'own_nets:sized'}", "finetune.resolutions=[[0, 16], [0.5, 8]]"],
            RecipeError,
            "^finetune.resolutions: at 8 pixels it fails: .*; leave them out",
        ),
        (
            ["model.arguments={width: 8, classes: 7}"],
            DataError,
            r"answers \(7,\) for .* has 10 classes",
        ),
        (
            ["model.arguments={channels: 3}"],
            DataError,
            "built for 3 input channels, the data .* has 1",
        ),
        (
            ["model={factory: 'own_nets:two_answers'}"],
            DataError,
            "answers a tuple in training mode; r",
        ),
        (["model={factory: 'own_nets:maps'}"], DataError, r"answers \(10, 16, 16\) for an image"),
        (["model={factory: 'own_nets:broken'}"], ConfigError, "broken failed with"),
        (
            ["model={name: torchvision/resnet18}"],
            DataError,
            "built for 3 input channels.*timm take",
        ),
        (["model={name: timm/test_vit}"], RecipeError, "prune: .*is a transformer"),
        (
            ["model={factory: 'own_nets:sized'}", "data.image_size=8"],
            DataError,
            "own_nets:sized fails in eval mode on images of 8 pixels: RuntimeError: .*image_size",
        ),
    ],
)
def test_what_is_refused_before_any_work(
    tmp_path: Path, overrides: list[str], error: type[Exception], message: str
) -> None:
    recipe = tiny(tmp_path / "run", *overrides)
    for job in (pipeline.dry_run, pipeline.run):
        with pytest.raises(error, match=message):
            job(recipe)
    assert not (tmp_path / "run").exists()
