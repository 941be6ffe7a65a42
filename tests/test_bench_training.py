"""The training benchmark: end to end on tiny nets, and what its report makes of known rows."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import bench_training as tool
import pytest
import torch
import training_report as report
import training_variants
from torch import Tensor, nn

TOY = ["--batch", "2", "--repeats", "5", "--threads", "1", "--max-seconds", "0", "--steps", "0"]
DOCUMENT = "".join(
    f"before\n<!-- training {name} -->\nold {name}\n<!-- end training {name} -->\n"
    for name in ("memory", "exponents", "time", "plot")
)


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    tool.main(arguments)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_rows_tables_and_a_resumed_run(tmp_path: Path, capsys, monkeypatch) -> None:
    docs = tmp_path / "page.md"
    docs.write_text(DOCUMENT)
    arguments = [*TOY, "--nets", "bc10", "bc16", "--timed", "bc10", "--out", str(tmp_path / "out")]
    arguments += ["--docs", str(docs)]
    told = run(arguments, capsys)
    names = ["naive", "torchvision", "timm", "checkpoint", "ours-1", "ours-2"]
    saved = {
        (r["net"], r["precision"], r["variant"]): r["bytes"]
        for r in told["rows"]
        if r["what"] == "saved"
    }
    assert list(saved) == [
        (n, p, v) for n in ("bc10", "bc16") for p in ("fp32", "bf16") for v in names
    ]
    for net in ("bc10", "bc16"):
        for precision in ("fp32", "bf16"):
            naive, *checkpoints, one, two = (saved[net, precision, name] for name in names)
            assert naive > checkpoints[0] > one > two
            assert len(set(checkpoints)) == 1  # three codes that recompute the same
    times = [row for row in told["rows"] if row["what"] == "time"]
    assert [(row["net"], row["precision"]) for row in times] == [("bc10", "fp32"), ("bc10", "bf16")]
    for row in times:
        expected = {f"{name} {layout}" for name in names for layout in ("NCHW", "channels_last")}
        assert set(row["times"]) == expected
        plain = [row["times"][f"naive {layout}"] for layout in ("NCHW", "channels_last")]
        assert min(t["vs_fastest_plain"] for t in plain) == 1
        assert {t["n"] for t in row["times"].values()} == {1}  # no time for more
    assert set(told["exponents"]["bf16"]) == set(names)

    text = docs.read_text()
    assert text.count("before\n") == 4 and "old" not in text
    assert "| bc16, ours-2 | 2 |" in text and "| bc10, bf16, batch 2 | ours-1 |" in text
    assert f"| naive | {told['exponents']['fp32']['naive']:.2f} |" in text
    assert told["settings"]["machine"] in text and "(page.png)" in text
    assert (tmp_path / "page.png").stat().st_size > 10_000

    monkeypatch.setattr(tool.Bench, "measure", None)  # everything is there already
    assert run(arguments, capsys) == told


def doubled(module: nn.Module, args: object, out: Tensor) -> Tensor:
    return 2 * out


def out_of_memory(module: nn.Module, args: object, out: Tensor) -> Tensor:
    raise RuntimeError("not enough memory\nhere")


@pytest.mark.parametrize(
    ("hook", "error"),
    [
        (doubled, "timm NCHW has loss and gradient norm"),
        (out_of_memory, "RuntimeError: not enough memory"),
    ],
)
def test_a_variant_that_fails_is_not_timed(
    tmp_path: Path, capsys, monkeypatch, hook: Any, error: str
) -> None:
    def wrong(net: training_variants.Net) -> nn.Module:
        model = training_variants.VARIANTS["naive"](net)
        model.classifier.register_forward_hook(hook)
        return model

    monkeypatch.setitem(training_variants.VARIANTS, "timm", wrong)
    arguments = [*TOY, "--nets", "bc10", "--timed", "bc10", "--precisions", "fp32"]
    with pytest.raises(SystemExit):
        tool.main([*arguments, "--variants", "timm", "--out", str(tmp_path)])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert "times" not in rows[-1]
    assert rows[-1]["error"].startswith(error)
    assert "| bc10, fp32, batch 2 | failed |" in (tmp_path / "time.md").read_text()
    failed = "| bc10, timm | 2 | failed |" in (tmp_path / "memory.md").read_text()
    assert failed == (hook is out_of_memory) == ("error" in rows[1])


def test_a_variant_that_cannot_be_built_is_skipped(tmp_path: Path, capsys, monkeypatch) -> None:
    def missing(net: training_variants.Net) -> nn.Module:
        raise ImportError("no module named timm")

    monkeypatch.setitem(training_variants.VARIANTS, "timm", missing)
    arguments = [*TOY, "--nets", "bc10", "--timed", "--precisions", "fp32"]
    tool.main([*arguments, "--variants", "timm", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert "skipped: timm of bc10: ImportError: no module named timm\n" in out
    assert [row["variant"] for row in json.loads(out.splitlines()[-1])["rows"]] == ["naive"]


def test_the_peak_of_a_fresh_process() -> None:
    given = argparse.Namespace(
        nets=["bc16"], variants=["ours-1"], precisions=["fp32", "bf16"], timed=[], batch=32, steps=1,
        repeats=1, threads=1, device="cpu", max_seconds=1,
    )  # fmt: skip
    bench = tool.Bench(given)
    keys = [key for key in bench.keys if key["precision"] == "fp32"]
    found = {(key["what"], key["variant"]): bench.measure(key)["bytes"] for key in keys}
    naive, ours = found["saved", "naive"], found["saved", "ours-1"]
    assert found["peak", "naive"] > naive
    assert found["peak", "naive"] - found["peak", "ours-1"] > (naive - ours) / 2
    assert {key["what"] for key in bench.keys if key["precision"] == "bf16"} == {"saved"}
    assert keys[-1]["what"] == "peak"
    assert "net 'bc17' is unknown" in bench.measure({**keys[-1], "net": "bc17"})["error"]


def test_a_peak_is_what_was_once_resident(monkeypatch) -> None:
    before = tool._peak_resident()
    size = before - tool._resident() + 2**26
    memory = torch.ones(size, dtype=torch.uint8)
    resident = tool._resident()
    del memory
    assert tool._peak_resident() - before > 2**25
    assert resident - tool._resident() > size // 2
    key = {"net": "bc10", "variant": "naive", "precision": "fp32", "batch": 2, "steps": 1}
    monkeypatch.setattr(tool, "_resident", lambda: 5)
    monkeypatch.setattr(tool, "_peak_resident", lambda: 12)
    assert tool.peak_of({**key, "settings": {"threads": 1, "device": "cpu"}}) == 7


def test_ratios_are_to_the_fastest_plain_net() -> None:
    taken = {"naive NCHW": [4.0, 9.0, 4.0], "naive channels_last": [3.0], "ours-1 NCHW": [1.0, 2.0]}
    found = tool._with_ratios(taken)
    assert {name: t["vs_fastest_plain"] for name, t in found.items()} == {
        "naive NCHW": pytest.approx(4 / 3),
        "naive channels_last": 1,
        "ours-1 NCHW": 0.5,
    }
    assert (found["naive NCHW"]["n"], found["naive NCHW"]["median_ms"]) == (3, 4000)
    found = tool._with_ratios({**taken, "torchvision-plain NCHW": [2.5]})
    assert found["naive channels_last"]["vs_fastest_plain"] == pytest.approx(1.2)


def test_the_exponent_of_a_known_series() -> None:
    depths = [40, 100, 190, 250]
    assert report.exponent(depths, [3 * d**1.7 for d in depths]) == pytest.approx(1.7)
    rows = [
        {"what": "saved", "net": f"bc{d}", "depth": d, "batch": batch, "precision": "fp32",
         "variant": variant, "bytes": batch * 5 * d**power}
        for variant, power in (("naive", 2), ("ours-1", 1))
        for d, batch in zip(depths, (64, 64, 8, 8), strict=True)
    ]  # fmt: skip
    assert report.exponents(rows) == {"fp32": {"naive": 2.0, "ours-1": 1.0}}
    assert "| ours-1 | 1.00 |" in report.exponent_table(rows)
    lines = report.memory_table(rows).splitlines()
    assert "| bc40, ours-1 | 64 | 0.0002 | 0.025 |" in lines


def test_nets_by_name() -> None:
    net = training_variants.find_net("bc100")
    assert (net.blocks, net.depth, net.batch) == ((16, 16, 16), 100, 64)
    for name in ("bc41", "bc4", "resnet50"):
        with pytest.raises(SystemExit, match=f"net '{name}' is unknown"):
            training_variants.find_net(name)
