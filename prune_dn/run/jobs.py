"""What the commands do with a checkpoint: arguments in, files written, figures out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from prune_dn.base.console import say
from prune_dn.base.files import same_file
from prune_dn.base.intervals import fell, wilson
from prune_dn.base.processes import process_state
from prune_dn.checkpoints.checkpoint import load, read_plan, save, save_state_dict
from prune_dn.checkpoints.opened import open_checkpoint
from prune_dn.data.datasets import (
    CALIBRATION_IMAGES,
    Datasets,
    calibration_batches,
    calibration_loader,
)
from prune_dn.deploy.deployed import Deployed
from prune_dn.deploy.formats import FORMATS
from prune_dn.errors import DataError, ExportError, PruningError, RecipeError
from prune_dn.measure.profiling import count
from prune_dn.models.convert import as_ours
from prune_dn.models.examples import example_image
from prune_dn.models.families import config_of, family_of
from prune_dn.models.losses import USUAL
from prune_dn.page.document import write as write_page
from prune_dn.pruning import (
    Plan,
    apply_plan,
    compensate_plan,
    make_plan,
    recalibrate_batch_norm_,
)
from prune_dn.pruning.config import PruneConfig
from prune_dn.pruning.criteria import follows_loss, reads_images
from prune_dn.run.building import load_data
from prune_dn.run.data_options import DataOptions, refuse_calibration
from prune_dn.run.deploying import digest_of, open_any, write_deployed
from prune_dn.run.page_files import page_path
from prune_dn.run.pages import Nets, cut_page
from prune_dn.run.pixels import (
    GUESSED,
    check_fit,
    describe_inputs,
    inputs_for,
    say_inputs,
    say_pixels,
    warn_of_other_pixels,
)
from prune_dn.run.recipe import Recipe
from prune_dn.run.rounds import largest_cut
from prune_dn.run.trials import Trial
from prune_dn.training import FitConfig, fit
from prune_dn.training import evaluate as score
from prune_dn.training.config import Distillation


def prune_checkpoint(
    checkpoint: Path,
    output: Path,
    request: PruneConfig,
    *,
    max_drop: float | None = None,
    ratios: Path | None,
    plan_out: Path | None,
    recalibrate: int,
    calibration: int | None,
    data: DataOptions,
    ema: bool = False,
    named: str | None = None,
    export: Path | None = None,
    page: bool = True,
) -> dict[str, Any]:
    """Cut a checkpoint as `request` says.

    `ratios` is the file of a sensitivity, `named` what net a training script's weights are of; with `export`
    the result is written there too, in the format of its ending; with `page` a page (HTML) beside it.
    `calibration` is how many training images criterion and compensation see (None = 512; see `PruneConfig.counting`); a loss of None is
    `softmax`: the data have classes. With `max_drop`, points of accuracy, the ratio is found on the
    validation images (`prune_within`), the trials are kept beside the output, and where neither criterion nor
    compensation is said they are those with calibration images.
    """
    searches = max_drop is not None
    asked = request.counting(
        CALIBRATION_IMAGES if searches and calibration is None else calibration
    )
    if searches and ratios is not None:
        raise PruningError("--ratios and --max-drop do not go together: leave one of the two out")
    read = {"the checkpoint": checkpoint, "the file of --ratios": ratios}
    _output(output, ".safetensors", **read)
    _apart("--plan-out", plan_out, **read, **{"--output": output})
    _apart("--export", export, **read, **{"--output": output, "--plan-out": plan_out})
    if export is not None:
        check_exported(export)
    model, info = open_checkpoint(checkpoint, ema, named)
    model = as_ours(model) or model
    if recalibrate and not any(isinstance(m, _BatchNorm) for m in model.modules()):
        raise PruningError(
            f"--recalibrate has no effect: a {_kind(model)} has no batch norms; leave it out"
        )
    inputs, inputs_from = inputs_for(model, info, data.image_size, checkpoint)
    method, reads = str(asked.compensate), reads_images(asked.criterion)
    if not reads and method == "none":
        refuse_calibration(calibration, asked.criterion, " and --compensate is none")
    if asked.loss is not None and not follows_loss(asked.criterion) and method == "none":
        raise PruningError(
            "--loss has no effect: the criterion does not depend on what the outputs mean, and "
            "--compensate is none; leave it out"
        )
    images: list[Any] = []
    pixels: dict[str, Any] = {**describe_inputs(inputs), "image_size_from": inputs_from}
    if recalibrate or reads or method != "none" or searches:
        sets, pixels = data.load(info, model, checkpoint)
        info["data"] = sets.spec.to_dict()
    else:
        data.refuse("no images are read", but=("image_size",))
        say_inputs(inputs, inputs_from)
    if reads or method != "none":
        images = calibration_batches(sets.train, calibration, seed=data.seed)
    kept = {**info, "pruned_from": checkpoint.name}
    asked = dataclasses.replace(asked, input_size=inputs.get("image_size"))
    example = inputs.get("example_inputs")
    told: dict[str, Any] = {}
    if max_drop is not None:
        trials = output.with_suffix(".search.json")
        found = largest_cut(
            model, asked, max_drop, sets, images or None, trials, _say_trial, example
        )
        assert found.plan is not None
        plan, small = found.plan, found.model
        told = {"max_drop": max_drop, "found": str(found), "search": str(trials)}
    else:
        plan = make_plan(
            model,
            asked,
            calibration=images if reads else None,
            example_inputs=example,
            ratios=ratios,
        )
        small = apply_plan(model, plan)
    if method != "none" and max_drop is None:
        loss, seed = asked.loss or USUAL, asked.seed
        small = compensate_plan(small, model, plan, images, method, loss=loss, seed=seed)
    if recalibrate:
        _recalibrate(small, sets, recalibrate, info, data.seed)
    if plan_out is not None:
        plan.save(plan_out)
    saved = {**kept, "plan": plan.requested, **digest_of(plan)}
    _save(small, output, saved, inputs)
    done = plan.achieved
    figures = _cut_figures(output, plan)
    warned = list(done.get("warnings", []))
    exported = _exported(small, export, inputs, saved)
    if method == "none" and not recalibrate:
        told["next"] = (
            f"the cut net is not refitted: `prune-dn finetune {output}` trains it; or cut again with "
            "--data NAME --compensate least_squares, which refits it without training"
        )
    if page:
        path = page_path(output)
        shown = cut_page(output.stem, plan, Nets.of(model, small, **inputs), {**figures, **told})
        write_page(shown, path)
        told["page"] = str(path)
    return {**figures, **told, **exported, "warnings": warned, "images": pixels}


def _say_trial(trial: Trial) -> None:
    say(str(trial), error=True)


def _kind(model: nn.Module) -> str:
    family = family_of(model)
    return type(model).__name__ if family is None else family.title


def _save(model: nn.Module, path: Path, info: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    """Save any net, one that is not ours with the inputs that it is for."""
    if config_of(model) is not None:
        save(model, path, info=info)
        return
    example = inputs.get("example_inputs")
    save(
        model,
        path,
        info=info,
        example_inputs=example_image(model, inputs["image_size"]) if example is None else example,
    )


def _exported(
    model: nn.Module, path: Path | None, inputs: Mapping[str, Any], info: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the net in the format of the ending, if a path is given; what was written, as facts."""
    if path is None:
        return {}
    if path.suffix in (".pt", ".pth"):
        save_state_dict(model, path)
    else:
        write_deployed(model, path, inputs, info)
    return {"exported": str(path)}


def _cut_figures(output: Path, plan: Plan) -> dict[str, Any]:
    done, told = plan.achieved, plan.requested
    return {
        "output": str(output),
        "unit": done["unit"],
        "criterion": told["criterion"],
        "compensate": told["compensate"],
        "requested": told["pruning_ratio"],
        "achieved": round(done["ratio"], 6),
        **{f"{key}_before": value for key, value in done["before"].items()},
        **{f"{key}_after": value for key, value in done["after"].items()},
        "file_bytes": output.stat().st_size,
        "protected": plan.protected,
    }


def finetune_checkpoint(
    checkpoint: Path,
    output: Path,
    *,
    recipe: Recipe | None,
    fields: Mapping[str, Any],
    teacher: Path | None,
    data: DataOptions,
    progress: bool,
    ema: bool = False,
) -> dict[str, Any]:
    """Train a checkpoint further, by a recipe's `finetune` part (or `train`) or by options."""
    _output(output, ".safetensors", **{"the checkpoint": checkpoint, "the teacher": teacher})
    base: dict[str, Any] = {}
    if recipe is not None:
        data.refuse("the recipe's part `data` says it (--set data.KEY=VALUE)")
        section = recipe.finetune or recipe.train
        base = {} if section is None else section.model_dump()
    if teacher is not None:
        base["distillation"] = base.get("distillation") or Distillation().model_dump()
    elif base.get("distillation"):
        raise RecipeError("the recipe distils from a teacher; add --teacher, the dense checkpoint")
    model, info = open_checkpoint(checkpoint, ema)
    if recipe is not None:
        sets = load_data(recipe.data, seed=data.seed)
        check_fit(model, sets.spec, str(checkpoint))
        warn_of_other_pixels(recipe.data, sets.spec, checkpoint)
        part = recipe.data
        size_from = GUESSED if part.image_size is None else "from the recipe"
        given = part.mean is not None and part.std is not None
        pixels = say_pixels(sets.spec, size_from, "from the recipe" if given else GUESSED)
    else:
        sets, pixels = data.load(info, model, checkpoint)
    try:
        config = FitConfig.model_validate({**base, **fields})
    except ValidationError as error:
        missing = [str(e["loc"][0]) for e in error.errors() if e["type"] == "missing"]
        if missing:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
            raise RecipeError(f"{options} is missing; or give --recipe") from None
        text = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise RecipeError(text) from None
    before = score(model, sets.test)
    try:
        result = fit(
            model,
            sets,
            config,
            seed=data.seed,
            teacher=None if teacher is None else load(teacher),
            progress=progress,
            name="finetune",
        )
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            f"{output} was not written and nothing is kept; `prune-dn run` keeps each epoch"
        ) from stop
    after = score(model, sets.test)
    assert before.accuracy is not None and after.accuracy is not None
    history = {**(info.get("history") or {}), "finetune": result.history}
    if process_state().is_main_process:
        told = {"data": sets.spec.to_dict(), "augment": sets.train.augment, "history": history}
        inputs = {"image_size": sets.spec.image_size}
        _save(model, output, {**info, **told}, inputs)
    return {
        "output": str(output),
        "test_accuracy_before": before.accuracy,
        "test_accuracy_before_interval": wilson(before.accuracy, before.n),
        "test_accuracy": after.accuracy,
        "test_accuracy_interval": wilson(after.accuracy, after.n),
        "test_loss": after.loss,
        "n": after.n,
        "seconds": round(result.seconds, 1),
        "notice": fell("fine-tuning", before.accuracy, after.accuracy, after.n),
        "images": pixels,
    }


def evaluate_checkpoint(
    checkpoint: Path,
    data: DataOptions,
    *,
    split: str,
    recalibrate: int,
    batch_size: int,
    precision: str,
    ema: bool = False,
    model: str | None = None,
) -> dict[str, Any]:
    """Accuracy and loss on the test (or validation) images."""
    if split not in ("test", "val"):
        raise DataError(f"--split {split!r} is unknown; choose test or val")
    if precision not in ("no", "bf16"):
        raise DataError(f"--precision {precision!r} is unknown; choose no or bf16")
    net, info = open_any(checkpoint, precision, ema=ema, model=model, recalibrate=recalibrate)
    sets, pixels = data.load(info, net, checkpoint)
    if recalibrate:
        _recalibrate(net, sets, recalibrate, info, data.seed)
    result = score(net, getattr(sets, split), batch_size=batch_size, precision=precision)
    assert result.accuracy is not None
    cost = (
        {key: info.get(key) for key in ("params", "macs")}
        if isinstance(net, Deployed)
        else dataclasses.asdict(count(net, sets.spec.image_size))
    )
    return {
        "checkpoint": str(checkpoint),
        "data": sets.spec.name,
        "split": split,
        "accuracy": result.accuracy,
        "accuracy_interval": wilson(result.accuracy, result.n),
        "loss": result.loss,
        "n": result.n,
        "recalibrated_on_batches": recalibrate,
        "precision": precision,
        "params": cost["params"],
        "macs": cost["macs"],
        "images": pixels,
    }


def export_checkpoint(
    checkpoint: Path,
    output: Path,
    image_size: int | None,
    *,
    ema: bool = False,
    model: str | None = None,
) -> dict[str, Any]:
    """Write the model in the format of `output`'s ending."""
    _apart("--output", output, **{"the checkpoint": checkpoint})
    check_exported(output)
    plain = output.suffix in (".pt", ".pth")
    if plain and image_size is not None:
        raise ExportError("--image-size has no effect: a state dict is for any size; leave it out")
    net, info = open_checkpoint(checkpoint, ema, model)
    inputs: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    if not plain:
        inputs, inputs_from = inputs_for(net, info, image_size, checkpoint)
        say_inputs(inputs, inputs_from)
        facts = {**describe_inputs(inputs), "image_size_from": inputs_from}
    _exported(net, output, inputs, {**info, **digest_of(read_plan(checkpoint))})
    return {"output": str(output), **facts, "file_bytes": output.stat().st_size}


def check_exported(output: Path) -> None:
    """Raise ExportError for a file name whose ending says no format."""
    endings = (*FORMATS, ".pt", ".pth")
    if output.suffix not in endings:
        raise ExportError(f"{output}: the ending says the format; use {', '.join(endings)}")


def _recalibrate(
    model: nn.Module, sets: Datasets, batches: int, info: Mapping[str, Any], seed: int
) -> None:
    """On images augmented as in training where the checkpoint says how, else on plain ones."""
    augment = info.get("augment", "none")
    loader = calibration_loader(sets.train, 64, augment=augment, seed=seed)
    recalibrate_batch_norm_(model, loader, max_batches=batches)


def _output(path: Path, ending: str, **read: Path | None) -> None:
    if path.suffix != ending:
        raise ExportError(f"{path}: a checkpoint is a {ending} file; name it {path.stem}{ending}")
    _apart("--output", path, **read)


def _apart(option: str, path: Path | None, **others: Path | None) -> None:
    """Raise ExportError where a file that is to be written is one that is read or written too."""
    for what, other in others.items():
        if path is not None and other is not None and same_file(path, other):
            raise ExportError(f"{option} {path} is {what} itself; name another file")
