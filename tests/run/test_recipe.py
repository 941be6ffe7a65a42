"""Recipes: every mistake is found at once, with its line; what is right survives a round trip."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from prune_dn.errors import RecipeError
from prune_dn.pruning.config import BOUNDS, PruneConfig
from prune_dn.run.recipe import PruneSection, Recipe, json_schema, to_yaml
from prune_dn.run.recipe_file import load_recipe, parse_recipe

GOOD = """\
model:
  name: densenet
  block_config: [2, 2]
  growth_rate: 4
  stem: cifar
data:
  name: digits
train:
  epochs: 2
  learning_rate: 1e-2
prune:
  pruning_ratio: 0.5
finetune:
  epochs: 1
"""


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, overrides=overrides)
    return str(caught.value).splitlines()


def replaced(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


def test_good_recipe_and_its_defaults() -> None:
    recipe = parse_recipe(GOOD, name="mine")
    assert recipe.train is not None and recipe.prune is not None
    assert recipe.train.learning_rate == 0.01
    assert recipe.model.block_config == (2, 2)
    assert recipe.prune.units == ("stream", "bottleneck")
    assert (recipe.seed, recipe.output_dir) == (0, "runs/mine")


@pytest.mark.parametrize("name", ["plain", "everything", "checkpoint"])
def test_resolved_recipe_reads_back_equal(name: str) -> None:
    text = {
        "plain": GOOD,
        "everything": replaced(
            "stem: cifar",
            "stem: cifar\n  mfm: {denseblock1.*: 2/1}\n  mfm_skipped: {classifier: 2/1}",
        )
        + "seed: 3\noutput_dir: 'no'\nexport: {onnx: false}\nreport: {batch_sizes: [2]}\n",
        "checkpoint": "model: {checkpoint: 1e-4}\ndata: {name: digits}\nprune: {pruning_ratio: 0.1}"
        "".replace("1e-4", "'1e-4'"),
    }[name]
    recipe = parse_recipe(text)
    resolved = to_yaml(recipe)
    assert parse_recipe(resolved) == recipe
    assert to_yaml(parse_recipe(resolved)) == resolved


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("epochs: 2", "epochs: three", 9, "train.epochs: 'three' is not an integer"),
        ("epochs: 2", "epochs: 2.5", 9, "train.epochs: 2.5 is not an integer"),
        ("epochs: 2", "epochs: true", 9, "train.epochs: true is not an integer"),
        ("epochs: 2", 'epochs: "2"', 9, "'2' is not an integer; write it without quotes"),
        ("epochs: 2", "epoch: 2", 9, "train.epoch: unknown key (did you mean 'epochs'?); the keys"),
        (
            "prune:",
            "prun:",
            11,
            "prun: unknown key (did you mean 'prune'?); the keys here are model",
        ),
        ("name: digits", "name: digit", 7, "'digit' is no data set; choose "),
        ("name: digits", "name: digit", 7, "(did you mean 'digits'?)"),
        (
            "name: densenet",
            "name: densnet",
            2,
            "model.name: 'densnet' is no model; choose densenet",
        ),
        ("stem: cifar", "stem: cifr", 5, "choose 'cifar' or 'imagenet' (did you mean 'cifar'?)"),
        ("stem: cifar", "num_classes: 3", 5, "the number of classes comes from the data"),
        ("[2, 2]", "[2, 0]", 3, "model.block_config.1: 0 must be at least 1"),
        ("[2, 2]", "5", 3, "model.block_config: 5 is not a list"),
        (
            "growth_rate: 4",
            "compression: 2.0",
            4,
            "model.compression is 2.0; it must lie in (0, 1]",
        ),
        ("stem: cifar", "mfm: {nobody: 2/1}", 5, "model.mfm pattern 'nobody' matches no part"),
        (
            "stem: cifar",
            "mfm_skipped: {a: 2/1}",
            5,
            "model.mfm_skipped pattern 'a' matches no part",
        ),
        (
            "stem: cifar",
            "mfm_skipped: {transition1: 3/2}",
            5,
            "model.mfm_skipped kind '3/2' is unknown",
        ),
        (
            "stem: cifar",
            "mfm_skipped: 3",
            5,
            "names or patterns to 2/1, such as {transition1: 2/1}",
        ),
        ("stem: cifar", "mfm: 3", 5, "model.mfm: 3 must be null, middle_and_last, or a mapping"),
        ("0.5", "0", 12, "prune.pruning_ratio is 0: nothing would be cut; give the share"),
        ("0.5", "1", 12, "prune.pruning_ratio is 1.0; it must lie in (0, 1)"),
        ("0.5", "50", 12, "prune.pruning_ratio is 50.0; it must lie in (0, 1); did you mean 0.5?"),
        ("0.5", "-0.1", 12, "prune.pruning_ratio is -0.1; it must lie in (0, 1)"),
        ("0.5", ".nan", 12, "prune.pruning_ratio: nan is not a finite number"),
        ("0.5", '"50"', 12, "prune.pruning_ratio: '50' is not a number; write it without quotes"),
        ("0.5", "50%", 12, "prune.pruning_ratio: '50%' is not a number"),
        ("0.5", "true", 12, "prune.pruning_ratio: true is not a number"),
        ("0.5", "0.5\n  round_to: 0", 13, "prune.round_to: 0 must be at least 1"),
        (
            "0.5",
            "0.5\n  criterion: l3",
            13,
            "'l3' is no criterion; choose activation, bn_scale, fisher",
        ),
        (
            "0.5",
            "0.5\n  unit: mac",
            13,
            "choose 'channels', 'params', 'macs' or 'latency' (did you mean 'macs'",
        ),
        ("0.5", "0.5\n  units: [edges]", 13, "prune.units.0: 'edges' is not a choice"),
        ("0.5", "0.5\n  rounds: 0", 13, "prune.rounds: 0 must be at least 1"),
        ("digits", "digits\n  val_fraction: 1.5", 8, "data.val_fraction: 1.5 must be below 1"),
        ("digits", "digits\n  download: yes", 8, "data.download: 'yes' is not true or false"),
        (
            "digits",
            "digits\n  name: cifar10",
            8,
            "duplicate key 'name'; it was given before on line 7",
        ),
        (
            "data:\n  name: digits",
            "data: digits",
            6,
            "data: 'digits' is not a mapping (key: value)",
        ),
        ("  name: digits", "\tname: digits", 7, "a tab cannot indent"),
    ],
)
def test_one_mistake(old: str, new: str, line: int, message: str) -> None:
    (found,) = problems(replaced(old, new))
    assert found.startswith(f"recipe.yaml:{line}: ")
    assert message in found


@pytest.mark.parametrize("number", ["1e400", ".inf", "-.inf", ".nan"])
@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("train.learning_rate", "{}"),
        ("train.weight_decay", "{}"),
        ("train.warmup_epochs", "{}"),
        ("train.milestones", "[0.5, {}]"),
        ("train.sparsity", "{{strength: {}}}"),
        ("train.distillation", "{{temperature: {}}}"),
        ("data.mean", "[{}]"),
        ("data.std", "[{}]"),
        ("data.val_fraction", "{}"),
        ("model.compression", "{}"),
        ("model.drop_rate", "{}"),
        ("report.max_seconds", "{}"),
    ],
)
def test_no_number_is_infinite_or_nan(key: str, shape: str, number: str) -> None:
    """In every section, with the line where it stands in a file."""
    value = shape.format(number)
    (found,) = problems(GOOD, f"{key}={value}")
    assert key in found and "is not a finite number" in found
    section, name = key.split(".")
    text = GOOD.replace("  learning_rate: 1e-2\n", "") + "report:\n  repeats: 3\n"
    (found,) = problems(text.replace(f"{section}:\n", f"{section}:\n  {name}: {value}\n"))
    line = text.splitlines().index(f"{section}:") + 2
    assert found.startswith(f"recipe.yaml:{line}: {key}") and "not a finite number" in found


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"train.epochs={10**30}", "must be at most 100000"),
        ("prune.rounds=1000000000", "must be at most 100"),
        (f"train.batch_size={2**63}", "must be at most 65536"),
        (f"train.max_steps={2**63}", "must be at most"),
        (f"train.num_workers={10**9}", "must be at most 1024"),
        (f"train.resolutions=[[0, {10**9}]]", "must be at most 16384"),
        (f"data.image_size={10**9}", "must be at most 16384"),
        (f"data.limit={10**18}", "must be at most"),
        ("data.mean=[123.675]", "data.mean.0: 123.675 must be at most 1"),
        ("data.std=[0]", "data.std.0: 0 must be at least 1e-06"),
        (f"prune.calibration={10**18}", "must be at most"),
        (f"prune.recalibrate_batches={10**18}", "must be at most"),
        (f"prune.seed={2**32}", "must be at most 4294967295"),
        ("prune.seed=-1", "must be at least 0"),
        (f"seed={2**32}", "must be at most 4294967295"),
        (f"report.repeats={10**12}", "must be at most 1000000"),
        (f"report.batch_sizes=[{10**12}]", "must be at most 65536"),
        (f"model.growth_rate={10**18}", "must be at most 1000000"),
        (f"model.block_config=[{10**9}]", "must be at most 1000"),
        (f"seed={'9' * 5000}", "is too large: it has 5000 characters"),
        (f"seed=0x{'f' * 5000}", "is too large: it has 5002 characters"),
        (f"train.learning_rate={'9' * 400}", "is too large: it has 400 characters"),
    ],
)
def test_numbers_beyond_reason(override: str, message: str) -> None:
    (found,) = problems(GOOD, override)
    assert message in found
    assert len(found) < 300


def test_a_refitted_net_is_not_recalibrated_unless_asked() -> None:
    for method, batches in (("none", 50), ("mean", 0), ("least_squares", 0)):
        recipe = parse_recipe(GOOD, overrides=[f"prune.compensate={method}"])
        assert recipe.prune is not None and recipe.prune.recalibrate_batches == batches
        assert f"recalibrate_batches: {batches}" in to_yaml(recipe)
        asked = parse_recipe(to_yaml(recipe), overrides=["prune.recalibrate_batches=7"])
        assert asked.prune is not None and asked.prune.recalibrate_batches == 7


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("", (None, "none", 50)),
        ("calibration: 64", ("reconstruction", "least_squares", 0)),
        ("calibration: 64, recalibrate_batches: 3", ("reconstruction", "least_squares", 3)),
        ("calibration: 64, criterion: taylor", ("taylor", "none", 50)),
        ("criterion: taylor", ("taylor", "none", 50)),
        ("calibration: 64, compensate: mean", (None, "mean", 0)),
        (
            "calibration: 64, criterion: reconstruction, compensate: none",
            ("reconstruction", "none", 50),
        ),
    ],
)
def test_what_calibration_images_mean_where_little_is_said(
    said: str, found: tuple[str | None, str, int]
) -> None:
    """Alone they mean the best that is known; a recipe that says more does what it did."""
    recipe = parse_recipe(GOOD, overrides=[f"prune={{pruning_ratio: 0.5, {said}}}"])
    cut = recipe.prune
    assert cut is not None and (cut.criterion, cut.compensate, cut.recalibrate_batches) == found
    assert parse_recipe(to_yaml(recipe)) == recipe
    alone = PruneConfig(0.5, criterion=cut.criterion, compensate=cut.compensate)  # type: ignore[arg-type]
    assert recipe.request() == alone


def test_a_recipe_asks_for_what_a_request_may_hold() -> None:
    """Each field with the same default and bounds; the seed is the recipe's unless it has its own."""
    section = PruneSection.model_fields
    for field in dataclasses.fields(PruneConfig):
        if field.name not in ("pruning_ratio", "input_size", "seed"):
            assert section[field.name].default == field.default, field.name
    schema = json_schema()["$defs"]["PruneSection"]["properties"]
    for name, bounds in BOUNDS.items():
        told = schema[name].get("anyOf", [schema[name]])[0]
        assert (told["minimum"], told["maximum"]) == bounds
    recipe = parse_recipe(GOOD, overrides=["seed=3", "prune.rounds=4", "prune.unit=macs"])
    assert recipe.request(32, 1) == PruneConfig(
        0.125, unit="macs", compensate="none", input_size=32, seed=3
    )
    assert parse_recipe(GOOD, overrides=["seed=3", "prune.seed=0"]).request().seed == 0


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "{name: torchvision/resnet19}",
            "model.name: 'torchvision/resnet19' cannot be built: torchvision",
        ),
        ("{name: timm/nothing}", "timm lists no net 'nothing'"),
        ("{name: keras/resnet}", "'keras/resnet' is no model; choose densenet, "),
        (
            "{name: timm/resnet18, num_classes: 3}",
            "unknown key; the number of classes comes from the",
        ),
        (
            "{name: timm/resnet18, arguments: {in_chans: 1}}",
            "arguments: in_chans comes from the data",
        ),
        (
            "{name: timm/resnet18, arguments: {pretrained: true}}",
            "'pretrained' is no option of timm/res",
        ),
        (
            "{name: timm/resnet18, growth_rate: 3}",
            "takes no growth_rate; write arguments: {KEY: VALUE}",
        ),
        ("{name: timm/resnet18, mfm: middle_and_last}", "timm/resnet18 takes no mfm"),
        ("{factory: os.path}", "model.factory: 'os.path' is not written package.module:function"),
        ("{factory: 'a:b', name: densenet40}", "name and factory are two nets; give one of"),
        ("{factory: 'a:b', arguments: {x: .inf}}", "is not a finite number"),
        ("{factory: 'a:b', arguments: 3}", "model.arguments: 3 is not a mapping"),
        ("{factory: 'a:b', stem: cifar}", "a:b takes no stem; write arguments"),
        ("{name: densenet40, arguments: {growth_rate: 3}}", "arguments are those of a factory, or"),
        ("{checkpoint: a, arguments: {x: 3}}", "its own shape; remove arguments"),
        (
            "{checkpoint: a, name: timm/resnet18, arguments: {drop_rate: 0.1}}",
            "its own shape; remove arg",
        ),
    ],
)
def test_nets_of_others_that_are_written_wrong(model: str, message: str) -> None:
    (found,) = problems("data:" + GOOD.partition("data:")[2], f"model={model}")
    assert message in found


def test_nets_of_others_read_back_equal_and_import_nothing() -> None:
    for model in (
        "{name: torchvision/googlenet, arguments: {aux_logits: false}}",
        "{factory: 'no_such.module:f', arguments: {widths: [3, 4], deep: {a: null}}}",
        "{checkpoint: a, name: timm/resnet18}",
        "{checkpoint: a, factory: 'no_such.module:f'}",
    ):
        text = "data:" + GOOD.partition("data:")[2]
        recipe = parse_recipe(text, overrides=[f"model={model}"])
        assert parse_recipe(to_yaml(recipe)) == recipe


def test_all_mistakes_at_once_in_order() -> None:
    text = replaced("epochs: 2", "epochs: three").replace("0.5", "0").replace("stem", "stam")
    lines = problems(text + "seed: -1\nseed: 2\n")
    assert [line.split(":")[1] for line in lines] == ["16", "5", "9", "12", "15"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the recipe is empty"),
        ("# only a comment\n", "the recipe is empty"),
        ("- a", "a recipe is a mapping"),
        ("seed: 1", "recipe.yaml:1: model: is missing"),
        ("seed: 1", "recipe.yaml:1: data: is missing"),
    ],
)
def test_hardly_a_recipe(text: str, message: str) -> None:
    assert any(message in line for line in problems(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: {name: densenet40}\ndata: {name: digits}\nprune: {pruning_ratio: 0.5}",
            "train is missing",
        ),
        ("model: {checkpoint: a}\ndata: {name: digits}", "there is nothing to do"),
        ("model: {checkpoint: a, name: densenet40}\ndata: {name: digits}", "give either name"),
        (
            "model: {}\ndata: {name: digits}",
            "model: give name (a builder, torchvision/NAME or timm/",
        ),
        ("model: {checkpoint: a, stem: cifar}\ndata: {name: digits}", "its own shape; remove stem"),
        (
            "model: {name: densenet40, bn_size: 4}\ndata: {name: digits}",
            "densenet40 takes no bn_size",
        ),
        (
            GOOD.replace("0.5", "0.5\n  runtime: eager"),
            "recipe.yaml:13: prune.runtime has no effect with unit 'channels'; use unit 'latency'",
        ),
        (GOOD.replace("0.5", "0.5\n  rounds: 2").split("finetune")[0], "add finetune"),
        (
            GOOD.replace("0.5", "0.5\n  rounds: 2\n  ratios: s.json"),
            "recipe.yaml:13: prune.rounds above 1 and ratios do not go together",
        ),
        (
            GOOD.replace("0.5", "0.5\n  scope: local\n  ratios: s.json"),
            "prune: scope='local' has no effect with ratios",
        ),
        (GOOD.replace("prune:\n  pruning_ratio: 0.5\n", ""), "finetune without prune"),
        (GOOD.replace("pruning_ratio: 0.5", "criterion: l1"), "prune: pruning_ratio is missing"),
        (
            GOOD.replace("0.5", "0.5\n  settle: true\n  units: [edge]"),
            "settle cuts every loser of an MFM and nothing else; remove pruning_ratio, units",
        ),
    ],
)
def test_parts_that_do_not_fit_together(text: str, message: str) -> None:
    assert message in "\n".join(problems(text))


def test_overrides() -> None:
    recipe = parse_recipe(GOOD, overrides=["train.epochs=7", "export.onnx=false", "finetune=null"])
    assert recipe.train is not None and recipe.train.epochs == 7
    assert not recipe.export.onnx
    assert recipe.finetune is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs=three", "--set train.epochs=three: train.epochs: 'three' is not an integer"),
        ("train.epoch=3", "--set train.epoch=3: train.epoch: unknown key (did you mean 'epochs'?)"),
        ("train.epochs", "--set train.epochs: write it as key.key=value"),
        ("=3", "--set =3: write it as key.key=value"),
        ("seed.x=1", "--set seed.x=1: seed: "),
        ("data.name.x=1", "--set data.name.x=1: data.name is 'digits', not a mapping"),
        ("train.epochs=[", "--set train.epochs=[: not valid YAML"),
        ("model.block_config=[2, x]", "model.block_config.1: 'x' is not an integer"),
    ],
)
def test_wrong_override_is_named(override: str, message: str) -> None:
    (found,) = problems(GOOD, override)
    assert message in found
    assert found.startswith("--set ")


def test_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no such recipe"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read as text"):
        load_recipe(tmp_path / "binary.yaml")


def test_name_of_the_file_makes_the_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(GOOD)
    assert load_recipe(tmp_path / "mine.yaml").output_dir == "runs/mine"


def test_schema_covers_every_key_and_choice() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["additionalProperties"] is False
    text = json.dumps(schema)
    for word in ("densenet_bc100", "bn_scale", "digits", "middle_and_last", "learning_rate"):
        assert f'"{word}"' in text


def test_units_are_a_set() -> None:
    recipe = parse_recipe(GOOD, overrides=["prune.units=[edge, bottleneck, stream, edge]"])
    assert recipe.prune is not None and recipe.prune.units == ("stream", "bottleneck", "edge")
    assert parse_recipe(to_yaml(recipe)) == recipe
    light = parse_recipe(LIGHT, overrides=["prune.units=[bottleneck, stream]"])
    assert light == parse_recipe(LIGHT)


LIGHT = """\
model: {name: light_cnn_9, widths: [4, 4, 4, 4, 4], embedding: 8}
data: {name: digits}
train: {epochs: 1}
prune: {pruning_ratio: 0.5, criterion: l2}
"""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.growth_rate=4",
            "light_cnn_9 takes no growth_rate; it takes widths, emb",
        ),
        (
            "model.block_config=[1, 1, 1, 1]",
            "light_cnn_9 takes no block_config; it takes widths, emb",
        ),
        ("model.image_size=32", "unknown key; the size of images comes from the data"),
        ("model.widths=[4, 4]", "widths is (4, 4); give 5"),
        ("prune.criterion=bn_scale", "prune: criterion 'bn_scale': no norm with a scale is on"),
        ("prune.units=[edge]", "prune.units: it has no edge; leave that out"),
        ("prune.units=[stream, layer]", "prune.units: it has no layer; leave that out"),
        (
            "prune.settle=true",
            "settle cuts every loser of an MFM and nothing else; remove pruning_",
        ),
        ("prune.round_to=4096", "prune: round_to=4096 is larger than every width"),
        ("train.resolutions=[[0, 16]]", "train.resolutions: its linear layer fits one size"),
        (
            "train.sparsity={kind: l1, strength: 0.001}",
            "train.sparsity: it has no batch norms with",
        ),
        ("train.memory_efficient=2", "train.memory_efficient: only DenseNets have a shared"),
    ],
)
def test_what_is_wrong_for_a_light_cnn(override: str, message: str) -> None:
    recipe = parse_recipe(LIGHT)
    assert parse_recipe(to_yaml(recipe)) == recipe
    assert recipe.model.build(7).config.layers[-1].units == 8
    assert parse_recipe(LIGHT, overrides=["prune.units=[sibling]"]).prune.units == ("sibling",)
    assert parse_recipe(LIGHT, overrides=["prune.criterion=null"]).prune.criterion is None
    (found,) = problems(LIGHT, override)
    assert message in found


def test_a_densenet_takes_no_widths() -> None:
    (found,) = problems(GOOD, "model.widths=[4, 4, 4, 4, 4]")
    assert "takes no widths" in found


def test_thousands_of_mistakes_are_not_all_listed() -> None:
    for text in (
        "".join(f"k{i}: 1\n" for i in range(4000)),
        "seed: 1\n" * 4000,
        f"model: {{name: densenet, block_config: [{'x, ' * 4000}x]}}\ndata: {{name: digits}}\n",
    ):
        with pytest.raises(RecipeError) as error:
            parse_recipe(text)
        lines = str(error.value).splitlines()
        assert len(lines) == 51 and lines[-1] == "and more"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("name: densenet, block_config: [600, 600], growth_rate: 1", "ask for 1,200 layers and 1,202 ch"),
        ("name: densenet, block_config: [900], growth_rate: 1000000", "900 layers and 902,000,000 channels"),
        (
            "name: densenet, block_config: [900], growth_rate: 1000, mfm_skipped: middle_and_last",
            "it has 4,502,013 channels; nets have at most 1,000,000",
        ),
        ("name: densenet, block_config: [1], bn_size: 1000000", "it has 32,000,109 channels; nets have"),
        ("name: light_cnn_29, block_config: [999, 999, 1, 1]", "asks for 2,000 residual blocks; nets have"),
        ("name: light_cnn_9, widths: [1000000, 1, 1, 1, 1]", "channels; nets have at most 1,000,000"),
        ("name: densenet, block_config: [1], growth_rate: 100000", "params; nets have at most 10,000,000"),
    ],
)  # fmt: skip
def test_nets_that_no_machine_holds(model: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(f"model: {{{model}}}\ndata: {{name: digits}}\n")


def test_recipes_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for name, message in (
        ("pipe.yaml", "it is no regular file, but a pipe or a device"),
        (".", "it is a folder"),
        ("x" * 300, "File name too long"),
        ("a\0b", "null byte in its name"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(tmp_path / name)
    with (tmp_path / "huge.yaml").open("wb") as file:
        file.truncate(1 << 40)  # takes no room
    with pytest.raises(
        RecipeError, match=r"it has 1,099,511,627,776 bytes, and such a file has at most"
    ):
        load_recipe(tmp_path / "huge.yaml")


@pytest.mark.parametrize("place", ["model.checkpoint", "data.root", "prune.ratios", "output_dir"])
def test_paths_that_no_disk_has(place: str) -> None:
    start = "{}" if place.startswith("model.") else GOOD
    for path, message in (
        ('"a\\0b"', "has a NUL in it"),
        ("a/" + "x" * 256, "of more than 255 bytes"),
    ):
        with pytest.raises(
            RecipeError, match=f"{place}: .* has a .*{message.split()[-1]}"
        ) as error:
            parse_recipe(start, overrides=[f"{place}={path}", "data.name=digits"])
        assert message in str(error.value)
    assert "is missing" not in str(parse_recipe(GOOD, overrides=["output_dir=" + "x" * 255]))
