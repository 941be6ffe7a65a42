"""A tool that was asked for what it does not have says so, and does nothing."""

from __future__ import annotations

from pathlib import Path

import bench_calibration
import bench_planning
import bench_tracing
import bench_training
import compare_mfm
import compare_pruners
import pytest
import torch
from PIL import Image
from results import chosen

import prune_dn
from prune_dn.models import densenet


def test_names_by_patterns() -> None:
    names = ("tp/l1", "tp/l2", "ours/l1")
    assert chosen(names, ["ours/*", "*/l1"], "method") == ["tp/l1", "ours/l1"]
    assert chosen(names, ["*"], "method") == list(names)
    with pytest.raises(SystemExit, match=r"no method matches 'bn'; choose from tp/l1, tp/l2, ours"):
        chosen(names, ["tp/l1", "bn"], "method")


def test_methods_of_compare_pruners(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(12):
                Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(tmp_path / split / label / f"{i}.png")
    net = densenet([1], 4, stem="cifar", num_classes=2)
    prune_dn.save(net, tmp_path / "net.safetensors")
    given = [str(tmp_path / "net.safetensors"), str(tmp_path), "--image-size", "8"]
    with pytest.raises(SystemExit, match=r"no method matches 'bn_scale'; choose from .*tp/l1/glob"):
        compare_pruners.main([*given, "--methods", "bn_scale", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_rows_variants_and_nets_of_the_others(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(
        SystemExit, match=r"no recipe in .*mfm_table matches 'five_mfm'; choose from"
    ):
        compare_mfm.main(["--rows", "five_mfm", *out])
    with pytest.raises(SystemExit, match=r"no variant matches 'naiv'; choose from .*naive"):
        bench_training.main(["--nets", "bc40", "--variants", "naiv", *out])
    with pytest.raises(
        SystemExit, match=r"no net matches 'densenet999'; choose from .*densenet121"
    ):
        bench_planning.main(["densenet121", "densenet999"])
    with pytest.raises(SystemExit, match=r"no net matches 'resnet5'; choose from .*resnet50"):
        bench_calibration.main(["resnet5"])
    with pytest.raises(SystemExit, match=r"no net matches 'unet3'; choose from .*unet"):
        bench_tracing.main(["unet3"])
    assert not (tmp_path / "out").exists()
    assert torch.get_num_threads() == 1


def test_every_kind_of_net_has_its_own_names(tmp_path: Path) -> None:
    import wild

    nets = [name for nets in wild.KINDS.values() for name in nets]
    assert len(set(nets)) == len(nets) == len(wild.NETS)
    with pytest.raises(SystemExit, match=r"no net matches 'densenet999'; choose from .*Unet"):
        wild.main(["densenet999", "--out", str(tmp_path / "out")])
    row = {"net": "a|b", "trace_s": 0.5, "criterion": "l2", "refused": "why: *x*"}
    wild.KINDS["test"] = {"a|b": wild.NETS["MLP"]}
    try:
        text = wild.tables([row], {}, "here")
    finally:
        del wild.KINDS["test"]
    assert "| a\\|b | refused | - | - | - | - | - | 0.50 s |" in text
    assert "- *a\\|b*: why: \\*x\\*" in text
