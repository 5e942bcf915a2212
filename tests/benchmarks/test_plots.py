"""Plots are drawn from result files alone: every figure in them is one of the file's."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.plots import curves_plot, frontier_plot, peers_plot, ticks

RESULTS = Path(__file__).parents[2] / "benchmarks/results/nvidia_h200_qlora_8b.json"
PLOTS = Path(__file__).parents[2] / "benchmarks/plots"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def data():
    return json.loads(RESULTS.read_text())


def words(svg: str) -> list[str]:
    return [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_bars_are_as_long_as_their_figures(data):
    svg = peers_plot(data)
    shown = [result for result in data["results"] if result["way"] == "least"]
    for result in shown:
        assert f"{result['tokens_per_s']:,}" in words(svg)
    bars = [float(bar.get("width")) for bar in ElementTree.fromstring(svg).iter(f"{SVG}rect")][1:]
    speeds = bars[0::2]
    assert len(speeds) == 2 + 3 + 4  # by default, without recomputation, with the least memory
    ratio = max(r["tokens_per_s"] for r in data["results"]) / min(r["tokens_per_s"] for r in data["results"])
    assert max(speeds) / min(speeds) == pytest.approx(ratio, rel=1e-2)
    assert any("NVIDIA H200; one session, 2026-11-24" in text for text in words(svg))


def test_the_frontier_has_a_point_for_each_result(data):
    data["results"].append({**data["results"][0], "case": "qlora-8b-24g", "way": "default", "memory_gib": 24})
    svg = frontier_plot(data)
    assert svg.count("<circle") == len(data["results"])
    assert any("24 GiB limit" in text for text in words(svg))


def test_curves_say_how_far_they_are_apart(data):
    common = {"case": "curves", "way": "bfloat16", "session": 0, "model": "a & b", "steps": 2}
    data["curves"] = [
        {**common, "peer": "hf", "losses": [3.0, 2.0]},
        {**common, "peer": "fastllm", "losses": [3.0, 2.5]},
        {**common, "peer": "fastllm", "way": "fp8", "losses": [3.0, 2.75]},
    ]
    said = words(curves_plot(data))
    assert "at most 5.0e-01" in said and "at most 7.5e-01" in said and "fastllm, FP8" in said


def test_gpus_are_not_mixed(data):
    data["sessions"].append({**data["sessions"][0], "gpu": "another"})
    data["results"][0]["session"] = 1
    with pytest.raises(ValueError, match="NVIDIA H200"):
        peers_plot(data)


@pytest.mark.parametrize("largest", [0.7, 1.0, 9.2, 95.6, 16642])
def test_axes_start_at_zero_and_hold_the_largest(largest):
    marks = ticks(largest)
    assert marks[0] == 0 and marks[-1] >= largest > marks[-2] and 4 <= len(marks) <= 9


@pytest.mark.parametrize(("gpu", "folder"), [("nvidia_h100", "."), ("nvidia_h200", "nvidia_h200")])
@pytest.mark.parametrize(
    ("name", "draw"), [("peers", peers_plot), ("frontier", frontier_plot), ("curves", curves_plot)]
)
def test_the_committed_plots_are_of_the_committed_results(gpu, folder, name, draw):
    data = json.loads((RESULTS.parent / f"{gpu}.json").read_text())
    assert re.sub(r"\s+", " ", (PLOTS / folder / f"{name}.svg").read_text()) == re.sub(r"\s+", " ", draw(data))
