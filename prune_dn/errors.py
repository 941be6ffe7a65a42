"""What can go wrong, by kind. Every message says what, where, and what to do."""


class PruneDNError(Exception):
    """Base of every error that prune_dn raises for bad input; the command line exits with 2."""


class ConfigError(PruneDNError):
    """A network description that cannot be built."""


class ConversionError(PruneDNError):
    """A model or state dict that is no DenseNet."""


class DataError(PruneDNError):
    """A data set that is missing, unreadable or does not fit the model."""


class TrainingError(PruneDNError):
    """A training run that cannot work, or that went wrong."""


class PruningError(PruneDNError):
    """A pruning request that cannot be met."""


class CheckpointError(PruneDNError):
    """A checkpoint that cannot be read or does not fit."""


class ExportError(PruneDNError):
    """An export that failed or whose result differs from the model."""


class WriteError(PruneDNError):
    """A file that cannot be written: no space, no permission, no such folder."""


class RecipeError(PruneDNError):
    """A recipe with mistakes; the message lists all of them."""
