"""The command line: exit codes, one clear message, JSON and nothing else, figures that are true."""
# ruff: noqa: F811  (fixtures are imported)

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import RECIPE, Run, bad, document, net, recipe, run  # noqa: F401  (fixtures)

from prune_dn.checkpoints.checkpoint import load, read_info, save, save_state_dict
from prune_dn.cli.options import app
from prune_dn.data.datasets import calibration_loader, load_datasets
from prune_dn.measure.profiling import count
from prune_dn.models import densenet, light_cnn_9
from prune_dn.pruning import Plan, apply_plan, latency_model, prune, recalibrate_batch_norm_
from prune_dn.run import inspection

COMMANDS = [command.name for command in app.registered_commands]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert re.search(rf"^  +prune-dn {command}( |$)", out, re.M)


def test_no_command_prints_the_commands(run: Run) -> None:
    _, out, err = run()
    assert all(command in out + err for command in COMMANDS)


def test_run_then_show_what_it_left(run: Run, recipe: Path) -> None:
    code, out, err = run("run", recipe)
    assert code == 0, err
    assert "fine-tuned" in out and "report: runs/tiny/report.md" in out
    metrics = json.loads(Path("runs/tiny/metrics.json").read_text())
    assert f"{metrics['stages']['dense']['params']:,}" in out
    assert document(run("run", recipe, "--json")) == metrics
    facts = document(run("show", "runs/tiny/plan.json", "--json"))
    assert facts["achieved"]["after"]["macs"] == metrics["stages"]["pruned"]["macs"]
    assert document(run("show", "runs/tiny/pruned.safetensors", "--json"))["info"]["data"]
    scored = document(run("evaluate", "runs/tiny/pruned.safetensors", "--json"))
    assert scored["accuracy"] == metrics["stages"]["fine-tuned"]["test_accuracy"]
    bad(run("run", recipe, "--set", "seed=5"), r"holds a run of another recipe .*: seed\)")
    bad(run("train", recipe, "--set", "seed=5"), "--overwrite")


def test_train_only(run: Run, recipe: Path) -> None:
    code, out, err = run("train", recipe, "--output-dir", "elsewhere")
    assert code == 0, err
    assert "checkpoint: elsewhere/dense.safetensors" in out
    assert load("elsewhere/dense.safetensors").config.num_classes == 10


def test_dry_run_trains_nothing(run: Run, recipe: Path) -> None:
    facts = document(run("run", recipe, "--dry-run", "--json", "--set", "prune.pruning_ratio=0.6"))
    assert facts["requested"] == 0.6 <= facts["achieved"]
    assert not Path("runs").exists()
    code, out, _ = run("run", recipe, "--dry-run")
    assert code == 0 and "output_dir: runs/tiny" in out


def test_what_would_have_no_effect(run: Run, recipe: Path, net: Path) -> None:
    bad(run("run", recipe, "--dry-run", "--overwrite"), "--overwrite has no effect with --dry-run")
    start = ["--set", f"model={{checkpoint: {net}}}", "--set", "train=null"]
    bad(run("train", recipe, *start), "has no part train, so there is nothing to do")
    assert not Path("runs").exists()


def test_validate_and_schema(run: Run, recipe: Path) -> None:
    code, out, err = run("validate", recipe, "--set", "seed=3")
    assert code == 0 and "is valid" in err
    assert "seed: 3" in out
    assert document(run("validate", recipe, "--json"))["prune"]["pruning_ratio"] == 0.4
    assert document(run("schema"))["properties"]["prune"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.epoch=3"],
            r"--set train.epoch=3: train.epoch: unknown key \(did you mean 'epochs'",
        ),
        (["train.epochs=x"], "train.epochs: 'x' is not an integer"),
        (["prune.pruning_ratio=0"], "prune.pruning_ratio is 0: nothing would be cut"),
        (["prune.pruning_ratio=1"], "prune.pruning_ratio is 1.0; it must lie in"),
        (["prune.pruning_ratio=.nan"], "nan is not a finite number"),
        (["prune.pruning_ratio='50'"], "'50' is not a number; write it without quotes"),
        (["prune.round_to=64"], "round_to=64 is larger than every width"),
        (["prune.protect=[nobody]"], "protect pattern 'nobody' matches no module"),
        (["data.name=image_folder", "data.root=nowhere"], "nowhere"),
        (["data.name=cifar10", "data.root=nowhere"], "nowhere"),
        (["model={checkpoint: none.safetensors}"], "cannot read none.safetensors"),
    ],
)
@pytest.mark.parametrize("command", [["run"], ["run", "--dry-run"]], ids=["run", "dry"])
def test_bad_recipe(
    run: Run, recipe: Path, overrides: list[str], message: str, command: list[str]
) -> None:
    sets = [x for o in overrides for x in ("--set", o)]
    bad(run(*command, recipe, *sets), message)
    assert not Path("runs/tiny/dense.safetensors").exists() or "prune" in overrides[0]


def test_bad_recipe_file(run: Run, tmp_path: Path) -> None:
    bad(run("run", "none.yaml"), "none.yaml: there is no such recipe")
    (tmp_path / "empty.yaml").write_text("")
    bad(run("validate", "empty.yaml"), "empty.yaml: the recipe is empty")
    (tmp_path / "two.yaml").write_text("seed: 1\nseed: 2\nmodle: 3\n")
    code, _, err = run("validate", "two.yaml")
    assert code == 2
    assert "two.yaml:2: duplicate key 'seed'" in err
    assert "two.yaml:3: modle: unknown key (did you mean 'model'?)" in err


@pytest.mark.parametrize(
    "arguments", [("bogus",), ("prune", "x"), ("run",), ("run", "--nope", "x")]
)
def test_usage_errors(run: Run, arguments: tuple[str, ...]) -> None:
    bad(run(*arguments), "Usage: prune-dn")


def test_prune(run: Run, net: Path) -> None:
    command = ["prune", net, "--ratio", 0.5, "--unit", "macs", "-o", "small.safetensors"]
    found = document(run(*command, "--plan-out", "plan.json", "--json"))
    small = load("small.safetensors")
    assert found["macs_after"] == count(small, 8).macs <= found["macs_before"] / 2
    assert found["macs_before"] == count(load(net), 8).macs
    assert found["file_bytes"] == Path("small.safetensors").stat().st_size
    plan = Plan.load("plan.json")
    assert plan.requested["input_size"] == 8
    expected = apply_plan(load(net), plan).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in small.state_dict().items())
    assert read_info("small.safetensors")["data"]["name"] == "digits"
    code, out, _ = run(*command)
    assert code == 0 and "achieved: 0.5" in out


def test_prune_can_recalibrate(run: Run, net: Path) -> None:
    command = ["prune", net, "--ratio", 0.5, "-o"]
    document(run(*command, "a.safetensors", "--json"))
    document(run(*command, "b.safetensors", "--recalibrate", 1, "--json"))
    first, second = load("a.safetensors").state_dict(), load("b.safetensors").state_dict()
    different = {k for k in first if not torch.equal(first[k], second[k])}
    assert different and all("running_" in k for k in different)


@pytest.mark.parametrize("augment", [None, "shift"])
def test_recalibration_follows_what_the_checkpoint_was_trained_on(
    run: Run, net: Path, augment: str | None
) -> None:
    told = {} if augment is None else {"augment": augment}
    save(load(net), net, info={**read_info(net), **told})
    command = ["prune", net, "--ratio", 0.3, "--recalibrate", 2, "-o", "a.safetensors"]
    document(run(*command, "--json"))
    expected = prune(load(net), 0.3, input_size=8)
    train = load_datasets("digits", image_size=8).train
    loader = calibration_loader(train, 64, augment=augment or "none")
    recalibrate_batch_norm_(expected, loader, max_batches=2)
    found = load("a.safetensors").state_dict()
    assert all(torch.equal(found[k], v) for k, v in expected.state_dict().items())
    document(run("finetune", "a.safetensors", "--epochs", 1, "-o", "b.safetensors", "--json"))
    assert read_info("b.safetensors")["augment"] == "shift"  # what is usual for digits


@pytest.mark.filterwarnings("always")
def test_what_speaks_against_a_plan_for_time_is_on_stderr(
    run: Run, net: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(configs, *_):
        return [0.1 + 1e-6 * count(config).macs for config in configs], "made up", 0.7

    monkeypatch.setattr(latency_model, "_measure", measure)
    arguments = ["--ratio", 0.1, "--unit", "latency", "--plan-out", "plan.json", "--json"]
    code, out, err = run("prune", net, *arguments, "-o", "fast.safetensors")
    assert code == 0 and json.loads(out)["unit"] == "latency", err
    assert "warning: the machine was busy when the latency model was fitted" in err
    assert "differ by 70% of the median" in Plan.load("plan.json").achieved["warnings"][0]


@pytest.mark.usefixtures("made_up_times")
def test_prune_to_a_latency(run: Run, net: Path) -> None:
    arguments = ["--ratio", 0.1, "--unit", "latency", "--runtime", "eager", "--batch-size", 2]
    found = document(run("prune", net, *arguments, "-o", "fast.safetensors", "--json"))
    assert found["unit"] == "latency"
    ratio = 1 - found["latency_after"] / found["latency_before"]
    assert found["achieved"] == pytest.approx(ratio, abs=1e-5)
    assert found["params_after"] < found["params_before"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", 0.5, "--runtime", "eager"], "runtime has no effect with unit 'channels'"),
        (["--ratio", 0.5, "--batch-size", 8], "batch_size has no effect with unit 'channels'"),
        (
            ["--ratio", 0.5, "--unit", "latency", "--runtime", "tvm"],
            "runtime 'tvm' is unknown; choose",
        ),
        (["--ratio", 0], "pruning_ratio is 0"),
        (["--ratio", 1], r"pruning_ratio is 1.0; it must lie in \(0, 1\)"),
        (["--ratio", 50], "did you mean 0.5"),
        (["--ratio", "nan"], "pruning_ratio is nan"),
        (["--ratio", "half"], "Invalid value for '--ratio'"),
        (["--ratio", 0.5, "--unit", "flops"], "unit 'flops' is unknown; choose from channels"),
        (
            ["--ratio", 0.5, "--criterion", "l3"],
            "criterion 'l3' is unknown; choose from activation",
        ),
        (["--ratio", 0.5, "--units", "edges"], "units 'edges' is unknown"),
        (["--ratio", 0.5, "--protect", "nobody"], "protect pattern 'nobody' matches no module"),
        (["--ratio", 0.5, "--round-to", 64], "round_to=64 is larger than every width"),
        (["--ratio", 0.5, "-o", "small.onnx"], "a checkpoint is a .safetensors file"),
    ],
)
def test_prune_with_bad_arguments(run: Run, net: Path, arguments: list[Any], message: str) -> None:
    bad(run("prune", net, "-o", "small.safetensors", *arguments), message)
    assert not Path("small.safetensors").exists()


@pytest.mark.parametrize("command", ["evaluate", "profile", "show", "export", "prune", "finetune"])
def test_bad_checkpoint(run: Run, net: Path, tmp_path: Path, command: str) -> None:
    extra = {
        "prune": ["--ratio", 0.5, "-o", "x.safetensors"],
        "export": ["-o", "x.onnx"],
        "finetune": ["-o", "x.safetensors"],
    }.get(command, [])
    bad(run(command, "none.safetensors", *extra), "cannot read none.safetensors: No such file")
    (tmp_path / "cut.safetensors").write_bytes(net.read_bytes()[:-100])
    bad(run(command, "cut.safetensors", *extra), "cut.safetensors is truncated")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    bad(run(command, "other.pt", *extra), "other.pt")
    assert not list(tmp_path.glob("x.*"))


def test_evaluate(run: Run, net: Path) -> None:
    found = document(run("evaluate", net, "--json"))
    data = load_datasets("digits", image_size=8)
    model = load(net).eval()
    with torch.no_grad():
        right = [
            int(model(data.test[i][0][None]).argmax()) == int(data.test[i][1])
            for i in range(len(data.test))
        ]
    assert found["n"] == len(data.test)
    assert found["accuracy"] == pytest.approx(sum(right) / len(right))
    assert document(run("evaluate", net, "--split", "val", "--json"))["n"] == len(data.val)
    changed = document(run("evaluate", net, "--recalibrate", 2, "--json"))
    assert changed["loss"] != found["loss"]
    bad(run("evaluate", net, "--split", "train"), "choose test or val")


def test_evaluate_a_foreign_checkpoint(run: Run, net: Path) -> None:
    save_state_dict(load(net), "plain.pt")
    bad(run("evaluate", "plain.pt"), r"does not say what data .* add --data")
    options = ["--data", "digits", "--image-size", 8]
    usual = document(run("evaluate", "plain.pt", *options, "--json"))
    assert usual["loss"] == document(run("evaluate", net, "--json"))["loss"]
    other = document(run("evaluate", "plain.pt", *options, "--mean", "0.9", "--std", "2", "--json"))
    assert other["loss"] != usual["loss"]
    bad(run("evaluate", "plain.pt", *options, "--mean", "0.9"), "--mean and --std belong together")
    bad(
        run("evaluate", "plain.pt", *options, "--mean", "a", "--std", "1"),
        "give numbers with commas",
    )
    bad(run("evaluate", "plain.pt", "--data", "digit"), "digit")
    bad(run("evaluate", "plain.pt", *options, "--normalize", "cifer10"), "cifar10")


def test_checkpoints_of_training_scripts(run: Run, net: Path) -> None:
    """Which weights were taken is said on stderr; --ema takes the others, in every command."""
    plain = load(net).state_dict()
    averaged = {key: value * 1.5 for key, value in plain.items()}
    script = {"model": plain, "model_ema": averaged, "args": argparse.Namespace(lr=0.1)}
    torch.save(script, "script.pth")
    options = ["--data", "digits", "--image-size", 8, "--json"]
    code, out, err = run("evaluate", "script.pth", *options)
    assert code == 0, err
    assert "script.pth: took the mapping 'model', not the mapping 'model_ema' (ema: the" in err
    assert "was assumed: eps 1e-05, no dropout, ReLU and the poolings of torchvision" in err
    assert json.loads(out)["loss"] == document(run("evaluate", net, "--json"))["loss"]
    torch.save(averaged, "averaged.pth")
    expected = document(run("evaluate", "averaged.pth", *options))["loss"]
    assert document(run("evaluate", "script.pth", "--ema", *options))["loss"] == expected
    written = {
        "export": ["-o", "a.pt"],
        "prune": ["--ratio", 0.3, "-o", "a.safetensors"],
        "finetune": [*options[:-1], "--epochs", 1, "--limit", 64, "-o", "b.safetensors"],
        "profile": ["--repeats", 1, "--batch-size", 1],
        "show": [],
        "sensitivity": [*options[:-1], "--ratios", 0.5, "--max-images", 10, "--out", "found"],
    }
    for command, arguments in written.items():
        code, _, err = run(command, "script.pth", "--ema", *arguments, "--json")
        assert code == 0, err
        assert "took the mapping 'model_ema', not the mapping 'model'" in err, command
        bad(run(command, net, "--ema", *arguments, "--json"), r"holds no averaged \(EMA\) weights")
    assert torch.equal(load("a.pt").state_dict()["classifier.bias"], averaged["classifier.bias"])


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"data": "digits"}, "its info says that data is 'digits', which is not a mapping"),
        ({"data": [1]}, r"data is \[1\], which is not a mapping"),
        ({"data": {"name": ["digits"]}}, r"data.name is \['digits'\], which is not a string"),
        ({"data": {"image_size": "8"}}, "data.image_size is '8', which is not a size of 1 to"),
        ({"data": {"image_size": 10**30}}, "data.image_size is 10*, which is not a size"),
        ({"data": {"mean": 0.5}}, "data.mean is 0.5, which is not a list of numbers"),
        ({"data": {"std": ["x"]}}, r"data.std is \['x'\], which is not a list of numbers"),
        ({"data": {"mean": [10**400]}}, r"data.mean is \[10*\.*, which is not a list of numbers"),
        ({"data": {"std": [float("inf")]}}, r"data.std is \[inf\], which is not a list of numbers"),
        ({"history": [1]}, r"history is \[1\], which is not a mapping"),
        ({"augment": "flips"}, "augment is 'flips', which is not an augmentation"),
        ({"augment": {}}, "augment is {}, which is not an augmentation"),
    ],
)  # fmt: skip
def test_info_of_another_shape(run: Run, net: Path, info: dict[str, Any], message: str) -> None:
    save(load(net), "net.safetensors", info=info)
    assert read_info("net.safetensors") == info  # Python may keep what it likes
    for command in (["show"], ["evaluate"], ["prune", "--ratio", 0.5, "-o", "a.safetensors"]):
        bad(run(command[0], "net.safetensors", *command[1:]), message)


def test_evaluate_with_the_wrong_number_of_classes(run: Run, tmp_path: Path) -> None:
    save(densenet((2,), 4, stem="cifar", num_classes=3, in_channels=1), tmp_path / "3.safetensors")
    bad(
        run("evaluate", "3.safetensors", "--data", "digits"),
        "3.safetensors has 3 classes, the data set 'digits' has 10",
    )


def test_finetune(run: Run, net: Path, recipe: Path) -> None:
    options = ["--epochs", 1, "--learning-rate", 0.05, "--batch-size", 16, "--limit", 64]
    found = document(run("finetune", net, *options, "-o", "tuned.safetensors", "--json"))
    again = document(run("evaluate", "tuned.safetensors", "--json"))
    assert found["test_accuracy"] == again["accuracy"]
    before = document(run("evaluate", net, "--json"))
    assert found["test_accuracy_before"] == before["accuracy"]
    document(run("finetune", net, *options, "--teacher", net, "-o", "t.safetensors", "--json"))
    document(run("finetune", net, "--recipe", recipe, "-o", "r.safetensors", "--json"))
    assert len(read_info("r.safetensors")["history"]["finetune"]) == 1
    bad(
        run("finetune", net, "--epochs", "x", "-o", "y.safetensors"), "Invalid value for '--epochs'"
    )
    bad(
        run("finetune", net, "--epochs", 1, "--learning-rate", -1, "-o", "y.safetensors"),
        "learning_rate",
    )


@pytest.mark.parametrize("ending", [".onnx", ".pt2", ".pt"])
def test_export(run: Run, net: Path, ending: str) -> None:
    found = document(run("export", net, "-o", f"out{ending}", "--json"))
    assert found["file_bytes"] == Path(f"out{ending}").stat().st_size
    assert found.get("image_size") == (None if ending == ".pt" else 8)


def test_export_to_an_unknown_format(run: Run, net: Path) -> None:
    bad(run("export", net, "-o", "out.tflite"), r"use \.onnx, \.xml, \.pt2, \.pt, \.pth")


def test_profile(run: Run, net: Path) -> None:
    found = document(run("profile", net, "--batch-size", 2, "--repeats", 2, "--json"))
    assert sum(row["macs"] for row in found["layers"]) == found["macs"] == count(load(net), 8).macs
    assert [(x["batch_size"], x["n"]) for x in found["latency"]] == [(2, 2)]
    code, out, _ = run("profile", net, "--batch-size", 1, "--repeats", 1)
    assert code == 0
    assert f"{found['params']:,}" in out and "batch 1: " in out


def test_show_and_criteria_for_people(run: Run, net: Path) -> None:
    code, out, _ = run("show", net)
    assert code == 0 and "features.denseblock2.denselayer2.conv2" in out
    assert set(document(run("criteria", "--json"))) >= {"bn_scale", "l1", "l2", "random"}
    Path("no.json").write_text("{}")
    bad(run("show", "no.json"), "not a plan of prune_dn")


def test_siblings_go_and_show_says_who_still_competes(run: Run, tmp_path: Path) -> None:
    made = densenet((2, 2), 4, stem="cifar", num_classes=10, in_channels=1, mfm={"*1": "2/1"},
                    mfm_skipped={"classifier": "2/1"})  # fmt: skip
    save(made, tmp_path / "mfm.safetensors")
    arguments = ["--units", "sibling", "--criterion", "mfm_win_rate", "--unit", "macs"]
    arguments += ["--ratio", 0.03, "--data", "digits", "--image-size", 8, "--calibration", 64]
    plan = ["--plan-out", "plan.json", "-o", "small.safetensors", "--json"]
    document(run("prune", "mfm.safetensors", *arguments, *plan))
    before, after = (
        document(run("show", f"{name}.safetensors", "--json"))["mfm"] for name in ("mfm", "small")
    )
    first = "features.denseblock1.denselayer1.mfm"
    assert before[first] == "4 maps compete, 2 win" and before["read"] == "9 maps compete, 5 win"
    assert before != after and after["read"] == before["read"]
    code, out, _ = run("show", "plan.json")
    assert code == 0 and re.search(r"mfm +sibling +4 +3", out)


def test_what_nobody_expects(run: Run, net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by chance")

    monkeypatch.setattr(inspection, "show_file", broken)
    code, out, err = run("show", net)
    assert (code, out) == (1, "")
    assert "unexpected error: ZeroDivisionError: by chance" in err
    assert "--debug" in err and "Traceback" not in err
    code, _, err = run("--debug", "show", net)
    assert code == 1 and "Traceback" in err


def test_a_process_that_lost_another(run: Run, net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo's own words, in the process that is left."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError(
            "[/__w/pytorch/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:6890."
        )

    monkeypatch.setattr(inspection, "show_file", broken)
    assert "unexpected error" in run("show", net)[2]
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, err = run("show", net)
    assert (code, out) == (1, "")
    assert err == (
        "error: another process of this run ended; its own message, or torchrun's, says why\n"
    )


def test_a_folder_that_cannot_be_written(run: Run, net: Path) -> None:
    Path("file").write_text("")
    result = run("prune", net, "--ratio", 0.5, "-o", "file/small.safetensors")
    bad(result, "error: cannot write file/small.safetensors: .*; nothing was changed")


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    from prune_dn.base.console import show

    show({"a": [float("nan"), (1.0, float("inf"))]}, True)
    assert json.loads(capsys.readouterr().out) == {"a": [None, [1.0, None]]}


@pytest.fixture
def light(tmp_path: Path) -> Path:
    """A Light CNN's checkpoint that knows its data."""
    torch.manual_seed(1)
    model = light_cnn_9(10, image_size=16, widths=(4, 4, 6, 6, 6), embedding=8)
    spec = load_datasets("digits", image_size=16).spec
    save(model, tmp_path / "light.safetensors", info={"data": spec.to_dict()})
    return tmp_path / "light.safetensors"


def test_every_command_takes_a_light_cnn(run: Run, light: Path) -> None:
    before = count(load(light))
    asked = ("prune", light, "--ratio", 0.5, "--unit", "macs", "--json", "-o", "small.safetensors")
    expected = document(run(*asked, "--criterion", "l2"))
    code, out, err = run(*asked, "--units", "bottleneck,stream")  # without a criterion the same
    assert code == 0 and json.loads(out) == expected, err
    small, figures = load("small.safetensors"), json.loads(out)
    assert figures["macs_before"] == before.macs and figures["macs_after"] == count(small).macs
    assert figures["achieved"] == pytest.approx(1 - count(small).macs / before.macs, abs=1e-6)
    code, out, err = run("finetune", "small.safetensors", "--epochs", 1, "--learning-rate", 0.01,
                         "--limit", 64, "-o", "tuned.safetensors", "--json")  # fmt: skip
    assert code == 0, err
    code, out, err = run("evaluate", "tuned.safetensors", "--json")
    assert code == 0 and json.loads(out)["macs"] == count(small).macs, err
    code, out, err = run("show", "tuned.safetensors", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["light_cnn"] == "9" and facts["image_size"] == 16, err
    assert facts["config"] == json.loads(load("tuned.safetensors").config.to_json())
    code, out, err = run("profile", "tuned.safetensors", "--repeats", 1, "--json")
    assert code == 0 and json.loads(out)["params"] == count(small).params, err
    code, out, err = run("export", "tuned.safetensors", "-o", "tuned.onnx")
    assert code == 0 and Path("tuned.onnx").exists(), err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "--ratio", 0.5, "--criterion", "bn_scale", "-o", "a.safetensors"],
         "no norm with a scale .* such as l2"),
        (["prune", "--ratio", 0.5, "--criterion", "l2", "--calibration", 9, "-o", "a.safetensors"],
         "--calibration has no effect: criterion 'l2' reads only the weights"),
        (["prune", "--ratio", 0.5, "--criterion", "l2", "--units", "edge", "-o", "a.safetensors"],
         "this net has none of them"),
        (["prune", "--ratio", 0.5, "--criterion", "l2", "--recalibrate", 2, "-o", "a.safetensors"],
         "--recalibrate has no effect: a Light CNN has no batch norms"),
        (["prune", "--ratio", 0.5, "--criterion", "l2", "--runtime", "eager", "-o", "a.safetensors"],
         "runtime has no effect with unit 'channels'"),
        (["evaluate", "--recalibrate", 2], "no batch norm with running statistics"),
        (["evaluate", "--image-size", 32], "has 16 pixels a side, --image-size says 32"),
        (["prune", "--ratio", 0.5, "--criterion", "l2", "--image-size", 999, "-o", "a.safetensors"],
         "has 16 pixels a side, --image-size says 999"),
        (["profile", "--image-size", 999], "has 16 pixels a side, --image-size says 999"),
        (["export", "--image-size", 999, "-o", "a.onnx"], "has 16 pixels a side"),
        (["sensitivity", "--units", "edge", "--out", "s"], "this net has none of them"),
    ],
)  # fmt: skip
def test_what_a_light_cnn_cannot(run: Run, light: Path, arguments: list[Any], message: str) -> None:
    code, out, err = run(arguments[0], light, *arguments[1:])
    assert (code, out) == (2, ""), err
    assert re.search(message, " ".join(err.split()))
    assert not list(Path().glob("a.*"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_checkpoints_in_half_precision(run: Run, net: Path, dtype: torch.dtype) -> None:
    """Each command does what it does with the same weights in float32, and keeps their dtype."""
    half, wide, out = Path("half.safetensors"), Path("wide.safetensors"), Path("out.safetensors")
    save(load(net).to(dtype), half, info=read_info(net))
    save(load(half).float(), wide, info=read_info(net))
    found, expected = (document(run("evaluate", path, "--json")) for path in (half, wide))
    assert found["loss"] == pytest.approx(expected["loss"], rel=20 * torch.finfo(dtype).eps)
    low = ("evaluate", "--precision", "bf16", "--recalibrate", 1, "--json")
    found, expected = (document(run(*low, path)) for path in (half, wide))
    assert found["loss"] == pytest.approx(expected["loss"], rel=20 * torch.finfo(dtype).eps)
    prune = ("prune", "--ratio", 0.4, "--unit", "macs", "--recalibrate", 1, "--calibration", 32)
    prune += ("--criterion", "taylor", "-o", out, "--json")
    found, expected = (document(run(*prune, path)) for path in (half, wide))
    assert found == expected | {"file_bytes": found["file_bytes"]}
    assert {x.dtype for x in load(out).parameters()} == {torch.float32}
    document(run(*prune, half))
    small = load(out)
    assert {x.dtype for x in small.parameters()} == {dtype}
    assert all(x.isfinite().all() for x in small.state_dict().values())
    tune = ("finetune", half, "--epochs", 1, "--learning-rate", 0.02, "--limit", 64, "--json")
    document(run(*tune, "--teacher", half, "-o", out))
    assert {x.dtype for x in load(out).parameters()} == {dtype}
    each = ("sensitivity", "--ratios", 0.5, "--units", "bottleneck", "--max-images", 40)
    each += ("--criterion", "taylor", "--calibration", 32, "--metric", "loss", "--json")
    found, expected = (document(run(*each, path, "--out", "each")) for path in (half, wide))
    for a, b in zip(found["rows"], expected["rows"], strict=True):
        assert a["value"] == pytest.approx(b["value"], rel=20 * torch.finfo(dtype).eps)


def test_what_the_outputs_mean_and_the_seed_reach_a_cut(run: Run, net: Path) -> None:
    """`--loss` counts for the criterion and the refit; `--seed` draws the images that decide."""

    def kept(*options: object) -> Any:
        command = ("prune", net, "--ratio", 0.4, "--unit", "macs", "--calibration", 16)
        document(
            run(*command, "--plan-out", "plan.json", "-o", "s.safetensors", "--json", *options)
        )
        return Plan.load("plan.json").keep_indices

    by = ("--criterion", "reconstruction")
    assert kept(*by) == kept(*by, "--loss", "softmax") != kept(*by, "--loss", "mse")
    for criterion in ("taylor", "reconstruction", "activation"):
        by = ("--criterion", criterion)
        assert kept(*by, "--seed", 1) == kept(*by, "--seed", 1) != kept(*by, "--seed", 2)
    assert kept("--compensate", "mean", "--loss", "sigmoid")
    each = ("sensitivity", net, "--out", "each", "--max-images", 10, "--ratios", 0.5)
    document(
        run(*each, "--criterion", "reconstruction", "--loss", "mse", "--calibration", 16, "--json")
    )
    cut = ("prune", net, "--ratio", 0.4, "-o", "s.safetensors")
    bad(run(*cut, "--loss", "mse"), "--loss has no effect: the criterion does not depend on")
    bad(run(*cut, *by, "--loss", "mse"), "--loss has no effect: the criterion does not depend on")
    bad(
        run(*cut, "--criterion", "taylor", "--loss", "hinge"),
        "loss 'hinge' is unknown; choose soft",
    )
    bad(
        run(*cut, "--compensate", "mean", "--loss", "hinge"), "loss 'hinge' is unknown; choose soft"
    )
    bad(run(*each, "--loss", "mse"), "loss has no effect: criterion 'l2'")
    bad(
        run(*cut, "--criterion", "taylor", "--loss", "sigmoid"),
        r"labels have shape \(\d+,\), the outp",
    )
