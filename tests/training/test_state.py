"""The state file: a round trip, atomic, and refused when broken or of other settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prune_dn.errors import TrainingError
from prune_dn.training.state import load_state, save_state, state_path

PRINT = {"epochs": 3, "milestones": (0.5, 0.75), "data": {"name": "digits"}}


def state(**more: Any) -> dict[str, Any]:
    text = '{"epochs": 3, "milestones": [0.5, 0.75], "data": {"name": "digits"}}'
    return {"fingerprint": text, "model": {"w": torch.arange(6.0).view(2, 3)}, **more}


def test_round_trip(tmp_path: Path) -> None:
    path = state_path(tmp_path / "deep", "finetune-2")
    assert path == tmp_path / "deep" / "finetune-2.state.pt"
    assert load_state(path, PRINT) is None
    save_state(path, state(epoch=2, ema=None))
    found = load_state(path, PRINT)
    assert found is not None and found["epoch"] == 2 and found["ema"] is None
    assert torch.equal(found["model"]["w"], torch.arange(6.0).view(2, 3))


def test_failed_write_keeps_the_old_state(tmp_path: Path) -> None:
    path = state_path(tmp_path, "train")
    save_state(path, state())
    before = path.read_bytes()
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        save_state(path, {"bad": (i for i in range(3))})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_other_settings_are_named(tmp_path: Path) -> None:
    path = state_path(tmp_path, "train")
    save_state(path, state())
    with pytest.raises(TrainingError) as caught:
        load_state(path, {**PRINT, "epochs": 4, "new": 1})
    text = str(caught.value)
    assert str(path) in text and "epochs: 3 -> 4" in text and "new: None -> 1" in text
    assert "milestones" not in text and "delete the file to start again" in text


def test_broken_files(tmp_path: Path) -> None:
    path = state_path(tmp_path, "train")
    save_state(path, state(big=torch.zeros(5000)))
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(TrainingError, match=r"cannot read the training state .*delete it"):
            load_state(path, PRINT)
    path.write_text("hello")
    with pytest.raises(TrainingError, match="cannot read"):
        load_state(path, PRINT)
    for other in ([1, 2], torch.zeros(3), {"model": 1}, {"fingerprint": 3}, {"fingerprint": "3"}):
        torch.save(other, path)
        with pytest.raises(TrainingError, match="cannot read"):
            load_state(path, PRINT)


def test_no_code_is_run(tmp_path: Path) -> None:
    """A pickle that would run something is refused."""
    path = state_path(tmp_path, "train")

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save(state(evil=Evil()), path)
    with pytest.raises(TrainingError, match="cannot read"):
        load_state(path, PRINT)
    assert not (tmp_path / "ran").exists()
