"""`examples/export_gguf.py` trains a small model and writes every file it promises."""

import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "export_gguf.py"


def test_the_example_exports(base_of, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FASTLLM_EXAMPLE_MODEL", str(base_of("qwen2")))
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert names["trainer"].state.global_step == 5
    assert {path.name for path in (tmp_path / "assistant_gguf").iterdir()} == {
        "Modelfile", "qwen2.Q4_K_M.gguf", "qwen2.Q8_0.gguf", "qwen2.DYNAMIC_Q4_K_M.gguf",
        "qwen2.DYNAMIC_Q4_K_M.recipe.json", "qwen2-lora-f16.gguf",
    }  # fmt: skip
    assert "qwen2, q4_k_m: " in capsys.readouterr().out
