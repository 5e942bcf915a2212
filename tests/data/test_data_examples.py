"""The example scripts and notebooks train a small model; each notebook holds the cells of its script."""

import json
import runpy
from pathlib import Path

import pytest

from .conftest import make_small_model

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("data_*.py"))
NOTEBOOKS = sorted(EXAMPLES.glob("data_*.ipynb"))


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_model(tmp_path_factory.mktemp("model"))


def test_every_format_has_an_example():
    names = {script.stem.removeprefix("data_") for script in SCRIPTS}
    assert names == {"text", "alpaca", "sharegpt", "messages", "prompt_completion", "preference", "kto"}


def code_of(example: Path) -> str:
    """The code of a script, or of all cells of a notebook."""
    text = example.read_text(encoding="utf-8")
    if example.suffix == ".py":
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    return "\n".join("".join(cell["source"]) for cell in cells)


@pytest.mark.parametrize("example", [*SCRIPTS, *NOTEBOOKS], ids=lambda example: example.name)
def test_the_example_trains(example: Path, small_model: Path, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FASTLLM_EXAMPLE_MODEL", str(small_model))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example.py").write_text(code_of(example), encoding="utf-8")
    names = runpy.run_path("example.py", run_name="__main__")
    assert names["trainer"].state.global_step == names["config"].max_steps
    assert "stops at" in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_the_notebook_holds_the_cells_of_the_script(script: Path):
    notebook = runpy.run_path(str(EXAMPLES / "make_notebooks.py"))["notebook"]
    stored = json.loads(script.with_suffix(".ipynb").read_text(encoding="utf-8"))
    assert stored == notebook(script.read_text(encoding="utf-8")), "python examples/make_notebooks.py"
