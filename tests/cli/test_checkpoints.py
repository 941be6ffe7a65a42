"""Commands on checkpoints: what was used and guessed is said, each option is used or refused, and what is
read stays as it is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import RECIPE, Run, bad, document, net, run  # noqa: F401  (fixtures)
from scipy.stats import binomtest

from prune_dn.checkpoints.checkpoint import load, read_info, save, save_state_dict
from prune_dn.data.datasets import load_datasets
from prune_dn.models import densenet
from prune_dn.pruning import Plan
from prune_dn.training import FitConfig, evaluate, fit
from prune_dn.training.config import Distillation

# ruff: noqa: F811


@pytest.fixture
def plain(net: Path) -> Path:
    """The same net as a plain state dict, which says nothing of its data."""
    save_state_dict(load(net), "plain.pt")
    return Path("plain.pt")


def lines(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("images: ")]


GUESSED = "guessed: usual for such a DenseNet"
EVERY = [
    ["evaluate"],
    ["prune", "--ratio", 0.3, "--recalibrate", 1, "-o", "o.safetensors"],
    [
        "prune",
        "--ratio",
        0.3,
        "--criterion",
        "activation",
        "--calibration",
        8,
        "-o",
        "o.safetensors",
    ],
    ["finetune", "--epochs", 1, "--limit", 40, "-o", "o.safetensors"],
    ["sensitivity", "--ratios", 0.5, "--max-images", 10, "--units", "bottleneck", "--out", "o"],
]


@pytest.mark.parametrize("command", EVERY, ids=lambda c: " ".join(map(str, c[:4])))
def test_how_pixels_were_read_is_said_and_what_of_it_was_guessed(
    run: Run, plain: Path, net: Path, command: list[Any]
) -> None:
    name, *options = command
    code, out, err = run(name, plain, *options, "--data", "digits", "--json")
    assert code == 0, err
    spec = load_datasets("digits").spec
    told = json.loads(out)["images"]
    assert told == {
        "image_size": 32,
        "image_size_from": GUESSED,
        "resize": None,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "normalisation_from": "guessed: usual for the data, or measured on them",
    }
    assert lines(err) == [
        "images: 32 pixels (guessed: usual for such a DenseNet; --image-size if that is wrong), "
        "normalised with mean 0.3058 and std 0.3236 (guessed: usual for the data, or measured on "
        "them; --mean and --std, or --normalize if that is wrong)"
    ]
    given = ["--data", "digits", "--image-size", 8, "--mean", 0.5, "--std", 0.25]
    code, out, err = run(name, plain, *options, *given, "--json")
    assert code == 0, err
    told = json.loads(out)["images"]
    assert (told["image_size"], told["mean"], told["std"]) == (8, [0.5], [0.25])
    assert lines(err) == [
        "images: 8 pixels (--image-size), normalised with mean 0.5 and std 0.25 (--mean and --std)"
    ]
    code, out, err = run(name, net, *options, "--json")
    assert code == 0, err
    assert "guessed" not in out + err
    assert lines(err)[0].startswith("images: 8 pixels (from the checkpoint), normalised with mean")


@pytest.mark.filterwarnings("default::prune_dn.errors.DataWarning")
def test_a_recipe_says_how_pixels_are_read(run: Run, plain: Path) -> None:
    Path("r.yaml").write_text(RECIPE)
    code, out, err = run("finetune", plain, "--recipe", "r.yaml", "-o", "o.safetensors", "--json")
    assert code == 0, err
    told = json.loads(out)["images"]
    assert (told["image_size"], told["image_size_from"]) == (8, "from the recipe")
    assert told["normalisation_from"].startswith("guessed")
    assert lines(err)[0].startswith(
        "images: 8 pixels (from the recipe), normalised with mean 0.3058"
    )
    assert "warning: plain.pt does not say the mean of its pixels; [0.3058] is a guess" in err


@pytest.mark.parametrize(
    "command",
    [
        ["prune", "--ratio", 0.3, "-o", "o.safetensors"],
        ["export", "-o", "o.pt2"],
        ["profile", "--repeats", 1, "--batch-size", 1],
        ["show"],
    ],
    ids=lambda c: c[0],
)
def test_where_no_pixels_are_read_the_size_is_said(
    run: Run, plain: Path, command: list[Any]
) -> None:
    name, *options = command
    code, out, err = run(name, plain, *options, "--json")
    assert code == 0, err
    found = json.loads(out)
    found = found.get("images", found)
    assert (found["image_size"], found["image_size_from"]) == (32, GUESSED)
    if name != "show":
        assert lines(err) == [
            "images: 32 pixels (guessed: usual for such a DenseNet; --image-size if that is wrong)"
        ]
        found = document(run(name, plain, *options, "--image-size", 8, "--json"))
        found = found.get("images", found)
        assert (found["image_size"], found["image_size_from"]) == (8, "--image-size")


def links(net: Path) -> dict[str, str]:
    """Other names of one file."""
    os.link(net, "hard.safetensors")
    Path("soft.safetensors").symlink_to(net.name)
    Path("folder").symlink_to(net.parent, target_is_directory=True)
    return {
        "itself": net.name,
        "absolute": str(net),
        "relative": f"./x/../{net.name}",
        "hard link": "hard.safetensors",
        "symbolic link": "soft.safetensors",
        "through a folder": f"folder/{net.name}",
    }


def test_no_command_writes_over_what_it_reads(run: Run, net: Path) -> None:
    Path("x").mkdir()
    before = net.read_bytes()
    other = net.with_name("teacher.safetensors")
    other.write_bytes(before)
    for name in links(net).values():
        bad(run("prune", net, "--ratio", 0.5, "-o", name), r"--output \S+ is the checkpoint itself")
        bad(run("finetune", net, "--epochs", 1, "-o", name), "is the checkpoint itself")
        bad(run("finetune", other, "--epochs", 1, "--teacher", net, "-o", name), "is the teacher")
        plan = ["--plan-out", name, "-o", "small.safetensors"]
        bad(run("prune", net, "--ratio", 0.5, *plan), r"--plan-out \S+ is the checkpoint itself")
    save_state_dict(load(net), "plain.pt")
    Path("link.pt").symlink_to("plain.pt")
    plain = Path("plain.pt").read_bytes()
    for name in ("plain.pt", "link.pt"):
        bad(run("export", "plain.pt", "-o", name), "is the checkpoint itself")
    same = ["--plan-out", "./new.safetensors", "-o", "new.safetensors"]
    bad(run("prune", net, "--ratio", 0.5, *same), "--plan-out new.safetensors is --output itself")
    Path("s.json").write_text("{}")
    ratios = ["--ratios", "s.json", "--plan-out", "s.json", "-o", "new.safetensors"]
    bad(run("prune", net, "--ratio", 0.5, *ratios), "is the file of --ratios itself")
    assert net.read_bytes() == before and Path("plain.pt").read_bytes() == plain
    assert Path("s.json").read_text() == "{}" and not Path("new.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            (["prune", "--ratio", 0.5, *option, "-o", "o.safetensors"], f"{option[0]} has no effect: no im")
            for option in (["--data", "digits"], ["--data-root", "data"], ["--normalize", "cifar10"],
                           ["--mean", "0.5"], ["--std", "0.5"])
        ),
        *(
            (["finetune", "--recipe", "r.yaml", *option, "-o", "o.safetensors"],
             f"{option[0]} has no effect: the recipe's part `data`")
            for option in (["--data", "digits"], ["--image-size", 8], ["--limit", 9], ["--std", "1"])
        ),
        (["finetune", "--epochs", 1, "--set", "seed=1", "-o", "o.safetensors"],
         "--set has no effect without --recipe"),
        (["finetune", "--recipe", "r.yaml", "--set", "finetune.distillation={}", "-o", "o.safetensors"],
         "add --teacher"),
        (["evaluate", "--normalize", "imagenet", "--mean", "0.5", "--std", "0.5"],
         "--normalize has no effect beside --mean and --std"),
        (["evaluate", "--data-root", "nowhere"], "--data-root has no effect: digits come with"),
        (["export", "--image-size", 8, "-o", "o.pt"], "--image-size has no effect: a state dict"),
        (["prune", "--ratio", 0.5, "--criterion", "l1", "--calibration", 8, "-o", "o.safetensors"],
         "--calibration has no effect: criterion 'l1' reads only the weights and --compensate is none"),
        (["prune", "--ratio", 0.5, "--seed", 2**32, "-o", "o.safetensors"], "in the range|less than or equal"),
        (["finetune", "--epochs", 10**30, "-o", "o.safetensors"], "in the range|less than or equal"),
        (["finetune", "--epochs", 1, "--learning-rate", "inf", "-o", "o.safetensors"],
         "learning_rate: Input should be a finite number"),
        (["evaluate", "--mean", "nan", "--std", "1"], r"mean is \[nan\]; for pixels in \[0, 1\]"),
        (["evaluate", "--mean", "0.5", "--std", "inf"], r"std is \[inf\]; for pixels"),
        (["profile", "--batch-size", 10**9], "in the range|less than or equal"),
    ],
)  # fmt: skip
def test_each_option_is_used_or_refused(
    run: Run, net: Path, arguments: list[Any], message: str
) -> None:
    Path("r.yaml").write_text(RECIPE)
    bad(run(arguments[0], net, *arguments[1:]), message)
    assert not list(Path().glob("o.*"))


def test_a_plan_has_no_averaged_weights(run: Run, net: Path) -> None:
    document(
        run("prune", net, "--ratio", 0.5, "--plan-out", "p.json", "-o", "o.safetensors", "--json")
    )
    bad(run("show", "p.json", "--ema"), "--ema has no effect: a plan holds no weights")


def test_calibration_images_alone_mean_the_best_that_is_known(run: Run, net: Path) -> None:
    """As in Python; who says a criterion gets that, and a refit where it is asked for."""
    each = ("prune", net, "--ratio", 0.4, "--unit", "macs", "-o", "o.safetensors", "--json")
    images = ("--calibration", 32)
    both = ("--criterion", "reconstruction", "--compensate", "least_squares")
    alone, weights = document(run(*each, *images)), load("o.safetensors").state_dict()
    assert document(run(*each, *images, *both)) == alone
    for name, tensor in load("o.safetensors").state_dict().items():
        assert torch.equal(tensor, weights[name])
    assert (alone["criterion"], alone["compensate"]) == ("reconstruction", "least_squares")
    taylor = document(run(*each, *images, "--criterion", "taylor"))
    assert (taylor["criterion"], taylor["compensate"]) == ("taylor", "none")
    usual = document(run(*each))
    assert (usual["criterion"], usual["compensate"]) == ("bn_scale", "none")


def test_a_teacher_is_distilled_from(run: Run, net: Path, tmp_path: Path) -> None:
    """It was read and then left aside, unless a recipe asked for distillation too."""
    torch.manual_seed(5)
    teacher = densenet((2, 2), 4, bn_size=2, stem="cifar", num_classes=10, in_channels=1)
    save(teacher, tmp_path / "t.safetensors")
    options = ["--epochs", 1, "--learning-rate", 0.05, "--batch-size", 16, "--limit", 64]
    document(
        run(
            "finetune", net, *options, "--teacher", "t.safetensors", "-o", "a.safetensors", "--json"
        )
    )
    expected, data = load(net), load_datasets("digits", image_size=8, limit=64)
    config = FitConfig(epochs=1, learning_rate=0.05, batch_size=16, distillation=Distillation())
    fit(expected, data, config, teacher=load("t.safetensors"), progress=False)
    found = load("a.safetensors").state_dict()
    assert all(torch.equal(found[k], v) for k, v in expected.state_dict().items())


def test_the_seed_of_a_recipe_is_that_of_its_finetuning(run: Run, net: Path) -> None:
    Path("r.yaml").write_text(RECIPE + "seed: 3\n")
    nets = {}
    for name, options in (("recipe", []), ("same", ["--seed", 3]), ("other", ["--seed", 4])):
        document(
            run(
                "finetune",
                net,
                "--recipe",
                "r.yaml",
                *options,
                "-o",
                f"{name}.safetensors",
                "--json",
            )
        )
        nets[name] = load(f"{name}.safetensors").classifier.weight
    assert torch.equal(nets["recipe"], nets["same"])
    assert not torch.equal(nets["recipe"], nets["other"])


def test_an_accuracy_stands_with_its_interval(run: Run, net: Path) -> None:
    found = document(run("evaluate", net, "--json"))
    right = round(found["accuracy"] * found["n"])
    interval = binomtest(right, found["n"]).proportion_ci(method="wilson")
    assert found["accuracy_interval"] == pytest.approx([interval.low, interval.high])
    code, out, _ = run("evaluate", net)
    shown = (100 * found["accuracy"], 100 * interval.low, 100 * interval.high)
    assert code == 0
    assert "accuracy: {:.2f} % ({:.1f} to {:.1f}) (95 % interval)\n".format(*shown) in out
    assert f"n: {found['n']}\n" in out and "accuracy_interval" not in out


def test_finetuning_that_makes_it_worse_is_said(run: Run, net: Path) -> None:
    good = ["--epochs", 20, "--learning-rate", 0.1, "--batch-size", 16, "--limit", 200]
    found = document(run("finetune", net, *good, "-o", "good.safetensors", "--json"))
    assert found["notice"] is None and found["test_accuracy"] > found["test_accuracy_before"]
    data = load_datasets("digits", image_size=8)
    assert found["test_accuracy"] == evaluate(load("good.safetensors"), data.test).accuracy
    harm = ["--epochs", 1, "--learning-rate", 30, "--batch-size", 64, "-o", "worse.safetensors"]
    worse = document(run("finetune", "good.safetensors", *harm, "--json"))
    assert worse["test_accuracy"] < worse["test_accuracy_before"] == found["test_accuracy"]
    assert worse["notice"].startswith("fine-tuning made the test accuracy worse: ")
    assert f"on {len(data.test)} test images" in worse["notice"]
    code, out, _ = run("finetune", "good.safetensors", *harm)
    assert code == 0 and f"notice: {worse['notice']}" in out
    assert read_info("worse.safetensors")["data"]["name"] == "digits"


def test_prune_as_far_as_the_accuracy_allows(run: Run, net: Path) -> None:
    command = ["prune", net, "--unit", "macs", "-o", "small.safetensors", "--calibration", 64]
    code, out, err = run(*command, "--max-drop", 6, "--plan-out", "plan.json", "--json")
    assert code == 0, err
    found = json.loads(out)
    trials = json.loads(Path("small.search.json").read_text())["trials"]
    assert len(trials) == err.count("search: pruning_ratio")
    best = max((t for t in trials if t["holds"]), key=lambda t: t["pruning_ratio"])
    assert found["max_drop"] == 6 and f"{best['pruning_ratio']:.3f}" in found["found"]
    assert found["macs_after"] == best["macs"]
    plan = Plan.load("plan.json")
    assert plan.requested["pruning_ratio"] == best["pruning_ratio"]
    assert load("small.safetensors").config == plan.config_after
    # What was measured serves another budget.
    code, _, again = run(*command, "--max-drop", 5, "--json")
    assert code == 0 and "search: pruning_ratio 0.5000" in again
    bad(run(*command), "give --ratio, the fraction to remove, or --max-drop")
    bad(run(*command, "--ratio", 0.5, "--max-drop", 1), "one of the two")
    bad(run(*command, "--max-drop", 0), "it is in points of accuracy, above 0 and below 100")
