"""The folder of a run: what is replaced, what is never touched, and files that are damaged."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import RECIPE, Run, run  # noqa: F401  (a fixture)

from prune_dn.base.console import plain
from prune_dn.errors import CheckpointError, PruneDNError, RecipeError
from prune_dn.run import pipeline
from prune_dn.run.files import artefacts, is_run_folder
from prune_dn.run.folder import RunFolder
from prune_dn.run.metrics import read_metrics
from prune_dn.run.recipe_file import parse_recipe

# ruff: noqa: F811

LEFT = [
    "cut.safetensors",
    "cut-2.safetensors",
    "recalibrated.safetensors",
    "finetuned-1.safetensors",
    "dense.safetensors",
    "pruned.safetensors",
    "pruned.pt",
    "plan.json",
    "plan-12.json",
    "model.onnx",
    "model.pt2",
    "train.jsonl",
    "train.state.pt",
    "finetune-1.jsonl",
    "finetune.state.pt",
    "widths.png",
    "training.png",
    "report.md",
    "metrics.json",
    "environment.json",
    "data.json",
    "train/events.out.tfevents.1.host",
    "finetune-1/events.out.tfevents.1.host",
    ".dense.safetensors.abc123_x.tmp.safetensors",
    ".recipe.yaml.abc123_x.tmp.yaml",
]
MINE = [
    "notes.txt",
    "train.csv",
    "train/cat/1.png",
    "finetune.py",
    "plan-b.json",
    "my.cut.safetensors",
    "dense.safetensors.bak",
    ".vimrc.tmp",
    ".mine.abc.tmp.txt",
    "finetune-1/plot.png",
    "sub/model.onnx",
]


def open_folder(folder: Path, *overrides: str, overwrite: bool = False) -> RunFolder:
    output = f"output_dir={json.dumps(str(folder))}"
    recipe = parse_recipe(RECIPE, overrides=[output, *overrides])
    return RunFolder(recipe, {}, overwrite=overwrite)


def begun(folder: Path) -> Path:
    """The folder of a run that has just begun."""
    open_folder(folder).close()
    return folder


def fill(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def files(folder: Path) -> set[str]:
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}


def test_overwrite_leaves_this_runs_files_and_yours(tmp_path: Path) -> None:
    folder = begun(tmp_path / "run")
    fill(folder, LEFT + MINE)
    open_folder(folder, "seed=5", overwrite=True).close()
    assert files(folder) == {*MINE, "recipe.yaml", "data.json", ".lock"}
    assert all((folder / name).read_text() == name for name in MINE)


def test_folders_that_are_empty_then_go_too(tmp_path: Path) -> None:
    folder = begun(tmp_path / "run")
    fill(folder, ["train/events.out.tfevents.1.host"])
    open_folder(folder, overwrite=True).close()
    assert not (folder / "train").exists()


def test_a_link_is_removed_not_what_it_points_to(tmp_path: Path) -> None:
    folder = begun(tmp_path / "run")
    (tmp_path / "net").write_text("mine")
    (folder / "dense.safetensors").symlink_to(tmp_path / "net")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "events.out.tfevents.1").write_text("mine")
    (folder / "train").symlink_to(tmp_path / "logs", target_is_directory=True)
    open_folder(folder, overwrite=True).close()
    assert (tmp_path / "net").read_text() == (tmp_path / "logs/events.out.tfevents.1").read_text()
    assert not (folder / "dense.safetensors").is_symlink()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["model.onnx", "metrics.json", "report.md", "recipe.yaml"])
def test_a_folder_of_something_else_is_refused(tmp_path: Path, name: str, overwrite: bool) -> None:
    (tmp_path / name).write_text("mine")
    for _ in range(2):  # the first try must not make it look like one of a run
        with pytest.raises(RecipeError, match=rf"holds (a )?{name} .*choose another output_dir"):
            open_folder(tmp_path, overwrite=overwrite)
        assert files(tmp_path) == {name} and (tmp_path / name).read_text() == "mine"
    assert not is_run_folder(tmp_path)


def test_a_folder_with_other_files_can_be_used(tmp_path: Path) -> None:
    fill(tmp_path, MINE)
    open_folder(tmp_path).close()
    assert files(tmp_path) >= set(MINE) and is_run_folder(tmp_path)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("link", ["itself", "symbolic", "hard"])
def test_a_run_does_not_write_over_what_it_reads(
    tmp_path: Path, overwrite: bool, link: str
) -> None:
    folder = begun(tmp_path / "run")
    net = folder / "dense.safetensors"
    net.write_text("weights")
    given = net if link == "itself" else tmp_path / "net.safetensors"
    if link == "symbolic":
        given.symlink_to(net)
    elif link == "hard":
        given.hardlink_to(net)
    start = f"model={{checkpoint: {json.dumps(str(given))}}}"
    with pytest.raises(
        RecipeError, match=r"model\.checkpoint .* would write over it; choose another"
    ):
        open_folder(folder, start, overwrite=overwrite)
    (folder / "plan.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"prune\.ratios .* would write over it"):
        open_folder(folder, f"prune.ratios={folder / 'plan.json'}", overwrite=overwrite)
    assert net.read_text() == "weights"


@pytest.mark.parametrize(
    "text", ["", "{", "a: [", "- 1", "\0", "\xff\xfe", "&a [*a]", "model: {name: 3"]
)
def test_a_damaged_recipe_in_the_folder(tmp_path: Path, text: str) -> None:
    folder = begun(tmp_path / "run")
    (folder / "recipe.yaml").write_bytes(text.encode("latin1"))
    with pytest.raises(
        RecipeError, match=r"recipe.yaml, the recipe of the run .*restore it, or choose"
    ):
        open_folder(folder)
    open_folder(folder, overwrite=True).close()
    open_folder(folder).close()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    output = f"output_dir={json.dumps(str(folder))}"
    pipeline.run(parse_recipe(RECIPE, overrides=[output]), progress=False)
    return folder


def test_every_file_of_a_run_is_known_to_overwrite(finished: Path) -> None:
    known = {str(f.relative_to(finished)) for f in artefacts(finished)}
    assert files(finished) == known | {"recipe.yaml", ".lock"}


def spoilt(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    def spoil(text: str) -> str:
        metrics = json.loads(text)
        change(metrics)
        return json.dumps(metrics)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda text: "", "Expecting value"),
        (lambda text: text[: len(text) // 2], ""),
        (lambda text: text.replace("{", "[", 1), ""),
        (lambda text: "[" * 100_000, "nested too deeply"),
        (lambda text: "[]", "the whole"),
        (lambda text: "null", "the whole"),
        (lambda text: "{}", "format"),
        (lambda text: "\0" * 100, ""),
        (spoilt(lambda m: m.update(phases=3)), "phases"),
        (spoilt(lambda m: m["phases"].update(train={"seconds": "1"})), "phases.train.seconds"),
        (spoilt(lambda m: m["phases"].update(train={"seconds": float("nan")})), "phases.train"),
        (spoilt(lambda m: m["stages"].pop("dense")), "dense is missing"),
        (spoilt(lambda m: m["stages"]["dense"].pop("n_test")), r"stages\.dense\.n_test"),
        (spoilt(lambda m: m["stages"]["dense"].update(n_test=0)), r"stages\.dense\.n_test"),
        (spoilt(lambda m: m["stages"]["dense"].update(test_accuracy=7)), "test_accuracy"),
        (spoilt(lambda m: m["stages"]["pruned"].update(file_bytes=None)), "file_bytes"),
        (spoilt(lambda m: m["latency"]["dense"].clear()), "latency has other rows"),
        (spoilt(lambda m: m["latency"]["dense"][0].update(median_ms=0)), "median_ms"),
        (spoilt(lambda m: m["history"]["train"][0].pop("loss")), r"history\.train\.0\.loss"),
        (spoilt(lambda m: m.update(rounds=[1])), r"rounds\.0"),
        (spoilt(lambda m: m.update(notices=[{"name": "x"}])), r"notices\.0\.text"),
    ],
)
def test_damaged_metrics(
    finished: Path, tmp_path: Path, spoil: Callable[[str], str], said: str
) -> None:
    text = (finished / "metrics.json").read_text()
    assert read_metrics(finished / "metrics.json") == json.loads(text)
    (tmp_path / "metrics.json").write_text(spoil(text))
    with pytest.raises(
        RecipeError, match=rf"metrics\.json, .* is damaged \(.*{said}.*restore it, .*--overwrite"
    ):
        read_metrics(tmp_path / "metrics.json")


def test_damaged_files_in_a_run(run: Run, finished: Path, tmp_path: Path) -> None:
    """From the command line: one line, exit code 2; what is deleted is made again."""
    (tmp_path / "r.yaml").write_text(RECIPE)
    command = ["run", "r.yaml", "--output-dir", finished]
    for name in ("metrics.json", "recipe.yaml", "dense.safetensors", "plan.json"):
        file = finished / name
        before = file.read_bytes()
        file.write_bytes(before[: len(before) // 2] + b"\0{")
        code, out, err = run(*command)
        assert (code, out) == (2, ""), err
        assert len(err.splitlines()) == 1 and err.startswith("error: ") and "mistake" not in err
        assert str(file) in err and "restore" in err
        file.write_bytes(before)
    (finished / "plan.json").unlink()
    assert run(*command)[0] == 0


def test_a_damaged_file_is_named_with_the_remedy(finished: Path) -> None:
    file = finished / "recalibrated.safetensors"
    before = file.read_bytes()
    file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    output = f"output_dir={json.dumps(str(finished))}"
    with pytest.raises(CheckpointError, match=r"damaged.*\(restore .*, or delete it"):
        pipeline.run(parse_recipe(RECIPE, overrides=[output]), progress=False)
    file.write_bytes(before)


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """No file can grow beyond some bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(most: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full(run: Run, tmp_path: Path, small_files: Callable[[int], None]) -> None:
    """At every writer: nothing is half-written, and the same command goes on when there is space."""
    (tmp_path / "r.yaml").write_text(RECIPE.replace("onnx: false", "onnx: true"))
    command = ["r.yaml", "--set", "finetune=null"]
    folder = tmp_path / "runs" / "r"

    def fails(name: str, most: int, *files_of: str) -> None:
        small_files(most)
        code, out, err = run(name, *command)
        small_files(resource.RLIM_INFINITY)
        last = err.splitlines()[-1]
        assert (code, out) == (2, ""), err
        assert last.startswith("error: cannot write runs/r/") and "File too large" in last
        assert any(file in last for file in files_of), last
        assert not [name for name in files(folder) if ".tmp" in name]

    fails("run", 100, "recipe.yaml")
    fails("train", 9_000, "train.state.pt")
    assert run("train", *command)[0] == 0
    fails("run", 2_000, "plan.json")
    fails("run", 9_000, "recalibrated.safetensors")
    fails("run", 16_500, "model.onnx", "pruned.pt")
    assert run("run", *command)[0] == 0
    assert files(folder) >= {"model.onnx", "pruned.pt", "report.md", "widths.png"}
    (folder / "report.md").unlink()
    fails("run", 20_000, "training.png", "widths.png")


def test_a_path_with_strange_characters_is_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    name = "a\nb\x1b[31m"
    (tmp_path / name).mkdir()
    (tmp_path / name / "model.onnx").write_text("mine")
    code, _, err = run("run", "r.yaml", "--output-dir", name)
    assert code == 2 and len(err.splitlines()) == 1 and plain(name) in err
    with pytest.raises(PruneDNError, match="a NUL"):
        open_folder(Path("a\0b"))
