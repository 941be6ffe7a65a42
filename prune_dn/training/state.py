"""What a training run needs to go on exactly where it was stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from prune_dn.base.pickles import read_pickle, write_pickle
from prune_dn.errors import CheckpointError, TrainingError

# What a damaged file, or one of something else, raises.
UNREADABLE = (CheckpointError, RuntimeError, ValueError, LookupError, TypeError, AttributeError)


def state_path(output_dir: str | os.PathLike[str], name: str) -> Path:
    """Where `fit` keeps its state."""
    return Path(output_dir) / f"{name}.state.pt"


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values, atomically."""
    write_pickle(path, state)


def load_state(path: Path, fingerprint: dict[str, Any]) -> dict[str, Any] | None:
    """The state in `path`, None when there is none.

    Raises TrainingError when it cannot be read, or belongs to a run with other settings.
    """
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = read_pickle(path)
        found = dict(json.loads(state["fingerprint"]))
    except UNREADABLE as error:
        raise TrainingError(
            f"cannot read the training state {path} ({type(error).__name__}): it is cut short, or "
            "a file of something else; delete it to start again"
        ) from error
    wanted = json.loads(json.dumps(fingerprint))
    different = [k for k in sorted({*found, *wanted}) if found.get(k) != wanted.get(k)]
    if different:
        changes = ", ".join(f"{k}: {found.get(k)!r} -> {wanted.get(k)!r}" for k in different[:5])
        raise TrainingError(
            f"{path} belongs to a run with other settings ({changes[:600]}); delete the file to "
            "start again, or use another output_dir"
        )
    return state
