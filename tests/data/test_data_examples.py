"""The example scripts run on a small model, and their notebooks hold the same cells."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from .conftest import make_toy_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("data_*.py"))


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_toy_tokenizer()
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=1024, **shape,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


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
