"""Nets by a function of the user's own: errors name the module and the function."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from prune_dn.errors import ConfigError
from prune_dn.models.factory import Factory


def test_the_function_is_called_with_its_arguments_and_the_seed() -> None:
    before = torch.random.get_rng_state()
    nets = [
        Factory(path, {"width": 4}).build()
        for path in ("own_nets:residual", "own_nets:Nested.residual")
    ]
    assert torch.equal(torch.random.get_rng_state(), before)
    for first, second in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(first, second)
    assert nets[0].head.in_features == 4


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        ("own_nets", {}, "'own_nets' is not written package.module:function, such as my_nets"),
        ("own_nets:", {}, "is not written"),
        ("own nets:residual", {}, "is not written"),
        ("own_nets:residual()", {}, "is not written"),
        ("../own_nets:residual", {}, "is not written"),
        (
            "no_such.nets:f",
            {},
            r"factory no_such.nets:f: the module no_such.nets cannot be imported: M",
        ),
        ("own_nets:nothing", {}, r"the module own_nets has no function nothing: AttributeError"),
        ("own_nets:not_a_function", {}, "not_a_function is no function: its type is int"),
        ("own_nets:number", {}, r"number gives no torch.nn.Module: its type is int"),
        ("own_nets:broken", {}, r"broken failed with \{\}: RuntimeError: the disk is gone"),
        ("own_nets:residual", {"wide": 3}, r"failed with \{'wide': 3\}: TypeError: .*'wide'"),
    ],
)
def test_what_is_refused(path: str, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Factory(path, arguments).build()


def test_the_working_directory_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module there is found, and hides none that is installed."""
    text = "from torch import nn\ndef make(): return nn.Conv2d(1, 2, 1)\n"
    (tmp_path / "only_here_nets.py").write_text(text)
    (tmp_path / "colorsys.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    path = list(sys.path)
    assert Factory("only_here_nets:make").build().out_channels == 2
    with pytest.raises(ConfigError, match="the module colorsys has no function make"):
        Factory("colorsys:make").build()
    assert sys.path == path
    del sys.modules["only_here_nets"]
