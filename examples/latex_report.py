"""What `vision_latex_ocr.py` tells of its model: scores, a loss curve, pictures with answers, a result file."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image

PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "bitsandbytes", "matplotlib")
Curve = Sequence[tuple[int, float]]


def edit_distance(one: str, other: str) -> int:
    """Characters to insert, delete or exchange to make one text of the other (Levenshtein)."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(other, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def scores(answers: Sequence[str], truths: Sequence[str]) -> dict[str, float]:
    """`exact_match`, the share of answers that are right to the character, and the mean `edit_distance`, each by the
    length of the longer text: 0 for the same, 1 for nothing in common."""
    pairs = list(zip(answers, truths, strict=True))
    distances = [edit_distance(answer, truth) / max(len(answer), len(truth)) for answer, truth in pairs]
    right = sum(answer == truth for answer, truth in pairs)
    return {"exact_match": right / len(pairs), "edit_distance": round(sum(distances) / len(pairs), 4)}


def plot_losses(path: Path, curves: Mapping[str, Curve]) -> None:
    """The loss of each stage of the training over its steps, one beside the other."""
    figure = Figure(figsize=(5 * len(curves), 3.5), layout="constrained")
    for axes, (name, curve) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        axes.plot(*zip(*curve, strict=True))
        axes.set(title=name, xlabel="step", ylabel="loss", yscale="log")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def plot_grid(
    path: Path, images: Sequence[Image.Image], truths: Sequence[str], answers: Sequence[str], columns: int = 4
) -> None:
    """Each picture with the model's answer under it: green where it is right, red with the truth where it is not."""
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(3.4 * columns, 1.35 * rows), layout="constrained")
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in places:
        axes.axis("off")
    for axes, image, truth, answer in zip(places, images, truths, answers, strict=False):
        right = answer == truth
        axes.imshow(image, cmap="gray")
        text = answer if right else f"{answer}\nnot {truth}"
        axes.text(
            0.5, -0.05, text, transform=axes.transAxes, ha="center", va="top", fontsize=6,
            family="monospace", color="green" if right else "red", parse_math=False,
        )  # fmt: skip
    figure.savefig(path, dpi=120)


def write_result(path: Path, found: Mapping[str, Any]) -> None:
    """A result file in the form of those in `benchmarks/results`: one session, and what was found in it."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    session: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": versions,
    }
    result: dict[str, Any] = {"case": "latex-ocr", "session": 0, **found}
    if torch.cuda.is_available():
        session |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        result["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"sessions": [session], "results": [result]}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
