"""The whole job on tiny data: its figures are recomputed, its phases resume, a kill breaks nothing."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import platform
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from prune_dn.checkpoints.checkpoint import load, read_info, save, save_state_dict
from prune_dn.cli import main
from prune_dn.data.datasets import calibration_batches, load_datasets, make_loader
from prune_dn.errors import DataError, DataWarning, PruneDNError, RecipeError
from prune_dn.measure.profiling import count
from prune_dn.models import MaxFeatureMap, densenet, light_cnn_9
from prune_dn.pruning import Plan, apply_plan, compensate_plan, make_plan, settling_plan
from prune_dn.pruning.ratios import FORMAT
from prune_dn.pruning.sensitivity import sensitivity
from prune_dn.run import figures, phases, pipeline
from prune_dn.run.building import load_data
from prune_dn.run.recipe import Recipe
from prune_dn.run.recipe_file import load_recipe, parse_recipe
from prune_dn.training import evaluate

TINY = """\
model: {name: densenet, block_config: [2, 2], growth_rate: 4, bn_size: 2, stem: cifar}
data: {name: digits, image_size: 8, limit: 64}
train: {epochs: 2, batch_size: 16, learning_rate: 0.05}
prune: {pruning_ratio: 0.4, unit: macs, recalibrate_batches: 2}
finetune: {epochs: 1, batch_size: 16, learning_rate: 0.05}
report: {batch_sizes: [2], repeats: 2}
"""
NO_ONNX = "export.onnx=false"
LEFT = {
    "recipe.yaml",
    "environment.json",
    "plan.json",
    "dense.safetensors",
    "recalibrated.safetensors",
    "pruned.safetensors",
    "pruned.pt",
    "metrics.json",
    "model.onnx",
    "report.md",
    "report.html",
    "samples.json",
    "widths.png",
    "training.png",
    "train.jsonl",
    "finetune.jsonl",
}


def tiny(folder: Path, *overrides: str) -> Recipe:
    return parse_recipe(TINY, overrides=[f"output_dir={json.dumps(str(folder))}", *overrides])


def go(recipe: Recipe, **how: bool) -> pipeline.RunResult:
    return pipeline.run(recipe, progress=False, **how)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> pipeline.RunResult:
    return go(tiny(tmp_path_factory.mktemp("run") / "tiny"))


def same_nets(first: Path, second: Path) -> bool:
    """Weights to the bit, config, and what the file says of itself."""
    a, b = load(first), load(second)
    weights, others = a.state_dict(), b.state_dict()
    return (
        a.config == b.config
        and all(torch.equal(weights[k], others[k]) for k in weights)
        and read_info(first) == read_info(second)
        and first.stat().st_size == second.stat().st_size
    )


def accuracy(file: Path, images: torch.utils.data.Dataset) -> float:
    """Slow and plain."""
    model, right, n = load(file).eval(), 0, 0
    with torch.no_grad():
        for x, y in make_loader(images, 1):
            right, n = right + int(model(x).argmax(1).item() == y.item()), n + 1
    return right / n


def test_what_is_left(finished: pipeline.RunResult) -> None:
    names = {file.name for file in finished.output_dir.iterdir()}
    assert names >= LEFT
    assert not [name for name in names if ".tmp" in name]


def test_figures_are_those_of_the_files(finished: pipeline.RunResult) -> None:
    folder, stages = finished.output_dir, finished.metrics["stages"]
    assert json.loads((folder / "metrics.json").read_text()) == finished.metrics
    test = load_data(tiny(folder).data, seed=0).test
    for stage, name in (
        ("dense", "dense"),
        ("recalibrated", "recalibrated"),
        ("fine-tuned", "pruned"),
    ):
        file = folder / f"{name}.safetensors"
        assert stages[stage]["test_accuracy"] == pytest.approx(accuracy(file, test))
        assert stages[stage]["n_test"] == len(test)
        assert stages[stage]["macs"] == count(load(file), 8).macs
        assert stages[stage]["file_bytes"] == file.stat().st_size
    assert stages["pruned"]["macs"] == stages["fine-tuned"]["macs"]
    achieved = 1 - stages["pruned"]["macs"] / stages["dense"]["macs"]
    assert finished.metrics["rounds"] == [
        {"unit": "macs", "requested": 0.4, "achieved": pytest.approx(achieved)}
    ]
    assert achieved >= 0.4
    plain = torch.load(folder / "pruned.pt", weights_only=True)
    assert all(torch.equal(v, plain[k]) for k, v in finished.model.state_dict().items())


def test_the_checkpoint_stands_alone(finished: pipeline.RunResult) -> None:
    info = read_info(finished.output_dir / "pruned.safetensors")
    assert info["data"]["name"] == "digits" and len(info["data"]["classes"]) == 10
    assert info["augment"] == "shift"
    assert len(info["history"]["train"]) == 2 and len(info["history"]["finetune"]) == 1


def test_the_plan_gives_the_pruned_net(finished: pipeline.RunResult) -> None:
    folder = finished.output_dir
    plan = Plan.load(folder / "plan.json")
    assert apply_plan(load(folder / "dense.safetensors"), plan).config == finished.model.config


def test_environment_and_resolved_recipe(finished: pipeline.RunResult) -> None:
    folder = finished.output_dir
    found = json.loads((folder / "environment.json").read_text())
    assert found["versions"]["python"] == platform.python_version()
    assert str(torch.__version__).startswith(found["versions"]["torch"].split("+")[0])
    assert found["seed"] == 0 and found["machine"]
    assert load_recipe(folder / "recipe.yaml") == tiny(folder)


def test_finished_phases_are_read_not_run(
    finished: pipeline.RunResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("fit", "stage_figures", "plan_round", "latency_rows"):
        monkeypatch.setattr(phases, name, None)  # a call would be an error
    for name in ("write_file", "file_figures"):
        monkeypatch.setattr(phases.deploying, name, None)
    again = go(tiny(finished.output_dir))
    assert again.metrics == finished.metrics
    assert torch.equal(again.model.classifier.weight, finished.model.classifier.weight)


def test_a_lost_file_is_made_again_the_same(finished: pipeline.RunResult, tmp_path: Path) -> None:
    names = ("dense", "recalibrated", "pruned")
    first = go(tiny(tmp_path / "a", NO_ONNX))
    assert all(
        same_nets(first.output_dir / f"{n}.safetensors", finished.output_dir / f"{n}.safetensors")
        for n in names
    )
    (first.output_dir / "recalibrated.safetensors").unlink()
    before = (first.output_dir / "dense.safetensors").stat().st_mtime_ns
    go(tiny(tmp_path / "a", NO_ONNX))
    assert (first.output_dir / "dense.safetensors").stat().st_mtime_ns == before
    assert same_nets(
        first.output_dir / "pruned.safetensors", finished.output_dir / "pruned.safetensors"
    )


def test_another_recipe_in_a_used_folder(finished: pipeline.RunResult, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"other values of: prune\.pruning_ratio.*--overwrite"):
        go(tiny(finished.output_dir, "prune.pruning_ratio=0.3"))
    folder = tmp_path / "used"
    go(tiny(folder), only_train=True)
    (folder / "notes.txt").write_text("mine")
    result = go(tiny(folder, "train.epochs=1", NO_ONNX), overwrite=True)
    assert len(result.metrics["history"]["train"]) == 1
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_folder_with_artefacts_of_nobody(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"holds metrics\.json but no recipe\.yaml"):
        go(tiny(tmp_path))


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    with (tmp_path / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(RecipeError, match="in use by another run"):
            go(tiny(tmp_path))


def test_output_dir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="cannot be used"):
        go(tiny(tmp_path / "file"))


def test_only_train_then_the_rest(tmp_path: Path, finished: pipeline.RunResult) -> None:
    part = go(tiny(tmp_path / "tiny", NO_ONNX), only_train=True)
    assert list(part.metrics["stages"]) == ["dense"]
    assert (tmp_path / "tiny" / "report.md").exists()
    assert not (tmp_path / "tiny" / "plan.json").exists()
    whole = go(tiny(tmp_path / "tiny", NO_ONNX))
    assert whole.metrics["stages"] == finished.metrics["stages"]


def test_rounds_count_against_the_dense_net(tmp_path: Path) -> None:
    result = go(tiny(tmp_path, "prune.rounds=2", NO_ONNX))
    dense, small = result.metrics["stages"]["dense"], result.metrics["stages"]["fine-tuned"]
    first, second = (Plan.load(tmp_path / f"plan-{n}.json") for n in (1, 2))
    assert second.config_before == first.config_after
    assert [r["requested"] for r in result.metrics["rounds"]] == [0.2, 0.4]
    for plan, asked in ((first, 0.2), (second, 0.4)):
        left = plan.achieved["after"]["macs"] / dense["macs"]
        assert asked <= 1 - left < asked + 0.15
    assert small["macs"] == second.achieved["after"]["macs"]
    assert {"finetuned-1.safetensors", "recalibrated-2.safetensors"} <= {
        f.name for f in tmp_path.iterdir()
    }


def test_from_a_checkpoint_without_training(tmp_path: Path, finished: pipeline.RunResult) -> None:
    dense = finished.output_dir / "dense.safetensors"
    recipe = tiny(
        tmp_path / "b", NO_ONNX, f"model={{checkpoint: {dense}}}", "train=null", "finetune=null"
    )
    result = go(recipe)
    stages, reference = result.metrics["stages"], finished.metrics["stages"]
    assert stages["dense"]["test_accuracy"] == reference["dense"]["test_accuracy"]
    assert list(stages) == ["dense", "pruned", "recalibrated"]  # nothing was fine-tuned
    pruned = accuracy(result.output_dir / "pruned.safetensors", load_data(recipe.data, seed=0).test)
    assert stages["recalibrated"]["test_accuracy"] == pytest.approx(pruned)


def test_pixels_that_are_read_otherwise_than_in_training_are_said(
    tmp_path: Path, finished: pipeline.RunResult
) -> None:
    """A recipe goes by its data section, and not by what its checkpoint says."""
    dense = finished.output_dir / "dense.safetensors"
    rest = [NO_ONNX, "train=null", "finetune=null"]
    start = f"model={{checkpoint: {json.dumps(str(dense))}}}"
    same = go(tiny(tmp_path / "same", start, *rest))
    assert same.metrics["notices"] == []
    other = tiny(tmp_path / "other", start, *rest, "data.mean=[0.5]", "data.image_size=16")
    notices = [notice["text"] for notice in go(other).metrics["notices"]]
    assert notices == [
        f"{dense} was trained with image_size 8, here it is 16; set data.image_size",
        f"{dense} was trained with mean [0.3058], here it is [0.5]; set data.mean",
    ]
    report = (tmp_path / "other" / "report.md").read_text()
    assert "was trained with image_size 8" in report and "pixels: mean 0.5, std 0.3236" in report
    with pytest.warns(DataWarning, match="trained with"):
        pipeline.dry_run(other)
    save_state_dict(load(dense), tmp_path / "plain.pt")
    start = f"model={{checkpoint: {json.dumps(str(tmp_path / 'plain.pt'))}}}"
    guess = go(tiny(tmp_path / "guess", start, *rest, "data.std=[0.3]"))
    (text,) = [notice["text"] for notice in guess.metrics["notices"]]
    assert "does not say the mean of its pixels; [0.3058] is a guess" in text


def test_ratios_of_a_sensitivity_file(tmp_path: Path, finished: pipeline.RunResult) -> None:
    net = load(finished.output_dir / "dense.safetensors")
    rows = sensitivity(net, lambda small: small.classifier.in_features, ratios=[0.5, 0.9])
    facts = {"format": FORMAT, "params": count(net).params}
    path = tmp_path / "sensitivity.json"
    path.write_text(json.dumps({**facts, "rows": [dataclasses.asdict(row) for row in rows]}))
    checkpoint = f"model={{checkpoint: {finished.output_dir / 'dense.safetensors'}}}"
    only_prune = [checkpoint, "train=null", "finetune=null", f"prune.ratios={path}", NO_ONNX]
    result = go(tiny(tmp_path / "run", *only_prune))
    plan = Plan.load(result.output_dir / "plan.json")
    same = make_plan(net, 0.4, unit="macs", input_size=8, ratios=path)
    assert plan.keep_indices == same.keep_indices
    path.write_text(json.dumps({**facts, "params": 7, "rows": []}))
    for wrong in (f"prune.ratios={path}", "prune.ratios=nowhere.json"):  # before any training
        with pytest.raises(RecipeError, match=r"was measured on another net|cannot read ratios"):
            go(tiny(tmp_path / "other", wrong))
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("classes", "channels", "message"),
    [(3, 1, "has 3 classes, the data set 'digits' has 10"), (10, 3, "has 3 input channels")],
)
def test_checkpoint_that_does_not_fit_the_data(
    tmp_path: Path, classes: int, channels: int, message: str
) -> None:
    net = densenet((2,), 4, stem="cifar", num_classes=classes, in_channels=channels)
    save(net, tmp_path / "other.safetensors")
    recipe = tiny(tmp_path / "o", f"model={{checkpoint: {tmp_path / 'other.safetensors'}}}")
    with pytest.raises(DataError, match=message):
        go(recipe)
    assert not (tmp_path / "o").exists()


REFITTED = "prune={pruning_ratio: 0.4, unit: macs, compensate: mean, calibration: 32}"


def test_a_refitted_net_has_its_row_and_is_not_recalibrated(tmp_path: Path) -> None:
    """Another stage than those of a plain cut: it was left out of the report."""
    result = go(tiny(tmp_path, NO_ONNX, REFITTED))
    stages = result.metrics["stages"]
    assert list(stages) == ["dense", "pruned", "compensated", "fine-tuned"]
    cut = load(tmp_path / "cut.safetensors")
    data = load_data(tiny(tmp_path).data, seed=0)
    assert stages["compensated"]["test_loss"] == evaluate(cut, data.test).loss
    assert stages["compensated"]["file_bytes"] == (tmp_path / "cut.safetensors").stat().st_size
    dense, plan = load(tmp_path / "dense.safetensors"), Plan.load(tmp_path / "plan.json")
    images = calibration_batches(data.train, 32)
    expected = compensate_plan(apply_plan(dense, plan), dense, plan, images, "mean").state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in cut.state_dict().items())
    assert "| compensated |" in (tmp_path / "report.md").read_text()
    asked = go(tiny(tmp_path, NO_ONNX, REFITTED, "prune.recalibrate_batches=1"), overwrite=True)
    assert list(asked.metrics["stages"])[2:4] == ["compensated", "recalibrated"]
    assert "recalibrate_batches: 1" in (tmp_path / "recipe.yaml").read_text()


def test_finetuning_that_makes_it_worse_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harm = "finetune={epochs: 1, batch_size: 16, learning_rate: 0.9, max_steps: 1}"
    (tmp_path / "tiny.yaml").write_text(TINY.replace("epochs: 2", "epochs: 20"))
    command = ["run", str(tmp_path / "tiny.yaml"), "--output-dir", str(tmp_path / "run")]
    assert main([*command, "--set", harm, "--set", NO_ONNX]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    before, after = (metrics["stages"][s]["test_accuracy"] for s in ("recalibrated", "fine-tuned"))
    assert after < before
    (notice,) = metrics["notices"]
    assert notice["name"] == "finetune-1"
    assert (
        f"worse: {100 * before:.2f} % (" in notice["text"]
        and f"{100 * after:.2f} % (" in notice["text"]
    )
    assert notice["text"] in capsys.readouterr().out
    assert (
        "**Notice** (finetune-1): fine-tuning made the test accuracy worse"
        in (tmp_path / "run" / "report.md").read_text()
    )


def test_a_warning_of_ours_is_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = phases.plan_round

    def warned(*arguments):
        warnings.warn("the fit is bad", stacklevel=2)
        return real(*arguments)

    monkeypatch.setattr(phases, "plan_round", warned)
    result = go(tiny(tmp_path, NO_ONNX))
    assert result.metrics["notices"] == [{"name": "prune-1", "text": "the fit is bad"}]
    assert "**Notice** (prune-1): the fit is bad" in (tmp_path / "report.md").read_text()


@pytest.mark.usefixtures("made_up_times")
def test_the_exported_file_is_timed_in_the_runtime_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int, str, object]] = []
    real = figures.compare_latency

    def seen(nets, **how):
        asked.append((how["runtime"], how["batch_size"], how["precision"], nets["pruned"]))
        return real(nets, **how)

    monkeypatch.setattr(figures, "compare_latency", seen)
    result = go(tiny(tmp_path, "prune={pruning_ratio: 0.3, unit: latency, batch_size: 3}"))
    assert [x[:3] for x in asked] == [("eager", 2, "fp32"), ("onnxruntime", 3, "fp32")]
    assert isinstance(asked[0][3], torch.nn.Module) and asked[1][3] == tmp_path / "model.onnx"
    for net in ("dense", "pruned"):
        rows = result.metrics["latency"][net]
        assert [row["batch_size"] for row in rows] == [2, 3]
        assert rows[1]["runtime"].startswith("onnxruntime ")
    (done,) = result.metrics["rounds"]
    assert (done["runtime"], done["batch_size"]) == ("onnxruntime", 3)
    text = (tmp_path / "report.md").read_text()
    assert "asked: 30 % fewer milliseconds, onnxruntime, batch 3; achieved: " in text
    assert re.search(r"^- latency, onnxruntime \S+, batch 3: .* times as fast", text, re.M)
    assert re.search(r"^\| pruned \| onnxruntime \S+ \| 3 \|.*\| 2 \| .* thread", text, re.M)


def test_impossible_request_fails_in_dry_run_too(tmp_path: Path) -> None:
    recipe = tiny(tmp_path / "x", "prune.min_channels=7")
    for job in (pipeline.dry_run, go):
        with pytest.raises(PruneDNError, match=r"cannot bring macs .* down to"):
            job(recipe)


def test_dry_run_says_sizes_and_leaves_nothing(tmp_path: Path) -> None:
    facts = pipeline.dry_run(tiny(tmp_path / "d"))
    assert not (tmp_path / "d").exists()
    assert facts["dense"]["macs"] * 0.6 >= facts["pruned"]["macs"]
    assert set(facts["images"]) == {"train", "val", "test"}


def test_kill_at_any_moment_then_finish_the_same(
    tmp_path: Path, finished: pipeline.RunResult
) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["prune_dn.run.pipeline", "sklearn.datasets", "onnxscript"])
    recipe, killed = tiny(tmp_path / "tiny"), 0

    def start() -> multiprocessing.process.BaseProcess:
        process = context.Process(target=go, args=(recipe,))
        process.start()
        return process

    pause = 0.5
    while True:
        process = start()
        process.join(pause)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        killed += 1
        check_whole(tmp_path / "tiny")
        pause *= 1.3
    assert process.exitcode == 0
    assert killed >= 3
    for name in ("dense", "recalibrated", "pruned"):
        assert same_nets(
            tmp_path / "tiny" / f"{name}.safetensors",
            finished.output_dir / f"{name}.safetensors",
        )
    stages = json.loads((tmp_path / "tiny" / "metrics.json").read_text())["stages"]
    assert stages == finished.metrics["stages"]
    left = {f.name for f in (tmp_path / "tiny").iterdir()}
    assert left >= LEFT and not [name for name in left if ".tmp" in name]


def check_whole(folder: Path) -> None:
    """Every file that has its final name can be read."""
    import onnx
    from PIL import Image

    for file in folder.iterdir() if folder.exists() else ():
        if file.name.startswith("."):
            continue
        if file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".jsonl":
            assert all(json.loads(line) for line in file.read_text().splitlines())
        elif file.suffix == ".safetensors":
            load(file)
        elif file.suffix == ".pt":
            torch.load(file, weights_only=True)
        elif file.suffix == ".onnx":
            onnx.checker.check_model(onnx.load(file))
        elif file.suffix == ".yaml":
            load_recipe(file)
        elif file.suffix == ".png":
            Image.open(file).load()
        elif file.suffix == ".md":
            assert "Where and with what" in file.read_text()


def test_two_processes_leave_one_run(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "prune_dn", "run", "tiny.yaml", "--json"]
    command += ["--set", "export.onnx=false", "--set", "train.tensorboard=true"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "tiny"
    assert len(list(folder.glob("train/events.out.*"))) == 1
    assert json.loads(done.stdout) == json.loads((folder / "metrics.json").read_text())
    assert json.loads((folder / "environment.json").read_text())["processes"] == 2
    plan = Plan.load(folder / "plan.json")
    assert load(folder / "pruned.safetensors").config == plan.config_after
    check_whole(folder)


def test_time_is_recorded(finished: pipeline.RunResult) -> None:
    done = finished.metrics["phases"]
    assert list(done) == ["train", "prune-1", "finetune-1", "export", "latency"]
    assert all(phase["seconds"] >= 0 for phase in done.values())


LIGHT = """\
model: {name: light_cnn_29, block_config: [1, 1, 1, 1], widths: [4, 4, 6, 6, 6], embedding: 8}
data: {name: digits, image_size: 16, limit: 64}
train: {epochs: 1, batch_size: 16, learning_rate: 0.01}
prune: {pruning_ratio: 0.5, unit: macs, criterion: taylor, calibration: 32, rounds: 2}
finetune: {epochs: 1, batch_size: 16, learning_rate: 0.01}
report: {batch_sizes: [2], repeats: 2}
"""


def test_a_light_cnn_from_recipe_to_export(tmp_path: Path) -> None:
    """Two rounds, both against the dense net; what was cut is in the plans and in the report."""
    recipe = parse_recipe(LIGHT, overrides=[f"output_dir={json.dumps(str(tmp_path / 'run'))}"])
    facts = pipeline.dry_run(recipe)
    assert facts["pruned"]["macs"] <= 0.5 * facts["dense"]["macs"] and facts["achieved"] >= 0.5
    result, folder = go(recipe), tmp_path / "run"
    files = ("dense", "cut-1", "finetuned-1", "cut-2", "pruned")
    dense, first, _, second, last = (load(folder / f"{name}.safetensors") for name in files)
    assert dense.config.image_size == 16 and dense.config.in_channels == 1
    assert count(first).macs <= 0.75 * count(dense).macs
    assert count(second).macs <= 0.5 * count(dense).macs and second.config == last.config
    stages = result.metrics["stages"]
    assert set(stages) == {"dense", "pruned", "fine-tuned"}
    assert stages["fine-tuned"]["macs"] == count(last).macs
    assert [r["requested"] for r in result.metrics["rounds"]] == [0.25, 0.5]
    assert 0.5 <= result.metrics["rounds"][1]["achieved"] < 0.58  # not 0.5 of what round 1 left
    achieved = 1 - count(second).macs / count(dense).macs
    assert result.metrics["rounds"][1]["achieved"] == pytest.approx(achieved)
    report = (folder / "report.md").read_text()
    name, before, after = "group4.conv.filter", dense.config.named(), first.config.named()
    row = f"| {name} | bottleneck | {before[name].filters} | {after[name].filters} |"
    assert row in report and "criterion taylor" in report
    plans = [Plan.load(folder / f"plan-{number}.json") for number in (1, 2)]
    assert [plan.config_after for plan in plans] == [first.config, second.config]
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx")
    x = torch.randn(3, 1, 16, 16)
    found = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
    torch.testing.assert_close(found, last(x).detach(), rtol=1e-4, atol=1e-4)
    (folder / "cut-2.safetensors").unlink()  # as if stopped in the second round
    (folder / "pruned.safetensors").rename(tmp_path / "before")
    again = go(recipe)
    assert same_nets(folder / "pruned.safetensors", tmp_path / "before")
    assert again.metrics["stages"]["fine-tuned"] == stages["fine-tuned"]
    assert again.metrics["stages"]["pruned"]["test_loss"] == stages["pruned"]["test_loss"]
    assert (folder / "report.md").read_text().count(row) == 1


def test_a_light_cnns_checkpoint_is_refused_before_it_trains(tmp_path: Path) -> None:
    save(light_cnn_9(10, image_size=16, widths=(2,) * 5, embedding=4), tmp_path / "net.safetensors")
    overrides = [
        f"model={{checkpoint: {json.dumps(str(tmp_path / 'net.safetensors'))}}}",
        f"output_dir={json.dumps(str(tmp_path / 'run'))}",
        "prune={pruning_ratio: 0.5, criterion: bn_scale}",
        "train.sparsity={kind: l1}",
    ]
    message = r"train.sparsity: it has no batch norms .*'bn_scale': no norm .*such as l2"
    for job in (pipeline.dry_run, go):
        with pytest.raises(RecipeError, match=message):
            job(parse_recipe(LIGHT, overrides=overrides))
    assert not (tmp_path / "run").exists()


def test_a_light_cnn_is_for_one_image_size(tmp_path: Path) -> None:
    net = light_cnn_9(10, image_size=32, widths=(2,) * 5, embedding=4)
    save(net, tmp_path / "net.safetensors")
    overrides = [
        f"model={{checkpoint: {json.dumps(str(tmp_path / 'net.safetensors'))}}}",
        f"output_dir={json.dumps(str(tmp_path / 'run'))}",
    ]
    with pytest.raises(DataError, match="has 32 pixels a side, the data set 'digits' has 16"):
        go(parse_recipe(LIGHT, overrides=overrides))


def test_settle_cuts_the_losers_of_the_trained_net(tmp_path: Path) -> None:
    overrides = ["model.mfm={'*': 2/1}", "model.mfm_skipped={'*': 2/1}", NO_ONNX, "train.epochs=1"]
    overrides.append("prune={settle: true, criterion: mfm_win_rate, calibration: 24}")
    recipe = tiny(tmp_path / "run", *overrides)
    facts = pipeline.dry_run(recipe)
    assert facts["pruned"]["macs"] < facts["dense"]["macs"]
    assert "requested" not in facts
    result = go(recipe)
    dense = load(tmp_path / "run" / "dense.safetensors")
    data = load_datasets("digits", image_size=8, limit=64)
    batches = calibration_batches(data.train, 24)
    plan = settling_plan(dense, batches, criterion="mfm_win_rate", seed=0)
    assert result.model.config == plan.config_after
    assert not any(isinstance(m, MaxFeatureMap) for m in result.model.modules())
    before = result.metrics["stages"]["pruned"]
    assert before["test_accuracy"] == evaluate(apply_plan(dense, plan), data.test).accuracy
    assert result.metrics["rounds"] == []
    assert "Asked: settle True" in (tmp_path / "run" / "report.md").read_text()


def test_as_far_as_the_accuracy_allows(tmp_path: Path) -> None:
    """The ratio is found on validation images; the trials are figures of the run, and serve another run."""
    ask = [
        "prune={max_drop: 20, unit: macs, calibration: 64}",
        "export.onnx=false",
        "finetune=null",
        "data.limit=400",
        "train.epochs=4",
    ]
    done = go(tiny(tmp_path / "run", *ask))
    found = done.metrics["search"]
    assert found["max_drop"] == 20 and found["best"]["drop"] <= 0.2
    trials = {t["pruning_ratio"]: t for t in found["trials"]}
    assert found["best"] == trials[max(r for r, t in trials.items() if t["holds"])]
    row = done.metrics["rounds"][0]
    assert row["requested"] == found["best"]["pruning_ratio"]
    assert count(done.model, 8).macs == found["best"]["macs"]
    sets = load_data(tiny(tmp_path / "run", *ask).data, seed=0)
    assert evaluate(done.model, sets.val).accuracy == pytest.approx(found["best"]["value"])
    told = (tmp_path / "run" / "report.md").read_text()
    assert "As far as the accuracy allows" in told
    assert f"{found['best']['pruning_ratio']:.4f}" in told
    assert (tmp_path / "run" / "search.json").is_file()


def test_what_does_not_go_with_max_drop(tmp_path: Path) -> None:
    for beside, message in [
        ("pruning_ratio: 0.5", "pruning_ratio and max_drop do not go together"),
        ("settle: true", "settle and max_drop do not go together"),
        ("rounds: 2", "rounds above 1 and max_drop do not go together"),
    ]:
        with pytest.raises(RecipeError, match=message):
            tiny(tmp_path, f"prune={{max_drop: 1, unit: macs, {beside}}}")
