"""The data and the net that a recipe names, checked against each other."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor, nn

from prune_dn.base.processes import process_state
from prune_dn.checkpoints.checkpoint import load
from prune_dn.data.datasets import Datasets, DataSpec, load_datasets
from prune_dn.errors import DataError, RecipeError
from prune_dn.models import BUILDERS
from prune_dn.models.convert import as_ours
from prune_dn.models.examples import in_channels
from prune_dn.models.families import built, config_of, known_family
from prune_dn.run.pixels import check_fit
from prune_dn.run.recipe import DataSection, Recipe
from prune_dn.run.recipe_model import ModelSection


def load_data(section: DataSection, *, seed: int) -> Datasets:
    """The data that a recipe names."""
    return load_datasets(**section.model_dump(), seed=seed)


def start(recipe: Recipe, data: Datasets) -> nn.Module:
    """The net to begin with.

    Raises RecipeError where the rest of the recipe is not for it, and what `build_model` raises.
    """
    model = build_model(recipe.model, data, seed=recipe.seed)
    try:
        recipe.check_net(model, data.spec.image_size)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    return model


def build_model(section: ModelSection, data: Datasets, *, seed: int) -> nn.Module:
    """A new net for these data, with weights from `seed`, or the one in the checkpoint.

    A plain DenseNet of torchvision or timm becomes ours. Raises DataError when its classes, channels or
    image size are not those of the data; ConfigError or ConversionError where it cannot be built.
    """
    spec, device = data.spec, process_state().device
    if section.checkpoint is None and section.name in BUILDERS:
        return _ours(section, spec, seed).to(device)
    torch.manual_seed(seed)
    if section.checkpoint is not None:
        given = section.name if section.factory is None else section.build()
        model = load(section.checkpoint, model=given)
    else:
        model = section.build(spec.num_classes, spec.in_channels)
    model = (as_ours(model) or model).to(device)
    if section.checkpoint is None and (has := in_channels(model)) != spec.in_channels:
        raise DataError(
            f"{section.title} is built for {has} input channels, the data set {spec.name!r} has "
            f"{spec.in_channels}; nets of timm take any number, a factory what its arguments say"
        )
    check_fit(model, spec, section.title)
    if config_of(model) is None:
        _check_answers(model, spec, section.title)
    return model


def _ours(section: ModelSection, spec: DataSpec, seed: int) -> nn.Module:
    with torch.device("meta"):
        config = config_of(section.build(spec.num_classes))
    torch.manual_seed(seed)
    size = {"image_size": spec.image_size} if known_family(config).one_size else {}
    model: nn.Module = built(dataclasses.replace(config, in_channels=spec.in_channels, **size))
    return model


def _check_answers(model: nn.Module, spec: DataSpec, where: str) -> None:
    """Raise DataError unless a net gives one number for each class, in eval and in training mode."""
    net, parameter = copy.deepcopy(model), next(model.parameters())
    images = torch.zeros(2, spec.in_channels, spec.image_size, spec.image_size).to(parameter)
    for training, mode in ((False, "eval"), (True, "training")):
        with torch.no_grad(), torch.random.fork_rng():
            try:
                answers = net.train(training)(images)
            except Exception as error:  # whatever a net raises
                raise DataError(
                    f"{where} fails in {mode} mode on images of {spec.image_size} pixels: "
                    f"{type(error).__name__}: {str(error)[:500]}; set data.image_size to what it takes"
                ) from error
        if not isinstance(answers, Tensor):
            remedy = ", such as aux_logits: false in model.arguments" if training else ""
            raise DataError(
                f"{where} answers a {type(answers).__name__} in {mode} mode; recipes train and evaluate "
                f"nets that answer one tensor (images, classes): switch the other outputs off{remedy}"
            )
        if answers.shape != (2, spec.num_classes):
            raise DataError(
                f"{where} answers {tuple(answers.shape[1:])} for an image, the data set {spec.name!r} "
                f"has {spec.num_classes} classes; build the net for these (model.arguments), or use "
                "the data that it was trained on"
            )
