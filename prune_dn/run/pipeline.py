"""The whole job: a recipe goes in; a trained, pruned, fine-tuned, exported net comes out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from prune_dn.errors import RecipeError
from prune_dn.measure.profiling import count
from prune_dn.pruning import apply_plan
from prune_dn.run import deploying
from prune_dn.run.building import load_data, start
from prune_dn.run.folder import RunFolder
from prune_dn.run.phases import Phases, Watch
from prune_dn.run.pixels import warn_of_other_pixels
from prune_dn.run.recipe import Recipe
from prune_dn.run.rounds import plan_round


@dataclass(frozen=True)
class RunResult:
    """What a run left: its folder, the figures of metrics.json, and the last net."""

    output_dir: Path
    metrics: dict[str, Any]
    model: nn.Module


def run(
    recipe: Recipe,
    *,
    overwrite: bool = False,
    progress: bool = True,
    only_train: bool = False,
    watch: Watch | None = None,
) -> RunResult:
    """Carry out a recipe; every phase leaves whole files in `recipe.output_dir`.

    A run that was stopped goes on where it was: phases that are done are read, not repeated.
    `overwrite` starts anew in a folder that holds another run; `only_train` stops at the dense net. `watch`
    gets each stage's name and figures when it is scored.

    Raises RecipeError when the folder holds a run of another recipe, DataError when the data does
    not fit, and what training, pruning and export raise.
    """
    if recipe.sweep is not None:
        raise RecipeError(
            "the recipe has a part sweep: use `prune-dn sweep`, or leave it out (--set sweep=null)"
        )
    data = load_data(recipe.data, seed=recipe.seed)
    deploying.check_installed(list(deploying.wanted_files(recipe.export).values()))
    model = start(recipe, data)
    folder = RunFolder(recipe, data.contents, overwrite=overwrite)
    try:
        phases = Phases(recipe, data, folder, progress, built=model, watch=watch)
        dense = model = phases.train()
        plans: list[dict[str, Any]] = []
        if recipe.prune is not None and not only_train:
            for number in range(1, recipe.prune.rounds + 1):
                plan, model = phases.prune(model, dense, recipe.prune, number)
                plans.append({"round": number, **plan})
                model = phases.finetune(model, dense, recipe.prune, number)
        if not only_train:
            phases.export(model, plans)
            phases.measure(
                {"dense": dense} if model is dense else {"dense": dense, "pruned": model}
            )
        phases.report(plans, dense, None if model is dense else model)
        return RunResult(folder.path, folder.metrics, model)
    except KeyboardInterrupt as stop:
        again = "the same command" + (", without --overwrite," if overwrite else "")
        raise KeyboardInterrupt(
            f"each finished phase and epoch is kept in {folder.path}; {again} goes on from there"
        ) from stop
    finally:
        folder.close()


def dry_run(recipe: Recipe) -> dict[str, Any]:
    """What `run` would work on: data, net, budget. Nothing is trained or written.

    The cut is planned on the weights as they are before training, which shows that the request can
    be met and what sizes it gives. Raises what `run` would raise for the same mistakes.
    """
    data = load_data(recipe.data, seed=recipe.seed)
    deploying.check_installed(list(deploying.wanted_files(recipe.export).values()))
    model = start(recipe, data)
    if recipe.model.checkpoint is not None:
        warn_of_other_pixels(recipe.data, data.spec, recipe.model.checkpoint)
    facts: dict[str, Any] = {
        "model": recipe.model.title,
        "data": data.spec.to_dict(),
        "images": {"train": len(data.train), "val": len(data.val), "test": len(data.test)},
        "dense": dataclasses.asdict(count(model, data.spec.image_size)),
        "epochs": {
            name: getattr(config, "epochs", 0)
            for name, config in (("train", recipe.train), ("finetune", recipe.finetune))
        },
        "output_dir": recipe.output_dir,
    }
    if recipe.prune is not None:
        plan = plan_round(recipe, model, model, data, recipe.prune.rounds)
        if recipe.prune.max_drop is not None:
            facts["max_drop"] = recipe.prune.max_drop
        elif recipe.prune.settle:
            after = count(apply_plan(model, plan), data.spec.image_size)
            facts["pruned"] = dataclasses.asdict(after)
        else:
            facts["pruned"] = plan.achieved["after"]
            facts["requested"] = recipe.prune.pruning_ratio
            facts["achieved"] = plan.achieved["ratio"]
        facts["protected"] = plan.protected
    return facts
