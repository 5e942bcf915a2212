"""`examples/vision_latex_ocr.py` makes formulas and a model, trains it on them, and tells what it reads."""

import json
import random
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("matplotlib", reason="formulas are rendered with matplotlib")
EXAMPLES = Path(__file__).parents[2] / "examples"
BLOCKS = 4 if torch.cuda.is_available() else 2  # of the tower of the model that it makes


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    """The modules beside the script, as Python finds them when it runs a script."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in [name for name in sys.modules if name.startswith("latex_")]:
        del sys.modules[name]


def run(monkeypatch, output, **options):
    for name, value in {"BASE_STEPS": 3, "STEPS": 3, "OUTPUT": output, **options}.items():
        monkeypatch.setenv(f"FASTLLM_EXAMPLE_{name}", str(value))
    return runpy.run_path(str(EXAMPLES / "vision_latex_ocr.py"), run_name="__main__")


def test_a_short_run_goes_through_every_stage(monkeypatch, tmp_path, capsys):
    names = run(monkeypatch, tmp_path, RESULT=tmp_path / "result.json")
    told = capsys.readouterr().out
    assert "before  exact_match 0.000" in told and f"{BLOCKS} of {BLOCKS} vision blocks fused" in told
    assert "NF4 with double quantization" in told and names["trainer"].state.global_step == 3
    learnt = {formula for lesson, _ in names["lessons"] for formula in lesson} | {
        formula for formula, _ in names["train"]
    }
    assert len(learnt) > 48 and not learnt.intersection(names["excluded"])
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert [answer["formula"] for answer in answers] == names["truths"]
    (result,) = json.loads((tmp_path / "result.json").read_text())["results"]
    assert result["held_out"] == len(answers) and 0 <= result["after"]["edit_distance"] <= 1
    assert [len(curve) for curve in result["losses"].values()] == [7, 3]
    assert min(Image.open(tmp_path / "grid.png").size) > 100 and min(Image.open(tmp_path / "losses.png").size) > 100
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()

    again = run(monkeypatch, tmp_path / "again", MODEL=tmp_path / "base")
    assert list(again["losses"]) == ["LoRA: writing LaTeX"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_reads_formulas_that_it_has_never_seen(monkeypatch, tmp_path):
    found = run(monkeypatch, tmp_path, BASE_STEPS=1600, STEPS=1200)["found"]
    assert found["before"]["exact_match"] == 0 and found["after"]["exact_match"] > 0.2
    assert found["after"]["edit_distance"] < found["before"]["edit_distance"] / 2


def test_the_notebook_holds_the_cells_of_the_script():
    script = EXAMPLES / "vision_latex_ocr.py"
    notebook = runpy.run_path(str(EXAMPLES / "make_notebooks.py"))["notebook"]
    stored = json.loads(script.with_suffix(".ipynb").read_text(encoding="utf-8"))
    assert stored == notebook(script.read_text(encoding="utf-8")), "python examples/make_notebooks.py"


def test_a_picture_has_one_latex():
    from latex_formulas import Page, distinct, pictures

    page = Page(224, 48, font_size=18)
    formulas = distinct(300, 7, terms=2, nested=True)
    found = pictures(formulas, page)
    assert len(found) > 280 and all(image.size == (224, 48) for _, image in found)
    shown = {crop(image): formula.latex for formula, image in found}
    assert len(shown) == len(found)
    assert pictures(formulas, page) == found


def crop(image):
    ink = image.point(lambda level: 255 - level)
    cropped = ink.crop(ink.getbbox())
    return cropped.size, cropped.tobytes()


def test_the_same_seed_gives_the_same_formulas_and_none_that_is_excluded():
    from latex_formulas import distinct

    held_out = distinct(50, 1, terms=2, nested=True)
    assert distinct(50, 1, terms=2, nested=True) == held_out
    assert not set(distinct(500, 2, terms=2, nested=True, without=held_out)) & set(held_out)
    with pytest.raises(ValueError, match="too few"):
        distinct(3_000, 1, terms=1, nested=False)


def test_edit_distance_and_scores():
    from latex_report import edit_distance, scores

    assert [edit_distance("x^{2}", other) for other in ("x^{2}", "x_{2}", "x^{23}", "", "^{2}")] == [0, 1, 1, 5, 1]
    texts = ["".join(random.Random(seed).choices("ab", k=seed)) for seed in range(6)]
    for one, other in zip(texts, reversed(texts), strict=True):
        assert edit_distance(one, other) == edit_distance(other, one)
    assert scores(["a", "xb"], ["a", "xy"]) == {"exact_match": 0.5, "edit_distance": 0.25}
