"""The page in a real browser: what it asks for, how it fits, what can be read, reached and saved.

Skipped, with the reason, where Playwright or a Chromium is missing (`pip install prune_dn[browser]` and
`apt-get install chromium`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from page_figures import figures, found_samples

from prune_dn.models import densenet
from prune_dn.page.document import write
from prune_dn.pruning import Plan, apply_plan, make_plan
from prune_dn.run.pages import Nets, run_page
from prune_dn.run.pages import plan_facts as facts_of

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
SCHEMES = ["light", "dark"]
# WCAG 2.1: the contrast of each text that is seen with what is behind it, 4.5 or, where it is large, 3.
CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (c) => c.slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode()); ) {
    const element = node.parentElement;
    if (!node.textContent.trim() || element.closest('script, .hidden')) continue;
    const style = getComputedStyle(element);
    const box = element.getBoundingClientRect();
    if (!box.width || style.visibility === 'hidden' || parseFloat(style.fontSize) === 0) continue;
    let backs = [];
    for (let at = element; at; at = at.parentElement) {
      const own = getComputedStyle(at);
      const back = rgba(own.backgroundColor);
      const image = own.backgroundImage.match(/(rgba?|color|oklab)\\([^)]*\\)/g) ?? [];
      backs.push(...image.map(rgba).filter((c) => c[3] === 255));
      if (back[3] === 255) { backs.push(back); break; }
    }
    const svg = element.closest('svg') !== null;
    const ink = light(rgba(svg ? style.fill : style.color));
    const large = parseFloat(style.fontSize) >= 24;
    for (const back of backs) {
      const [a, b] = [ink, light(back)].sort((x, y) => y - x);
      const ratio = (a + 0.05) / (b + 0.05);
      if (ratio < (large ? 3 : 4.5)) found.push([node.textContent.trim(), ratio]);
    }
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="Playwright is missing: pip install prune_dn[browser]"
    )
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (apt-get install chromium, or set CHROMIUM)")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    """A page with all of its sections, and the plan that it is of."""
    torch.manual_seed(0)
    model = densenet(
        [6, 12],
        growth_rate=4,
        bn_size=2,
        num_init_features=8,
        stem="cifar",
        mfm={"transition1": "2/1"},
    )
    plan = make_plan(
        *(model, 0.6),
        unit="macs",
        units=["stream", "bottleneck", "edge", "layer"],
        protect=["features.conv0"],
        input_size=16,
    )
    nets = Nets.of(model, apply_plan(model, plan), image_size=16)
    facts = [{"round": 1, **facts_of(plan)}]
    page = run_page(*figures(), facts, nets, recipe="model: {}\n" * 9, samples=found_samples())
    path = tmp_path_factory.mktemp("page") / "report.html"
    write(page, path)
    return path, plan


@pytest.fixture
def opened(browser: Any, cut: tuple[Path, Plan]) -> Iterator[Any]:
    """Opens the page, and fails where it wrote to the console or asked for anything but itself."""
    contexts, said = [], []

    def go(**how: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **how})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda one: said.append(one.url) if page_url != one.url else None)
        page.goto(page_url)
        return page

    page_url = cut[0].as_uri()
    yield go
    for context in contexts:
        context.close()
    assert [text for text in said if not text.startswith(("data:", "blob:"))] == []


def test_it_is_one_small_file(cut: tuple[Path, Plan]) -> None:
    assert cut[0].stat().st_size < 2_000_000


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_and_all_text_can_be_read(
    opened: Any, scheme: str, width: int, tmp_path: Path
) -> None:
    page = opened(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CONTRAST) == []
    page.screenshot(path=tmp_path / f"page-{width}-{scheme}.png", full_page=True)  # to be looked at
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    channels = [int(x) for x in back.removeprefix("rgb(").removesuffix(")").split(",")]
    assert (sum(channels) < 3 * 128) == (scheme == "dark")


def test_the_contrast_that_is_computed_sees_bad_text(opened: Any) -> None:
    page = opened()
    page.evaluate("document.querySelectorAll('p').forEach((one) => { one.style.color = '#999'; })")
    assert page.evaluate(CONTRAST) != []


def test_the_cells_of_the_map_are_those_of_the_plan(
    opened: Any, cut: tuple[Path, Plan], tmp_path: Path
) -> None:
    """A stranger's way: choose a cell, read its numbers, find them in plan.json."""
    page = opened()
    file = tmp_path / "plan.json"
    cut[1].save(file)
    plan = json.loads(file.read_text())
    block = page.locator(".maps").nth(1)
    figure = block.locator("figure").first
    assert figure.locator("figcaption").inner_text() == "share still read"
    names = plan["config_before"]["blocks"][1]
    width = plan["config_before"]["transitions"][0]["out_channels"]
    for number, layer in enumerate(names, start=1):
        prefix = f"features.denseblock2.{layer['name']}"
        conv1 = plan["keep_indices"].get(f"{prefix}.conv1")
        read = plan["keep_indices"].get(f"{prefix}.norm1", range(10**6))
        for place in range(number):
            start = 0 if place == 0 else width + 4 * (place - 1)
            n = width if place == 0 else 4
            source = f"features.denseblock2.{names[place - 1]['name']}.conv2"
            source = "features.transition1.mfm" if place == 0 else source
            made = set(plan["keep_indices"].get(source, range(n)))
            if place == 0:
                made = {i % width for i in made}
            left = [i for i in range(n) if i in made and start + i in read and conv1 != []]
            cell = figure.locator("tbody tr").nth(number - 1).locator("td").nth(place)
            assert cell.text_content() == f"{len(left)} of {n} channels", (layer, source)
    cell = figure.locator("tbody tr").nth(2).locator("td").nth(1)
    cell.click()
    detail = block.locator(".detail").inner_text()
    assert detail.startswith(
        "features.denseblock2.denselayer3.conv1 ← features.denseblock2.denselayer1.conv2."
    )
    assert f"share still read: {cell.text_content()}. weight before: " in detail


def test_the_keyboard_reaches_every_control(opened: Any) -> None:
    page = opened()
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    controls = page.evaluate(
        "[...document.querySelectorAll('a, button, summary, pre, .scroll[tabindex], .heat')].length"
    )
    reached = set()
    for _ in range(controls + 20):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "[...document.querySelectorAll('a, button, summary, pre, .scroll[tabindex], .heat')]"
                ".indexOf(document.activeElement.closest('.heat') ?? document.activeElement)"
            )
        )
    assert set(range(controls)) <= reached
    page.locator(".heat .c").nth(1).focus()
    before = page.evaluate("document.activeElement.textContent")
    page.keyboard.press("ArrowDown")
    place = page.evaluate(
        "[document.activeElement.parentNode.rowIndex, document.activeElement.cellIndex]"
    )
    assert place == [3, 1] and before
    told = page.locator(".maps").first.locator(".detail").inner_text()
    assert "denselayer3.conv1 ← features.conv0" in told


def test_tables_are_sorted_and_saved(opened: Any, cut: tuple[Path, Plan], tmp_path: Path) -> None:
    page = opened()
    page.get_by_role("button", name="params").first.click()
    shown = page.locator("table.data").first.locator("tbody tr td:nth-of-type(3)").all_inner_texts()
    numbers = [int(x.replace(",", "")) for x in shown]
    assert numbers == sorted(numbers) and len(set(numbers)) > 1
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Save all data as JSON").click()
    waiting.value.save_as(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["plans"][0]["keep_indices"] == json.loads(cut[1].to_json())["keep_indices"]
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Save the table Nets of this run").click()
    waiting.value.save_as(tmp_path / "nets.csv")
    lines = (tmp_path / "nets.csv").read_text().splitlines()
    assert lines[0].startswith('net,"test accuracy, %"') and len(lines) == 5


def test_without_javascript_everything_is_there(opened: Any) -> None:
    page = opened(java_script_enabled=False)
    assert page.locator("svg").count() >= 4
    assert page.locator(".heat td.c").first.text_content().endswith("channels")
    assert not page.locator(".js").first.is_visible()


def test_it_prints(opened: Any, tmp_path: Path) -> None:
    page = opened(color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("nav").is_visible()
    assert page.evaluate(CONTRAST) == []
    page.pdf(path=tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
