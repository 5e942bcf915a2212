"""`examples/vision_latex_ocr.py` renders formulas, trains a small model on them and saves its adapter."""

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "vision_latex_ocr.py"


def test_the_example_trains_and_saves(checkpoints, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="formulas are rendered with matplotlib")
    monkeypatch.setenv("FASTLLM_EXAMPLE_MODEL", checkpoints["qwen2_5_vl"])
    monkeypatch.setenv("FASTLLM_EXAMPLE_STEPS", "3")
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert names["trainer"].state.global_step == 3 and len(names["rows"]) == 24
    assert (tmp_path / "latex_ocr_lora" / "adapter_model.safetensors").is_file()
    assert "20 held-out formulas" in capsys.readouterr().out
