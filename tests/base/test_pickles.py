"""Files of torch.save: what lies beside the tensors is never run, and never in the way."""

from __future__ import annotations

import argparse
import collections
import datetime
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from prune_dn.base.pickles import StandIn, read_pickle, write_pickle
from prune_dn.errors import CheckpointError


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_other_objects_are_stood_in_for(tmp_path: Path, new: bool) -> None:
    path = tmp_path / "a.pt"
    others = [
        argparse.Namespace(lr=0.1, best=np.float64(3)),
        np.float32(2),
        np.int64(2),
        np.zeros(3),
        np.random.RandomState(0).get_state(),
        Path("runs"),
        datetime.datetime(2020, 1, 1),
        collections.defaultdict(list),
        slice(1),
        print,
    ]
    weights = torch.randn(3, 4)
    for other in others:
        torch.save({"w": weights, "o": other}, path, _use_new_zipfile_serialization=new)
        found = read_pickle(path)
        assert torch.equal(found["w"], weights)
        inside = found["o"] if isinstance(found["o"], tuple) else [found["o"]]
        assert any(isinstance(x, StandIn) or x.__class__ is type for x in inside), other
    torch.save({"w": weights, "o": others}, path, _use_new_zipfile_serialization=new)
    assert len(read_pickle(path)["o"]) == len(others)


class Call:
    """Whoever unpickles it calls a function."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_nothing_is_called(tmp_path: Path, new: bool) -> None:
    import os
    import subprocess

    ran, path = tmp_path / "ran", tmp_path / "a.pt"
    for call in (
        (eval, (f"open({str(ran)!r}, 'w')",)),
        (exec, (f"open({str(ran)!r}, 'w')",)),
        (open, (str(ran), "w")),
        (os.system, (f"touch {ran}",)),
        (os.mkdir, (str(ran),)),
        (subprocess.check_call, (["touch", str(ran)],)),
        (Path.touch, (ran,)),
        (getattr, (ran, "touch")),
        (np.savetxt, (str(ran), [1])),
    ):
        torch.save({"w": torch.ones(1), "o": Call(*call)}, path, _use_new_zipfile_serialization=new)
        try:
            assert isinstance(read_pickle(path)["o"], StandIn)
        except CheckpointError as error:
            assert "reading it would run code" in str(error)  # noqa: PT017 (either is right)
        assert not ran.exists(), call


def test_other_archives_are_called_what_they_are(tmp_path: Path) -> None:
    net, x = nn.Linear(2, 2), torch.zeros(1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is going out of fashion
        torch.jit.trace(net, x).save(tmp_path / "script.pt")
    torch.export.save(torch.export.export(net, (x,)), tmp_path / "program.pt2")
    np.savez(tmp_path / "arrays.npz", a=np.ones(2))
    for name, text in (
        ("script.pt", r"is a TorchScript file: .*torch.save\(torch.jit.load\(path\).state_dict\(\), "),
        ("program.pt2", r"is a program of torch.export.*torch.save\(torch.export.load\(path\).state_dict"),
        ("arrays.npz", "is a zip archive, but not of torch.save"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=text):
            read_pickle(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(torch.jit.load(tmp_path / "script.pt").state_dict(), tmp_path / "net.pt")
    assert torch.equal(read_pickle(tmp_path / "net.pt")["weight"], net.weight)
    torch.save(torch.export.load(tmp_path / "program.pt2").state_dict, tmp_path / "net.pt")
    assert torch.equal(read_pickle(tmp_path / "net.pt")["weight"], net.weight)


class Options(dict):  # type: ignore[type-arg]
    """As the dictionaries with attributes that many scripts have."""


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_mappings_of_other_classes_are_plain_ones(tmp_path: Path, new: bool) -> None:
    path, history = tmp_path / "a.pt", collections.defaultdict(list, loss=[1.0, 0.5])
    value = {"w": torch.ones(2), "h": history, "o": [Options(lr=0.1), Path("a")], "p": Path("b")}
    torch.save(value, path, _use_new_zipfile_serialization=new)
    found = read_pickle(path)
    assert found["h"] == {"loss": [1.0, 0.5]} and found["o"][0] == {"lr": 0.1}
    assert isinstance(found["p"], StandIn)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_whole_objects_are_no_weights(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    torch.save({"net": {"w": torch.ones(2)}, "o": [nn.Linear(2, 2)]}, path)
    assert torch.equal(read_pickle(path)["net"]["w"], torch.ones(2))
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(
        CheckpointError, match=r"run code \(it needs torch.nn.modules.linear.Linear\)"
    ):
        read_pickle(path)
    torch.save(argparse.Namespace(w=torch.ones(2)), path)
    with pytest.raises(CheckpointError, match=r"run code \(it needs argparse.Namespace\)"):
        read_pickle(path)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_every_truncation_is_noticed(tmp_path: Path, new: bool) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.randn(50), "o": np.float64(1)}, path, _use_new_zipfile_serialization=new)
    data = path.read_bytes()
    for size in {*range(2, 40), *range(40, len(data) - 1, 29), len(data) - 1}:
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            read_pickle(path)


def test_a_flipped_byte_in_a_tensor_is_noticed(tmp_path: Path) -> None:
    """torch itself does not look at the checksums of the archive."""
    path = tmp_path / "a.pt"
    torch.save({"w": torch.arange(100.0)}, path)
    data = path.read_bytes()
    place = data.index(torch.arange(100.0).numpy().tobytes()) + 50
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    assert not torch.equal(torch.load(path, weights_only=True)["w"], torch.arange(100.0))
    with pytest.raises(CheckpointError, match="is damaged or truncated: Bad CRC-32"):
        read_pickle(path)


def test_archives_without_checksums(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(5)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_pickle(tmp_path / "a.pt")["w"], torch.ones(5))


def test_plain_pickles_of_python(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"w": [1.0]}, protocol=4))
    with pytest.raises(CheckpointError, match=r"a.pkl is damaged|holds more than"):
        read_pickle(tmp_path / "a.pkl")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_pickle(tmp_path / "a.pt", {"w": torch.arange(5.0), "n": 3})
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    assert found["n"] == 3 and torch.equal(found["w"], torch.arange(5.0))
    first = (tmp_path / "a.pt").read_bytes()
    write_pickle(tmp_path / "other name.pt", {"w": torch.arange(5.0), "n": 3})
    assert (tmp_path / "other name.pt").read_bytes() == first
