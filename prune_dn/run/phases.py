"""The phases of a run, each: read what is there, or make it, write it, record it."""

from __future__ import annotations

import platform
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from prune_dn.base.intervals import fell
from prune_dn.base.processes import process_state
from prune_dn.checkpoints.checkpoint import load, save, save_state_dict
from prune_dn.data.datasets import Datasets, calibration_loader
from prune_dn.errors import PruneDNError
from prune_dn.measure.latency import machine
from prune_dn.models.examples import example_image
from prune_dn.models.families import config_of
from prune_dn.models.losses import USUAL
from prune_dn.page.document import write as write_page
from prune_dn.pruning import (
    Plan,
    apply_plan,
    compensate_plan,
    recalibrate_batch_norm_,
)
from prune_dn.run import deploying, samples
from prune_dn.run.figures import asked_latency, latency_rows, stage_figures
from prune_dn.run.files import PAGE, SAMPLES
from prune_dn.run.folder import RunFolder
from prune_dn.run.pages import Nets, plan_facts, run_page
from prune_dn.run.pixels import warn_of_other_pixels
from prune_dn.run.recipe import PruneSection, Recipe, to_yaml
from prune_dn.run.report import write_report
from prune_dn.run.rounds import calibration, plan_round, plan_within
from prune_dn.training import fit

# No times: the same recipe gives the same checkpoint.
KEPT_HISTORY = ("epoch", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate")
PACKAGE = Path(__file__).parents[1]
PACKAGES = ("prune_dn", "torch", "torchvision", "accelerate", "numpy", "onnxruntime")

Watch = Callable[[str, dict[str, Any]], object]  # a stage's name and figures


@dataclass
class Phases:
    """The phases, each: read what is there, or make it, write it, record it.

    `built` is the net as `build_model` gave it, of which files of other nets than ours are instances.
    """

    recipe: Recipe
    data: Datasets
    folder: RunFolder
    progress: bool
    built: nn.Module
    watch: Watch | None = None

    def __post_init__(self) -> None:
        metrics, spec = self.folder.metrics, self.data.spec
        metrics["name"] = Path(self.recipe.output_dir).name
        metrics["data"] = spec.to_dict()
        for key in ("stages", "history", "latency"):
            metrics.setdefault(key, {})
        metrics.setdefault("rounds", [])
        others = [x for x in metrics.get("notices", []) if x["name"] != "data"]
        metrics["notices"] = [{"name": "data", "text": x} for x in self.data.notices] + others
        self.environment = environment(self.recipe.seed)
        self.folder.write_json("environment.json", self.environment)

    def train(self) -> nn.Module:
        """The dense net, trained unless the recipe only reads a checkpoint."""
        file, model = "dense.safetensors", self.built
        if self.folder.done("train", [file]):
            return self._load(file)
        with self._phase("train") as notices:
            if self.recipe.model.checkpoint is not None:
                warn_of_other_pixels(self.recipe.data, self.data.spec, self.recipe.model.checkpoint)
            if self.recipe.train is not None:
                notices += self._fit(model, self.recipe.train, "train")
            self._save(model, file)
            self._score(model, "dense", file)
        return model

    def prune(
        self, model: nn.Module, dense: nn.Module, section: PruneSection, number: int
    ) -> tuple[dict[str, Any], nn.Module]:
        """One round, and what the report tells of the cut. The budget is against `dense`."""
        plan, small = self._prune(model, dense, section, number)
        return plan_facts(plan), small

    def _prune(
        self, model: nn.Module, dense: nn.Module, section: PruneSection, number: int
    ) -> tuple[Plan, nn.Module]:
        """Plan, cut, compensate, recalibrate; each step is scored."""
        ending = "" if section.rounds == 1 else f"-{number}"
        plan_file = self._plan_file(number)
        has_norms = any(isinstance(module, _BatchNorm) for module in model.modules())
        batches = (section.recalibrate_batches or 0) if has_norms else 0
        done = "recalibrated" if batches else "cut"
        file = f"{done}{ending}.safetensors"
        if self.folder.done(f"prune-{number}", [plan_file, file]):
            with self._readable(plan_file):
                plan = Plan.load(self._path(plan_file))
            return plan, self._load(file)
        with self._phase(f"prune-{number}"):
            plan = self._plan(model, dense, number)
            self.folder.write(plan_file, plan.to_json() + "\n")
            small = apply_plan(model, plan)
            stages = ["pruned"]
            self._score(small, "pruned")
            if section.compensate != "none":
                small = self._compensate(small, model, plan)
                stages.append("compensated")
                self._score(small, "compensated")
            if batches:
                self._recalibrate(small, batches)
                stages.append("recalibrated")
                self._score(small, "recalibrated")
            self._save(small, file)
            for stage in stages:
                self.folder.metrics["stages"][stage]["file_bytes"] = self._bytes(file)
            if not section.settle:
                self._record_round(number, plan.requested["pruning_ratio"], plan.achieved["ratio"])
        return plan, small

    def _plan_file(self, number: int) -> str:
        assert self.recipe.prune is not None
        return "plan.json" if self.recipe.prune.rounds == 1 else f"plan-{number}.json"

    def _record_round(self, number: int, requested: float, achieved: float) -> None:
        assert self.recipe.prune is not None
        row: dict[str, Any] = {
            "unit": self.recipe.prune.unit,
            "requested": requested,
            "achieved": achieved,
        }
        if (asked := asked_latency(self.recipe)) is not None:
            row |= asked._asdict()
        self.folder.metrics["rounds"][number - 1 :] = [row]

    def finetune(
        self, model: nn.Module, dense: nn.Module, section: PruneSection, number: int
    ) -> nn.Module:
        """Train the cut net; after the last round it becomes pruned.safetensors."""
        last = number == section.rounds
        file = "pruned.safetensors" if last else f"finetuned-{number}.safetensors"
        if self.folder.done(f"finetune-{number}", [file]):
            return self._load(file)
        with self._phase(f"finetune-{number}") as notices:
            if self.recipe.finetune is None:
                self._save(model, file)
                return model
            stages = self.folder.metrics["stages"]
            before = [figures for stage, figures in stages.items() if stage != "fine-tuned"][-1]
            name = "finetune" if last else f"finetune-{number}"
            notices += self._fit(model, self.recipe.finetune, name, teacher=dense)
            self._save(model, file)
            self._score(model, "fine-tuned", file)
            after = stages["fine-tuned"]
            worse = fell(
                "fine-tuning", before["test_accuracy"], after["test_accuracy"], after["n_test"]
            )
            notices += [] if worse is None else [worse]
        return model

    def measure(self, nets: dict[str, nn.Module]) -> None:
        """Latency of all nets, measured in turns; of the exported file where that is asked for."""
        if self.folder.done("latency", []):
            return
        with self._phase("latency"):
            rows = None
            if self.folder.is_main:
                rows = latency_rows(self.recipe, nets, self.data.spec.image_size, self.folder.path)
            self.folder.metrics["latency"] = self.folder.agree(rows)

    def export(self, model: nn.Module, plans: list[dict[str, Any]]) -> None:
        """The files that the recipe asks for, each verified before it gets its name, and their figures."""
        wish, files = self.recipe.export, deploying.wanted_files(self.recipe.export)
        plain = ["pruned.pt"] if wish.state_dict else []
        if self.folder.done("export", [*files, *plain]):
            return
        with self._phase("export") as notices:
            said: list[str] = []
            if self.folder.is_main:
                for name, kind in files.items():
                    said += self._deploy(model, name, kind, plans)
                if plain:
                    save_state_dict(model, self._path(plain[0]))
            process_state().wait_for_everyone()
            paths, main = {name: self._path(name) for name in files}, self.folder.is_main
            figures = deploying.file_figures(paths, self.data, self.recipe.report, timed=main)
            self.folder.metrics["files"] = self.folder.agree(figures)
            notices += self.folder.agree(said)

    def _deploy(
        self, model: nn.Module, name: str, kind: deploying.Kind, plans: list[dict[str, Any]]
    ) -> list[str]:
        info: dict[str, Any] = {"data": self.data.spec.to_dict()}
        if plans:
            last = Plan.load(self._path(self._plan_file(len(plans))))
            info |= {"plan": last.requested, **deploying.digest_of(last)}
        cut, seed = self.recipe.prune, self.recipe.seed
        images = None if cut is None else cut.calibration
        return deploying.write_file(
            model, self._path(name), *kind, self.data, info, images, seed=seed
        )

    def report(
        self, plans: list[dict[str, Any]], dense: nn.Module, pruned: nn.Module | None = None
    ) -> None:
        """report.md with its plots, and report.html; what `fit` keeps for going on is no longer needed."""
        if not self.folder.is_main:
            return
        for file in self.folder.path.glob("*.state.pt"):
            file.unlink()
        metrics = self.folder.metrics
        write_report(self.folder.path, metrics, self.environment, plans)
        found = None
        if pruned is not None:
            found = samples.collect(dense, pruned, self.data.test)
            self.folder.write_json(SAMPLES, found)
        nets = Nets.of(dense, pruned, image_size=self.data.spec.image_size)
        recipe = to_yaml(self.recipe)
        page = run_page(metrics, self.environment, plans, nets, recipe=recipe, samples=found)
        write_page(page, self._path(PAGE))

    @contextmanager
    def _phase(self, name: str) -> Iterator[list[str]]:
        """Time and record a phase. The report tells the notices, and what prune_dn warned of."""
        torch.manual_seed(self.recipe.seed)
        start = time.perf_counter()
        notices: list[str] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("always", module="prune_dn")
            yield notices
        for w in caught:
            if Path(w.filename).is_relative_to(PACKAGE):
                notices.append(str(w.message))
            else:
                warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
        others = [notice for notice in self.folder.metrics["notices"] if notice["name"] != name]
        said = [{"name": name, "text": text} for text in dict.fromkeys(notices)]
        self.folder.metrics["notices"] = others + said
        process_state().wait_for_everyone()
        self.folder.record(name, time.perf_counter() - start)

    def _path(self, name: str) -> Path:
        return self.folder.path / name

    def _load(self, name: str) -> nn.Module:
        with self._readable(name):
            dense = self.built if config_of(self.built) is None else None
            return load(self._path(name), model=dense).to(process_state().device)

    @contextmanager
    def _readable(self, name: str) -> Iterator[None]:
        """Say what to do about a file of a phase that is done and cannot be read."""
        try:
            yield
        except PruneDNError as error:
            raise type(error)(
                f"{error} (restore {self._path(name)}, or delete it: it is then made again)"
            ) from error

    def _bytes(self, name: str) -> int:
        return int(self.folder.agree(self._path(name).stat().st_size if self.folder.is_main else 0))

    def _fit(self, model: nn.Module, config: Any, name: str, **teacher: Any) -> list[str]:
        result = fit(
            model,
            self.data,
            config,
            output_dir=self.folder.path,
            seed=self.recipe.seed,
            name=name,
            progress=self.progress,
            **teacher,
        )
        self.folder.metrics["history"][name] = result.history
        return result.notices

    def _plan(self, model: nn.Module, dense: nn.Module, number: int) -> Plan:
        """Decided by the main process, so that all cut the same."""
        text = None
        if self.folder.is_main:
            text = self._decide(model, dense, number).to_json()
        return Plan.from_json(self.folder.agree(text))

    def _decide(self, model: nn.Module, dense: nn.Module, number: int) -> Plan:
        assert self.recipe.prune is not None
        if self.recipe.prune.max_drop is None:
            return plan_round(self.recipe, model, dense, self.data, number)
        say = (lambda trial: print(trial, file=sys.stderr)) if self.progress else None
        found = plan_within(self.recipe, dense, self.data, self._path("search.json"), say)
        assert found.plan is not None
        self.folder.metrics["search"] = {"max_drop": self.recipe.prune.max_drop, **found.facts()}
        return found.plan

    def _compensate(self, small: nn.Module, model: nn.Module, plan: Plan) -> nn.Module:
        """Refitted by the main process, so that all have the same weights."""
        weights = None
        if self.folder.is_main:
            images, asked = calibration(self.recipe, self.data), self.recipe.request()
            assert asked.compensate is not None
            fitted = compensate_plan(
                *(small, model, plan, images, asked.compensate),
                loss=asked.loss or USUAL,
                seed=asked.seed,
            )
            weights = {name: tensor.cpu() for name, tensor in fitted.state_dict().items()}
        small.load_state_dict(self.folder.agree(weights))
        return small

    def _recalibrate(self, model: nn.Module, batches: int) -> None:
        size = 64 if self.recipe.finetune is None else self.recipe.finetune.batch_size
        train = self.data.train
        loader = calibration_loader(train, size, augment=train.augment, seed=self.recipe.seed)
        recalibrate_batch_norm_(model, loader, max_batches=batches)

    def _save(self, model: nn.Module, file: str) -> None:
        history = {
            name: [{key: row[key] for key in KEPT_HISTORY} for row in rows]
            for name, rows in self.folder.metrics["history"].items()
        }
        spec, augment = self.data.spec.to_dict(), self.data.train.augment
        info: dict[str, Any] = {"data": spec, "augment": augment, "history": history}
        if self.folder.is_main:
            save(model, self._path(file), info=info, **self._origin(model))

    def _origin(self, model: nn.Module) -> dict[str, Any]:
        """Arguments of `save` for a net that is not ours: who made it, and an image that it takes."""
        if config_of(model) is not None:
            return {}
        spec, told = self.data.spec, {}
        named = self.recipe.model.named(spec.num_classes, spec.in_channels)
        if named is not None:
            told = {"name": named.name, "options": named.options}
        return {"example_inputs": example_image(model, spec.image_size), **told}

    def _score(self, model: nn.Module, stage: str, file: str | None = None) -> None:
        size = None if file is None else self._bytes(file)
        figures = {**stage_figures(model, self.data), "file_bytes": size}
        self.folder.metrics["stages"][stage] = figures
        if self.watch is not None:
            self.watch(stage, figures)


def environment(seed: int) -> dict[str, Any]:
    """Versions, machine, seed and command line, for the record."""
    versions = {"python": platform.python_version()}
    versions.update({name: metadata.version(name) for name in PACKAGES})
    state = process_state()
    return {
        "versions": versions,
        "machine": f"{machine(state.device)}, {platform.system()}",
        "processes": state.num_processes,
        "seed": seed,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
