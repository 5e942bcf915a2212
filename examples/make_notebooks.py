"""Write the notebook of each example script: `python examples/make_notebooks.py`.

A line `# %%` starts a cell of code, `# %% [markdown]` one of text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def notebook(script: str) -> dict[str, Any]:
    """The notebook (format 4.5) of a script in cells."""
    parts = ("\n" + script).split("\n# %%")[1:]
    cells = [_cell(number, part) for number, part in enumerate(parts)]
    python = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"cells": cells, "metadata": {"kernelspec": python}, "nbformat": 4, "nbformat_minor": 5}


def _cell(number: int, part: str) -> dict[str, Any]:
    kind, _, body = part.partition("\n")
    lines = body.strip("\n").split("\n")
    if kind.strip() == "[markdown]":
        lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        return {"cell_type": "markdown", "id": f"cell-{number}", "metadata": {}, "source": _source(lines)}
    code = {"cell_type": "code", "id": f"cell-{number}", "metadata": {}, "execution_count": None, "outputs": []}
    return {**code, "source": _source(lines)}


def _source(lines: list[str]) -> list[str]:
    return [line + "\n" for line in lines[:-1]] + lines[-1:]


def main() -> None:
    for script in [*sorted(FOLDER.glob("data_*.py")), FOLDER / "vision_latex_ocr.py"]:
        text = json.dumps(notebook(script.read_text(encoding="utf-8")), indent=1, ensure_ascii=False)
        script.with_suffix(".ipynb").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
