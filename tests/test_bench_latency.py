"""The benchmark of realised speed-ups, end to end on small images."""

from __future__ import annotations

import bench_latency as tool

from prune_dn.measure.latency import machine


def test_each_cut(capsys) -> None:
    tool.main(["--ratios", "0.5", "--image-size", "32", "--repeats", "1", "--runtimes", "eager"])
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:6]]
    assert [row[0] for row in rows] == ["eager"] * 4
    for row in rows:
        time, left, realised = (float(cell.rstrip("x")) for cell in row[3:])
        assert (time, left, realised) == (1, 1, 1) or 0.4 < left <= 0.5
        assert abs(realised - left / time) < 0.02 + 0.02 * realised
    assert lines[-1] == f"{machine()}; batch 1, medians of n = 1"
