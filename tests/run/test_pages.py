"""Pages of runs, cuts and nets: their figures against those that were put in."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from page_figures import figures
from PIL import Image
from torch import nn

from prune_dn.checkpoints.checkpoint import save
from prune_dn.cli import main
from prune_dn.data.datasets import load_datasets
from prune_dn.models import densenet, light_cnn_9
from prune_dn.page.document import render
from prune_dn.pruning import apply_plan, make_plan
from prune_dn.run import samples
from prune_dn.run.pages import Nets, cut_page, plan_facts, run_page


class Text(HTMLParser):
    """The text of a page, and its tables as rows."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.in_cell = False
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.in_cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data.strip()


def small() -> nn.Module:
    torch.manual_seed(0)
    return densenet([2], growth_rate=4, num_init_features=4, num_classes=10, stem="cifar")


def test_the_headline_and_the_table_have_the_figures() -> None:
    metrics, environment = figures()
    found = {
        "n": 360,
        "lost": 4,
        "drop_interval": (-0.024, 0.012),
        "won": 6,
        "changed": 11,
        "classes": list("0123456789"),
        "samples": [],
    }
    page = run_page(metrics, environment, [], Nets(None, None), recipe="a: 1", samples=found)
    assert page.headline == (
        "50 % fewer MACs, 3.20 times as fast (onnxruntime, batch 1: 4.00 to 1.25 ms), test accuracy "
        "98.61 % (96.8 to 99.4) against 98.06 % (96.0 to 99.1): +0.56 points (95 % interval -1.2 to "
        "+2.4, the same 360 images)."
    )
    read = Text(render(page))
    assert [
        "dense",
        "98.06",
        "96.0 to 99.1",
        "2,000,000",
        "40,000,000",
        "4",
        "8,000,000",
    ] in read.rows
    assert "2 images <b>are</b> twice there" in read.text
    assert "went on here" in render(page)
    assert ["0.5", "97.5", "0.5", "-0.20 to 1.20", "20,000,000", "", "yes"] in read.rows


def test_names_that_users_gave_are_text() -> None:
    metrics, environment = figures()
    metrics["name"] = "</script><script>alert(1)</script>"
    html = render(run_page(metrics, environment, [], Nets(None, None), recipe="<b>", samples=None))
    assert html.count("<script") == 2 and "<b>" not in html


def test_samples_are_those_that_changed_first(tmp_path: Path) -> None:
    data = load_datasets("digits", image_size=8, limit=64)
    torch.manual_seed(1)
    nets = [
        densenet(
            [1], growth_rate=4, num_init_features=4, num_classes=10, in_channels=1, stem="cifar"
        )
        for _ in "ab"
    ]
    found = samples.collect(*nets, data.test)
    with torch.no_grad():
        batch = torch.stack([image for image, _ in data.test])
        first, second = (net.eval()(batch).argmax(1) for net in nets)
    labels = data.test.labels
    assert found["lost"] == int(((first == labels) & (second != labels)).sum())
    assert found["won"] == int(((first != labels) & (second == labels)).sum())
    assert found["changed"] == int((first != second).sum())
    kinds = [x["kind"] for x in found["samples"]]
    assert kinds == sorted(kinds, key=["lost", "won", "changed, both wrong", "same"].index)
    for x in found["samples"]:
        index = x["index"]
        assert (x["label"], x["dense"], x["pruned"]) == (labels[index], first[index], second[index])


def test_the_page_of_a_cut_has_what_the_plan_says() -> None:
    model = small()
    plan = make_plan(model, 0.4, unit="macs", protect=["features.conv0"], input_size=8)
    page = cut_page("small", plan, Nets.of(model, apply_plan(model, plan), image_size=8))
    read = Text(render(page))
    before, after = plan.achieved["before"], plan.achieved["after"]
    for key in ("macs", "params"):
        kept = f"{100 * after[key] / before[key]:.0f} %"
        assert [key, f"{before[key]:,}", f"{after[key]:,}", kept] in read.rows
    for unit, why in plan.protected.items():
        assert [unit, why] in read.rows
    for row in plan.layers:
        share = f"{100 * row['after'] / row['before']:.0f} %"
        assert [row["name"], row["kind"], str(row["before"]), str(row["after"]), share] in read.rows
    assert page.data["plans"] == [plan_facts(plan)]


def test_of_a_net_without_a_map_the_layers_are_shown() -> None:
    model = light_cnn_9(num_classes=3, image_size=16)
    plan = make_plan(model, 0.4)
    page = cut_page("light", plan, Nets.of(model, apply_plan(model, plan), image_size=16))
    names = [section.name for section in page.sections]
    assert "layers" in names and "map" not in names and "competitions" in names


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    model = small()
    plan = make_plan(model, 0.4, unit="macs", input_size=8)
    plan.save("plan.json")
    save(model, "dense.safetensors")
    save(apply_plan(model, plan), "cut.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "file", "sections"),
    [
        (["plan.json"], "plan.report.html", {"map", "widths", "protected"}),
        (
            ["plan.json", "--against", "dense.safetensors", "-o", "a.html"],
            "a.html",
            {"map", "widths"},
        ),
        (["cut.safetensors"], "cut.report.html", {"map"}),
        (["cut.safetensors", "--against", "dense.safetensors"], "cut.report.html", {"map"}),
    ],
)
def test_the_command_writes_pages(
    folder: Path, arguments: list[str], file: str, sections: set[str]
) -> None:
    assert main(["report", *arguments]) == 0
    html = (folder / file).read_text()
    assert all(f'<section id="{name}"' in html for name in sections)
    with_weights = "dense.safetensors" in arguments
    assert ("weight before" in html) == with_weights


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["."], "is the folder of no finished phase of a run"),
        ([".", "--against", "dense.safetensors"], "--against has no effect"),
        (["dense.safetensors", "-o", "dense.safetensors"], "a page is an .html file"),
        (["nothing.json"], "cannot read the plan"),
    ],
)
def test_the_command_refuses_what_has_no_page(folder: Path, capsys, arguments, message) -> None:
    assert main(["report", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert json.loads((folder / "plan.json").read_text())


def test_an_image_of_a_sample_is_that_image() -> None:
    data = load_datasets("digits", image_size=8, limit=64)
    pixels, _ = data.test[3]
    uri = samples._data_uri(pixels, data.spec)
    png = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    raw = data.test.images.take([int(data.test.indices[3])])[0, 0].numpy()
    assert np.array_equal(np.array(png), raw)
