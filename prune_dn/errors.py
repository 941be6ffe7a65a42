"""What can go wrong, by kind. Every message says what, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

_WIDEST = 500  # characters of a line


def listed(problems: Iterable[str], most: int = 20) -> str:
    """The first problems, one a line, and whether there are more; no more than these are found.

    >>> listed(f"{i} is wrong" for i in range(1000)).splitlines()[-2:]
    ['19 is wrong', 'and more']
    """
    found = list(islice(problems, most + 1))
    lines = [x if len(x) <= _WIDEST else f"{x[:_WIDEST]}..." for x in found[:most]]
    return "\n".join(lines + ["and more"] * (len(found) > most))


class PruneDNError(Exception):
    """Base of every error that prune_dn raises for bad input; the command line exits with 2."""


class ConfigError(PruneDNError):
    """A network description that cannot be built."""


class ConversionError(PruneDNError):
    """A model or state dict that is no DenseNet."""


class DataError(PruneDNError):
    """A data set that is missing, unreadable or does not fit the model."""


class DataWarning(UserWarning):
    """Something about a data set that its owner may not expect; what is done is said."""


class TrainingError(PruneDNError):
    """A training run that cannot work, or that went wrong."""


class PruningError(PruneDNError):
    """A pruning request that cannot be met."""


class RuntimeMissingError(PruneDNError):
    """A runtime that is not installed; the message names the extra that brings it."""


class BudgetError(PruningError):
    """A budget that no cut meets, given what must stay."""


class PruningWarning(UserWarning):
    """Something about a plan that its owner may not expect; the plan holds it too."""


class CheckpointError(PruneDNError):
    """A checkpoint that cannot be read or does not fit."""


class ExportError(PruneDNError):
    """An export that failed or whose result differs from the model."""


class WriteError(PruneDNError):
    """A file that cannot be written: no space, no permission, no such folder."""


class RecipeError(PruneDNError):
    """A recipe with mistakes; the message lists all of them."""
