"""Charts: SVG without a colour of its own, with what it shows in words."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from prune_dn.base.intervals import wilson
from prune_dn.page.charts import Point, before_after, lines, scatter


@pytest.mark.parametrize("share", [0.0, 1.0, 0.5])
def test_a_scatter_takes_every_accuracy(share: float) -> None:
    """Rounding puts the end of an interval of 0 or 100 % just inside the accuracy."""
    for n in range(1, 400):
        if (low := wilson(share, n)[0]) > share or wilson(share, n)[1] < share:
            break
    bounds = [100 * x for x in wilson(share, n)]
    chart = scatter("Accuracy", [Point("a <b>", 2.0, 100 * share, *bounds)], "cost")
    assert low <= 1 and f"{100 * share:.2f} % at 2" in chart.description
    assert "a &lt;b&gt;" in chart.svg
    ET.fromstring(chart.svg.replace("xlink:href", "href"))


def test_colours_are_those_of_the_page_and_ids_differ_between_charts() -> None:
    one = lines("One", {"a": [(1, 2.0), (2, 1.0)]}, "epoch", "loss", {"went on here": [1.5]})
    two = before_after("Two", ["x", "y"], [3, 4], [1, 4], "channels")
    ids = [set(re.findall(r'id="([^"]+)"', chart.svg)) for chart in (one, two)]
    assert ids[0] and not ids[0] & ids[1]
    for chart in (one, two):
        assert re.findall(r"#(?:0[1-7]){3}\b", chart.svg) == []
        assert "var(--" in chart.svg and chart.svg.startswith("<svg viewBox=")
        used = set(re.findall(r'href="#([^"]+)"', chart.svg)) | set(
            re.findall(r"url\(#([^)]+)\)", chart.svg)
        )
        assert used <= set(re.findall(r'id="([^"]+)"', chart.svg))
    assert "7 before, 5 after, in 2 parts" in two.description
    assert "went on here" in one.svg
