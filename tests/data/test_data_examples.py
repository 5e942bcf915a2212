"""The example scripts run on a small model, and their notebooks hold the same cells."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from .conftest import make_small_model

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("data_*.py"))


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_model(tmp_path_factory.mktemp("model"))


def test_every_format_has_an_example():
    names = {script.stem.removeprefix("data_") for script in SCRIPTS}
    assert names == {"text", "alpaca", "sharegpt", "messages", "prompt_completion", "preference", "kto"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_the_script_trains(script: Path, small_model: Path, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FASTLLM_EXAMPLE_MODEL", str(small_model))
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(script), run_name="__main__")
    assert names["trainer"].state.global_step == names["config"].max_steps
    assert "stops at" in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_the_notebook_holds_the_cells_of_the_script(script: Path):
    sys.path.insert(0, str(EXAMPLES))
    try:
        from make_notebooks import notebook
    finally:
        sys.path.remove(str(EXAMPLES))
    stored = json.loads(script.with_suffix(".ipynb").read_text(encoding="utf-8"))
    assert stored == notebook(script.read_text(encoding="utf-8")), "python examples/make_notebooks.py"
