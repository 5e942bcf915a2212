"""Draw the README's plots from result files: SVG, written by hand, so that nothing need be installed.

    python -m benchmarks.plots benchmarks/results/nvidia_h200_qlora_8b.json

writes `peers.svg` (bars of speed and memory), `frontier.svg` (speed against memory) and, where the file has loss
curves, `curves.svg` to benchmarks/plots/.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from .cases import DEFAULT_WAY

COLORS = {"fastllm": "#1668b8", "unsloth": "#c8671b", "liger": "#5f9137", "hf": "#777777"}
NAMES = {"fastllm": "fastllm", "unsloth": "Unsloth", "liger": "Liger + PEFT", "hf": "transformers + PEFT"}
WAYS = {"least": "least memory", "none": "no recomputation", "default": "default", "fp8": "FP8"}
# (the session's name of a package, the peer whose version it is)
PACKAGES = {"unsloth": "unsloth", "liger": "liger-kernel", "hf": "transformers"}
# How far below its point a label of the scatter plot stands.
LABEL_DROP = {"fastllm": 6, "unsloth": 18, "liger": 4, "hf": 18}
INK, FAINT = "#222222", "#d9d9d9"


class Drawing:
    """An SVG that grows by one element a call. Text is black on white, wherever it is shown."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="Helvetica, Arial, sans-serif" font-size="13" fill="{INK}" role="img">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        ]

    def text(self, x: float, y: float, words: str, anchor: str = "start", **style: str) -> None:
        extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(words)}</text>')

    def line(self, points: list[tuple[float, float]], color: str = FAINT, width: float = 1, **style: str) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"{extra}/>')

    def bar(self, x: float, y: float, width: float, height: float, color: str) -> None:
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{color}"/>')

    def dot(self, x: float, y: float, color: str) -> None:
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{color}"/>')

    def done(self) -> str:
        return "\n".join([*self.parts, "</svg>"]) + "\n"


def ticks(largest: float) -> list[float]:
    """Round values from zero to at least `largest`, some five of them."""
    power = 10.0 ** math.floor(math.log10(largest))
    step = next(power * part for part in (5, 2, 1, 0.5, 0.2) if largest / (power * part) > 3)
    return [step * index for index in range(math.ceil(largest / step) + 1)]


def measured(data: dict[str, Any], cases: tuple[str, ...]) -> list[dict[str, Any]]:
    """The results of some cases that are no failures, all of one session's machine, each with that session."""
    found = [
        {**result, "measured_in": data["sessions"][result["session"]]}
        for result in data["results"]
        if result["case"] in cases and "error" not in result
    ]
    gpus = {result["measured_in"]["gpu"] for result in found}
    if len(gpus) > 1:
        raise ValueError(f"results of {' and '.join(sorted(gpus))} don't belong into one plot")
    return found


def caption(results: list[dict[str, Any]]) -> str:
    """Where and when the results were measured, and of which versions."""
    sessions = {result["session"]: result["measured_in"] for result in results}.values()
    versions: dict[str, set[str]] = {}
    for result in results:
        package = PACKAGES.get(result["peer"])
        if package:
            name = NAMES[result["peer"]].removesuffix(" + PEFT")
            versions.setdefault(name, set()).add(result["measured_in"]["versions"][package])
    dates = sorted({session["date"] for session in sessions})
    listed = [f"{name} {' and '.join(sorted(found))}" for name, found in versions.items()]
    sessions_word = "one session" if len(sessions) == 1 else f"{len(sessions)} sessions"
    gpu = next(iter(sessions))["gpu"]
    return "; ".join([gpu, f"{sessions_word}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}", ", ".join(listed)])


def describe(result: dict[str, Any]) -> str:
    bits = {4: "QLoRA (NF4)", 16: "16-bit LoRA", 0: "full fine-tuning"}[result["bits"]]
    rank = f", rank {result['rank']}" if result["bits"] else ""
    shape = f"{result['batch']} x {result['sequence']:,} tokens"
    return f"{result['model']} shapes, {bits}{rank}, {shape}"


def peers_plot(data: dict[str, Any], case: str = "qlora-8b") -> str:
    """Bars of tokens a second and of the memory peak, peers side by side in each way of holding activations."""
    results = measured(data, (case,))
    groups = [(way, [r for r in results if r["way"] == way]) for way in ("none", "least")]
    own = {r["peer"]: "default" for r in results if r["way"] == "default"}
    groups.insert(0, ("default", [r for r in results if r["way"] == {**DEFAULT_WAY, **own}.get(r["peer"])]))
    groups = [
        (way, sorted(members, key=lambda r: -r["tokens_per_s"])) for way, members in groups if len(members) > 1
    ]  # fmt: skip
    rows = sum(len(members) for _, members in groups)
    height = 92 + 22 * rows + 30 * len(groups) + 40
    drawing = Drawing(860, height, "Speed and memory of fastllm and its peers")
    drawing.text(20, 28, describe(results[0]), font_size="16", font_weight="bold")
    drawing.text(20, 48, caption(results), font_size="12")
    panels = [(180, "tokens a second (more is better)", "tokens_per_s", "{:,.0f}"),
              (525, "peak of reserved GPU memory, GiB (less is better)", "peak_reserved_gib", "{:.1f}")]  # fmt: skip
    top, bottom = 84, height - 34
    scales = {}
    for left, label, field, _ in panels:
        marks = ticks(max(r[field] for _, members in groups for r in members))
        scales[field] = 255 / marks[-1]
        drawing.text(left, top - 10, label, font_size="12")
        for mark in marks:
            x = left + mark * scales[field]
            drawing.line([(x, top), (x, bottom)])
            drawing.text(x, bottom + 16, f"{mark:,.0f}", "middle", font_size="11")
    y = top + 4
    for way, members in groups:
        y += 22
        drawing.text(20, y, WAYS[way], font_weight="bold")
        y += 8
        for result in members:
            drawing.text(168, y + 13, NAMES[result["peer"]], "end")
            for left, _, field, form in panels:
                width = result[field] * scales[field]
                drawing.bar(left, y, width, 17, COLORS[result["peer"]])
                drawing.text(left + width + 5, y + 13, form.format(result[field]), font_size="12")
            y += 22
    return drawing.done()


def frontier_plot(data: dict[str, Any]) -> str:
    """Tokens a second against the memory peak: fastllm's settings and memory limits joined, peers as points."""
    limited = ("qlora-8b-12g", "qlora-8b-16g", "qlora-8b-24g")
    results = measured(data, ("qlora-8b",))
    results += [r for r in measured(data, limited) if r["peer"] == "fastllm" and r["way"] == "default"]
    drawing = Drawing(860, 470, "Tokens a second against memory")
    drawing.text(20, 28, describe(results[0]), font_size="16", font_weight="bold")
    drawing.text(20, 48, caption(results), font_size="12")
    across = ticks(max(r["peak_reserved_gib"] for r in results))
    up = ticks(max(r["tokens_per_s"] for r in results))
    left, right, top, bottom = 80, 830, 70, 415

    def place(result: dict[str, Any]) -> tuple[float, float]:
        return (
            left + (right - left) * result["peak_reserved_gib"] / across[-1],
            bottom - (bottom - top) * result["tokens_per_s"] / up[-1],
        )

    for mark in across:
        x = left + (right - left) * mark / across[-1]
        drawing.line([(x, top), (x, bottom)])
        drawing.text(x, bottom + 18, f"{mark:,.0f}", "middle", font_size="11")
    for mark in up:
        y = bottom - (bottom - top) * mark / up[-1]
        drawing.line([(left, y), (right, y)])
        drawing.text(left - 8, y + 4, f"{mark:,.0f}", "end", font_size="11")
    drawing.text((left + right) / 2, bottom + 40, "peak of reserved GPU memory, GiB", "middle")
    drawing.text(22, (top + bottom) / 2, "tokens a second", "middle", transform=f"rotate(-90 22 {(top + bottom) / 2})")
    for peer in ("hf", "liger", "unsloth", "fastllm"):
        own = sorted((r for r in results if r["peer"] == peer), key=lambda r: r["peak_reserved_gib"])
        if peer == "fastllm":  # its planner has settings between these, the peers have none
            drawing.line([place(r) for r in own], COLORS[peer], 1.5, stroke_dasharray="4 4")
        labels: list[tuple[float, float, list[str]]] = []
        for result in own:
            x, y = place(result)
            drawing.dot(x, y, COLORS[peer])
            limit = f"{result.get('memory_gib', 0):.0f} GiB limit"
            setting = limit if result.get("memory_gib") else WAYS[result["way"]]
            near = [words for a, b, words in labels if math.hypot(x - a, y - b) < 24]
            if near:  # settings that come out at one place share a label
                near[0].append(setting)
            else:
                labels.append((x, y, [setting]))
        for x, y, words in labels:
            words = " = ".join(dict.fromkeys(words))
            color = COLORS[peer]
            if words.endswith("GiB limit"):
                drawing.text(x - 5, y - 8, words, "end", font_size="11", fill=color)
                continue
            drop = -9 if peer == "fastllm" and WAYS["none"] in words else LABEL_DROP[peer]
            dx, anchor = (-9, "end") if x > 600 else (9, "start")
            drawing.text(x + dx, y + drop, f"{NAMES[peer]}, {words}", anchor, font_size="12", fill=color)
    return drawing.done()


# Of each loss curve: its name, color, width and style.
_CURVE_LINES: dict[str, tuple[str, str, float, dict[str, str]]] = {
    "hf": (NAMES["hf"], COLORS["hf"], 5, {"stroke_opacity": "0.45"}),
    "fastllm": (NAMES["fastllm"], COLORS["fastllm"], 1.5, {}),
    "fp8": (f"{NAMES['fastllm']}, FP8", "#a23b72", 1.5, {"stroke_dasharray": "4 2"}),
}


def curves_plot(data: dict[str, Any]) -> str:
    """The loss curves of each dtype on top of each other, and below them their distance from transformers + PEFT."""
    curves = [curve for curve in data["curves"] if "error" not in curve]
    dtypes = [d for d in ("float32", "bfloat16", "float16") if {c["peer"] for c in curves if c["way"] == d} >= {"hf"}]
    drawing = Drawing(860, 70 + 210 * len(dtypes) + 30, "Loss curves of fastllm and transformers + PEFT")
    drawing.text(20, 28, f"Training loss, {curves[0]['model']}, NF4 + LoRA, the same data", font_size="16",
                 font_weight="bold")  # fmt: skip
    sessions = sorted({curve["session"] for curve in curves})
    gpus = {data["sessions"][number]["gpu"] for number in sessions}
    dates = {data["sessions"][number]["date"] for number in sessions}
    drawing.text(20, 48, f"GPU: {', '.join(sorted(gpus))}; {', '.join(sorted(dates))}", font_size="12")
    for row, dtype in enumerate(dtypes):
        own = {curve["peer"]: curve["losses"] for curve in curves if curve["way"] == dtype}
        if dtype == "bfloat16":
            own |= {curve["way"]: curve["losses"] for curve in curves if curve["way"] == "fp8"}
        steps = max(map(len, own.values()))
        top, bottom = 80 + 210 * row, 240 + 210 * row
        low, high = min(map(min, own.values())), max(map(max, own.values()))

        def place(step: int, loss: float, top=top, bottom=bottom, low=low, high=high, steps=steps):
            return 80 + 560 * step / max(1, steps - 1), bottom - (bottom - top) * (loss - low) / max(1e-9, high - low)

        for mark in (low, (low + high) / 2, high):
            _, y = place(0, mark)
            drawing.line([(80, y), (640, y)])
            drawing.text(72, y + 4, f"{mark:.2f}", "end", font_size="11")
        drawing.text(80, top - 8, dtype, font_weight="bold")
        drawing.text(80, bottom + 18, "1", "middle", font_size="11")
        drawing.text(640, bottom + 18, f"{steps} steps", "middle", font_size="11")
        y = top + 14
        for name, (label, color, width, style) in _CURVE_LINES.items():
            if name not in own:
                continue
            drawing.line([place(i, loss) for i, loss in enumerate(own[name])], color, width, **style)
            drawing.text(655, y, label, fill=color)
            if name != "hf":
                apart = [abs(a - b) for a, b in zip(own[name], own["hf"], strict=True)]
                drawing.text(655, y + 16, f"apart by {sum(apart) / len(apart):.1e} on average,", font_size="12")
                drawing.text(655, y + 32, f"at most {max(apart):.1e}", font_size="12")
            y += 20 if name == "hf" else 54
    return drawing.done()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "plots")
    options = parser.parse_args()
    data = json.loads(options.results.read_text(encoding="utf-8"))
    options.out.mkdir(parents=True, exist_ok=True)
    plots = {"peers": peers_plot, "frontier": frontier_plot, **({"curves": curves_plot} if data["curves"] else {})}
    for name, draw in plots.items():
        (options.out / f"{name}.svg").write_text(draw(data), encoding="utf-8")
        print(f"written to {options.out / name}.svg")


if __name__ == "__main__":
    main()
